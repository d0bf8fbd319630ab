"""Boxes of a class that lie on one another, found by grids, and greedy suppression among them.

Boxes lie in grids, one for each class and size, whose cells are at least as large as their boxes: a box meets boxes
of its own and the neighbouring cells alone. They are stored in the order of rows and columns of cells, so that a
sweep over a grid reads memory in order, and pairs come out without a search. What decides is always
`boxes.overlap`; everything before it only leaves out pairs that cannot matter.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from babelrs_geo.boxes import Floats, bounds, direction, overlap
from babelrs_geo.kernels import compiled

Ints = NDArray[np.int64]

CROWDED = 64
"""Pairs a box up to which all are listed before any is judged. Where more lie on one another the best boxes are
judged first, and what they suppress is never looked at.
"""
HAIR = 1e-9
"""Relative margin against rounding, where pairs are only left out."""


class Grids(NamedTuple):
    """Boxes in the order of their grids, rows and columns. A grid holds one class and one size."""

    levels: int  # grids of a class, from small cells to large ones
    cells: Floats  # (levels,) side of a cell
    origin: Floats  # (2,) the corner that rows and columns count from
    rows: Ints  # (classes * levels + 1,) first row of each grid, in `starts`
    starts: Ints  # (rows + 1,) first box of each row
    columns: NDArray[np.int32]  # (N,) column of each box
    names: NDArray[np.int32]  # (N,) which box it is
    table: Floats  # (N, 4) cx, cy, w, h; of turned boxes (N, 8): half the size of the bounds, cosine and sine too


class Pairs(NamedTuple):
    """Boxes i < j that lie on one another, by position."""

    i: Ints
    j: Ints
    iou: Floats


def arrange(boxes: Floats, labels: Ints, classes: int, names: NDArray[np.int32] | None = None) -> Grids:
    """Grids of boxes (N, 5), N > 0, with labels below `classes`, under `names` (N,), or else their positions."""
    turned = bool(boxes[:, 4].any())
    cos, sin = direction(boxes[:, 4]) if turned else (np.zeros(0), np.zeros(0))
    names = np.arange(len(boxes), dtype=np.int32) if names is None else names
    # column by column: along the short axis NumPy takes fifteen times as long
    x, y, w, h = (boxes[:, column] for column in range(4))
    origin = np.array([x.min(), y.min()])
    span = float(max(x.max() - origin[0], y.max() - origin[1]))
    some = bounds(boxes[:: max(len(boxes) // 1000, 1)])
    half, most = np.quantile(np.maximum(some[:, 2:] - some[:, :2], 0).max(1), (0.5, 0.99))
    # the smallest cell holds all boxes if they are about as large as one another, else most; it is never so small that
    # empty rows outnumber the boxes by far
    usual = 1.1 * most if most < 3 * half else 1.5 * half
    smallest = max(float(usual), span * classes / (4 * len(boxes)), 1e-6)
    largest = (1 + HAIR) * float(max(w.max(), 0.0) + max(h.max(), 0.0))
    levels = 1 + max(0, int(np.ceil(np.log2(max(largest / smallest, 1.0)))))
    cells = smallest * np.exp2(np.arange(levels, dtype=np.float64))
    rows, starts, columns, which = _arrange(boxes, labels, classes, (cos, sin), origin, cells)
    table = _tabulated(boxes, which, names, (cos, sin))
    return Grids(levels, cells, origin, rows, starts, columns, which, table)


@compiled
def _half_bounds(boxes, k, turn):  # type: ignore[no-untyped-def]
    cos, sin = turn
    w, h = max(boxes[k, 2], 0.0), max(boxes[k, 3], 0.0)
    if len(cos):
        c, s = abs(cos[k]), abs(sin[k])
        return (w * c + h * s) / 2, (w * s + h * c) / 2
    return w / 2, h / 2


@compiled
def _arrange(boxes, labels, classes, turn, origin, cells):  # type: ignore[no-untyped-def]
    """Of `Grids`: rows, starts, columns, and the positions of the boxes. `turn` is cosine and sine, or empty."""
    n, levels = len(boxes), len(cells)
    level, row, column = np.empty(n, np.int16), np.empty(n, np.int32), np.empty(n, np.int32)
    rows = np.zeros(classes * levels + 1, np.int64)
    widest = 0
    for k in range(n):
        ex, ey = _half_bounds(boxes, k, turn)
        fits = 0
        while cells[fits] < 2 * max(ex, ey) * (1 + HAIR):
            fits += 1
        level[k] = fits
        column[k] = int((boxes[k, 0] - origin[0]) / cells[fits])
        row[k] = int((boxes[k, 1] - origin[1]) / cells[fits])
        grid = labels[k] * levels + fits
        rows[grid + 1] = max(rows[grid + 1], row[k] + 1)
        widest = max(widest, column[k] + 1)
    for g in range(classes * levels):
        rows[g + 1] += rows[g]
    # counting sorts: by column, then by row of grid, which keeps the columns in order
    at, starts = np.zeros(widest + 2, np.int64), np.zeros(rows[-1] + 2, np.int64)
    for k in range(n):
        row[k] += rows[labels[k] * levels + level[k]]
        at[column[k] + 2] += 1
        starts[row[k] + 2] += 1
    for c in range(widest):
        at[c + 1] += at[c]
    for r in range(rows[-1]):
        starts[r + 1] += starts[r]
    by_column = np.empty(n, np.int32)
    for k in range(n):
        by_column[at[column[k] + 1]] = k
        at[column[k] + 1] += 1
    which = np.empty(n, np.int32)
    for m in range(n):
        k = by_column[m]
        which[starts[row[k] + 1]] = k
        starts[row[k] + 1] += 1
    columns = by_column  # its memory again: of a million boxes all of this counts
    for place in range(n):
        columns[place] = column[which[place]]
    return rows, starts[:-1], columns, which


@compiled
def _tabulated(boxes, which, names, turn):  # type: ignore[no-untyped-def]
    """The table of `Grids` for boxes in the order `which`, whose numbers become `names`."""
    table = np.empty((len(boxes), 8 if len(turn[0]) else 4))
    for place in range(len(boxes)):
        k = which[place]
        which[place] = names[k]
        for c in range(4):
            table[place, c] = boxes[k, c]
        if len(turn[0]):
            table[place, 4], table[place, 5] = _half_bounds(boxes, k, turn)
            table[place, 6], table[place, 7] = turn[0][k], turn[1][k]
    return table


@compiled
def _prepared(table, k, out):  # type: ignore[no-untyped-def]
    """A row as `boxes.prepare` gives it."""
    for c in range(4):
        out[0, c] = table[k, c]
    out[0, 4], out[0, 5] = 1.0, 0.0
    if table.shape[1] == 8:
        out[0, 4], out[0, 5] = table[k, 6], table[k, 7]
    out[0, 6] = np.hypot(table[k, 2], table[k, 3]) / 2


@compiled
def _most(table, k, m):  # type: ignore[no-untyped-def]
    """An upper bound of the area that two boxes share: that of their bounds, and of either box."""
    if table.shape[1] == 8:
        reach_x, reach_y = table[k, 4] + table[m, 4], table[k, 5] + table[m, 5]
    else:
        reach_x, reach_y = (table[k, 2] + table[m, 2]) / 2, (table[k, 3] + table[m, 3]) / 2
    across = reach_x * (1 + HAIR) - abs(table[k, 0] - table[m, 0])
    down = reach_y * (1 + HAIR) - abs(table[k, 1] - table[m, 1])
    if across <= 0.0 or down <= 0.0:
        return 0.0
    area, other = table[k, 2] * table[k, 3], table[m, 2] * table[m, 3]
    return min(across * down, area, other) * (1 + HAIR)


@compiled
def _same(area, other, shared, iou, containment):  # type: ignore[no-untyped-def]
    # a containment of 1 is off: rounding must not find more of a box than there is
    within = containment < 1.0 and shared > containment * min(area, other)
    return shared > 0.0 and (within or shared / (area + other - shared) > iou)


@compiled
def _longer(array):  # type: ignore[no-untyped-def]
    out = np.empty(2 * len(array), array.dtype)
    for k in range(len(array)):
        out[k] = array[k]
    return out


@compiled
def _sweep(grids, classes, iou, containment, limit, valued):  # type: ignore[no-untyped-def]
    """All pairs that are the same by `iou` and `containment`, their IoU where `valued`, and whether they were at most
    `limit`.
    """
    table, column, starts = grids.table, grids.columns, grids.starts
    i, j, value = np.empty(64, np.int32), np.empty(64, np.int32), np.empty(64 * valued)
    n = 0
    work, p, q = np.empty((4, 16)), np.empty((1, 7)), np.empty((1, 7))
    for a in range(classes * grids.levels):
        for b in range(a, (a // grids.levels + 1) * grids.levels):
            if starts[grids.rows[a]] == starts[grids.rows[a + 1]]:
                continue
            if starts[grids.rows[b]] == starts[grids.rows[b + 1]]:
                continue
            small, large = grids.cells[a % grids.levels], grids.cells[b % grids.levels]
            ratio = small / large
            for r in range(grids.rows[a], grids.rows[a + 1]):
                begin, end = starts[r], starts[r + 1]
                if begin == end:
                    continue
                line = r - grids.rows[a]
                # a box reaches half a cell of its own and half a cell of the others' from its centre
                low = grids.rows[b] + max(int(np.floor((line - 0.5) * ratio - 0.5 - 1e-6)), 0)
                high = grids.rows[b] + int(np.floor((line + 1.5) * ratio + 0.5 + 1e-6))
                if a == b:
                    low, high = r, r + 1
                for t in range(low, min(high, grids.rows[b + 1] - 1) + 1):
                    pointer, stop = starts[t], starts[t + 1]
                    if pointer == stop:
                        continue
                    for k in range(begin, end):
                        if a == b:
                            left, right = column[k] - 1, column[k] + 1
                        else:
                            left = int(np.floor((column[k] - 0.5) * ratio - 0.5 - 1e-6))
                            right = int(np.floor((column[k] + 1.5) * ratio + 0.5 + 1e-6))
                        while pointer < stop and column[pointer] < left:
                            pointer += 1
                        m = k + 1 if a == b and t == r else pointer
                        while m < stop and column[m] <= right:
                            most = _most(table, k, m)
                            area, other = table[k, 2] * table[k, 3], table[m, 2] * table[m, 3]
                            if _same(area, other, most, iou, containment):
                                first = grids.names[k] < grids.names[m]
                                better, worse = (k, m) if first else (m, k)
                                _prepared(table, better, p)
                                _prepared(table, worse, q)
                                shared = overlap(p, 0, q, 0, work)
                                if _same(area, other, shared, iou, containment):
                                    if n == limit:
                                        return i[:0], j[:0], value[:0], False
                                    if n == len(i):
                                        i, j, value = _longer(i), _longer(j), _longer(value)
                                    i[n], j[n] = grids.names[better], grids.names[worse]
                                    if valued:
                                        value[n] = shared / (area + other - shared)
                                    n += 1
                            m += 1
    return i[:n], j[:n], value[:n], True


def lying_together(boxes: Floats, labels: Ints, iou: float) -> Pairs | None:
    """Pairs of boxes (N, 5) of one class whose IoU is above `iou`; None where they are `CROWDED`."""
    if not len(boxes):
        return Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
    classes = int(labels.max()) + 1
    i, j, value, complete = _sweep(
        arrange(boxes, labels, classes), classes, float(iou), 1.0, CROWDED * len(boxes), True
    )
    return Pairs(i.astype(np.int64), j.astype(np.int64), value) if complete else None


def keep(boxes: Floats, labels: Ints, rank: NDArray[np.int32], iou: float, containment: float) -> Ints:
    """Positions of the boxes (N, 5) that stay, best first: exact greedy suppression in each class.

    `rank` (N,) says how many boxes are better than each.
    """
    gone = np.zeros(len(boxes), np.bool_)
    if len(boxes):
        classes = int(labels.max()) + 1
        grids = arrange(boxes, labels, classes, rank)
        limit = CROWDED * len(boxes)
        i, j, _, complete = _sweep(grids, classes, float(iou), float(containment), limit, False)
        if complete:
            del grids
            _settle(i, j, gone)
        else:
            _suppress(grids, labels[_inverse(rank)], float(iou), float(containment), gone)
    return _inverse(rank)[~gone]


def _inverse(rank: NDArray[np.int32]) -> Ints:
    positions = np.empty(len(rank), np.int64)
    positions[rank] = np.arange(len(rank))
    return positions


@compiled
def _settle(i, j, gone):  # type: ignore[no-untyped-def]
    """Greedy suppression by pairs, i better than j."""
    starts = np.zeros(len(gone) + 2, np.int64)
    for k in range(len(i)):
        starts[i[k] + 2] += 1
    for k in range(len(gone)):
        starts[k + 1] += starts[k]
    rivals = np.empty(len(i), np.int32)
    for k in range(len(i)):
        rivals[starts[i[k] + 1]] = j[k]
        starts[i[k] + 1] += 1
    for better in range(len(gone)):
        if not gone[better]:
            for k in range(starts[better], starts[better + 1]):
                gone[rivals[k]] = True


@compiled
def _suppress(grids, labels, iou, containment, gone):  # type: ignore[no-untyped-def]
    """Greedy suppression box by box, best first."""
    table = grids.table
    near, place = np.empty(len(gone), np.int64), np.empty(len(gone), np.int64)
    for k in range(len(gone)):
        place[grids.names[k]] = k
    work, p, q = np.empty((4, 16)), np.empty((1, 7)), np.empty((1, 7))
    for better in range(len(gone)):
        if gone[better]:
            continue
        k = place[better]
        _prepared(table, k, p)
        ex, ey = (table[k, 4], table[k, 5]) if table.shape[1] == 8 else (table[k, 2] / 2, table[k, 3] / 2)
        bounds = (table[k, 0] - ex, table[k, 1] - ey, table[k, 0] + ex, table[k, 1] + ey)
        for x in range(_near(grids, bounds, labels[better], near)):
            m = near[x]
            worse = grids.names[m]
            if worse > better and not gone[worse]:
                _prepared(table, m, q)
                shared = overlap(p, 0, q, 0, work)
                area, other = table[k, 2] * table[k, 3], table[m, 2] * table[m, 3]
                gone[worse] = _same(area, other, shared, iou, containment)


@compiled
def _near(grids, box, label, out):  # type: ignore[no-untyped-def]
    """Boxes of a class whose bounds overlap the bounds `box`: their places in the grids go to `out`."""
    n = 0
    table = grids.table
    for g in range(label * grids.levels, (label + 1) * grids.levels):
        cell = grids.cells[g % grids.levels]
        # a box reaches half a cell from its centre at most; a hair wider than needed, against rounding
        x1 = (box[0] - grids.origin[0]) / cell - 0.5 - 1e-6
        x2 = (box[2] - grids.origin[0]) / cell + 0.5 + 1e-6
        y1 = (box[1] - grids.origin[1]) / cell - 0.5 - 1e-6
        y2 = (box[3] - grids.origin[1]) / cell + 0.5 + 1e-6
        height = grids.rows[g + 1] - grids.rows[g]
        if x2 < 0 or y2 < 0 or y1 > height:
            continue
        left, right = int(np.floor(max(x1, 0.0))), int(np.floor(min(x2, 2.0**31)))
        last = min(int(np.floor(min(y2, 2.0**31))), height - 1)
        for line in range(int(np.floor(max(y1, 0.0))), last + 1):
            low, end = grids.starts[grids.rows[g] + line], grids.starts[grids.rows[g] + line + 1]
            high = end
            while low < high:
                middle = (low + high) // 2
                if grids.columns[middle] < left:
                    low = middle + 1
                else:
                    high = middle
            while low < end and grids.columns[low] <= right:
                x, y = table[low, 0], table[low, 1]
                if table.shape[1] == 8:
                    ex, ey = table[low, 4], table[low, 5]
                else:
                    ex, ey = max(table[low, 2], 0.0) / 2, max(table[low, 3], 0.0) / 2
                if x - ex < box[2] and box[0] < x + ex and y - ey < box[3] and box[1] < y + ey:
                    out[n] = low
                    n += 1
                low += 1
    return n


def meeting(a: Floats, labels_a: Ints, b: Floats, labels_b: Ints) -> tuple[Ints, Ints]:
    """Positions (i, j) of all boxes of bounds `a` (N, 4) and boxes `b` (M, 5) of one class whose bounds overlap."""
    if not (len(a) and len(b)):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    grids = arrange(b, labels_b, int(max(labels_a.max(), labels_b.max())) + 1)
    counts = np.zeros(len(a), np.int64)
    near = np.empty(len(b), np.int64)
    _list_near(grids, a, labels_a, near, counts, np.zeros(0, np.int64))
    j = np.empty(counts.sum(), np.int64)
    _list_near(grids, a, labels_a, near, counts, j)
    return np.repeat(np.arange(len(a)), counts), j


@compiled
def _list_near(grids, bounds, labels, near, counts, out):  # type: ignore[no-untyped-def]
    """Count the neighbours of each box, or list them where there is room."""
    done = 0
    for i in range(len(bounds)):
        n = _near(grids, bounds[i], labels[i], near)
        counts[i] = n
        if len(out):
            for k in range(n):
                out[done + k] = grids.names[near[k]]
        done += n
