"""Oriented R-CNN: proposals and boxes with an angle, one pair of heads for RGB and one for infrared (BabelRS
section 3).

Legend: N images, A anchors of all levels, P proposals, G boxes of an image, K classes of the shared space.
Boxes are le90 tensors (see `rotated`); anchors are upright x1, y1, x2, y2, centred on grid points without
offset. Losses and their normalisers follow Xie et al. 2021 as the published weights used them: a smooth L1
over all samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from babelrs_geo.boxes import from_le90, rotated_iou
from babelrs_geo.models.rotated import MidpointOffset, RotatedDelta, VertexRule, outer, roi_align
from babelrs_geo.models.suppression import batched_nms


@dataclass(frozen=True)
class RPNConfig:
    """Anchors, sampling and proposals of the oriented RPN. Defaults are the paper's."""

    channels: int = 256
    strides: tuple[int, ...] = (4, 8, 16, 32, 64)
    scale: float = 8.0
    """Anchor side in strides."""
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    positive_iou: float = 0.7
    negative_iou: float = 0.3
    samples: int = 256
    positive_share: float = 0.5
    pre_nms: int = 2000
    nms_iou: float = 0.8
    proposals: int = 2000
    vertex_rule: VertexRule = "consistent"
    """How boxes are encoded in training: "published" as the original, which loses the width of long boxes that are
    almost upright, or "consistent". The same weights decode either.
    """


@dataclass(frozen=True)
class RoIConfig:
    """Size, sampling and output of the box head. Defaults are the paper's."""

    channels: int = 1024
    strides: tuple[int, ...] = (4, 8, 16, 32)
    base_size: float = 56.0
    """A box of this side, in pixels, is read from the second-finest level's lower bound."""
    pooled: int = 7
    positive_iou: float = 0.5
    samples: int = 512
    positive_share: float = 0.25
    box_weight: float = 1.0
    """Of the boxes' loss beside the classes'."""
    score: float = 0.05
    nms_iou: float = 0.1
    max_boxes: int = 2000
    start_stds: tuple[float, float] | None = None
    """Deviations from which the class and box layers start. None is Xavier's normal start, which the original's
    layers in fact get, whatever its configuration asks for; (0.01, 0.001) is Faster R-CNN's.
    """


@dataclass(frozen=True)
class OrientedTarget:
    """Truth of one image: le90 boxes (G, 5); labels (G,); `size` is (height, width) without padding."""

    boxes: Tensor
    labels: Tensor
    size: tuple[int, int]


def sample(owner: Tensor, count: int, share: float) -> tuple[Tensor, Tensor]:
    """Random indices of positives (owner >= 0) and negatives (owner == -1); others (-2) are never drawn."""
    positive, negative = (owner >= 0).nonzero()[:, 0], (owner == -1).nonzero()[:, 0]
    most = int(count * share)
    if len(positive) > most:
        positive = positive[torch.randperm(len(positive), device=owner.device)[:most]]
    rest = count - len(positive)
    if len(negative) > rest:
        negative = negative[torch.randperm(len(negative), device=owner.device)[:rest]]
    return positive, negative


