"""Slow and plain versions of what `merging` does: every pair is looked at, nothing is indexed."""

from __future__ import annotations

import numpy as np
import shapely

from babelrs_geo import boxes
from babelrs_geo.detections import Detections
from babelrs_geo.merging import pieces as joining
from babelrs_geo.merging import whole as meaning


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


def groups(rows: list[tuple], links: list[tuple[float, int, int]]) -> list[list[int]]:
    """Rows of one object: joined pair by pair, best agreement first, never two of one tile."""
    member = [{k} for k in range(len(rows))]
    for _, i, j in sorted(links):
        if member[i] is not member[j] and not {rows[k][3] for k in member[i]} & {
            rows[k][3] for k in member[j]
        }:
            together = member[i] | member[j]
            for k in together:
                member[k] = together
    return [sorted(g) for k, g in enumerate(member) if k == min(g)]


def step(box: np.ndarray, start: np.ndarray) -> np.ndarray:
    """What leads from one box to another, whose sides may be named the other way round."""
    quarters = round((box[4] - start[4]) / 90)
    w, h = (box[3], box[2]) if quarters % 2 else (box[2], box[3])
    return np.array([box[0], box[1], w, h, box[4] - 90 * quarters]) - start


def holds(tile, box: np.ndarray) -> bool:
    x1, y1, x2, y2 = boxes.bounds([box])[0]
    return bool(tile[0] <= x1 and tile[1] <= y1 and x2 <= tile[2] and y2 <= tile[3])


def seen_twice(rows: list[tuple], cut: list[bool], options) -> list[tuple[float, int, int]]:
    """Pairs of rows that may be one object, which at least one tile saw whole."""
    links = []
    grown = [r[0] + np.array([0, 0, 2, 2, 0]) * meaning.BLUR for r in rows]
    every = boxes.rotated_iou(grown, grown)
    for i, a in enumerate(rows):
        for j in range(i + 1, len(rows)):
            b = rows[j]
            if a[2] != b[2] or a[3] == b[3] or (cut[i] and cut[j]):
                continue
            iou = every[i, j]
            if iou <= min(meaning.SAME, options.iou):
                continue
            if not cut[i] and not cut[j]:
                good = iou > options.iou or (holds(b[3], a[0]) and holds(a[3], b[0]))
            else:
                full, part = (b, a) if cut[i] else (a, b)
                view = boxes.clip([full[0]], part[3])[0]
                good = (
                    area(view) > meaning.SHOWN * area(full[0])
                    and abs(step(part[0], view)[4]) <= meaning.ALIGNED
                )
            if good:
                links.append((-iou, i, j))
    return links


def agreed(rows: list[tuple], cut: list[bool], options) -> tuple[list[tuple], list[tuple]]:
    """Objects seen whole, at their mean place, and the pieces that are left."""
    whole, left = [], []
    for group in groups(rows, seen_twice(rows, cut, options)):
        if len(group) == 1:
            (left if cut[group[0]] else whole).append(rows[group[0]])
            continue
        box, _, label, tile = rows[min(k for k in group if not cut[k])]
        weight = [max(float(rows[k][1]), 1e-6) for k in group]
        steps = [step(rows[k][0], boxes.clip([box], rows[k][3])[0] if cut[k] else box) for k in group]
        mean = box + np.average(steps, axis=0, weights=weight)
        mean[2:4] = np.maximum(mean[2:4], box[2:4] / 2)
        whole.append((mean, max(rows[k][1] for k in group), label, tile))
    return whole, left


def links_of(pieces: list[tuple], options) -> list[tuple[float, int, int]]:
    """Pairs of pieces that agree about the ground that both tiles saw."""
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
    return links


def sides(box: np.ndarray) -> list[tuple[float, float]]:
    x1, y1, x2, y2 = boxes.bounds([box])[0]
    return [(x1, x2), (y1, y2)]


def polygon(box: np.ndarray) -> shapely.Polygon:
    return shapely.Polygon(boxes.corners([box])[0])


