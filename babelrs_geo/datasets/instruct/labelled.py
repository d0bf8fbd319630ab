"""Labelled images as questions are asked about them: upright boxes and concepts, and what their source labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from babelrs_geo.boxes import bounds
from babelrs_geo.concepts import concept, tidy
from babelrs_geo.datasets.soi import FOLDERS, Record, class_names, read_split
from babelrs_geo.errors import LabelError, SceneError

SIDE = 1000
"""Boxes in text are whole numbers from 0 to this, along either side of the image."""

Renamed = Mapping[str, str]
"""Classes by the concept to call them, in place of what the table of concepts says."""


@dataclass(frozen=True, eq=False)
class Source:
    """What the labels of one sensor of one data set tell: all else may be in the images too."""

    sensor: str
    weights: Mapping[str, float]
    """The concepts that are labelled, sorted, each with the weight by which it is asked for where it is not."""
    empty: float
    """Share of the images that show none of them."""
    classes: frozenset[str] = frozenset()
    """What the labels themselves call them."""


@dataclass(frozen=True, eq=False)
class LabelledImage:
    """An image that is asked about. Only objects that show in it are here."""

    name: str
    """Its path within its data set: what its questions are drawn by, with the seed."""
    path: Path
    """The 8-bit picture that records refer to."""
    size: tuple[int, int]
    """Width and height in pixels."""
    boxes: NDArray[np.float64]
    """(N, 4) x1, y1, x2, y2: upright bounds in pixels, clipped to the image."""
    concepts: tuple[str, ...]
    """(N,)"""
    source: Source
    complete: bool = True
    """False where objects show whose labels are not here, cut off by the edge or dropped by a reader: nothing is then
    said of how many there are or of what is not there.
    """

    @cached_property
    def grid(self) -> NDArray[np.int64]:
        """(N, 4) boxes as in text: nearest whole numbers; a side that would vanish is rounded outwards."""
        scaled = self.boxes * (SIDE / np.array([*self.size, *self.size], np.float64))
        near, low, high = np.rint(scaled), np.floor(scaled[:, :2]), np.ceil(scaled[:, 2:])
        gone = near[:, 2:] <= near[:, :2]
        near[:, :2][gone], near[:, 2:][gone] = low[gone], high[gone]
        return near.astype(np.int64)


@dataclass(frozen=True)
class Picture:
    """A picture that is to be written, of a chip."""

    folder: Path
    """Of the chips."""
    row: Any
    """Of their index."""
    path: Path

    def write(self) -> None:
        """Write it. Raises as `chips.export.write_picture` does."""
        from babelrs_geo.chips.export import write_picture

        write_picture(self.folder, self.path, self.row)


def frames(root: Path, sensor: str, split: str, renamed: Renamed | None = None) -> list[LabelledImage]:
    """One sensor's split of a folder in SOI-Det's layout. Raises as `read_split` and `labelled` do."""
    classes = class_names(root, sensor, split)
    return labelled(read_split(root, sensor, split, classes), classes, root, renamed)


def labelled(
    records: Sequence[Record], classes: Sequence[str], root: Path, renamed: Renamed | None = None
) -> list[LabelledImage]:
    """Records of any reader, all of one sensor, whose images lie below `root`.

    One of which the reader dropped some object is not complete. Raises SceneError for an image that cannot be opened,
    LabelError for a class without a name or no records.
    """
    if not records:
        raise LabelError(f"{root} has no image in the split; name another split")
    sizes = [_size(record.path) for record in records]
    boxes = [bounds(record.boxes) + record.border for record in records]
    things = _concepts(classes, renamed)
    named = [[things[classes[label]] for label in record.labels] for record in records]
    return images_of(
        [record.path.relative_to(root).as_posix() for record in records],
        [record.path for record in records],
        sizes,
        _clipped(boxes, named, sizes),
        [not record.dropped for record in records],
        _source(records[0].sensor, things),
    )


def chips(
    folder: Path, sensor: str, split: str, pictures: Path, renamed: Renamed | None = None
) -> tuple[list[LabelledImage], list[Picture]]:
    """One sensor's split of a folder of chips, and the pictures of them to write below `pictures`.

    A chip that shows some object too little for its label to be kept is not complete. Raises LabelError where the
    folder is not whole, has no such chips, or no labels of the sensor.
    """
    from babelrs_geo.chips import read_index, read_labels

    index, labels = read_index(folder), read_labels(folder)
    mine = index[index["sensor"] == sensor]
    rows = list(mine[mine["split"] == split].itertuples())
    if not rows:
        have = ", ".join(f"{n} in {name}" for name, n in mine["split"].value_counts().items()) or "none"
        raise LabelError(
            f"{folder} has no chips of {sensor} in split {split}, only {have}; name another split"
        )
    told = labels[labels["chip"].isin(mine["chip"])]
    if told.empty:
        raise LabelError(f"{folder} has no labels of {sensor}; pass --labels to babelrs-geo tile")
    things = _concepts(sorted(told["class"].unique()), renamed)
    by_chip = dict(iter(told.groupby("chip", sort=False)))
    found = [by_chip.get(row.chip, told[:0]) for row in rows]
    boxes = [bounds(group[["cx", "cy", "w", "h", "r"]].to_numpy(np.float64)) for group in found]
    named = [[things[name] for name in group["class"]] for group in found]
    todo = [Picture(folder, row, pictures / sensor / split / f"{row.chip}.png") for row in rows]
    sizes = [(int(row.width), int(row.height)) for row in rows]
    images = images_of(
        [str(row.path) for row in rows],
        [each.path for each in todo],
        sizes,
        _clipped(boxes, named, sizes),
        [not row.dropped for row in rows],
        _source(sensor, things),
    )
    return images, todo


def sensors(path: Path) -> tuple[str, ...]:
    """The sensors that a folder has images of. Raises LabelError where it is no labelled data."""
    if is_chips(path):
        from babelrs_geo.chips import read_index

        there = set(read_index(path)["sensor"])
    else:
        there = {sensor for sensor, folder in FOLDERS.items() if (path / folder).is_dir()}
    if not there:
        raise LabelError(
            f"{path} holds no labelled images; expected chips of babelrs-geo tile (index.parquet) or SOI-Det's "
            f"folders ({', '.join(FOLDERS.values())})"
        )
    return tuple(sensor for sensor in FOLDERS if sensor in there)


def is_chips(path: Path) -> bool:
    """Whether a folder was written by `babelrs-geo tile`, wholly or in part."""
    return (path / "index.parquet").is_file() or (path / "tile.json").is_file()


def _concepts(classes: Sequence[str], renamed: Renamed | None) -> dict[str, str]:
    return {
        name: tidy((renamed or {})[name]) if name in (renamed or {}) else concept(name) for name in classes
    }


def _size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            return image.size
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise SceneError(f"{path} cannot be read as an image ({error}); copy it again") from error


Shown = tuple[NDArray[np.float64], tuple[str, ...]]
"""Boxes (N, 4) and concepts (N,) of one image."""


def _clipped(
    boxes: Sequence[NDArray[np.float64]], named: Sequence[Sequence[str]], sizes: Sequence[tuple[int, int]]
) -> list[Shown]:
    """What shows of each image's boxes, those that do not left out."""
    found = []
    for rows, things, (width, height) in zip(boxes, named, sizes, strict=True):
        inside = np.clip(rows.reshape(-1, 4), 0, [width, height, width, height])
        shows = np.flatnonzero((inside[:, 2:] > inside[:, :2]).all(1))
        found.append((inside[shows], tuple(things[i] for i in shows.tolist())))
    return found


