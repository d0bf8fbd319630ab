"""Augmentation of samples by torchvision's transforms v2, boxes carried along; each a function of a generator.

Geometry is one flip, one affine map (turn, scale, shift) and one crop, done by torchvision on image, mask and boxes
alike; boxes are never clamped by it, which would move them, but cut and sifted here afterwards. Turned boxes in an
image whose axes are scaled differently become parallelograms: `resize` takes the smallest rectangle around them.

Tone, by sensor: gamma and contrast for all; speckle for SAR; polarity (white hot, black hot), gain and offset for
infrared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as V
from torchvision.tv_tensors import Image, Mask

from babelrs_geo.boxes import areas, bounds, clip, from_xyxy
from babelrs_geo.datasets.samples import Sample, as_boxes, collate, scale_boxes, unbatch
from babelrs_geo.errors import ParameterError

_ON_THE_GROUND = ("transform", "window", "scale")  # what no longer holds once pixels have moved


def check_cut(what: str, size: int, scale: tuple[float, float], visible: float) -> None:
    """ParameterError for a size, scales or least visible share by which nothing can be cut out of an image."""
    low, high = scale
    if size < 1 or not 0 < low <= high or not 0 < visible <= 1:
        raise ParameterError(
            f"{what} of {size} px at scales {scale} that keep boxes seen by {visible}; give a "
            "size of 1 or more, scales above 0 in order, and a share in (0, 1]"
        )


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random views of a sample: `augmentation(sample, generator)`. The same generator state gives the same view.

    Raises ParameterError where a number is out of range.
    """

    size: int = 640
    """Side of the view, in pixels."""
    scale: tuple[float, float] = (0.7, 1.4)
    """Range of output pixels an input pixel, drawn evenly by ratio."""
    flip: bool = True
    """Mirror half of the views; with the quarter turns that is all eight ways to lay a square."""
    turn: float = 45.0
    """Half of the views are turned by up to so many degrees, either way, beside quarter turns."""
    oriented: bool = True
    """False for horizontal boxes, as SAR's: they allow quarter turns only, and stay upright."""
    focus: float = 0.75
    """Share of the views that look near an object, so that rare ones are seen."""
    visible: float = 0.4
    """A box cut by the edge is kept, cut to what is seen, from this share of its area on."""
    smallest: float = 4.0
    """Boxes with a shorter long side, in output pixels, are dropped."""
    gamma: float = 0.25
    """Exponents lie between exp(-gamma) and exp(gamma)."""
    contrast: float = 0.2
    """Factors lie between exp(-contrast) and exp(contrast)."""
    looks: tuple[float, float] | None = None
    """SAR: speckle of so many looks is laid over the view; the number is drawn evenly by ratio."""
    invert: float = 0.0
    """Infrared: share of the views whose polarity is turned, hot and cold exchanged."""
    offset: float = 0.0
    """Infrared: added to the view, up to so much either way, as another range of temperatures would."""

    def __post_init__(self) -> None:
        check_cut("views", self.size, self.scale, self.visible)
        if self.looks is not None and not 0 < self.looks[0] <= self.looks[1]:
            raise ParameterError(f"looks are {self.looks}; give two numbers above 0, in order")

    @property
    def geometry(self) -> tuple[object, ...]:
        """All that decides where pixels go."""
        return self.size, self.scale, self.flip, self.turn if self.oriented else 0.0, self.focus

    def __call__(self, sample: Sample, generator: Generator) -> Sample:
        """A random view of a sample, `size` by `size`."""
        return self.view(sample, np.asarray(sample["boxes"])[:, :2], _whole(generator))

    def view(self, sample: Sample, centres: NDArray[Any], seed: int) -> Sample:
        """The view of a seed: what is near an object is decided by `centres` (N, 2)."""
        rng = np.random.default_rng(seed)
        image, mask, boxes = Image(sample["image"]), Mask(sample["valid"].to(torch.uint8)), sample["boxes"]
        parts = self._geometry([image, mask, boxes], centres.astype(np.float64), rng)
        valid = torch.as_tensor(parts[1]).bool()
        view = self._tone(parts[0].as_subclass(Tensor).clamp(0, 1), rng)
        view[:, ~valid] = 0.0
        seen, kept = self._sift(np.asarray(parts[2], np.float64))
        rest = {k: v for k, v in sample.items() if k not in _ON_THE_GROUND}
        return rest | {
            "image": view,
            "valid": valid,
            "boxes": as_boxes(seen[kept], (self.size, self.size)),
            "labels": sample["labels"][torch.from_numpy(kept)],
        }

    def _geometry(
        self, parts: list[Any], centres: NDArray[np.float64], rng: np.random.Generator
    ) -> list[Any]:
        """Image, mask and boxes through one flip, one affine map and one crop."""
        scale = math.exp(rng.uniform(math.log(self.scale[0]), math.log(self.scale[1])))
        angle = 90.0 * int(rng.integers(4))
        turned, mirrored, near = rng.random(3) < (0.5, 0.5, self.focus)
        extra = rng.uniform(-self.turn, self.turn)
        if turned and self.oriented:
            angle += extra
        height, width = parts[0].shape[1:]
        if mirrored and self.flip:
            parts = [V.horizontal_flip(p) for p in parts]
            centres = centres * (-1.0, 1.0) + (width, 0.0)
        place, focus = rng.random(), rng.random(2) * (width, height)
        if near and len(centres):
            focus = centres[int(place * len(centres))]
        reach = self.size / scale * 0.4
        centre = focus + rng.uniform(-reach, reach, 2)
        margin = np.minimum(
            np.array([width, height]) / 2, self.size / scale / 2
        )  # keep the view over the image
        centre = np.clip(centre, margin, (width, height) - margin)
        more = [0, 0, max(0, self.size - width), max(0, self.size - height)]
        parts = [V.pad(p, more) for p in parts] if any(more) else parts
        middle = np.array([max(width, self.size), max(height, self.size)]) / 2
        moved = [
            V.affine(
                p,
                angle=angle,
                translate=(middle - centre).tolist(),
                scale=scale,
                shear=[0.0, 0.0],
                interpolation=InterpolationMode.BILINEAR,
                center=centre.tolist(),
            )
            for p in parts
        ]
        return [V.center_crop(p, [self.size, self.size]) for p in moved]

    def _sift(self, boxes: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """What is seen of boxes (N, 5), and which of them are kept."""
        if not self.oriented:
            boxes = from_xyxy(bounds(boxes))
        seen = clip(boxes, (0.0, 0.0, float(self.size), float(self.size)))
        kept = areas(seen) >= self.visible * areas(boxes)
        kept &= (seen[:, 2:4].max(1, initial=0.0) >= self.smallest) & (
            seen[:, 2:4].min(1, initial=np.inf) >= 1.0
        )
        return seen, kept

    def _tone(self, view: Tensor, rng: np.random.Generator) -> Tensor:
        """Gamma, contrast, and what the sensor asks for."""
        gamma, gain = np.exp(rng.uniform(-1, 1, 2) * (self.gamma, self.contrast)).tolist()
        polarity, shift = rng.random(), rng.uniform(-self.offset, self.offset)
        if polarity < self.invert:
            view = 1.0 - view
        view = view**gamma * gain + shift
        if self.looks is not None:
            looks = math.exp(rng.uniform(*np.log(self.looks)))
            # the intensity of L looks is gamma distributed with mean 1 and variance 1 / L; this is amplitude
            noise = np.sqrt(rng.gamma(looks, 1 / looks, view.shape[1:]))
            view = view * torch.from_numpy(noise.astype(np.float32))
        return view.clamp(0.0, 1.0)


@dataclass(frozen=True)
class Together:
    """One view of co-registered samples: `Together({"sar": ..., "rgb": ...})(nested, generator)`.

    Takes and gives what `&` of two datasets does, `{sensor: batch}`; every sensor is seen from the same place, each
    in its own tone. Raises ParameterError where the views or the images do not go together.
    """

    views: Mapping[str, Augmentation]
    """One for each sensor, alike in what moves pixels."""

    def __post_init__(self) -> None:
        if len({view.geometry for view in self.views.values()}) > 1:
            raise ParameterError(
                "views of co-registered sensors differ in size, scale, flip, turn or focus; give all one geometry"
            )

    def __call__(self, nested: Mapping[str, Any], generator: Generator) -> dict[str, Any]:
        """The same view of every sensor's samples."""
        samples = [one for batch in nested.values() for one in unbatch(batch)]
        sizes = {tuple(one["image"].shape) for one in samples}
        if len(sizes) > 1 or set(nested) - set(self.views):
            raise ParameterError(
                f"images of {', '.join(nested)} sized {sorted(sizes)} cannot be seen together; give images of one "
                "size, and a view for each sensor"
            )
        centres = np.concatenate([np.asarray(one["boxes"])[:, :2] for one in samples])
        seed = _whole(generator)
        return collate(self.views[one["sensor"]].view(one, centres, seed) for one in samples)


def _whole(generator: Generator) -> int:
    """A number to seed one view by."""
    return int(torch.randint(1 << 62, (), generator=generator))


def resize(sample: Sample, height: int, width: int) -> Sample:
    """The sample at another size, its axes scaled apart where they ask for it. Anti-aliased."""
    rows, columns = sample["image"].shape[1:]
    mask = Mask(sample["valid"].to(torch.uint8))
    image = V.resize(Image(sample["image"]), [height, width], antialias=True).as_subclass(Tensor).clamp(0, 1)
    valid = torch.as_tensor(V.resize(mask, [height, width], InterpolationMode.NEAREST)).bool()
    image[:, ~valid] = 0.0
    boxes = as_boxes(scale_boxes(sample["boxes"], width / columns, height / rows), (height, width))
    rest = {k: v for k, v in sample.items() if k not in _ON_THE_GROUND}
    return rest | {"image": image, "valid": valid, "boxes": boxes}
