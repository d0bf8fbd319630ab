"""Detections of many overlapping tiles to one per object.

Tiles overlap, so an object at a seam is found more than once: whole by the tile that holds it, cut by its
neighbours, and only in pieces if it is larger than the overlap. `merge` goes by what each tile could see:

1. Of whole boxes that show the same object (IoU or intersection over the smaller above the limits) the best
   score stays. This is greedy non-maximum suppression, exact, class by class.
2. A box that reaches an edge of its tile inside the scene is cut. It goes where a whole box explains it: most of
   it lies in that box, or that box, seen through the cut one's tile, would look like it.
3. Cut boxes of different tiles that agree about the ground their tiles share are pieces of one object, and become
   the smallest box around what they saw. Neighbours side by side share no ground, and stay apart. No object
   takes two boxes of one tile.
4. What is left is suppressed once more, so that no two boxes of a class exceed the limits.

Candidates come from grids with cells as large as the boxes in them, so the cost grows with the boxes and their
neighbours, not with the scene. Ties go by coordinates: the order in which tiles finish does not matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import shapely
from numpy.typing import ArrayLike, NDArray

from babelrs_geo.boxes import (
    Floats,
    areas,
    areas_within,
    bounds,
    clip,
    compiled,
    from_corners,
    from_xyxy,
    intersection_pairs,
    outlines,
    overlap,
    prepare,
    rotated_iou_pairs,
)
from babelrs_geo.detections import Detections, order
from babelrs_geo.errors import ParameterError

Ints = NDArray[np.int64]

ALIGNED = 5.0
"""Degrees within which a side of a box lies along a direction."""


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """When two boxes of a class are one object. Raises `ParameterError` for a share outside [0, 1]."""

    iou: float = 0.5
    """Intersection over union above which the lower score goes."""
    containment: float = 0.5
    """Intersection over the smaller box above which the lower score goes; 1 switches it off."""
    edge: float = 4.0
    """Pixels: a box that comes this near to an edge of its tile is taken to be cut there."""
    seam: float = 0.5
    """IoU on the ground that two tiles share above which their cut boxes are pieces of one object."""
    join: bool = True
    """Whether pieces become one box; if not, each stays."""

    def __post_init__(self) -> None:
        for name in ("iou", "containment", "seam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ParameterError(f"{name} is {getattr(self, name)}; it is a share, from 0 to 1")
        if self.edge < 0:
            raise ParameterError(f"edge is {self.edge} px; it must be 0 or more")


def nms(found: Detections, iou: float = 0.5) -> Ints:
    """Positions of the detections that stay, best first: exact greedy suppression within each class.

    A detection goes if its IoU with a better one that stays is above `iou`. Ties in score go by the
    coordinates, so the order of the rows does not matter; of rows equal in everything the first stays.
    """
    ranked = order(found)
    return ranked[_keep(found.boxes[ranked], found.labels[ranked], iou, 1.0)]


def merge(
    found: Detections, outers: ArrayLike, shape: tuple[int, int], options: MergeOptions | None = None
) -> Detections:
    """One detection per object, best first, from the detections of overlapping tiles.

    `found` is in pixels of the scene; `outers` (N, 4) is the tile each came from, as integers x, y, width, height
    in the same pixels; `shape` is the scene's (height, width). Boxes without area are dropped. A joined box has
    the best score of its pieces. The result does not depend on the order of the rows.

    Raises `ParameterError` where `outers` does not go with `found` or leaves the scene.
    """
    options = options or MergeOptions()
    tiles = _tiles(found, outers, shape)
    solid = np.flatnonzero((found.boxes[:, 2] > 0) & (found.boxes[:, 3] > 0))
    # by tile where all else is equal: rows that still tie cannot be told apart
    by_tile = solid[np.lexsort(tiles[solid].T)]
    ranked = by_tile[order(found[by_tile])]
    found, tiles = found[ranked], tiles[ranked]

    cut = _is_cut(found, tiles, shape, options.edge)
    whole, part = np.flatnonzero(~cut), np.flatnonzero(cut)
    whole = whole[_keep(found.boxes[whole], found.labels[whole], options.iou, options.containment)]
    if len(part) and len(whole):
        part = part[~_explained(found[part], tiles[part], found[whole], tiles[whole], options)]
    pieces = found[part]
    if len(part) and options.join:
        pieces = _joined(pieces, tiles[part], options)
    result = Detections.concatenate([found[whole], pieces]).sort()
    return result[_keep(result.boxes, result.labels, options.iou, options.containment)]


def _tiles(found: Detections, outers: ArrayLike, shape: tuple[int, int]) -> Ints:
    """`outers` as x1, y1, x2, y2, checked."""
    given = np.asarray(outers, dtype=np.int64).reshape(-1, 4) if np.size(outers) == 0 else np.asarray(outers)
    if given.shape != (len(found), 4):
        raise ParameterError(
            f"{len(found)} detections came with tiles {given.shape}; expected ({len(found)}, 4)"
        )
    tiles = given.astype(np.int64)
    tiles[:, 2:] += tiles[:, :2]
    height, width = shape
    if len(tiles) and (tiles.min() < 0 or tiles[:, 2].max() > width or tiles[:, 3].max() > height):
        raise ParameterError(
            f"a tile leaves the scene of {width} x {height} px; give outers as x, y, width, height"
        )
    return tiles


def _is_cut(found: Detections, tiles: Ints, shape: tuple[int, int], edge: float) -> NDArray[np.bool_]:
    """(N,) True where a box reaches an edge of its tile that is not the scene's."""
    box = bounds(found.boxes)
    height, width = shape
    near = np.column_stack([box[:, :2] - edge <= tiles[:, :2], box[:, 2:] + edge >= tiles[:, 2:]])
    inner = np.column_stack([tiles[:, :2] > 0, tiles[:, 2:] < (width, height)])
    return np.asarray((near & inner).any(1))


