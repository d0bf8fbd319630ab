"""Greedy suppression of upright boxes inside the network.

On a CPU by a kernel of our own: torchvision takes as long to import as torch itself, and small scenes would wait.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from babelrs_geo.kernels import compiled


def batched_nms(boxes: Tensor, scores: Tensor, groups: Tensor, iou: float) -> Tensor:
    """Greedy NMS of boxes (n, 4) x1, y1, x2, y2 within each group (n,): kept indices, best first, of equals the first.

    A box goes where its IoU with a better one that stays is above `iou`.
    """
    if boxes.device.type != "cpu":
        from torchvision.ops import batched_nms as on_device

        kept: Tensor = on_device(boxes, scores, groups, iou)
        return kept
    ranked = scores.sort(descending=True, stable=True).indices
    gone = np.zeros(len(ranked), np.bool_)
    _suppress(boxes[ranked].float().contiguous().numpy(), groups[ranked].numpy(), float(iou), gone)
    return ranked[torch.from_numpy(~gone)]


@compiled
def _suppress(boxes, groups, iou, gone):  # type: ignore[no-untyped-def]
    """Mark boxes, best first, that go; an IoU is float32 and its limit float64, as in torchvision."""
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    for i in range(len(boxes)):
        if gone[i]:
            continue
        for j in range(i + 1, len(boxes)):
            if gone[j] or groups[i] != groups[j]:
                continue
            w = min(boxes[i, 2], boxes[j, 2]) - max(boxes[i, 0], boxes[j, 0])
            h = min(boxes[i, 3], boxes[j, 3]) - max(boxes[i, 1], boxes[j, 1])
            if w > 0 and h > 0:
                shared = w * h
                gone[j] = shared / (area[i] + area[j] - shared) > iou
