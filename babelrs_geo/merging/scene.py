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

The cost grows with the boxes and their neighbours, not with the scene (`neighbours`). Ties go by coordinates: the
order in which tiles finish does not matter.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from babelrs_geo.boxes import bounds
from babelrs_geo.detections import Detections, order
from babelrs_geo.errors import ParameterError
from babelrs_geo.merging.neighbours import Ints, keep
from babelrs_geo.merging.options import MergeOptions
from babelrs_geo.merging.pieces import explained, joined
from babelrs_geo.merging.whole import agreed


def nms(found: Detections, iou: float = 0.5) -> Ints:
    """Positions of the detections that stay, best first: exact greedy suppression within each class.

    A detection goes if its IoU with a better one that stays is above `iou`. Ties in score go by the
    coordinates, so the order of the rows does not matter; of rows equal in everything the first stays.
    """
    return keep(found.boxes, found.labels, order(found), iou, 1.0)


def merge(
    found: Detections, outers: ArrayLike, shape: tuple[int, int], options: MergeOptions | None = None
) -> Detections:
    """One detection per object, best first, from the detections of overlapping tiles.

    `found` is in pixels of the scene; `outers` (N, 4) is the tile each came from, as integers x, y, width, height
    in the same pixels; `shape` is the scene's (height, width). Boxes without area are dropped. A mean or joined box
    has the best score of those it is made of. The result does not depend on the order of the rows.

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
    whole, whole_tiles, part = agreed(found, tiles, cut, options)
    kept = _kept(whole, options)
    whole, whole_tiles = whole[kept], whole_tiles[kept]
    if len(part) and len(whole):
        part = part[~explained(found[part], tiles[part], whole, whole_tiles, options)]
    pieces = found[part]
    if len(part) and options.join:
        pieces = joined(pieces, tiles[part], options)
    result = Detections.concatenate([whole, pieces]).sort()
    return result[_kept(result, options)]


def _kept(ranked: Detections, options: MergeOptions) -> Ints:
    positions = np.arange(len(ranked))
    return keep(ranked.boxes, ranked.labels, positions, options.iou, options.containment)


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
