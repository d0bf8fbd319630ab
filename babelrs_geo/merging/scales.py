"""Objects that several scales saw."""

from __future__ import annotations

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
    i, j = meeting(bounds(coarse.boxes), coarse.labels, fine.boxes, fine.labels)
    shared = intersection_pairs(coarse.boxes[i], fine.boxes[j])
    area, other = areas(coarse.boxes[i]), areas(fine.boxes[j])
    same = shared > options.iou * (area + other - shared)
    inside = ~same & (shared > options.containment * np.minimum(area, other))
    scores = fine.scores.copy()
    np.maximum.at(scores, j[same], coarse.scores[i[same]])
    sure = (area > other) & (coarse.boxes[i, 2:4].max(1, initial=0) > tile)
    wins = sure | (coarse.scores[i] > fine.scores[j])
    gone[i[same | (inside & ~wins)]] = True
    part[j[inside & wins & ~gone[i]]] = True
    return Detections(fine.boxes, scores, fine.labels, fine.classes, fine.oriented), ~part, ~gone


def held(small: Detections, large: Detections, options: MergeOptions) -> NDArray[np.bool_]:
    """(N,) True for boxes that show what one of `large` shows, or lie in it."""
    found = np.zeros(len(small), np.bool_)
    if len(small) and len(large):
        i, j = meeting(bounds(small.boxes), small.labels, large.boxes, large.labels)
        shared = intersection_pairs(small.boxes[i], large.boxes[j])
        area, other = areas(small.boxes[i]), areas(large.boxes[j])
        same = shared > options.iou * (area + other - shared)
        found[i[same | (shared > options.containment * np.minimum(area, other))]] = True
    return found
