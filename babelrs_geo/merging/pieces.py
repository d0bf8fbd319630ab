"""Objects that are cut by the edges of tiles: pieces that a whole box accounts for, and those that become one box."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import shapely
from numpy.typing import NDArray

from babelrs_geo.boxes import (
    Floats,
    areas,
    areas_within,
    bounds,
    clip,
    corners,
    direction,
    intersection_pairs,
    outlines,
    rotated_iou_pairs,
)
from babelrs_geo.detections import Detections
from babelrs_geo.merging.neighbours import Ints, Pairs, meeting
from babelrs_geo.merging.options import MergeOptions
from babelrs_geo.merging.whole import grouped

DOUBTFUL = 0.9
"""Likeness below which a joined box is looked at more closely."""


def explained(
    part: Detections, part_tiles: Ints, whole: Detections, whole_tiles: Ints, options: MergeOptions
) -> NDArray[np.bool_]:
    """(N,) True for cut boxes that a whole box accounts for."""
    i, j = meeting(bounds(part.boxes), part.labels, whole.boxes, whole.labels)
    inside = intersection_pairs(part.boxes[i], whole.boxes[j]) > options.containment * areas(part.boxes[i])
    found = np.zeros(len(part), np.bool_)
    found[i[inside]] = True
    open_ = ~found[i] & (part_tiles[i] != whole_tiles[j]).any(1)
    i, j = i[open_], j[open_]
    found[i[_is_view(part.boxes[i], part_tiles[i], whole.boxes[j], options.seam)]] = True
    return found


def _is_view(seen: Floats, tiles: Ints, full: Floats, limit: float) -> NDArray[np.bool_]:
    """(N,) True where full[i] would look like seen[i] through tiles[i].

    The box of what would be seen is compared first. It may lie along another side than the one that was found, where
    both fit a tip about equally; so the tip itself is compared too. It fills as little as half of a box around it,
    and the limit is lower for it.
    """
    area = areas_within(seen, full, tiles)
    tip = area[:, 2] > 0.75 * limit * (area[:, 0] + area[:, 1] - area[:, 2])
    return (area[:, 2] > 0) & (tip | (rotated_iou_pairs(seen, clip(full, tiles)) > limit))


def joined(pieces: Detections, tiles: Ints, options: MergeOptions) -> Detections:
    """Pieces of one object as one box around them all; others as they are."""
    i, j = meeting(bounds(pieces.boxes), pieces.labels, pieces.boxes, pieces.labels)
    apart = (i < j) & (tiles[i] != tiles[j]).any(1)
    i, j = i[apart], j[apart]
    common = np.column_stack([np.maximum(tiles[i, :2], tiles[j, :2]), np.minimum(tiles[i, 2:], tiles[j, 2:])])
    area = areas_within(pieces.boxes[i], pieces.boxes[j], common)
    agreement = area[:, 2] / np.maximum(area[:, 0] + area[:, 1] - area[:, 2], 1e-300)
    same = agreement > options.seam
    for a, b in ((i, j), (j, i)):
        open_ = np.flatnonzero(~same)
        a, b = a[open_], b[open_]
        same[open_] = _is_view(pieces.boxes[a], tiles[a], pieces.boxes[b], options.seam)
    return _fused(pieces, tiles, grouped(Pairs(i[same], j[same], agreement[same]), tiles))


def _fused(pieces: Detections, tiles: Ints, group: Ints) -> Detections:
    """One detection for each group, with its best score.

    The box is the one that looks most like the pieces through their tiles, of several: the largest piece, and boxes
    around what the pieces leave possible, along each of them. Where none fits well their sides are moved in.
    """
    first, member = np.unique(group, return_inverse=True)
    by = np.lexsort((-areas(pieces.boxes), member))
    largest = by[np.searchsorted(member[by], np.arange(len(first)))]
    boxes = pieces.boxes[largest]
    best = np.ones(len(first))
    several = np.flatnonzero(np.bincount(member)[member] > 1)
    if len(several):
        number, owner = np.unique(member[several], return_inverse=True)
        mine = _Sighting(pieces[several], tiles[several], owner)
        boxes[number], best[number] = _best(boxes[number], mine, _candidates(mine))
        hard = np.flatnonzero(best[number] < DOUBTFUL)
        if pieces.oriented and len(hard):
            few = mine.of(hard)
            tried = [_moved_in(box, few) for box in _candidates(few)]
            boxes[number[hard]], _ = _best(boxes[number[hard]], few, tried)
    scores = np.full(len(first), -np.inf, np.float32)
    np.maximum.at(scores, member, pieces.scores)
    return Detections(boxes, scores, pieces.labels[first], pieces.classes, pieces.oriented)


class _Sighting(NamedTuple):
    """Pieces, the tiles that saw them, and which object each is of, counted from 0."""

    pieces: Detections
    tiles: Ints
    owner: Ints

    def of(self, objects: Ints) -> _Sighting:
        """The pieces of some objects."""
        rows = np.flatnonzero(np.isin(self.owner, objects))
        return _Sighting(self.pieces[rows], self.tiles[rows], np.searchsorted(objects, self.owner[rows]))


def _best(boxes: Floats, seen: _Sighting, others: Sequence[Floats]) -> tuple[Floats, Floats]:
    """Of `boxes` (objects, 5) and others, one for each object: the likeliest, and how like it is."""
    boxes, best = boxes.copy(), _likeness(boxes, seen)
    for other in others:
        likeness = _likeness(other, seen)
        better = likeness > best + 1e-9
        boxes[better], best[better] = other[better], likeness[better]
    return boxes, best


def _likeness(boxes: Floats, seen: _Sighting) -> Floats:
    """(objects,) how much the pieces look like what their tiles would show of their object's box, as mean IoU.

    What would be seen is boxed along the piece: around the tip of a turned box several directions fit about equally.
    """
    pieces = seen.pieces.boxes
    points = outlines(boxes[seen.owner], seen.tiles) - pieces[:, None, :2]
    low, high = _extent(points, pieces[:, 4, None])
    half = pieces[:, 2:4] / 2
    shared = np.maximum(np.minimum(high, half) - np.maximum(low, -half), 0).prod(1)
    iou = shared / np.maximum((high - low).prod(1) + areas(pieces) - shared, 1e-300)
    return np.bincount(seen.owner, iou) / np.bincount(seen.owner)


def _extent(points: Floats, degrees: Floats) -> tuple[Floats, Floats]:
    """Least and largest coordinates (N, 2) of points (N, K, 2) along and across directions (N, 1)."""
    cos, sin = (v[:, None] for v in direction(degrees[:, 0]))
    along = points[..., 0] * cos - points[..., 1] * sin
    across = points[..., 0] * sin + points[..., 1] * cos
    return np.column_stack([along.min(1), across.min(1)]), np.column_stack([along.max(1), across.max(1)])


def _candidates(seen: _Sighting) -> list[Floats]:
    """Boxes (objects, 5) around the pieces of each object, along one of them after the other."""
    by = np.argsort(seen.owner, kind="stable")
    count = np.bincount(seen.owner)
    start = np.cumsum(count) - count
    corner = corners(seen.pieces.boxes)
    if seen.pieces.oriented:
        points, owner = shapely.get_coordinates(_possible(seen, by, start, count), return_index=True)
        owner = seen.owner[owner]
        turns = [seen.pieces.boxes[by[start + step % count], 4] for step in range(int(count.max()))]
    else:
        points, owner = corner.reshape(-1, 2), np.repeat(seen.owner, 4)
        turns = [np.zeros(len(count))]
    return [_around(points, owner, degrees) for degrees in turns]


def _possible(seen: _Sighting, by: Ints, start: Ints, count: Ints) -> NDArray[np.object_]:
    """What each piece shows, less the ground where another tile looked and its piece does not reach.

    `by` sorts the pieces by object; each has `count` of them from `start` on.
    """
    ground = shapely.box(*seen.tiles.T)
    shown = shapely.intersection(shapely.polygons(corners(seen.pieces.boxes)), ground)
    empty = shapely.difference(ground, shown)
    place = np.empty(len(by), np.int64)
    place[by] = np.arange(len(by)) - start[seen.owner[by]]
    out = shown
    for step in range(1, int(count.max())):
        has = np.flatnonzero(count[seen.owner] > step)
        mine = seen.owner[has]
        out[has] = shapely.difference(out[has], empty[by[start[mine] + (place[has] + step) % count[mine]]])
    # noise may leave nothing, and then the piece stands as it was seen
    return np.where(shapely.is_empty(out), shapely.polygons(corners(seen.pieces.boxes)), out)


def _around(points: Floats, owner: Ints, degrees: Floats) -> Floats:
    """(objects, 5) the smallest box around each object's points (N, 2) along its direction (objects,)."""
    cos, sin = direction(degrees)
    c, s = cos[owner], sin[owner]
    turned = np.column_stack([points[:, 0] * c - points[:, 1] * s, points[:, 0] * s + points[:, 1] * c])
    low, high = np.full((len(degrees), 2), np.inf), np.full((len(degrees), 2), -np.inf)
    np.minimum.at(low, owner, turned)
    np.maximum.at(high, owner, turned)
    x, y = ((low + high) / 2).T
    return np.column_stack([x * cos + y * sin, y * cos - x * sin, high - low, degrees])


def _moved_in(boxes: Floats, seen: _Sighting) -> Floats:
    """Boxes (objects, 5) with their sides moved in, each as long as it helps."""
    boxes, best = boxes.copy(), _likeness(boxes, seen)
    for share in np.repeat([0.2, 0.1, 0.05, 0.02], 3):
        for axis, sign in ((0, 1), (0, -1), (1, 1), (1, -1)):
            cos, sin = direction(boxes[:, 4])
            gone = share * boxes[:, 2 + axis]
            ux, uy = (cos, -sin) if axis == 0 else (sin, cos)
            other = boxes.copy()
            other[:, 0] += sign * gone / 2 * ux
            other[:, 1] += sign * gone / 2 * uy
            other[:, 2 + axis] -= gone
            likeness = _likeness(other, seen)
            better = likeness > best + 1e-9
            boxes[better], best[better] = other[better], likeness[better]
    return boxes
