"""Detections of a scene's tiles to one per object, and suppression alone.

Tiles overlap, so an object at a seam is found more than once: whole by the tiles that hold it, cut by their
neighbours, and only in pieces if it is larger than the overlap. `merge` goes by what each tile could see:

1. Boxes of different tiles that saw an object whole become their mean. Each is matched with at most one box of
   another tile, the closest first, so that true neighbours stay apart however near they are.
2. Of whole boxes that still show the same object (IoU or intersection over the smaller above the limits) the best
   score stays. This is greedy non-maximum suppression, exact, class by class.
3. A box that reaches an edge of its tile inside the scene is cut. It goes where a whole box explains it: most of
   it lies in that box, or that box, seen through the cut one's tile, would look like it.
4. Cut boxes of different tiles that agree about the ground their tiles share are pieces of one object, and become
   one box around what they saw. Neighbours side by side share no ground, and stay apart. No object
   takes two boxes of one tile.
5. What is left is suppressed once more, so that no two boxes of a class exceed the limits.

A scene may be read at several scales, coarser ones for what is larger than a tile. Each is taken through steps 1 and 2
alone, and then

* a coarser scale is not asked about objects that a finer one surely holds, those no longer than its overlap;
* an object that two scales saw whole has its place by the finer, and the better score of both. Where one whole box lies
  in another, the better score stays, unless the larger box is longer than a tile of the finer scale: that scale
  cannot have seen such an object whole, and what it has found inside is a part, which goes;
* cut boxes go by step 3 where a whole box of any scale explains them, and pieces are joined scale by scale. Where two
  scales joined pieces of one object, the coarser, which had it in fewer, stays.

The cost grows with the boxes and their neighbours, not with the scene (`neighbours`). Ties go by coordinates: the
order in which tiles finish does not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from babelrs_geo.boxes import bounds
from babelrs_geo.detections import Detections, order
from babelrs_geo.errors import ParameterError
from babelrs_geo.merging.neighbours import Ints, keep
from babelrs_geo.merging.options import MergeOptions
from babelrs_geo.merging.pieces import explained, joined
from babelrs_geo.merging.scales import held, with_coarser
from babelrs_geo.merging.whole import BLUR, agreed


def nms(found: Detections, iou: float = 0.5) -> Ints:
    """Positions of the detections that stay, best first: exact greedy suppression within each class.

    A detection goes if its IoU with a better one that stays is above `iou`. Ties in score go by the
    coordinates, so the order of the rows does not matter; of rows equal in everything the first stays.
    """
    rank = np.empty(len(found), np.int32)
    rank[order(found)] = np.arange(len(found), dtype=np.int32)
    return keep(found.boxes, found.labels, rank, iou, 1.0)


def merge(
    found: Detections, outers: ArrayLike, shape: tuple[int, int], options: MergeOptions | None = None
) -> Detections:
    """One detection per object, best first, from the detections of overlapping tiles.

    `found` is in pixels of the scene; `outers` (N, 4) is the tile each came from, as integers x, y, width, height
    in the same pixels; `shape` is the scene's (height, width). Boxes without area are dropped. A mean or joined box
    has the best score of those it is made of. The result does not depend on the order of the rows.

    Raises `ParameterError` where `outers` does not go with `found` or leaves the scene.
    """
    return merge_scales([Seen(found, outers, shape)], options)


class Seen(NamedTuple):
    """What tiles of one scale found, as `merge` takes it, in the pixels of that scale."""

    found: Detections
    outers: ArrayLike
    shape: tuple[int, int]
    tile: int = 0
    """Side of a tile."""
    overlap: int = 0
    """What neighbouring tiles share."""


class _Sorted(NamedTuple):
    """What one scale saw whole and cut, with the tiles, in its own pixels; `zoom` (2,) of the first's go on one."""

    whole: Detections
    whole_tiles: Ints
    part: Detections
    part_tiles: Ints
    zoom: NDArray[np.float64]


