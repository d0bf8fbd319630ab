"""The SAR head: generalized focal loss on horizontal boxes, one anchor a cell (BabelRS section 3; GFL, Li et
al. 2020).

Legend: N images, L levels, A anchors of all levels (one a cell), G boxes of an image, K classes, R =
`reg_max`. Boxes here are x1, y1, x2, y2 in pixels of the network's input. Sides are left, top, right, bottom
distances in strides. Anchors are squares of side 8 strides centred on (j * stride, i * stride): no half-cell
offset, as published.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from babelrs_geo.errors import ParameterError
from babelrs_geo.models.suppression import batched_nms

PRIOR_LOGIT = -math.log(99)
"""Where class logits start: one object in a hundred cells."""


@dataclass(frozen=True)
class GFLConfig:
    """Size and thresholds of the head. Defaults are the paper's."""

    channels: int = 256
    convs: int = 4
    groups: int = 32
    strides: tuple[int, ...] = (8, 16, 32, 64, 128)
    anchor_scale: float = 8.0
    reg_max: int = 16
    candidates: int = 9
    """Anchors a level that ATSS considers for each box."""
    box_weight: float = 2.0
    dfl_weight: float = 0.25
    score: float = 0.05
    pre_nms: int = 1000
    nms_iou: float = 0.6
    max_boxes: int = 100

    def __post_init__(self) -> None:
        if self.groups < 1 or self.channels % self.groups:
            raise ParameterError(
                f"gfl.groups is {self.groups}; expected a divisor of gfl.channels, {self.channels}"
            )


@dataclass(frozen=True)
class HorizontalTarget:
    """Truth of one image: boxes (G, 4) x1, y1, x2, y2; labels (G,); `size` is (height, width) without padding."""

    boxes: Tensor
    labels: Tensor
    size: tuple[int, int]


class _ConvNorm(nn.Module):
    def __init__(self, cin: int, cout: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, 3, padding=1, bias=False)
        self.gn = nn.GroupNorm(groups, cout)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.gn(self.conv(x)))