def _explained(
    part: Detections, part_tiles: Ints, whole: Detections, whole_tiles: Ints, options: MergeOptions
) -> NDArray[np.bool_]:
    """(N,) True for cut boxes that a whole box accounts for."""
    i, j = _pairs(part, whole)
    inside = intersection_pairs(part.boxes[i], whole.boxes[j]) > options.containment * areas(part.boxes[i])
    explained = np.zeros(len(part), np.bool_)
    explained[i[inside]] = True
    open_ = ~explained[i] & (part_tiles[i] != whole_tiles[j]).any(1)
    i, j = i[open_], j[open_]
    explained[i[_is_view(part.boxes[i], part_tiles[i], whole.boxes[j], options.seam)]] = True
    return explained


def _is_view(seen: Floats, tiles: Ints, full: Floats, limit: float) -> NDArray[np.bool_]:
    """(N,) True where full[i] would look like seen[i] through tiles[i].

    The box of what would be seen is compared first. It may lie along another side than the one that was found, where
    both fit a tip about equally; so the tip itself is compared too. It fills as little as half of a box around it,
    and the limit is lower for it.
    """
    area = areas_within(seen, full, tiles)
    tip = area[:, 2] > 0.75 * limit * (area[:, 0] + area[:, 1] - area[:, 2])
    return (area[:, 2] > 0) & (tip | (rotated_iou_pairs(seen, clip(full, tiles)) > limit))


def _joined(pieces: Detections, tiles: Ints, options: MergeOptions) -> Detections:
    """Pieces of one object as one box around them all; others as they are."""
    i, j = _pairs(pieces, pieces)
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
    i, j, agreement = i[same], j[same], agreement[same]
    best_first = np.lexsort((j, i, -agreement))
    _, tile = np.unique(tiles, axis=0, return_inverse=True)
    group = np.arange(len(pieces))
    _unite(i[best_first], j[best_first], tile.reshape(-1), group, np.arange(len(pieces)))
    return _fused(pieces, tiles, group)


def _fused(pieces: Detections, tiles: Ints, group: Ints) -> Detections:
    """One detection for each group, with its best score.

    The box is the one that looks most like the pieces through their tiles, of three: around all pieces, around
    those that lie along their mean direction, and the largest piece. (The tip of a turned object may be boxed
    along another side, and would widen the box.)
    """
    first, member = np.unique(group, return_inverse=True)
    size = areas(pieces.boxes)
    largest = np.lexsort((-areas(pieces.boxes), member))[
        np.searchsorted(np.sort(member), np.arange(len(first)))
    ]
    alone = pieces.boxes[largest]
    # a box is the same after a quarter turn but for its sides' names: means are taken over four times the angle
    four = np.deg2rad(4 * pieces.boxes[:, 4])
    mean = np.arctan2(np.bincount(member, size * np.sin(four)), np.bincount(member, size * np.cos(four)))
    turned = np.mod(pieces.boxes[:, 4] - np.rad2deg(mean[member]) / 4 + 45, 90) - 45
    boxes = _around(pieces, tiles, member, np.ones(len(pieces), np.bool_), alone)
    best = _likeness(boxes, pieces, tiles, member)
    for other in (_around(pieces, tiles, member, np.abs(turned) <= ALIGNED, alone), alone):
        likeness = _likeness(other, pieces, tiles, member)
        better = likeness > best + 1e-9
        boxes[better], best[better] = other[better], likeness[better]
    scores = np.full(len(first), -np.inf, np.float32)
    np.maximum.at(scores, member, pieces.scores)
    return Detections(boxes, scores, pieces.labels[first], pieces.classes, pieces.oriented)