def _source(sensor: str, things: Mapping[str, str]) -> Source:
    """A source with the concept of each class, before anything is known of its images."""
    return Source(sensor, dict.fromkeys(sorted(set(things.values())), 1.0), 0.0, frozenset(things))


def images_of(
    names: Sequence[str],
    paths: Sequence[Path],
    sizes: Sequence[tuple[int, int]],
    shown: Sequence[Shown],
    complete: Sequence[bool],
    source: Source,
) -> list[LabelledImage]:
    """The images with their source: what it labels is given, how often it shows follows from the complete ones."""
    known = list(source.weights)
    rows = [things for (_, things), whole in zip(shown, complete, strict=True) if whole]
    there = np.array([[thing in things for thing in known] for things in rows]).reshape(-1, len(known))
    empty = float(np.mean(~there.any(1))) if len(there) else 0.0
    weights = dict(zip(known, absence_weights(there).tolist(), strict=True))
    source = replace(source, weights=weights, empty=empty)
    return [
        LabelledImage(name, path, size, boxes, things, source, whole)
        for name, path, size, (boxes, things), whole in zip(names, paths, sizes, shown, complete, strict=True)
    ]


def absence_weights(there: NDArray[np.bool_], rounds: int = 30) -> NDArray[np.float64]:
    """Weights (K,) by which to draw one of the concepts that an image lacks, `there` (N, K) saying which it has.

    Where a concept that an image has is drawn evenly for a question with yes, and one that it lacks by these weights
    for a question with no, each concept is asked for as often with either, as far as that can be: found by
    proportional fitting. A concept that no image has keeps next to no weight.
    """
    mixed = there[there.any(1) & ~there.all(1)]
    present = (mixed / np.maximum(mixed.sum(1, keepdims=True), 1)).sum(0)
    target = present / max(present.sum(), 1.0)
    lacking = (~there[~there.all(1)]).astype(np.float64)
    weights = np.full(there.shape[1], 1.0)
    for _ in range(rounds):
        drawn = lacking * weights
        asked = (drawn / np.maximum(drawn.sum(1, keepdims=True), 1e-12)).sum(0)
        weights = np.maximum(weights * target / np.maximum(asked / max(len(lacking), 1), 1e-12), 1e-9)
        weights = np.minimum(weights / weights.mean(), 1e9)
    return weights