class _Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class _Integral(nn.Module):
    """Expectation of a discrete distribution over 0..R: a side's length in strides (GFL eq. 4)."""

    project: Tensor

    def __init__(self, reg_max: int) -> None:
        super().__init__()
        self.register_buffer("project", torch.linspace(0, reg_max, reg_max + 1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, 4 * (R + 1)) to sides (n, 4)."""
        return x.unflatten(-1, (4, -1)).softmax(-1) @ self.project.to(x.dtype)


def atss_assign(
    anchors: Tensor, counts: Sequence[int], boxes: Tensor, candidates: int, valid: Tensor | None = None
) -> Tensor:
    """Adaptive training sample selection (Zhang et al. 2020): index of each anchor's box, -1 for background.

    `anchors` (A, 4) ordered by level with `counts` a level, `boxes` (G, 4), `valid` (A,) leaves anchors out.
    Per box the anchors with the closest centres of every level are candidates; those with IoU of at least
    mean + std of all candidates, and their centre inside the box, are positive. A contested anchor goes to
    its best IoU.
    """
    from torchvision.ops import box_iou

    assigned = torch.full((len(anchors),), -1, dtype=torch.long, device=anchors.device)
    usable = torch.arange(len(anchors), device=anchors.device) if valid is None else valid.nonzero()[:, 0]
    if not len(boxes) or not len(usable):
        return assigned
    level = torch.repeat_interleave(
        torch.arange(len(counts), device=anchors.device), torch.tensor(counts, device=anchors.device)
    )[usable]
    a = anchors[usable]
    iou = box_iou(a, boxes)  # (A, G)
    centres, middles = (a[:, :2] + a[:, 2:]) / 2, (boxes[:, :2] + boxes[:, 2:]) / 2
    distance = (centres[:, None] - middles[None]).pow(2).sum(-1).sqrt()
    picked = []
    for i in range(len(counts)):
        rows = (level == i).nonzero()[:, 0]
        if len(rows):
            nearest = distance[rows].topk(min(candidates, len(rows)), dim=0, largest=False).indices
            picked.append(rows[nearest])
    index = torch.cat(picked)  # (candidates, G)
    overlap = iou.gather(0, index)
    # The deviation of a single candidate is undefined; zero keeps that candidate.
    spread = overlap.std(0) if len(overlap) > 1 else torch.zeros_like(overlap[0])
    sides = torch.cat([centres[index] - boxes[None, :, :2], boxes[None, :, 2:] - centres[index]], -1)
    positive = (overlap >= overlap.mean(0) + spread) & (sides.amin(-1) > 0.01)
    contest = torch.full_like(iou, -torch.inf)
    rows, cols = index[positive], positive.nonzero()[:, 1]
    contest[rows, cols] = iou[rows, cols]
    best, owner = contest.max(1)
    owner[best == -torch.inf] = -1
    assigned[usable] = owner
    return assigned


class GFLHead(nn.Module):
    """Scores and box distributions on five maps; its losses and its boxes."""

    def __init__(self, config: GFLConfig, in_channels: int, classes: int) -> None:
        super().__init__()
        self.config, self.classes = config, classes
        widths = [in_channels] + [config.channels] * config.convs
        self.cls_convs = nn.ModuleList(
            _ConvNorm(a, b, config.groups) for a, b in zip(widths, widths[1:], strict=False)
        )
        self.reg_convs = nn.ModuleList(
            _ConvNorm(a, b, config.groups) for a, b in zip(widths, widths[1:], strict=False)
        )
        self.gfl_cls = nn.Conv2d(config.channels, classes, 3, padding=1)
        self.gfl_reg = nn.Conv2d(config.channels, 4 * (config.reg_max + 1), 3, padding=1)
        self.scales = nn.ModuleList(_Scale() for _ in config.strides)
        self.integral = _Integral(config.reg_max)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.constant_(cast(Tensor, self.gfl_cls.bias), PRIOR_LOGIT)

    def forward(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Per level: class logits (N, K, h, w) and side logits (N, 4 (R + 1), h, w), both float32."""
        scores, sides = [], []
        for x, scale in zip(maps, self.scales, strict=True):
            c = r = x
            for conv in self.cls_convs:
                c = conv(c)
            for conv in self.reg_convs:
                r = conv(r)
            scores.append(self.gfl_cls(c).float())
            sides.append(scale(self.gfl_reg(r)).float())
        return scores, sides

    def centres(self, scores: Sequence[Tensor]) -> list[Tensor]:
        """Anchor centres (h * w, 2) in pixels, a tensor a level."""
        out = []
        for s, stride in zip(scores, self.config.strides, strict=True):
            y = torch.arange(s.shape[2], device=s.device) * stride
            x = torch.arange(s.shape[3], device=s.device) * stride
            yy, xx = torch.meshgrid(y, x, indexing="ij")
            out.append(torch.stack([xx.flatten(), yy.flatten()], -1).float())
        return out

    def loss(self, maps: Sequence[Tensor], targets: Sequence[HorizontalTarget]) -> dict[str, Tensor]:
        """Quality focal, GIoU and distribution focal loss, summed over levels (GFL eq. 1 to 6)."""
        scores, sides = self(maps)
        c = self.config
        per_level = self.centres(scores)
        counts = [len(p) for p in per_level]
        centre = torch.cat(per_level)
        stride = torch.cat([centre.new_full((n,), s) for n, s in zip(counts, c.strides, strict=True)])
        half = (stride * c.anchor_scale / 2).unsqueeze(1)
        anchors = torch.cat([centre - half, centre + half], -1)
        logits = torch.cat([s.flatten(2) for s in scores], -1).transpose(1, 2)  # (N, A, K)
        distributions = torch.cat([s.flatten(2) for s in sides], -1).transpose(1, 2)  # (N, A, 4 (R + 1))

        owners = [atss_assign(anchors, counts, t.boxes, c.candidates) for t in targets]
        positives = sum(max(int((o >= 0).sum()), 1) for o in owners)
        image, anchor, box, label = [], [], [], []
        for n, (owner, t) in enumerate(zip(owners, targets, strict=True)):
            at = (owner >= 0).nonzero()[:, 0]
            image.append(torch.full_like(at, n))
            anchor.append(at)
            box.append(t.boxes[owner[at]])
            label.append(t.labels[owner[at]])
        i, a, gt, k = torch.cat(image), torch.cat(anchor), torch.cat(box), torch.cat(label)

        quality = torch.zeros_like(logits)
        if not len(a):
            zero = distributions.sum() * 0
            return {
                "loss_cls": self._quality_loss(logits, quality) / positives,
                "loss_bbox": zero,
                "loss_dfl": zero,
            }
        from torchvision.ops import generalized_box_iou_loss

        s = stride[a].unsqueeze(1)
        at = centre[a] / s
        picked = distributions[i, a]
        length = self.integral(picked)
        boxes = torch.cat([at - length[:, :2], at + length[:, 2:]], -1)
        truth = gt / s
        quality[i, a, k] = _paired_iou(boxes.detach(), truth)
        weight = logits.detach()[i, a].sigmoid().amax(-1)
        loss_box = c.box_weight * (generalized_box_iou_loss(boxes, truth, eps=1e-7) * weight).sum()
        wanted = torch.cat([at - truth[:, :2], truth[:, 2:] - at], -1).clamp(0, c.reg_max - 0.1)
        loss_dfl = c.dfl_weight * (self._distribution_loss(picked, wanted).sum(-1) * weight).sum() / 4
        norm = weight.sum().clamp(min=1)
        return {
            "loss_cls": self._quality_loss(logits, quality) / positives,
            "loss_bbox": loss_box / norm,
            "loss_dfl": loss_dfl / norm,
        }

    @staticmethod
    def _quality_loss(logits: Tensor, quality: Tensor) -> Tensor:
        gap = (quality - logits.sigmoid()).abs().pow(2)
        return (F.binary_cross_entropy_with_logits(logits, quality, reduction="none") * gap).sum()

    @staticmethod
    def _distribution_loss(logits: Tensor, wanted: Tensor) -> Tensor:
        """Cross-entropy (n, 4) to the two whole numbers around each wanted length."""
        log = logits.unflatten(-1, (4, -1)).log_softmax(-1)
        low = wanted.long()
        high_share = wanted - low
        at_low = log.gather(-1, low.unsqueeze(-1)).squeeze(-1)
        at_high = log.gather(-1, (low + 1).unsqueeze(-1)).squeeze(-1)
        return -(at_low * (1 - high_share) + at_high * high_share)

    def predict(
        self, maps: Sequence[Tensor], sizes: Sequence[tuple[int, int]], labels: slice
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Per image boxes (n, 4), scores (n,), labels (n,), best first; only labels in the slice are considered."""
        return self.boxes(self(maps), sizes, labels)

    def boxes(
        self, outputs: tuple[list[Tensor], list[Tensor]], sizes: Sequence[tuple[int, int]], labels: slice
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """What `predict` gives, from what `forward` gave."""
        scores, sides = outputs
        c = self.config
        centres = self.centres(scores)
        out = []
        for i, (height, width) in enumerate(sizes):
            boxes, confidences, names = [], [], []
            for level, stride in enumerate(c.strides):
                confidence = scores[level][i, labels].flatten(1).T.sigmoid()  # (h * w, K)
                where, what = (confidence > c.score).nonzero(as_tuple=True)
                value, order = confidence[where, what].sort(descending=True, stable=True)
                order = order[: c.pre_nms]
                where, what = where[order], what[order]
                length = self.integral(sides[level][i].flatten(1).T[where]) * stride
                at = centres[level][where]
                box = torch.cat([at - length[:, :2], at + length[:, 2:]], -1)
                box[:, 0::2] = box[:, 0::2].clamp(0, width)
                box[:, 1::2] = box[:, 1::2].clamp(0, height)
                boxes.append(box)
                confidences.append(value[: c.pre_nms])
                names.append(what + (labels.start or 0))
            all_boxes, value, name = torch.cat(boxes), torch.cat(confidences), torch.cat(names)
            keep = batched_nms(all_boxes, value, name, c.nms_iou)[: c.max_boxes]
            out.append((all_boxes[keep], value[keep], name[keep]))
        return out


def _paired_iou(a: Tensor, b: Tensor) -> Tensor:
    low, high = torch.maximum(a[:, :2], b[:, :2]), torch.minimum(a[:, 2:], b[:, 2:])
    common = (high - low).clamp(min=0).prod(-1)
    union = (a[:, 2:] - a[:, :2]).prod(-1) + (b[:, 2:] - b[:, :2]).prod(-1) - common
    return common / union.clamp(min=1e-6)
