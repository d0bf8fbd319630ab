"""Box maths, and the only place that knows the angle convention.

A box is a row `cx, cy, w, h, r`, float64: centre, width and height in pixels (x right, y down), and `r` in
degrees counter-clockwise on the image, as in torchvision's `cxcywhr`. At r = 0 the width runs along +x; a
positive r turns it toward -y, up the screen. Horizontal boxes are the boxes with r = 0.

Intersections are exact polygon areas in float64. Each pair is moved to the first box's centre and turned into
its frame, where that box is an upright rectangle and the other is cut by four half-planes (Sutherland and
Hodgman 1974). No intersection points are compared with one another, so coincident and almost coincident
boxes, on which kernels that collect points and take their hull go wrong, are cases like any other.

Arrays are anything `np.asarray` takes, CPU tensors included; results are NumPy arrays. Nothing here raises on
box values: a box with a side of zero or less is empty, and has no area and no overlap. A wrong shape raises
`ParameterError`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from babelrs_geo.errors import ParameterError
from babelrs_geo.kernels import compiled

Floats = NDArray[np.float64]

# Columns of a prepared box: centre, size, cosine and sine of its angle, radius of the circle around it.
_CX, _CY, _W, _H, _COS, _SIN, _RADIUS = range(7)


def _rows(boxes: ArrayLike, columns: int = 5) -> Floats:
    """Boxes as (N, columns) float64; an empty list is no boxes."""
    array = np.ascontiguousarray(boxes, dtype=np.float64)
    if array.size == 0:
        return np.zeros((0, columns))
    if array.ndim != 2 or array.shape[1] != columns:
        raise ParameterError(f"boxes have shape {array.shape}; expected (N, {columns})")
    return array


def direction(degrees: Floats) -> tuple[Floats, Floats]:
    """Cosine and sine, exact at quarter turns, so that upright boxes stay upright."""
    if not degrees.any():
        return np.ones(len(degrees)), np.zeros(len(degrees))
    quarters = degrees / 90.0
    whole = np.rint(quarters)
    right = np.flatnonzero(quarters == whole)
    radians = degrees.copy()
    far = np.flatnonzero(np.abs(degrees) > 360.0)
    radians[far] = np.mod(degrees[far], 360.0)
    radians = np.deg2rad(radians)
    cos, sin = np.cos(radians), np.sin(radians)
    turn = np.mod(whole[right], 4).astype(np.int64)
    cos[right] = np.array([1.0, 0.0, -1.0, 0.0])[turn]
    sin[right] = np.array([0.0, 1.0, 0.0, -1.0])[turn]
    return cos, sin


def _half_turn(degrees: Floats) -> Floats:
    """Angles brought to [-90, 90) by half turns, which leave a rectangle where it is."""
    wrapped = np.mod(degrees + 90.0, 180.0) - 90.0
    # mod of a tiny negative number rounds to the divisor itself
    return np.where(wrapped >= 90.0, -90.0, wrapped)


# ----------------------------------------------------------------------------------------------------
# Conversions


def from_xyxy(xyxy: ArrayLike) -> Floats:
    """Horizontal boxes (N, 4) `x1, y1, x2, y2` as (N, 5) boxes with r = 0."""
    b = _rows(xyxy, 4)
    size = b[:, 2:] - b[:, :2]
    return np.column_stack([b[:, :2] + size / 2, size, np.zeros(len(b))])


def bounds(boxes: ArrayLike) -> Floats:
    """Upright bounds (N, 4) `x1, y1, x2, y2` of boxes (N, 5), in pixels."""
    b = _rows(boxes)
    cos, sin = direction(b[:, 4])
    x = (np.abs(b[:, 2] * cos) + np.abs(b[:, 3] * sin)) / 2
    y = (np.abs(b[:, 2] * sin) + np.abs(b[:, 3] * cos)) / 2
    return np.column_stack([b[:, 0] - x, b[:, 1] - y, b[:, 0] + x, b[:, 1] + y])


def corners(boxes: ArrayLike) -> Floats:
    """Corners (N, 4, 2) of boxes (N, 5), in pixels.

    At r = 0: top left, top right, bottom right, bottom left. The first side is always along the width.
    """
    b = _rows(boxes)
    cos, sin = direction(b[:, 4])
    along = np.stack([cos, -sin], 1) * b[:, 2:3] / 2
    across = np.stack([sin, cos], 1) * b[:, 3:4] / 2
    middle = b[:, :2]
    return np.stack(
        [middle - along - across, middle + along - across, middle + along + across, middle - along + across],
        1,
    )


def from_corners(quads: ArrayLike) -> Floats:
    """Minimum-area rectangles (N, 5) around quadrilaterals (N, 4, 2), in any order of their corners.

    The smallest rectangle around a convex polygon has a side along one of its edges (Freeman and Shapira
    1975), and the hull's edges are among the six lines through two of the corners. Where several fit equally,
    the line through the first two corners wins, then the following edges: the corners of a box give that box
    back. r lies in [-90, 90).
    """
    q = np.ascontiguousarray(quads, dtype=np.float64)
    if q.size == 0:
        return np.zeros((0, 5))
    if q.ndim != 3 or q.shape[1:] != (4, 2):
        raise ParameterError(f"quadrilaterals have shape {q.shape}; expected (N, 4, 2)")
    return smallest_rectangles(q, ((0, 1), (1, 2), (2, 3), (3, 0), (0, 2), (1, 3)))


def smallest_rectangles(
    points: Floats, lines: tuple[tuple[int, int], ...], prefer: Floats | None = None
) -> Floats:
    """Smallest rectangles (N, 5) around points (N, K, 2) with a side along one of `lines`, pairs of numbers.

    Where several fit equally (a triangle has the same area along each side), the one that lies nearest to
    `prefer` (N,) in degrees is taken, or else the one along the earliest line.
    """
    origin = points.mean(1)
    p = points - origin[:, None]
    first, last = np.array(lines).T
    edge = p[:, last] - p[:, first]
    length = np.hypot(edge[..., 0], edge[..., 1])
    safe = np.where(length > 0, length, 1.0)
    ux = np.where(length > 0, edge[..., 0] / safe, 1.0)
    uy = np.where(length > 0, edge[..., 1] / safe, 0.0)
    along = p[:, None, :, 0] * ux[..., None] + p[:, None, :, 1] * uy[..., None]
    across = p[:, None, :, 1] * ux[..., None] - p[:, None, :, 0] * uy[..., None]
    a0, a1, b0, b1 = along.min(2), along.max(2), across.min(2), across.max(2)
    area = (a1 - a0) * (b1 - b0)
    # Only fits within rounding of the best, so that equal ones are decided by rank and not by noise.
    # Coordinates are known to their last digit; a line through a short side turns by that over the side.
    digit = 8 * np.finfo(np.float64).eps * (1 + np.abs(points).max((1, 2)))
    long = np.maximum(a1 - a0, b1 - b0).max(1)
    aspect = long / np.maximum(np.minimum(a1 - a0, b1 - b0).min(1), long / 1e3 + 1e-300)
    slack = digit * long * (1 + aspect) + 1e-9 * area.min(1)
    rank = np.broadcast_to(np.arange(len(lines), dtype=np.float64), area.shape)
    if prefer is not None:
        rank = np.abs(np.mod(np.rad2deg(np.arctan2(-uy, ux)) - prefer[:, None] + 45, 90) - 45)
    best = np.argmin(np.where(area <= (area.min(1) + slack)[:, None], rank, np.inf), 1)
    k = (np.arange(len(p)), best)
    middle, side = (a0[k] + a1[k]) / 2, (b0[k] + b1[k]) / 2
    centre = origin + np.stack([middle * ux[k] - side * uy[k], middle * uy[k] + side * ux[k]], 1)
    degrees = _half_turn(np.rad2deg(np.arctan2(-uy[k], ux[k])))
    return np.column_stack([centre, a1[k] - a0[k], b1[k] - b0[k], degrees])


def to_le90(boxes: ArrayLike) -> Floats:
    """Boxes as the official BabelRS code's le90 (N, 5): the same rectangles with w >= h.

    Its angle is in radians, clockwise on the image, in [-pi/2, pi/2).
    """
    b = _rows(boxes)
    tall = b[:, 2] < b[:, 3]
    degrees = _half_turn(np.where(tall, 90.0, 0.0) - b[:, 4])
    return np.column_stack([b[:, :2], b[:, 2:4].max(1), b[:, 2:4].min(1), np.deg2rad(degrees)])


def from_le90(boxes: ArrayLike) -> Floats:
    """Boxes (N, 5) from `cx, cy, w, h, a` with a in radians clockwise on the image; w and h stay as they
    are.
    """
    b = _rows(boxes)
    return np.column_stack([b[:, :4], -np.rad2deg(b[:, 4]) + 0.0])


# ----------------------------------------------------------------------------------------------------
# Areas and overlaps


def areas(boxes: ArrayLike) -> Floats:
    """Areas (N,) in square pixels; 0 for empty boxes."""
    b = _rows(boxes)
    return np.maximum(b[:, 2], 0.0) * np.maximum(b[:, 3], 0.0)


def prepare(boxes: ArrayLike) -> Floats:
    """Boxes (N, 5) as the (N, 7) rows that `overlap` reads: cx, cy, w, h, cos r, sin r, radius."""
    b = _rows(boxes)
    cos, sin = direction(b[:, 4])
    return np.column_stack([b[:, :4], cos, sin, np.hypot(b[:, 2], b[:, 3]) / 2])


@compiled
def _cut(work, n, source, axis, sign, limit):  # type: ignore[no-untyped-def]
    """Keep the part of a polygon with sign * coordinate <= limit; vertices go from one half of `work` to the
    other.
    """
    target = 2 - source
    kept = 0
    for k in range(n):
        m = k + 1 if k + 1 < n else 0
        here = sign * work[source + axis, k] - limit
        there = sign * work[source + axis, m] - limit
        if here <= 0.0:
            work[target, kept] = work[source, k]
            work[target + 1, kept] = work[source + 1, k]
            kept += 1
        if (here < 0.0 < there) or (there < 0.0 < here):
            share = here / (here - there)
            other = 1 - axis
            work[target + axis, kept] = sign * limit
            work[target + other, kept] = work[source + other, k] + share * (
                work[source + other, m] - work[source + other, k]
            )
            kept += 1
    return kept


@compiled
def _cut_upright(work, n, half_w, half_h):  # type: ignore[no-untyped-def]
    """Cut the polygon in work[:2, :n] by the rectangle around the origin; the result lies in work[:2]
    again.
    """
    n = _cut(work, n, 0, 0, 1.0, half_w)
    n = _cut(work, n, 2, 0, -1.0, half_w)
    n = _cut(work, n, 0, 1, 1.0, half_h)
    return _cut(work, n, 2, 1, -1.0, half_h)


@compiled
def overlap(p, i, q, j, work):  # type: ignore[no-untyped-def]
    """Area shared by rows p[i] and q[j] of prepared boxes; `work` is (4, 16) float64 scratch. For compiled
    callers.
    """
    dx = q[j, _CX] - p[i, _CX]
    dy = q[j, _CY] - p[i, _CY]
    reach = p[i, _RADIUS] + q[j, _RADIUS]
    wa, ha, wb, hb = p[i, _W] / 2, p[i, _H] / 2, q[j, _W] / 2, q[j, _H] / 2
    if dx * dx + dy * dy >= reach * reach or wa <= 0.0 or ha <= 0.0 or wb <= 0.0 or hb <= 0.0:
        return 0.0
    ca, sa, cb, sb = p[i, _COS], p[i, _SIN], q[j, _COS], q[j, _SIN]
    x = dx * ca - dy * sa
    y = dx * sa + dy * ca
    c = cb * ca + sb * sa
    s = sb * ca - cb * sa
    if s == 0.0 or c == 0.0:
        if c == 0.0:
            wb, hb = hb, wb
        across = min(wa, x + wb) - max(-wa, x - wb)
        down = min(ha, y + hb) - max(-ha, y - hb)
        return across * down if across > 0.0 and down > 0.0 else 0.0
    for k in range(4):
        along = wb if k == 1 or k == 2 else -wb
        side = hb if k >= 2 else -hb
        work[0, k] = x + along * c + side * s
        work[1, k] = y - along * s + side * c
    n = _cut_upright(work, 4, wa, ha)
    return min(_area(work, n), 4 * wa * ha, 4 * wb * hb)


@compiled
def iou_of(p, i, q, j, work):  # type: ignore[no-untyped-def]
    """Intersection over union of rows p[i] and q[j] of prepared boxes; 0 where both are empty. For compiled
    callers.
    """
    shared = overlap(p, i, q, j, work)
    if shared <= 0.0:
        return 0.0
    return shared / (p[i, _W] * p[i, _H] + q[j, _W] * q[j, _H] - shared)


@compiled
def _matrix(p, q, out):  # type: ignore[no-untyped-def]
    work = np.empty((4, 16))
    for i in range(len(p)):
        for j in range(len(q)):
            out[i, j] = iou_of(p, i, q, j, work)


@compiled
def _pairs(p, q, share, out):  # type: ignore[no-untyped-def]
    work = np.empty((4, 16))
    for i in range(len(p)):
        out[i] = iou_of(p, i, q, i, work) if share else overlap(p, i, q, i, work)


def rotated_iou(a: ArrayLike, b: ArrayLike) -> Floats:
    """Intersection over union (N, M) of every box of `a` (N, 5) with every box of `b` (M, 5)."""
    p, q = prepare(a), prepare(b)
    out = np.empty((len(p), len(q)))
    _matrix(p, q, out)
    return out


def _paired(a: ArrayLike, b: ArrayLike, share: bool) -> Floats:
    p, q = prepare(a), prepare(b)
    if len(p) != len(q):
        raise ParameterError(f"{len(p)} and {len(q)} boxes do not pair up; give as many of each")
    out = np.empty(len(p))
    _pairs(p, q, share, out)
    return out


def rotated_iou_pairs(a: ArrayLike, b: ArrayLike) -> Floats:
    """Intersection over union (N,) of a[i] with b[i], both (N, 5)."""
    return _paired(a, b, True)


def intersection_pairs(a: ArrayLike, b: ArrayLike) -> Floats:
    """Area (N,) in square pixels that a[i] shares with b[i], both (N, 5)."""
    return _paired(a, b, False)


# ----------------------------------------------------------------------------------------------------
# Cutting


@compiled
def _visible(p, extents, points, counts):  # type: ignore[no-untyped-def]
    work = np.empty((4, 16))
    for i in range(len(p)):
        x, y = (extents[i, 0] + extents[i, 2]) / 2, (extents[i, 1] + extents[i, 3]) / 2
        _place(p, i, x, y, work)
        n = _cut_upright(work, 4, (extents[i, 2] - extents[i, 0]) / 2, (extents[i, 3] - extents[i, 1]) / 2)
        counts[i] = n
        for k in range(8):
            # the last vertex fills the rest, so that every row has eight
            m = min(k, n - 1)
            points[i, k, 0] = x + work[0, m] if n else p[i, _CX]
            points[i, k, 1] = y + work[1, m] if n else p[i, _CY]


@compiled
def _place(p, i, x, y, work):  # type: ignore[no-untyped-def]
    """The corners of p[i], seen from (x, y), into work[:2, :4]."""
    for k in range(4):
        along = (1.0 if k == 1 or k == 2 else -1.0) * p[i, _W] / 2
        side = (1.0 if k >= 2 else -1.0) * p[i, _H] / 2
        work[0, k] = p[i, _CX] - x + along * p[i, _COS] + side * p[i, _SIN]
        work[1, k] = p[i, _CY] - y - along * p[i, _SIN] + side * p[i, _COS]


@compiled
def _area(work, n):  # type: ignore[no-untyped-def]
    """Area of the polygon in work[:2, :n]; its corners run clockwise on the screen."""
    twice = 0.0
    for k in range(1, n - 1):
        twice += (work[0, k] - work[0, 0]) * (work[1, k + 1] - work[1, 0])
        twice -= (work[1, k] - work[1, 0]) * (work[0, k + 1] - work[0, 0])
    return max(twice / 2, 0.0)


@compiled
def _within(p, q, extents, out):  # type: ignore[no-untyped-def]
    work = np.empty((4, 16))
    for i in range(len(p)):
        x, y = (extents[i, 0] + extents[i, 2]) / 2, (extents[i, 1] + extents[i, 3]) / 2
        half_w, half_h = (extents[i, 2] - extents[i, 0]) / 2, (extents[i, 3] - extents[i, 1]) / 2
        out[i] = 0.0
        if half_w <= 0.0 or half_h <= 0.0:
            continue
        _place(q, i, x, y, work)
        out[i, 1] = _area(work, _cut_upright(work, 4, half_w, half_h))
        _place(p, i, x, y, work)
        n = _cut_upright(work, 4, half_w, half_h)
        out[i, 0] = _area(work, n)
        # what is left of p, in the frame of q
        c, s = q[i, _COS], q[i, _SIN]
        for k in range(n):
            dx, dy = work[0, k] + x - q[i, _CX], work[1, k] + y - q[i, _CY]
            work[0, k] = dx * c - dy * s
            work[1, k] = dx * s + dy * c
        out[i, 2] = _area(work, _cut_upright(work, n, q[i, _W] / 2, q[i, _H] / 2))


def areas_within(a: ArrayLike, b: ArrayLike, extents: ArrayLike) -> Floats:
    """Areas (N, 3) inside extents[i] (x1, y1, x2, y2): of a[i], of b[i], and of what both share."""
    p, q, e = prepare(a), prepare(b), _rows(extents, 4)
    if not len(p) == len(q) == len(e):
        raise ParameterError(
            f"{len(p)}, {len(q)} boxes and {len(e)} extents do not pair up; give as many of each"
        )
    out = np.empty((len(p), 3))
    _within(p, q, e, out)
    return out


def outlines(boxes: ArrayLike, extents: ArrayLike) -> Floats:
    """What can be seen of boxes (N, 5) inside extents[i] (x1, y1, x2, y2), as convex polygons (N, 8, 2).

    A polygon with fewer corners repeats its last one; nothing to be seen is the box's centre, eight times.
    """
    p = prepare(boxes)
    points = np.empty((len(p), 8, 2))
    _visible(
        p, np.ascontiguousarray(np.broadcast_to(extents, (len(p), 4)), np.float64), points, np.empty(len(p))
    )
    return points


def clip(boxes: ArrayLike, extents: ArrayLike) -> Floats:
    """What can be seen of boxes (N, 5) inside `extents`, as minimum-area rectangles (N, 5).

    `extents` is x1, y1, x2, y2 in pixels, one for all (4,) or one for each (N, 4). Boxes that lie inside come
    back as they are, horizontal ones stay horizontal, and those outside become empty (w = h = 0) at their
    centre. Of rectangles that fit a part equally the one along the box is taken.
    """
    given = _rows(boxes)
    b = given.copy()
    e = np.broadcast_to(np.asarray(extents, np.float64), (len(b), 4))
    box = bounds(b)
    inside = ((box[:, :2] >= e[:, :2]) & (box[:, 2:] <= e[:, 2:])).all(1)
    upright = ~inside & (np.mod(b[:, 4], 90.0) == 0.0)
    seen = from_xyxy(np.column_stack([np.maximum(box[:, :2], e[:, :2]), np.minimum(box[:, 2:], e[:, 2:])]))
    # a quarter turn swaps the sides; the angle is kept, so width stays width
    swapped = np.mod(b[:, 4], 180.0) != 0.0
    seen[swapped, 2:4] = seen[swapped, 3:1:-1]
    b[upright, :4] = seen[upright, :4]
    turned = np.flatnonzero(~inside & ~upright)
    if len(turned):
        points = outlines(b[turned], e[turned])
        b[turned] = smallest_rectangles(points, tuple((k, (k + 1) % 8) for k in range(8)), b[turned, 4])
    gone = (b[:, 2] <= 0.0) | (b[:, 3] <= 0.0)
    b[gone, :2] = given[gone, :2]
    b[gone, 2:4] = 0.0
    return b