def merge_scales(seen: Sequence[Seen], options: MergeOptions | None = None) -> Detections:
    """`merge` for a scene that was read at several scales, finest first: one detection per object, in the pixels of the
    first. Raises as `merge` does.
    """
    options = options or MergeOptions()
    levels = [_sorted(each, seen[0].shape, options) for each in seen]
    whole, tiles = levels[0].whole, levels[0].whole_tiles
    blur = np.zeros(len(whole))
    for finer, before, level in zip(seen, levels, levels[1:], strict=False):
        zoom = float(before.zoom.max())
        coarse, coarse_tiles = _moved(level.whole, level.zoom), _moved_tiles(level.whole_tiles, level.zoom)
        asked = _beyond(coarse, finer.overlap * zoom, level.zoom)
        coarse, coarse_tiles = coarse[asked], coarse_tiles[asked]
        whole, stays, comes = with_coarser(whole, coarse, finer.tile * zoom, options)
        whole = Detections.concatenate([whole[stays], coarse[comes]])
        tiles = np.concatenate([tiles[stays], coarse_tiles[comes]])
        blur = np.append(blur[stays], np.full(int(comes.sum()), float(level.zoom.max())))
    # a coarse box may leave a strip of its object free, less than one of its pixels wide
    grown = replace(whole, boxes=whole.boxes + blur[:, None] * np.array([0, 0, 2, 2, 0]))
    pieces = [_pieces(level, (grown, tiles), options) for level in levels]
    for number in range(1, len(levels)):
        reach = seen[number - 1].overlap * float(levels[number - 1].zoom.max())
        pieces[number] = pieces[number][_beyond(pieces[number], reach, levels[number].zoom)]
        for other in range(number):
            pieces[other] = pieces[other][~held(pieces[other], pieces[number], options)]
    result = Detections.concatenate([whole, *pieces]).sort()
    return result[_kept(result, options)]


def _sorted(seen: Seen, shape: tuple[int, int], options: MergeOptions) -> _Sorted:
    """Steps 1 and 2."""
    found, tiles = seen.found, _tiles(seen.found, seen.outers, seen.shape)
    solid = np.flatnonzero((found.boxes[:, 2] > 0) & (found.boxes[:, 3] > 0))
    # by tile where all else is equal: rows that still tie cannot be told apart
    by_tile = solid[np.lexsort(tiles[solid].T)]
    ranked = by_tile[order(found[by_tile])]
    found, tiles = found[ranked], tiles[ranked]
    cut = _is_cut(found, tiles, seen.shape, options.edge)
    whole, whole_tiles, part = agreed(found, tiles, cut, options)
    kept = _kept(whole, options)
    zoom = np.array([shape[1] / seen.shape[1], shape[0] / seen.shape[0]])
    return _Sorted(whole[kept], whole_tiles[kept], found[part], tiles[part], zoom)


def _pieces(level: _Sorted, whole: tuple[Detections, Ints], options: MergeOptions) -> Detections:
    """Steps 3 and 4 for the cut boxes of one scale, in the first's pixels."""
    part, tiles, (full, full_tiles) = level.part, level.part_tiles, whole
    if len(part) and len(full):
        moved, moved_tiles = _moved(part, level.zoom), _moved_tiles(tiles, level.zoom)
        left = ~explained(moved, moved_tiles, full, full_tiles, options)
        part, tiles = part[left], tiles[left]
    return _moved(joined(part, tiles, options) if len(part) and options.join else part, level.zoom)


def _moved(found: Detections, zoom: NDArray[np.float64]) -> Detections:
    return found if (zoom == 1).all() else found.scale(*zoom.tolist())


def _moved_tiles(tiles: Ints, zoom: NDArray[np.float64]) -> Ints:
    return np.rint(tiles * np.tile(zoom, 2)).astype(np.int64)


def _beyond(found: Detections, reach: float, zoom: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which objects are longer than `reach`, or may be: a side may be off by `BLUR` pixels of its scale."""
    return np.asarray(found.boxes[:, 2:4].max(1, initial=0) + BLUR * float(zoom.max()) > reach)


def _kept(ranked: Detections, options: MergeOptions) -> Ints:
    rank = np.arange(len(ranked), dtype=np.int32)
    return keep(ranked.boxes, ranked.labels, rank, options.iou, options.containment)


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