def _likeness(boxes: Floats, pieces: Detections, tiles: Ints, member: Ints) -> Floats:
    """(groups,) mean IoU of the pieces with their group's box as seen through their tiles."""
    iou = rotated_iou_pairs(pieces.boxes, clip(boxes[member], tiles))
    return np.bincount(member, iou) / np.bincount(member)


def _around(pieces: Detections, tiles: Ints, member: Ints, adds: NDArray[np.bool_], alone: Floats) -> Floats:
    """(groups, 5) the smallest box around what the pieces in `adds` saw; `alone` where there are none."""
    boxes = alone.copy()
    boxes[member[adds]] = pieces.boxes[adds]
    several = np.flatnonzero(adds & (np.bincount(member[adds], minlength=len(alone))[member] > 1))
    target, number = np.unique(member[several], return_inverse=True)
    if len(several) and pieces.oriented:
        # the part of a box beyond its tile was not seen
        points = outlines(pieces.boxes[several], tiles[several])
        by = np.argsort(number, kind="stable")
        cloud = shapely.multipoints(points[by].reshape(-1, 2), indices=np.repeat(number[by], 8))
        corner = shapely.get_coordinates(shapely.oriented_envelope(cloud)).reshape(-1, 5, 2)
        boxes[target] = from_corners(corner[:, :4])
    elif len(several):
        box = bounds(pieces.boxes[several])
        low, high = np.full((len(target), 2), np.inf), np.full((len(target), 2), -np.inf)
        np.minimum.at(low, number, box[:, :2])
        np.maximum.at(high, number, box[:, 2:])
        boxes[target] = from_xyxy(np.column_stack([low, high]))
    return boxes


@compiled
def _unite(i, j, tile, group, following):  # type: ignore[no-untyped-def]
    """Merge the groups of i[k] and j[k] in turn, unless both hold a box of the same tile.

    `group` is the lowest member of each; `following` links a group's members in a ring.
    """
    for k in range(len(i)):
        a, b = i[k], j[k]
        if group[a] == group[b]:
            continue
        clash = False
        m = a
        while not clash:
            n = b
            while not clash:
                clash = tile[m] == tile[n]
                n = following[n]
                if n == b:
                    break
            m = following[m]
            if m == a:
                break
        if clash:
            continue
        low = min(group[a], group[b])
        following[a], following[b] = following[b], following[a]
        m = a
        while True:
            group[m] = low
            m = following[m]
            if m == a:
                break


# ----------------------------------------------------------------------------------------------------
# Neighbours


class _Index(NamedTuple):
    """Boxes in grids: one for each class and size, its cells at least as large as its boxes.

    Boxes are sorted by grid, row and column of their centres, so that a row of cells is one run of boxes.
    """

    grids: Ints  # (classes + 1,) first grid of each class
    cells: Floats  # (G,) side of a cell
    origins: Floats  # (2,) the corner that rows and columns count from
    rows: Ints  # (G + 1,) first row of each grid, in `starts`
    starts: Ints  # (R + 1,) first box of each row
    columns: Ints  # (N,) column of each box
    boxes: Ints  # (N,) which box it is
    bounds: Floats  # (N, 4) of the boxes in this order