def possible(pieces: list[tuple]) -> np.ndarray:
    """Corners of what each piece shows, less the ground where another tile looked and its piece does not reach."""
    points = []
    for piece in pieces:
        out = polygon(piece[0]).intersection(shapely.box(*piece[3]))
        for other in pieces:
            if other is not piece:
                ground = shapely.box(*other[3])
                out = out - (ground - polygon(other[0]).intersection(ground))
        points.append(shapely.get_coordinates(polygon(piece[0]) if out.is_empty else out))
    return np.concatenate(points)


def along(points: np.ndarray, degrees: float) -> np.ndarray:
    """The smallest box around points in a direction."""
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    turned = points @ np.array([[c, s], [-s, c]])
    (x, y), size = (turned.min(0) + turned.max(0)) / 2, np.ptp(turned, 0)
    return np.array([x * c + y * s, y * c - x * s, *size, degrees])


def likeness(box: np.ndarray, pieces: list[tuple]) -> float:
    """Mean IoU of the pieces with what their tiles would show of a box, boxed along the piece."""
    every = []
    for seen, *_, tile in pieces:
        shown = along(boxes.outlines([box], [tile])[0], seen[4])
        every.append(boxes.rotated_iou([shown], [seen])[0, 0])
    return float(np.mean(every))


def moved_in(box: np.ndarray, pieces: list[tuple]) -> np.ndarray:
    """A box with its sides moved in, one after the other and by less and less, as long as it helps."""
    best = likeness(box, pieces)
    for share in np.repeat([0.2, 0.1, 0.05, 0.02], 3):
        for axis, sign in ((0, 1), (0, -1), (1, 1), (1, -1)):
            turn = np.deg2rad(box[4])
            way = [(np.cos(turn), -np.sin(turn)), (np.sin(turn), np.cos(turn))][axis]
            other = box.copy()
            other[:2] += sign * share * box[2 + axis] / 2 * np.array(way)
            other[2 + axis] *= 1 - share
            if likeness(other, pieces) > best + 1e-9:
                box, best = other, likeness(other, pieces)
    return box


def likeliest(tried: list[np.ndarray], pieces: list[tuple]) -> np.ndarray:
    """The box that looks most like the pieces; of about equal ones the first."""
    best = tried[0]
    for box in tried[1:]:
        if likeness(box, pieces) > likeness(best, pieces) + 1e-9:
            best = box
    return best


def fused(pieces: list[tuple], oriented: bool) -> tuple:
    """One row for the pieces of an object."""
    box = pieces[max(range(len(pieces)), key=lambda k: (area(pieces[k][0]), -k))][0]
    if len(pieces) > 1:
        if oriented:
            tried = [along(possible(pieces), p[0][4]) for p in pieces]
        else:
            tried = [along(np.concatenate([boxes.corners([p[0]])[0] for p in pieces]), 0.0)]
        box = likeliest([box, *tried], pieces)
        if oriented and likeness(box, pieces) < joining.DOUBTFUL:
            box = likeliest([box, *(moved_in(one, pieces) for one in tried)], pieces)
    return (box, max(p[1] for p in pieces), pieces[0][2], None)


def merge(found: Detections, outers: np.ndarray, shape, options) -> Detections:
    """What `merging.merge` does, looking at every pair."""
    tiles = np.column_stack([outers[:, :2], outers[:, :2] + outers[:, 2:]]).astype(int)
    rows = [
        (found.boxes[k], found.scores[k], int(found.labels[k]), tuple(tiles[k].tolist()))
        for k in ranked(found, tiles)
        if found.boxes[k, 2] > 0 and found.boxes[k, 3] > 0
    ]
    cut = [touches(r[0], r[3], shape, options.edge) for r in rows]
    whole, left = agreed(rows, cut, options)
    whole.sort(key=lambda r: (-r[1], r[2], *r[0]))
    whole = suppressed(whole, options)
    pieces = []
    for piece in left:
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
        joined = groups(pieces, links_of(pieces, options))
        pieces = [fused([pieces[k] for k in g], found.oriented) for g in joined]
    rows = whole + pieces
    rows.sort(key=lambda r: (-r[1], r[2], *r[0]))
    kept = suppressed(rows, options)
    return Detections(
        [r[0] for r in kept], [r[1] for r in kept], [r[2] for r in kept], found.classes, found.oriented
    )
