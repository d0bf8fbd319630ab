"""What a chip shows of the objects, and whether that is enough to keep them, or to cut the chip at all."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from babelrs_geo import boxes
from babelrs_geo.chips.options import ChipOptions
from babelrs_geo.tiling import Rect
from babelrs_geo.vectors import Objects

_NOTHING = 1e-9  # shares of area below this are rounding


@dataclass(frozen=True, eq=False)
class Shown:
    """Of each object that reaches into a chip, how much can be seen there."""

    rows: NDArray[np.int64]
    """(N,) their positions among the objects."""
    shares: NDArray[np.float64]
    """(N,) of their area."""

    def kept(self, options: ChipOptions) -> NDArray[np.bool_]:
        """Which of them the rule keeps (N,); it drops the others."""
        return (self.shares > _NOTHING) & (self.truncated <= options.keep_truncated)

    @property
    def truncated(self) -> NDArray[np.float64]:
        """(N,) what cannot be seen of them."""
        return np.where(self.shares > 1 - _NOTHING, 0.0, 1 - self.shares)


def shown(objects: Objects, rect: Rect) -> Shown:
    """What lies within a chip, valid or not."""
    extent = np.array([rect.x, rect.y, rect.x1, rect.y1], np.float64)
    near = boxes.bounds(objects.boxes)
    rows = np.flatnonzero(((near[:, :2] < extent[2:]) & (near[:, 2:] > extent[:2])).all(1))
    window = np.repeat(boxes.from_xyxy(extent[None]), len(rows), 0)
    inside = boxes.intersection_pairs(objects.boxes[rows], window) / boxes.areas(objects.boxes[rows])
    touching = inside > _NOTHING
    return Shown(rows[touching], inside[touching])


def where_valid(found: Shown, objects: Objects, rect: Rect, valid: NDArray[np.bool_]) -> Shown:
    """The same of valid pixels (y, x) of the chip alone."""
    if valid.all() or not len(found.rows):
        return found
    mine = objects.boxes[found.rows] - (rect.x, rect.y, 0, 0, 0)
    edges = boxes.bounds(mine)
    low, high = np.maximum(np.floor(edges[:, :2]), 0).astype(int), np.ceil(edges[:, 2:]).astype(int)
    runs = [_runs(~valid[y0:y1, x0:x1], x0, y0) for (x0, y0), (x1, y1) in zip(low, high, strict=True)]
    owner = np.repeat(np.arange(len(mine)), [len(each) for each in runs])
    areas = boxes.intersection_pairs(mine[owner], boxes.from_xyxy(np.concatenate(runs)))
    hidden = np.bincount(owner, areas, len(mine))
    return replace(found, shares=found.shares - hidden / boxes.areas(mine))


def _runs(mask: NDArray[np.bool_], x: int, y: int) -> NDArray[np.float64]:
    """Rectangles (N, 4) `x1, y1, x2, y2`, one a row and run, of what is True in a mask whose corner is (x, y)."""
    if not mask.any():
        return np.zeros((0, 4))
    steps = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    row, start = np.nonzero(steps == 1)
    end = np.nonzero(steps == -1)[1]
    return np.stack([start + x, row + y, end + x, row + y + 1], 1).astype(np.float64)


def background(name: str, options: ChipOptions) -> bool:
    """Whether a chip without an object is cut all the same, where there are labels."""
    return options.lot(f"background {name}") < options.background
