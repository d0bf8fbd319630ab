"""Slow and plain versions of what `models` does: loops over boxes, anchors and cells, from the formulas."""

from __future__ import annotations

import math
from statistics import mean, stdev

import numpy as np


def bilinear(cells: np.ndarray, x: float, y: float) -> np.ndarray:
    """Value (C,) at a point of (C, H, W), in cells from the first one's centre; zero more than a cell outside."""
    _, h, w = cells.shape
    if y < -1 or y > h or x < -1 or x > w:
        return np.zeros(len(cells))
    x, y = min(max(x, 0.0), w - 1.0), min(max(y, 0.0), h - 1.0)
    x0, y0 = int(x), int(y)
    x1, y1 = min(x0 + 1, w - 1), min(y0 + 1, h - 1)
    fx, fy = x - x0, y - y0
    above = cells[:, y0, x0] * (1 - fx) + cells[:, y0, x1] * fx
    below = cells[:, y1, x0] * (1 - fx) + cells[:, y1, x1] * fx
    return above * (1 - fy) + below * fy


def roi_align(
    cells: np.ndarray, box: np.ndarray, stride: float, out: int, samples: tuple[int, int]
) -> np.ndarray:
    """Features (C, out, out) of one le90 box: each bin the mean of its samples."""
    cx, cy, w, h = box[:4] / stride
    found = np.zeros((len(cells), out, out))
    for row in range(out):
        for column in range(out):
            for i in range(samples[0]):
                for j in range(samples[1]):
                    up = ((row + (i + 0.5) / samples[0]) / out - 0.5) * h
                    along = ((column + (j + 0.5) / samples[1]) / out - 0.5) * w
                    x = cx - 0.5 + along * math.cos(box[4]) - up * math.sin(box[4])
                    y = cy - 0.5 + along * math.sin(box[4]) + up * math.cos(box[4])
                    found[:, row, column] += bilinear(cells, x, y) / (samples[0] * samples[1])
    return found


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two upright boxes x1, y1, x2, y2."""
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(w, 0.0) * max(h, 0.0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def giou(a: np.ndarray, b: np.ndarray) -> float:
    """Generalised IoU: less the share of the hull that neither covers."""
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    union = areas / (1 + iou(a, b))
    return iou(a, b) - (hull - union) / hull


def atss(anchors: np.ndarray, counts: list[int], boxes: np.ndarray, candidates: int) -> list[int]:
    """Each anchor's box by adaptive training sample selection, -1 for none."""
    owner, best = [-1] * len(anchors), [-1.0] * len(anchors)
    for g, box in enumerate(boxes):
        middle = (box[:2] + box[2:]) / 2
        near, start = [], 0
        for count in counts:
            away = [
                (math.dist((a[:2] + a[2:]) / 2, middle), start + k)
                for k, a in enumerate(anchors[start : start + count])
            ]
            near += [k for _, k in sorted(away)[:candidates]]
            start += count
        overlaps = [iou(anchors[k], box) for k in near]
        limit = mean(overlaps) + (stdev(overlaps) if len(overlaps) > 1 else 0.0)
        for k, overlap in zip(near, overlaps, strict=True):
            x, y = (anchors[k][:2] + anchors[k][2:]) / 2
            inside = min(x - box[0], y - box[1], box[2] - x, box[3] - y) > 0.01
            if overlap >= limit and inside and overlap > best[k]:
                owner[k], best[k] = g, overlap
    return owner


def sigmoid(x: float) -> float:
    """1 / (1 + e^-x)."""
    return 1 / (1 + math.exp(-x))


def quality_focal(logits: np.ndarray, label: int, quality: float) -> float:
    """One anchor's classes: cross-entropy to the quality at its label and 0 elsewhere, by the squared miss."""
    total = 0.0
    for k, logit in enumerate(logits):
        p, wanted = sigmoid(logit), quality if k == label else 0.0
        total -= (wanted * math.log(p) + (1 - wanted) * math.log(1 - p)) * (wanted - p) ** 2
    return total


def distribution_focal(logits: np.ndarray, wanted: float) -> float:
    """One side: cross-entropy to the two whole numbers around the wanted length, shared linearly."""
    low = int(wanted)
    chances = np.exp(logits) / np.exp(logits).sum()
    return -(low + 1 - wanted) * math.log(chances[low]) - (wanted - low) * math.log(chances[low + 1])


