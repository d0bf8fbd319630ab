"""Rectangles inside the network: le90 geometry, the two box coders, and RoIAlign on rotated boxes.

Boxes here are (n, 5) tensors cx, cy, w, h, a in pixels of the network's input, `a` in radians clockwise on
the image, in [-pi/2, pi/2): the convention of the published weights, called le90. Outside `models/` boxes are
`cxcywhr`, and `babelrs_geo.boxes` converts. Section numbers are those of Oriented R-CNN (Xie et al. 2021) and
of BabelRS.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_RATIO = abs(math.log(16 / 1000))
"""Largest change of a side, as a logarithm, that a coder decodes."""


def wrap(angle: Tensor) -> Tensor:
    """Angles in [-pi/2, pi/2)."""
    return (angle + math.pi / 2) % math.pi - math.pi / 2


def vertices(boxes: Tensor) -> Tensor:
    """Corners (n, 4, 2) of le90 boxes, counter-clockwise on the image, first side along the height."""
    cos, sin = boxes[:, 4].cos(), boxes[:, 4].sin()
    along = torch.stack([cos, sin], -1) * boxes[:, 2:3] / 2
    across = torch.stack([-sin, cos], -1) * boxes[:, 3:4] / 2
    centre = boxes[:, :2]
    return torch.stack(
        [centre + along + across, centre + along - across, centre - along - across, centre - along + across],
        1,
    )


def outer(boxes: Tensor) -> Tensor:
    """Upright bounds (n, 4) x1, y1, x2, y2 of le90 boxes."""
    cos, sin = boxes[:, 4].cos().abs(), boxes[:, 4].sin().abs()
    half = torch.stack([boxes[:, 2] * cos + boxes[:, 3] * sin, boxes[:, 2] * sin + boxes[:, 3] * cos], -1) / 2
    return torch.cat([boxes[:, :2] - half, boxes[:, :2] + half], -1)


def from_quads(quads: Tensor) -> Tensor:
    """Rectangles given by their corners (n, 4, 2) as le90 boxes with w >= h."""
    first, second = quads[:, 1] - quads[:, 0], quads[:, 3] - quads[:, 0]
    a, b = first.norm(dim=-1), second.norm(dim=-1)
    direction = torch.where((a > b).unsqueeze(-1), first, second)
    angle = wrap(torch.atan2(direction[:, 1], direction[:, 0]))
    centre = (quads[:, 0] + quads[:, 2]) / 2
    return torch.cat([centre, torch.stack([torch.maximum(a, b), torch.minimum(a, b), angle], -1)], -1)


VertexRule = Literal["consistent", "published"]


class MidpointOffset:
    """Oriented boxes as upright ones plus two midpoint offsets (Oriented R-CNN section 3.1).

    The topmost and the rightmost vertex are encoded. Of vertices within .1 px of the extreme the original takes
    the one furthest right, or down ("published"). Where only one of the two pairs is that close, in long boxes
    turned by a trifle, it so takes two ends of one diagonal, and the decoded box has no width. "consistent" looks
    at such boxes exactly; all others are the same, within .2 px of the truth.
    """

    stds = (1.0, 1.0, 1.0, 1.0, 0.5, 0.5)

    def __init__(self, rule: VertexRule = "consistent") -> None:
        self.rule = rule

    def encode(self, anchors: Tensor, boxes: Tensor) -> Tensor:
        """Deltas (n, 6) from upright anchors (n, 4) x1, y1, x2, y2 to le90 boxes (n, 5)."""
        p = _centre_size(anchors)
        corner = vertices(boxes)
        g = _centre_size(torch.cat([corner.amin(1), corner.amax(1)], -1))
        x, y = corner.unbind(-1)
        below, left = y - y.amin(1, keepdim=True), x.amax(1, keepdim=True) - x
        top, right = below <= 0.1, left <= 0.1
        if self.rule == "consistent":
            upright = ((top.sum(1) > 1) & (right.sum(1) > 1)).unsqueeze(1)
            top, right = top & (upright | (below == 0)), right & (upright | (left == 0))
        at_top = torch.where(top, x, -torch.inf).amax(1)
        at_right = torch.where(right, y, -torch.inf).amax(1)
        deltas = torch.stack(
            [
                *((g[:, :2] - p[:, :2]) / p[:, 2:]).unbind(-1),
                *(g[:, 2:] / p[:, 2:]).log().unbind(-1),
                (at_top - g[:, 0]) / g[:, 2],
                (at_right - g[:, 1]) / g[:, 3],
            ],
            -1,
        )
        return deltas / deltas.new_tensor(self.stds)

    def decode(self, anchors: Tensor, deltas: Tensor) -> Tensor:
        """le90 boxes (n, 5) from upright anchors (n, 4) and deltas (n, 6)."""
        d = deltas * deltas.new_tensor(self.stds)
        p = _centre_size(anchors)
        centre = p[:, :2] + p[:, 2:] * d[:, :2]
        size = p[:, 2:] * d[:, 2:4].clamp(-MAX_RATIO, MAX_RATIO).exp()
        (x1, y1), (x2, y2) = (centre - size / 2).unbind(-1), (centre + size / 2).unbind(-1)
        shift = d[:, 4:].clamp(-0.5, 0.5) * size
        across, down = shift.unbind(-1)
        cx, cy = centre.unbind(-1)
        quad = torch.stack(
            [
                torch.stack([cx + across, y1], -1),
                torch.stack([x2, cy + down], -1),
                torch.stack([cx - across, y2], -1),
                torch.stack([x1, cy - down], -1),
            ],
            1,
        )
        # A parallelogram becomes a rectangle by stretching its shorter diagonal to the longer.
        arm = quad - centre.unsqueeze(1)
        length = arm.norm(dim=-1, keepdim=True)
        return from_quads(centre.unsqueeze(1) + arm * (length.amax(1, keepdim=True) / length))


class RotatedDelta:
    """Oriented boxes relative to oriented proposals, in the proposal's own axes (Oriented R-CNN section 3.2)."""

    stds = (0.1, 0.1, 0.2, 0.2, 0.1)

    def encode(self, proposals: Tensor, boxes: Tensor) -> Tensor:
        """Deltas (n, 5); of the two ways to name a rectangle's sides, the one that turns less is used."""
        p, g = proposals, boxes
        cos, sin = p[:, 4].cos(), p[:, 4].sin()
        away = g[:, :2] - p[:, :2]
        dx = (cos * away[:, 0] + sin * away[:, 1]) / p[:, 2]
        dy = (-sin * away[:, 0] + cos * away[:, 1]) / p[:, 3]
        straight, swapped = wrap(g[:, 4] - p[:, 4]), wrap(g[:, 4] - p[:, 4] + math.pi / 2)
        keep = straight.abs() < swapped.abs()
        w, h = torch.where(keep, g[:, 2], g[:, 3]), torch.where(keep, g[:, 3], g[:, 2])
        turn = torch.where(keep, straight, swapped)
        deltas = torch.stack([dx, dy, (w / p[:, 2]).log(), (h / p[:, 3]).log(), turn], -1)
        return deltas / deltas.new_tensor(self.stds)

    def decode(self, proposals: Tensor, deltas: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """le90 boxes with w >= h; centres are kept inside `size` (height, width) where it is given."""
        p, d = proposals, deltas * deltas.new_tensor(self.stds)
        cos, sin = p[:, 4].cos(), p[:, 4].sin()
        dx, dy = p[:, 2] * d[:, 0], p[:, 3] * d[:, 1]
        cx, cy = p[:, 0] + cos * dx - sin * dy, p[:, 1] + sin * dx + cos * dy
        if size is not None:
            cx, cy = cx.clamp(0, size[1] - 1), cy.clamp(0, size[0] - 1)
        side = p[:, 2:4] * d[:, 2:4].clamp(-MAX_RATIO, MAX_RATIO).exp()
        w, h = side.unbind(-1)
        angle = wrap(p[:, 4] + d[:, 4])
        long = w > h
        angle = torch.where(long, angle, wrap(angle + math.pi / 2))
        return torch.stack([cx, cy, torch.maximum(w, h), torch.minimum(w, h), angle], -1)


def _centre_size(xyxy: Tensor) -> Tensor:
    return torch.cat([(xyxy[:, :2] + xyxy[:, 2:]) / 2, xyxy[:, 2:] - xyxy[:, :2]], -1)


def roi_align(
    maps: Sequence[Tensor],
    boxes: Tensor,
    image: Tensor,
    level: Tensor,
    strides: Sequence[int],
    out: int = 7,
    samples: tuple[int, int] = (2, 2),
) -> Tensor:
    """Features (n, C, out, out) of rotated boxes (n, 5), each read from its own image and level.

    Each bin is the mean of `samples` bilinear samples, so many along the height and along the width of the
    box, pixel centres at halves; a sample more than a cell outside the map counts as zero (mmcv's
    RoIAlignRotated, clockwise, aligned). All bins of all levels are one weighted `embedding_bag` over the
    cells: no loop over boxes, and its gradient is fast on a CPU. It flows to the maps only. In float64 where
    the boxes are, else in float32.
    """
    n, channels = len(boxes), maps[0].shape[1]
    boxes = boxes.detach().to(torch.promote_types(boxes.dtype, torch.float32))
    table = torch.cat([m.permute(0, 2, 3, 1).reshape(-1, channels) for m in maps]).to(boxes.dtype)
    shape = [(m.shape[2], m.shape[3]) for m in maps]
    starts, total = [], 0
    for m, (h, w) in zip(maps, shape, strict=True):
        starts.append(total)
        total += m.shape[0] * h * w
    at = boxes.device
    height = torch.tensor([h for h, _ in shape], device=at)[level]
    width = torch.tensor([w for _, w in shape], device=at)[level]
    start = torch.tensor(starts, device=at)[level] + image * height * width
    scale = 1 / torch.tensor(strides, device=at, dtype=boxes.dtype)[level].unsqueeze(-1)

    centre, size = boxes[:, :2] * scale - 0.5, boxes[:, 2:4] * scale
    down, along = (
        (torch.arange(out * s, device=at, dtype=boxes.dtype) + 0.5) / (out * s) - 0.5 for s in samples
    )
    xx = size[:, 0, None, None] * along[None, None, :]
    yy = size[:, 1, None, None] * down[None, :, None]
    cos, sin = boxes[:, 4].cos()[:, None, None], boxes[:, 4].sin()[:, None, None]
    x = centre[:, 0, None, None] + xx * cos - yy * sin  # (n, out * samples[0], out * samples[1])
    y = centre[:, 1, None, None] + xx * sin + yy * cos
    index, weight = _border_taps(x, y, width[:, None, None], height[:, None, None])
    index = index + start[:, None, None, None]

    def bins(t: Tensor) -> Tensor:
        t = t.view(n, out, samples[0], out, samples[1], 4).permute(0, 1, 3, 2, 4, 5)
        return t.reshape(n * out * out, samples[0] * samples[1] * 4)

    share = bins(weight) / (samples[0] * samples[1])
    pooled = F.embedding_bag(bins(index), table, per_sample_weights=share, mode="sum")
    return pooled.view(n, out, out, channels).permute(0, 3, 1, 2)


def _border_taps(x: Tensor, y: Tensor, width: Tensor, height: Tensor) -> tuple[Tensor, Tensor]:
    """Four cells around each point and their weights (..., 4); points up to a cell outside take the border's value."""
    inside = (x >= -1) & (x <= width) & (y >= -1) & (y <= height)
    x, y = torch.minimum(x.clamp(min=0), width - 1.0), torch.minimum(y.clamp(min=0), height - 1.0)
    x0, y0 = x.floor(), y.floor()
    fx, fy = x - x0, y - y0
    x1, y1 = torch.minimum(x0 + 1, width - 1.0), torch.minimum(y0 + 1, height - 1.0)
    index = torch.stack([y0 * width + x0, y0 * width + x1, y1 * width + x0, y1 * width + x1], -1).long()
    weight = torch.stack([(1 - fx) * (1 - fy), fx * (1 - fy), (1 - fx) * fy, fx * fy], -1)
    return index, weight * inside.unsqueeze(-1)