class OrientedRPN(nn.Module):
    """Oriented proposals from five maps."""

    def __init__(self, config: RPNConfig, in_channels: int) -> None:
        super().__init__()
        self.config, self.coder = config, MidpointOffset(config.vertex_rule)
        anchors = len(config.ratios)
        self.rpn_conv = nn.Conv2d(in_channels, config.channels, 3, padding=1)
        self.rpn_cls = nn.Conv2d(config.channels, anchors, 1)
        self.rpn_reg = nn.Conv2d(config.channels, 6 * anchors, 1)
        for layer in (self.rpn_conv, self.rpn_cls, self.rpn_reg):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(cast(Tensor, layer.bias))

    def forward(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Per level: objectness (N, h * w * anchors) and deltas (N, h * w * anchors, 6), float32."""
        scores, deltas = [], []
        for m in maps:
            x = F.relu(self.rpn_conv(m))
            scores.append(self.rpn_cls(x).permute(0, 2, 3, 1).flatten(1).float())
            deltas.append(self.rpn_reg(x).permute(0, 2, 3, 1).reshape(x.shape[0], -1, 6).float())
        return scores, deltas

    def anchors(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Upright anchors (h * w * ratios, 4) a level."""
        out = []
        for m, stride in zip(maps, self.config.strides, strict=True):
            ratio = torch.tensor(self.config.ratios, device=m.device).sqrt()
            side = self.config.scale * stride
            half = torch.stack([side / ratio, side * ratio], -1) / 2  # height / width is the ratio
            y, x = (torch.arange(n, device=m.device, dtype=torch.float32) * stride for n in m.shape[2:])
            yy, xx = torch.meshgrid(y, x, indexing="ij")
            centre = torch.stack([xx, yy], -1).reshape(-1, 1, 2)
            out.append(torch.cat([centre - half, centre + half], -1).reshape(-1, 4))
        return out

    def assign(self, anchors: Tensor, target: OrientedTarget) -> Tensor:
        """Owner (A,) of each anchor by IoU with the boxes' bounds: an index, -1 background, -2 ignored."""
        from torchvision.ops import box_iou

        c, (height, width) = self.config, target.size
        inside = (anchors[:, :2] >= 0).all(1) & (anchors[:, 2] < width) & (anchors[:, 3] < height)
        owner = torch.full((len(anchors),), -2, device=anchors.device)
        if not len(target.boxes):
            owner[inside] = -1
            return owner
        at = inside.nonzero()[:, 0]
        if not len(at):
            return owner
        iou = box_iou(anchors[at], outer(target.boxes))  # (a, G)
        best, which = iou.max(1)
        local = torch.full_like(at, -2)
        local[best < c.negative_iou] = -1
        local[best >= c.positive_iou] = which[best >= c.positive_iou]
        # Every box gets its best anchors, ties included, unless even they are background; of several the last.
        top = iou.amax(0)
        best_of = (iou == top) & (top >= c.negative_iou)
        last = torch.where(best_of, torch.arange(len(top), device=iou.device), -1).amax(1)
        owner[at] = torch.where(last >= 0, last, local)
        return owner

    def loss(
        self,
        maps: Sequence[Tensor],
        outputs: tuple[list[Tensor], list[Tensor]],
        targets: Sequence[OrientedTarget],
    ) -> dict[str, Tensor]:
        """Binary cross-entropy and smooth L1 (beta 1/9) over sampled anchors of all images."""
        anchors = torch.cat(self.anchors(maps))
        scores, deltas = torch.cat(outputs[0], 1), torch.cat(outputs[1], 1)
        logits, truths, found, at, boxes, count = [], [], [], [], [], 0
        for i, target in enumerate(targets):
            owner = self.assign(anchors, target)
            positive, negative = sample(owner, self.config.samples, self.config.positive_share)
            count += max(len(positive), 1) + max(len(negative), 1)
            logits.append(scores[i, torch.cat([positive, negative])])
            truths += [scores.new_ones(len(positive)), scores.new_zeros(len(negative))]
            found.append(deltas[i, positive])
            at.append(anchors[positive])
            boxes.append(target.boxes[owner[positive]])
        classes = F.binary_cross_entropy_with_logits(torch.cat(logits), torch.cat(truths), reduction="sum")
        wanted = self.coder.encode(torch.cat(at), torch.cat(boxes))
        errors = F.smooth_l1_loss(torch.cat(found), wanted, beta=1 / 9, reduction="sum")
        return {"loss_rpn_cls": classes / count, "loss_rpn_bbox": errors / count}

    @torch.no_grad()
    def proposals(self, maps: Sequence[Tensor], outputs: tuple[list[Tensor], list[Tensor]]) -> list[Tensor]:
        """Per image the best le90 boxes (P, 5), after NMS of their bounds level by level."""
        c, count = self.config, len(maps[0])
        anchors, deltas, values, levels = [], [], [], []
        for level, (anchor, score, delta) in enumerate(zip(self.anchors(maps), *outputs, strict=True)):
            value, order = score.sort(dim=1, descending=True, stable=True)
            value, order = value[:, : c.pre_nms], order[:, : c.pre_nms]
            values.append(value)
            anchors.append(anchor[order])
            deltas.append(delta.gather(1, order.unsqueeze(-1).expand(-1, -1, delta.shape[-1])))
            levels.append(torch.full_like(order[0], level))
        # All images' boxes at once: few large operations, where a GPU waits for many small ones.
        boxes = self.coder.decode(torch.cat(anchors, 1).flatten(0, 1), torch.cat(deltas, 1).flatten(0, 1))
        bounds, level_of = outer(boxes).unflatten(0, (count, -1)), torch.cat(levels)
        kept = [
            batched_nms(bound, value, level_of, c.nms_iou)[: c.proposals]
            for bound, value in zip(bounds, torch.cat(values, 1).sigmoid(), strict=True)
        ]
        return [box[keep] for box, keep in zip(boxes.unflatten(0, (count, -1)), kept, strict=True)]


class _BoxHead(nn.Module):
    """Two shared layers on pooled features, then K + 1 class logits and one box."""

    def __init__(self, config: RoIConfig, in_channels: int, classes: int) -> None:
        super().__init__()
        sizes = [in_channels * config.pooled**2, config.channels, config.channels]
        self.shared_fcs = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))
        self.fc_cls = nn.Linear(config.channels, classes + 1)
        self.fc_reg = nn.Linear(config.channels, 5)
        for layer in (*self.shared_fcs, self.fc_cls, self.fc_reg):
            nn.init.xavier_normal_(cast(Tensor, layer.weight))
            nn.init.zeros_(cast(Tensor, layer.bias))
        if config.start_stds:
            for layer, std in zip((self.fc_cls, self.fc_reg), config.start_stds, strict=True):
                nn.init.normal_(layer.weight, std=std)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        x = pooled.flatten(1)
        for layer in self.shared_fcs:
            x = F.relu(layer(x))
        return self.fc_cls(x).float(), self.fc_reg(x).float()


