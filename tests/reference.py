"""Slow and plain versions of what `merging` does: every pair is looked at, nothing is indexed."""

from __future__ import annotations

import numpy as np

from babelrs_geo import boxes
from babelrs_geo.detections import Detections
from babelrs_geo.merging import ALIGNED


def ranked(found: Detections, tiles: np.ndarray) -> list[int]:
    return sorted(
        range(len(found)), key=lambda k: (-found.scores[k], found.labels[k], *found.boxes[k], *tiles[k, ::-1])
    )


def nms(found: Detections, iou: float) -> list[int]:
    """Greedy suppression: best first, a box stays unless it overlaps one that stayed."""
    kept: list[int] = []
    for k in ranked(found, np.zeros((len(found), 1))):
        same = [m for m in kept if found.labels[m] == found.labels[k]]
        if not same or boxes.rotated_iou(found.boxes[same], found.boxes[[k]]).max() <= iou:
            kept.append(k)
    return kept


def shared(a: np.ndarray, b: np.ndarray) -> float:
    return float(boxes.intersection_pairs([a], [b])[0])


def area(box: np.ndarray) -> float:
    return float(box[2] * box[3])


def suppressed(rows: list[tuple], options) -> list[tuple]:
    """The (box, score, label, ...) rows that stay, of rows sorted best first."""
    kept: list[tuple] = []
    for row in rows:
        for other in kept:
            if other[2] == row[2]:
                s = shared(other[0], row[0])
                within = options.containment < 1 and s > options.containment * min(
                    area(other[0]), area(row[0])
                )
                if s > 0 and (within or s / (area(other[0]) + area(row[0]) - s) > options.iou):
                    break
        else:
            kept.append(row)
    return kept


def touches(box: np.ndarray, tile, shape, edge: float) -> bool:
    x1, y1, x2, y2 = boxes.bounds([box])[0]
    height, width = shape
    return (
        (tile[0] > 0 and x1 - edge <= tile[0])
        or (tile[1] > 0 and y1 - edge <= tile[1])
        or (tile[2] < width and x2 + edge >= tile[2])
        or (tile[3] < height and y2 + edge >= tile[3])
    )


def is_view(seen: np.ndarray, tile, full: np.ndarray, limit: float) -> bool:
    """Would `full` look like `seen` through `tile`?"""
    a, b, s = boxes.areas_within([seen], [full], [tile])[0]
    if s <= 0:
        return False
    clipped = boxes.clip([full], tile)
    return s > 0.75 * limit * (a + b - s) or boxes.rotated_iou([seen], clipped)[0, 0] > limit


def agreement(a: tuple, b: tuple) -> float:
    """IoU of two rows on the ground that their tiles share."""
    common = [max(a[3][0], b[3][0]), max(a[3][1], b[3][1]), min(a[3][2], b[3][2]), min(a[3][3], b[3][3])]
    x, y, s = boxes.areas_within([a[0]], [b[0]], [common])[0]
    return s / max(x + y - s, 1e-300)


def groups(pieces: list[tuple], options) -> list[list[int]]:
    """Pieces of one object: joined pair by pair, best agreement first, never two of one tile."""
    links = []
    for i in range(len(pieces)):
        for j in range(i + 1, len(pieces)):
            a, b = pieces[i], pieces[j]
            meet = all(
                np.maximum(x[0], y[0]) < np.minimum(x[1], y[1])
                for x, y in zip(sides(a[0]), sides(b[0]), strict=True)
            )
            if a[2] != b[2] or a[3] == b[3] or not meet:
                continue
            how = agreement(a, b)
            if (
                how > options.seam
                or is_view(a[0], a[3], b[0], options.seam)
                or is_view(b[0], b[3], a[0], options.seam)
            ):
                links.append((-how, i, j))
    member = [{k} for k in range(len(pieces))]
    for _, i, j in sorted(links):
        if member[i] is not member[j] and not {pieces[k][3] for k in member[i]} & {
            pieces[k][3] for k in member[j]
        }:
            together = member[i] | member[j]
            for k in together:
                member[k] = together
    return [sorted(g) for k, g in enumerate(member) if k == min(g)]


def sides(box: np.ndarray) -> list[tuple[float, float]]:
    x1, y1, x2, y2 = boxes.bounds([box])[0]
    return [(x1, x2), (y1, y2)]


def around(pieces: list[tuple], oriented: bool) -> np.ndarray:
    """The smallest box around what the pieces saw."""
    if len(pieces) == 1:
        return pieces[0][0]
    if not oriented:
        b = boxes.bounds([p[0] for p in pieces])
        return boxes.from_xyxy([[*b[:, :2].min(0), *b[:, 2:].max(0)]])[0]
    points = np.concatenate([boxes.outlines([p[0]], [p[3]])[0] for p in pieces])
    lines = tuple((i, j) for i in range(len(points)) for j in range(i + 1, len(points)))
    return boxes.smallest_rectangles(points[None], lines)[0]


def fused(pieces: list[tuple], options, oriented: bool) -> tuple:
    largest = max(range(len(pieces)), key=lambda k: (area(pieces[k][0]), -k))
    alone = pieces[largest][0]
    mean = np.angle(sum(area(p[0]) * np.exp(1j * np.deg2rad(4 * p[0][4])) for p in pieces), deg=True) / 4
    along = [p for p in pieces if abs((p[0][4] - mean + 45) % 90 - 45) <= ALIGNED] or [pieces[largest]]
    tried = [around(pieces, oriented), around(along, oriented), alone]
    likeness = [
        np.mean([boxes.rotated_iou([p[0]], boxes.clip([box], p[3]))[0, 0] for p in pieces]) for box in tried
    ]
    best = 0
    for k in (1, 2):
        if likeness[k] > likeness[best] + 1e-9:
            best = k
    return (tried[best], max(p[1] for p in pieces), pieces[0][2], None)


def merge(found: Detections, outers: np.ndarray, shape, options) -> Detections:
    """What `merging.merge` does, looking at every pair."""
    tiles = np.column_stack([outers[:, :2], outers[:, :2] + outers[:, 2:]]).astype(int)
    rows = [
        (found.boxes[k], found.scores[k], int(found.labels[k]), tuple(tiles[k].tolist()))
        for k in ranked(found, tiles)
        if found.boxes[k, 2] > 0 and found.boxes[k, 3] > 0
    ]
    cut = [touches(r[0], r[3], shape, options.edge) for r in rows]
    whole = suppressed([r for r, c in zip(rows, cut, strict=True) if not c], options)
    pieces = []
    for piece in (r for r, c in zip(rows, cut, strict=True) if c):
        explained = any(
            w[2] == piece[2]
            and (
                shared(piece[0], w[0]) > options.containment * area(piece[0])
                or (w[3] != piece[3] and is_view(piece[0], piece[3], w[0], options.seam))
            )
            for w in whole
        )
        if not explained:
            pieces.append(piece)
    if options.join:
        pieces = [fused([pieces[k] for k in g], options, found.oriented) for g in groups(pieces, options)]
    rows = whole + pieces
    rows.sort(key=lambda r: (-r[1], r[2], *r[0]))
    kept = suppressed(rows, options)
    return Detections(
        [r[0] for r in kept], [r[1] for r in kept], [r[2] for r in kept], found.classes, found.oriented
    )
