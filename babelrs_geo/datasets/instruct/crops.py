"""Squares cut from labelled images, which are asked about in their place: objects keep their size in pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from babelrs_geo.datasets.instruct.labelled import LabelledImage, images_of
from babelrs_geo.drafts import draft
from babelrs_geo.errors import SceneError

VISIBLE = 0.4
"""Share of an object from which on one that the edge cuts is asked about, by what shows of it."""
_NEAR = 0.75  # share of the squares that are drawn near an object, so that rare ones are seen
_PLACES = 8  # drawn for a square; the first that cuts off no object is taken

Part = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels."""


@dataclass(frozen=True)
class Crop:
    """A picture that is to be written, of a part of another."""

    source: Path
    part: Part
    path: Path

    def write(self) -> None:
        """Write it as PNG, whole or not at all. Raises SceneError where its source cannot be read, OutputError where it
        cannot be written.
        """
        try:
            picture = _opened(self.source).crop(self.part)
        except (OSError, Image.DecompressionBombError) as error:
            raise SceneError(f"{self.source} cannot be read as an image ({error}); copy it again") from error
        with draft(self.path) as hidden:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(hidden, format="PNG", compress_level=1)


@lru_cache(maxsize=1)
def _opened(path: Path) -> Image.Image:
    """An image in memory: its crops are written one after the other."""
    with Image.open(path) as image:
        image.load()
        return image


def cropped(
    images: Sequence[LabelledImage], size: int, count: int, seed: int, pictures: Path
) -> tuple[list[LabelledImage], list[Crop]]:
    """Images of one source as `count` squares each, `size` pixels a side or the image's where that is less, and what to
    write below `pictures`. Where they lie follows from the seed, the image's name and its boxes. A square that shows
    less than `VISIBLE` of an object is not complete.
    """
    source = images[0].source
    found: list[tuple[LabelledImage, Part]] = []
    for image in images:
        draw = Random(f"{seed}/{source.sensor}/{image.name}/crops")
        parts = dict.fromkeys(_place(image, size, draw) for _ in range(count))
        found += [(image, part) for part in parts]
    todo = [Crop(image.path, part, pictures / _name(image, part)) for image, part in found]
    shown = [_shown(image, part) for image, part in found]
    return images_of(
        [f"{image.name}/{part[0]},{part[1]}" for image, part in found],
        [each.path for each in todo],
        [(right - left, bottom - top) for _, (left, top, right, bottom) in found],
        [
            (boxes, tuple(image.concepts[k] for k in kept))
            for (image, _), (boxes, kept, _) in zip(found, shown, strict=True)
        ],
        [image.complete and whole for (image, _), (_, _, whole) in zip(found, shown, strict=True)],
        source,
    ), todo


def _name(image: LabelledImage, part: Part) -> str:
    return f"{Path(image.name).with_suffix('')}_{part[0]}_{part[1]}.png"


def _place(image: LabelledImage, size: int, draw: Random) -> Part:
    """Where a square lies: of some places the first that cuts off no object, or that which cuts off the fewest."""
    return min(_places(image, size, draw), key=lambda part: _cut_off(_seen(image.boxes, part)))


def _places(image: LabelledImage, size: int, draw: Random) -> Iterator[Part]:
    w, h = (min(size, side) for side in image.size)
    for _ in range(_PLACES):
        x, y = draw.uniform(0, image.size[0]), draw.uniform(0, image.size[1])
        if len(image.boxes) and draw.random() < _NEAR:
            x1, y1, x2, y2 = image.boxes[draw.randrange(len(image.boxes))].tolist()
            x, y = ((low + high) / 2 + draw.uniform(-0.4, 0.4) * size for low, high in ((x1, x2), (y1, y2)))
        left = min(max(round(x - w / 2), 0), image.size[0] - w)
        top = min(max(round(y - h / 2), 0), image.size[1] - h)
        yield left, top, left + w, top + h


def _cut_off(seen: NDArray[np.float64]) -> int:
    """Objects, by the share of each that shows, that show too little to be asked about."""
    return int(((seen > 0) & (seen < VISIBLE)).sum())


def _seen(boxes: NDArray[np.float64], part: Part) -> NDArray[np.float64]:
    """(N,) share of each box that lies in a part of the image."""
    low, high = np.maximum(boxes[:, :2], part[:2]), np.minimum(boxes[:, 2:], part[2:])
    shown: NDArray[np.float64] = np.maximum(high - low, 0).prod(1) / (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return shown


def _shown(image: LabelledImage, part: Part) -> tuple[NDArray[np.float64], list[int], bool]:
    """Boxes in pixels of the part, clipped, which of the image's they are, and whether no other shows."""
    seen = _seen(image.boxes, part)
    kept = np.flatnonzero(seen >= VISIBLE)
    corner = np.array([*part[:2], *part[:2]], np.float64)
    size = np.array([part[2] - part[0], part[3] - part[1]] * 2, np.float64)
    boxes = np.clip(image.boxes[kept] - corner, 0, size)
    return boxes, kept.tolist(), not _cut_off(seen)