def _index(box: Floats, labels: Ints, classes: int) -> _Index:
    """Index of boxes with bounds `box` (N, 4), N > 0, and labels below `classes`."""
    centre = (box[:, :2] + box[:, 2:]) / 2
    origin = centre.min(0)
    size = np.maximum(box[:, 2:] - box[:, :2], 0).max(1)
    span = float((centre.max(0) - origin).max())
    # the smallest cell: about the usual box, but never so small that empty rows outnumber the boxes
    smallest = max(float(np.median(size)), span / (4 * len(box)), 1e-6)
    level = np.ceil(np.log2(np.maximum(size / smallest, 1))).astype(np.int64)
    cell = smallest * 2.0**level
    column, row = np.floor((centre - origin) / cell[:, None]).astype(np.int64).T
    # a class and a level in one number: no level comes near 4096, float64 has about 2000 powers of two
    pair, grid = np.unique(labels * 4096 + level, return_inverse=True)
    height = np.zeros(len(pair), np.int64)
    np.maximum.at(height, grid, row + 1)
    rows = np.concatenate([[0], np.cumsum(height)])
    line = rows[grid] + row
    by = np.lexsort((column, line))
    return _Index(
        grids=np.searchsorted(pair // 4096, np.arange(classes + 1)),
        cells=smallest * 2.0 ** (pair % 4096),
        origins=origin,
        rows=rows,
        starts=np.searchsorted(line[by], np.arange(rows[-1] + 1)),
        columns=column[by],
        boxes=by,
        bounds=np.ascontiguousarray(box[by]),
    )


@compiled
def _near(index, box, label, out):  # type: ignore[no-untyped-def]
    """The indexed boxes of a class whose bounds overlap `box`: their places in the index go to `out`."""
    n = 0
    for g in range(index.grids[label], index.grids[label + 1]):
        cell = index.cells[g]
        # a box reaches half a cell from its centre at most
        x1 = (box[0] - index.origins[0]) / cell - 0.5
        x2 = (box[2] - index.origins[0]) / cell + 0.5
        y1 = (box[1] - index.origins[1]) / cell - 0.5
        y2 = (box[3] - index.origins[1]) / cell + 0.5
        if x2 < 0 or y2 < 0:
            continue
        # a hair wider than needed, against rounding on the border of a cell
        first = index.rows[g] + max(int(np.floor(max(y1, 0.0) - 1e-6)), 0)
        last = min(index.rows[g] + int(np.floor(y2 + 1e-6)), index.rows[g + 1] - 1)
        left, right = max(int(np.floor(max(x1, 0.0) - 1e-6)), 0), int(np.floor(x2 + 1e-6))
        for r in range(first, last + 1):
            low, end = index.starts[r], index.starts[r + 1]
            high = end
            while low < high:
                middle = (low + high) // 2
                if index.columns[middle] < left:
                    low = middle + 1
                else:
                    high = middle
            while low < end and index.columns[low] <= right:
                other = index.bounds[low]
                if other[0] < box[2] and box[0] < other[2] and other[1] < box[3] and box[1] < other[3]:
                    out[n] = low
                    n += 1
                low += 1
    return n


def _keep(boxes: Floats, labels: Ints, iou: float, containment: float) -> Ints:
    """Positions that stay of boxes (N, 5) sorted best first."""
    if not len(boxes):
        return np.zeros(0, np.int64)
    box = bounds(boxes)
    index = _index(box, labels, int(labels.max()) + 1)
    gone = np.zeros(len(boxes), np.bool_)
    _suppress(index, prepare(boxes), box, labels, iou, containment, gone)
    return np.flatnonzero(~gone)


@compiled
def _suppress(index, p, box, labels, iou, containment, gone):  # type: ignore[no-untyped-def]
    work = np.empty((4, 16))
    near = np.empty(len(p), np.int64)
    for i in range(len(p)):
        if gone[i]:
            continue
        area = p[i, 2] * p[i, 3]
        for k in range(_near(index, box[i], labels[i], near)):
            j = index.boxes[near[k]]
            if j <= i or gone[j]:
                continue
            shared = overlap(p, i, p, j, work)
            other = p[j, 2] * p[j, 3]
            # a containment of 1 is off: rounding must not find more of a box than there is
            within = containment < 1.0 and shared > containment * min(area, other)
            gone[j] = shared > 0.0 and (within or shared / (area + other - shared) > iou)


def _pairs(a: Detections, b: Detections) -> tuple[Ints, Ints]:
    """Positions (i, j) of all boxes of `a` and `b` of one class whose bounds overlap."""
    if not (len(a) and len(b)):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    box = bounds(a.boxes)
    index = _index(bounds(b.boxes), b.labels, len(b.classes))
    counts = np.zeros(len(a), np.int64)
    near = np.empty(len(b), np.int64)
    _list_pairs(index, box, a.labels, near, counts, np.zeros(0, np.int64))
    j = np.empty(counts.sum(), np.int64)
    _list_pairs(index, box, a.labels, near, counts, j)
    return np.repeat(np.arange(len(a)), counts), j


@compiled
def _list_pairs(index, box, labels, near, counts, out):  # type: ignore[no-untyped-def]
    """Count the neighbours of each box, or list them where there is room."""
    done = 0
    for i in range(len(box)):
        n = _near(index, box[i], labels[i], near)
        counts[i] = n
        if len(out):
            for k in range(n):
                out[done + k] = index.boxes[near[k]]
        done += n
