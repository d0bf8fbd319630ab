"""Objects that several tiles saw whole."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from babelrs_geo.boxes import Floats, areas, bounds, clip
from babelrs_geo.detections import Detections, order
from babelrs_geo.kernels import compiled
from babelrs_geo.merging.neighbours import Ints, Pairs, keep, lying_together
from babelrs_geo.merging.options import MergeOptions

SAME = 0.3
"""IoU above which boxes of two tiles that both saw the whole ground may be one object, once grown by `BLUR`."""
BLUR = 2.0
"""Pixels that a side may be off by in either box: much for small objects, nothing for large ones."""
SHOWN = 0.7
"""Share of an object that a tile must show for its cut box to tell where the object is."""
ALIGNED = 10.0
"""Degrees within which boxes lie along one another."""


def agreed(
    found: Detections, tiles: Ints, cut: NDArray[np.bool_], options: MergeOptions
) -> tuple[Detections, Ints, Ints]:
    """Objects seen whole, with the tile of each one's best box; and the positions of cut boxes that are left.

    Boxes are in ranked order. Those of one object are brought to their mean, weighted by score; a cut box counts by
    how it differs from what its tile would show of the whole one.
    """
    group = grouped(_matched(found, tiles, cut, options), tiles)
    several = np.flatnonzero(np.bincount(group, minlength=len(group))[group] > 1)
    _, member = np.unique(group[several], return_inverse=True)
    whole_first = np.lexsort((several, cut[several], member))
    first = np.searchsorted(member[whole_first], np.arange(member.max() + 1 if len(member) else 0))
    leader = several[whole_first][first]
    scores = found.scores.copy()
    np.maximum.at(scores, leader[member], found.scores[several])
    shown = found.boxes[leader[member]]
    part = np.flatnonzero(cut[several])
    shown[part] = clip(shown[part], tiles[several[part]])
    # what is added to the leader: the mean of identical boxes is that box, to the last digit
    step = _step(found.boxes[several], shown)
    weight = np.maximum(found.scores[several].astype(np.float64), 1e-6)
    boxes = found.boxes.copy()
    for column in range(5):
        boxes[leader, column] += np.bincount(member, weight * step[:, column]) / np.bincount(member, weight)
    turned = leader[found.boxes[leader, 4] != boxes[leader, 4]]
    boxes[turned, 4] = np.mod(boxes[turned, 4] + 90, 180) - 90
    boxes[leader, 2:4] = np.maximum(boxes[leader, 2:4], found.boxes[leader, 2:4] / 2)
    stays, left = ~cut, cut.copy()
    stays[several] = left[several] = False
    stays[leader] = True
    whole = Detections(boxes[stays], scores[stays], found.labels[stays], found.classes, found.oriented)
    ranked = order(whole)
    return whole[ranked], tiles[stays][ranked], np.flatnonzero(left)


def _step(boxes: Floats, start: Floats) -> Floats:
    """(N, 5) what leads from `start` to `boxes`, whose sides may be named the other way round."""
    step = boxes - start
    quarters = np.round(step[:, 4] / 90)
    odd = np.flatnonzero(np.mod(quarters, 2))
    step[odd, 2:4] = boxes[odd][:, [3, 2]] - start[odd, 2:4]
    step[:, 4] -= 90 * quarters
    return step


def _matched(found: Detections, tiles: Ints, cut: NDArray[np.bool_], options: MergeOptions) -> Pairs:
    """Pairs of boxes that may be one object seen twice, by one tile at least whole."""
    grown = found.boxes + np.array([0, 0, 2 * BLUR, 2 * BLUR, 0])
    least = min(SAME, options.iou)
    pairs = lying_together(grown, found.labels, least)
    if pairs is None:
        # boxes by the dozen on one another: what is the same anyway goes first
        rank = np.arange(len(found), dtype=np.int32)
        kept = keep(found.boxes, found.labels, rank, options.iou, options.containment)
        few = lying_together(grown[kept], found.labels[kept], least)
        pairs = few and Pairs(kept[few.i], kept[few.j], few.iou)
    if pairs is None:
        return Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
    i, j, iou = pairs
    apart = np.flatnonzero((tiles[i] != tiles[j]).any(1) & ~(cut[i] & cut[j]))
    i, j, iou = i[apart], j[apart], iou[apart]
    box = bounds(found.boxes)

    def within(a: Ints, b: Ints) -> NDArray[np.bool_]:
        return np.asarray(((box[a, :2] >= tiles[b, :2]) & (box[a, 2:] <= tiles[b, 2:])).all(1))

    good = ~cut[i] & ~cut[j] & ((iou > options.iou) | (within(i, j) & within(j, i)))
    mixed = np.flatnonzero(cut[i] | cut[j])
    full, part = np.where(cut[i], j, i)[mixed], np.where(cut[i], i, j)[mixed]
    view = clip(found.boxes[full], tiles[part])
    good[mixed] = (areas(view) > SHOWN * areas(found.boxes[full])) & (
        np.abs(_step(found.boxes[part], view)[:, 4]) <= ALIGNED
    )
    return Pairs(i[good], j[good], iou[good])


def grouped(pairs: Pairs, tiles: Ints) -> Ints:
    """The lowest member of each box's group: pairs are united, closest first, but no two boxes of a tile."""
    best_first = np.lexsort((pairs.j, pairs.i, -pairs.iou))
    group = np.arange(len(tiles))
    _unite(pairs.i[best_first], pairs.j[best_first], tiles, group, np.arange(len(tiles)))
    return group


@compiled
def _unite(i, j, tiles, group, following):  # type: ignore[no-untyped-def]
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
                clash = True
                for c in range(4):
                    clash = clash and tiles[m, c] == tiles[n, c]
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