def gfl_losses(scores, sides, strides, images, candidates=9, reg_max=16) -> dict[str, float]:
    """GFL's losses from logits a level (N, K, h, w) and (N, 4 (R + 1), h, w); `images` are (boxes, labels)."""
    anchors, counts, stride_of, place = [], [], [], []
    for level, s in enumerate(strides):
        h, w = scores[level].shape[2:]
        counts.append(h * w)
        for i in range(h):
            for j in range(w):
                anchors.append([(j - 4) * s, (i - 4) * s, (j + 4) * s, (i + 4) * s])
                stride_of.append(s)
                place.append((level, i, j))
    anchors = np.array(anchors, float)
    classes = boxes_loss = distributions = weights = 0.0
    positives = 0
    for n, (boxes, labels) in enumerate(images):
        owner = atss(anchors, counts, boxes, candidates)
        positives += max(sum(o >= 0 for o in owner), 1)
        for k, o in enumerate(owner):
            level, i, j = place[k]
            logits = scores[level][n, :, i, j]
            if o < 0:
                classes += quality_focal(logits, -1, 0.0)
                continue
            parts = sides[level][n, :, i, j].reshape(4, reg_max + 1)
            length = [(np.exp(p) / np.exp(p).sum()) @ np.arange(reg_max + 1) for p in parts]
            at, truth = np.array([j, i], float), boxes[o] / stride_of[k]
            box = np.array([at[0] - length[0], at[1] - length[1], at[0] + length[2], at[1] + length[3]])
            weight = max(sigmoid(v) for v in logits)
            classes += quality_focal(logits, labels[o], iou(box, truth))
            wanted = [at[0] - truth[0], at[1] - truth[1], truth[2] - at[0], truth[3] - at[1]]
            boxes_loss += 2.0 * weight * (1 - giou(box, truth))
            distributions += (
                0.25
                / 4
                * weight
                * sum(
                    distribution_focal(p, min(max(v, 0.0), reg_max - 0.1))
                    for p, v in zip(parts, wanted, strict=True)
                )
            )
            weights += weight
    norm = max(weights, 1.0)
    return {"loss_cls": classes / positives, "loss_bbox": boxes_loss / norm, "loss_dfl": distributions / norm}


def rpn_owners(anchors: np.ndarray, boxes: np.ndarray, size: tuple[int, int]) -> list[int]:
    """Each anchor's box (upright bounds) by the RPN's rule: -1 background, -2 left out."""
    owners = []
    overlaps = [[iou(a, b) for b in boxes] for a in anchors]
    inside = [a[0] >= 0 and a[1] >= 0 and a[2] < size[1] and a[3] < size[0] for a in anchors]
    for row, within in zip(overlaps, inside, strict=True):
        best = max(row)
        owners.append(-2 if not within else row.index(best) if best >= 0.7 else -1 if best < 0.3 else -2)
    for g in range(len(boxes)):
        top = max((row[g] for row, within in zip(overlaps, inside, strict=True) if within), default=0.0)
        for k, row in enumerate(overlaps):
            if inside[k] and top >= 0.3 and row[g] == top:
                owners[k] = g
    return owners


def deformable_attention(values, offsets, weights, places, shapes) -> np.ndarray:
    """Mixed values (Q, M, depth) of projected ones (S, M, depth) at places (Q, 2) + offsets (Q, M, L, P, 2) cells."""
    queries, heads, _, points, _ = offsets.shape
    out = np.zeros((queries, heads, values.shape[2]))
    for q in range(queries):
        for m in range(heads):
            start = 0
            for level, (h, w) in enumerate(shapes):
                table = values[start : start + h * w, m]
                start += h * w
                for p in range(points):
                    x = places[q, 0] * w + offsets[q, m, level, p, 0] - 0.5
                    y = places[q, 1] * h + offsets[q, m, level, p, 1] - 0.5
                    for j in (math.floor(y), math.floor(y) + 1):
                        for i in (math.floor(x), math.floor(x) + 1):
                            if 0 <= i < w and 0 <= j < h:
                                share = (1 - abs(x - i)) * (1 - abs(y - j))
                                out[q, m] += weights[q, m, level, p] * share * table[j * w + i]
    return out