class OrientedRoI(nn.Module):
    """Classes and refined boxes of proposals. Background is the last logit."""

    def __init__(self, config: RoIConfig, in_channels: int, classes: int) -> None:
        super().__init__()
        self.config, self.classes, self.coder = config, classes, RotatedDelta()
        self.bbox_head = _BoxHead(config, in_channels, classes)

    def levels(self, boxes: Tensor) -> Tensor:
        """Which map each box is read from (FPN eq. 1)."""
        side = (boxes[:, 2] * boxes[:, 3]).sqrt()
        return (
            (side / self.config.base_size + 1e-6).log2().floor().clamp(0, len(self.config.strides) - 1).long()
        )

    def forward(self, maps: Sequence[Tensor], proposals: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits (sum P, K + 1) and deltas (sum P, 5) of all images' proposals, in order."""
        boxes = torch.cat(list(proposals))
        image = torch.cat([torch.full((len(p),), i, device=boxes.device) for i, p in enumerate(proposals)])
        maps = maps[: len(self.config.strides)]
        pooled = roi_align(maps, boxes, image, self.levels(boxes), self.config.strides, self.config.pooled)
        return self.bbox_head(pooled)

    def assign(self, proposals: Tensor, target: OrientedTarget) -> Tensor:
        """Owner (P,) of each proposal by rotated IoU: an index or -1 for background."""
        owner = torch.full((len(proposals),), -1, device=proposals.device)
        if len(target.boxes) and len(proposals):
            a, b = (t.detach().double().cpu().clone() for t in (proposals, target.boxes))
            a[:, 2:4].clamp_(min=1e-3)
            b[:, 2:4].clamp_(min=1e-3)
            iou = torch.from_numpy(rotated_iou(from_le90(a.numpy()), from_le90(b.numpy()))).to(proposals)
            best, which = iou.max(1)
            owner[best >= self.config.positive_iou] = which[best >= self.config.positive_iou]
        return owner

    def loss(
        self, maps: Sequence[Tensor], proposals: Sequence[Tensor], targets: Sequence[OrientedTarget]
    ) -> dict[str, Tensor]:
        """Cross-entropy over samples; smooth L1 of positives, over all samples too, times `box_weight`."""
        c = self.config
        boxes, labels, at, truths, positives = [], [], [], [], []
        for found, target in zip(proposals, targets, strict=True):
            candidates = torch.cat([target.boxes, found])
            owner = self.assign(candidates, target)
            positive, negative = sample(owner, c.samples, c.positive_share)
            mine = owner[positive]
            boxes.append(candidates[torch.cat([positive, negative])])
            labels.append(torch.cat([target.labels[mine], torch.full_like(negative, self.classes)]))
            at.append(candidates[positive])
            truths.append(target.boxes[mine])
            positives.append(torch.cat([torch.ones_like(positive), torch.zeros_like(negative)]).bool())
        logits, deltas = self(maps, boxes)
        picked = deltas[torch.cat(positives)]
        wanted, count = self.coder.encode(torch.cat(at), torch.cat(truths)), max(len(logits), 1)
        return {
            "loss_cls": F.cross_entropy(logits, torch.cat(labels), reduction="sum") / count,
            "loss_bbox": c.box_weight * F.smooth_l1_loss(picked, wanted, reduction="sum") / count,
        }

    def predict(
        self,
        maps: Sequence[Tensor],
        proposals: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
        labels: slice,
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Per image le90 boxes (n, 5), scores (n,), labels (n,), best first; only labels in the slice are kept."""
        logits, deltas = self(maps, proposals)
        scores = logits.softmax(-1)[:, labels]
        out, start = [], 0
        for proposal, size in zip(proposals, sizes, strict=True):
            rows = slice(start, start + len(proposal))
            start += len(proposal)
            boxes = self.coder.decode(proposal, deltas[rows], size)
            where, what = (scores[rows] > self.config.score).nonzero(as_tuple=True)
            value, name = scores[rows][where, what], what + (labels.start or 0)
            keep = rotated_nms(boxes[where], value, name, self.config.nms_iou)[: self.config.max_boxes]
            out.append((boxes[where][keep], value[keep], name[keep]))
        return out


def rotated_nms(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """Greedy class-wise NMS of le90 boxes by exact IoU: kept indices, best first. Boxes at the threshold
    go.
    """
    keep = torch.zeros(len(scores), dtype=torch.bool)
    for label in labels.unique().tolist():
        mine = (labels == label).nonzero()[:, 0]
        mine = mine[scores[mine].sort(descending=True, stable=True).indices]
        upright = from_le90(boxes[mine].double().cpu().numpy())
        rival = rotated_iou(upright, upright) >= threshold
        gone = np.zeros(len(mine), np.bool_)
        for i in range(len(mine)):
            if not gone[i]:
                gone[i + 1 :] |= rival[i, i + 1 :]
        keep[mine.cpu()] = torch.from_numpy(~gone)
    kept = keep.nonzero()[:, 0].to(scores.device)
    return kept[scores[kept].sort(descending=True, stable=True).indices]
