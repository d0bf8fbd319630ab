"""Objects that several scales saw."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from babelrs_geo.boxes import areas, bounds, intersection_pairs
from babelrs_geo.detections import Detections
from babelrs_geo.merging.neighbours import meeting
from babelrs_geo.merging.options import MergeOptions


def with_coarser(
    fine: Detections, coarse: Detections, tile: float, options: MergeOptions
) -> tuple[Detections, NDArray[np.bool_], NDArray[np.bool_]]:
    """Which whole boxes of a finer and of a coarser scale stay, in the same pixels; the finer with their scores.

    Boxes of one object have the finer place and the better score. Where one lies in another the better score stays, and
    the coarse one in any case where it is larger and longer than `tile`, the side of the finer scale's tiles.
    """
    gone, part = np.zeros(len(coarse), np.bool_), np.zeros(len(fine), np.bool_)
    met = _meet(coarse, fine, options)
    scores = fine.scores.copy()
    np.maximum.at(scores, met.j[met.same], coarse.scores[met.i[met.same]])
    sure = (met.area > met.other) & (coarse.boxes[met.i, 2:4].max(1, initial=0) > tile)
    wins = sure | (coarse.scores[met.i] > fine.scores[met.j])
    gone[met.i[met.same | (met.inside & ~wins)]] = True
    part[met.j[met.inside & wins & ~gone[met.i]]] = True
    return Detections(fine.boxes, scores, fine.labels, fine.classes, fine.oriented), ~part, ~gone


def held(small: Detections, large: Detections, options: MergeOptions) -> NDArray[np.bool_]:
    """(N,) True for boxes that show what one of `large` shows, or lie in it."""
    found = np.zeros(len(small), np.bool_)
    met = _meet(small, large, options)
    found[met.i[met.same | met.inside]] = True
    return found


class _Met(NamedTuple):
    """Pairs of boxes of a class that touch, `(pair,)` each."""

    i: NDArray[np.int64]
    """Rows of the first."""
    j: NDArray[np.int64]
    """Rows of the second."""
    area: NDArray[np.float64]
    """Of the first."""
    other: NDArray[np.float64]
    same: NDArray[np.bool_]
    """They show one object."""
    inside: NDArray[np.bool_]
    """They do not, but the smaller lies in the larger."""


def _meet(first: Detections, second: Detections, options: MergeOptions) -> _Met:
    i, j = meeting(bounds(first.boxes), first.labels, second.boxes, second.labels)
    shared = intersection_pairs(first.boxes[i], second.boxes[j])
    area, other = areas(first.boxes[i]), areas(second.boxes[j])
    same = shared > options.iou * (area + other - shared)
    return _Met(i, j, area, other, same, ~same & (shared > options.containment * np.minimum(area, other)))
