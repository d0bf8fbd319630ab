"""Rectangles inside the network: coders come back, RoIAlign equals plain loops and its own differences."""

from __future__ import annotations

import math

import model_reference
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_models import same
from torch import Tensor
from torch.autograd import gradcheck

from babelrs_geo.boxes import from_le90, rotated_iou_pairs
from babelrs_geo.models.rotated import (
    MidpointOffset,
    RotatedDelta,
    from_quads,
    outer,
    roi_align,
    vertices,
    wrap,
)

sizes = st.floats(6, 120)
turns = st.floats(-1.57, 1.57) | st.floats(-0.02, 0.02)
oriented = st.tuples(st.floats(-200, 200), st.floats(-200, 200), sizes, sizes, turns)


def le90(box: tuple[float, ...]) -> Tensor:
    cx, cy, w, h, a = box
    if w < h:
        w, h, a = h, w, a + math.pi / 2
    return torch.tensor(
        [[cx, cy, w, h, float(wrap(torch.tensor(a, dtype=torch.float64)))]], dtype=torch.float64
    )


def furthest_corner(a: Tensor, b: Tensor) -> float:
    """Pixels between a corner of one rectangle and the nearest of the other."""
    between = torch.cdist(vertices(a), vertices(b))[0]
    return max(between.amin(0).max().item(), between.amin(1).max().item())


@settings(max_examples=150)
@given(oriented, st.tuples(*[st.floats(-3, 3)] * 4))
@example((100.0, 100.0, 100.0, 6.0, 0.002), (0.0, 0.0, 0.0, 0.0))
def test_midpoint_offsets_come_back_within_a_fifth_of_a_pixel(
    box: tuple[float, ...], shift: tuple[float, ...]
) -> None:
    """The vertex rule takes vertices within .1 px of the extreme for extreme."""
    boxes = le90(box)
    anchors = outer(boxes) + torch.tensor([shift], dtype=torch.float64).clamp(-2.9, 2.9)
    coder = MidpointOffset()
    assert furthest_corner(boxes, coder.decode(anchors, coder.encode(anchors, boxes))) < 0.2


def test_the_published_vertex_rule_loses_the_width_of_long_upright_boxes() -> None:
    boxes = torch.tensor([[100.0, 100, 100, 6, 0.002]])
    coder = MidpointOffset("published")
    assert coder.decode(outer(boxes), coder.encode(outer(boxes), boxes))[0, 3] < 0.1


@settings(max_examples=100)
@given(oriented, st.floats(-1.5, 1.5))
def test_rotated_deltas_come_back_exactly(box: tuple[float, ...], turn: float) -> None:
    boxes = le90(box)
    proposals = boxes + torch.tensor([[2.0, -3.0, 4.0, 1.0, turn]], dtype=torch.float64)
    coder = RotatedDelta()
    back = coder.decode(proposals, coder.encode(proposals, boxes))
    assert furthest_corner(boxes, back) < 1e-9
    assert rotated_iou_pairs(from_le90(boxes.numpy()), from_le90(back.numpy()))[0] > 1 - 1e-6
    assert (back[0, 2] >= back[0, 3]) and -math.pi / 2 <= back[0, 4] < math.pi / 2


@settings(max_examples=60)
@given(oriented)
def test_corners_give_the_rectangle_back(box: tuple[float, ...]) -> None:
    boxes = le90(box)
    assert furthest_corner(boxes, from_quads(vertices(boxes))) < 1e-9
    corner = vertices(boxes)
    same(torch.cat([corner.amin(1), corner.amax(1)], 1), outer(boxes), 1e-9)


def test_decoded_sides_and_centres_are_limited() -> None:
    boxes = torch.tensor([[50.0, 50, 20, 10, 0.0]])
    far = torch.tensor([[100.0, -100, 99, -99, 0]])
    cx, cy, w, h, _ = RotatedDelta().decode(boxes, far, (80, 60))[0]
    assert (cx, cy) == (59, 0)
    assert w == pytest.approx(20 * 1000 / 16, rel=1e-5) and h == pytest.approx(10 * 16 / 1000, rel=1e-5)


# ---- RoIAlign


def rois(count: int) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    maps = [torch.randn(2, 3, 12, 16, dtype=torch.float64), torch.randn(2, 3, 6, 8, dtype=torch.float64)]
    boxes = torch.rand(count, 5, dtype=torch.float64)
    boxes = boxes * torch.tensor([140.0, 110, 60, 40, 3]) + torch.tensor([-6.0, -6, 4, 4, -1.5])
    return maps, boxes, torch.arange(count) % 2, (torch.arange(count) // 2) % 2


@pytest.mark.parametrize("samples", [(2, 2), (1, 3)])
def test_roi_align_equals_plain_loops(samples: tuple[int, int]) -> None:
    """Boxes over the edge and outside included."""
    maps, boxes, image, level = rois(12)
    boxes[0, :2] = torch.tensor([-90.0, 40])
    got = roi_align(maps, boxes, image, level, (8, 16), 3, samples)
    for k in range(len(boxes)):
        cells = maps[level[k]][image[k]].numpy()
        wanted = model_reference.roi_align(cells, boxes[k].numpy(), (8, 16)[level[k]], 3, samples)
        np.testing.assert_allclose(got[k].numpy(), wanted, atol=1e-12)
    single = roi_align([m.float() for m in maps], boxes.float(), image, level, (8, 16), 3, samples)
    assert single.dtype == torch.float32
    same(single.double(), got, 1e-4)


def test_roi_aligns_gradient_equals_its_differences() -> None:
    maps, boxes, image, level = rois(6)
    for m in maps:
        m.requires_grad_()
    assert gradcheck(lambda *m: roi_align(m, boxes, image, level, (8, 16), 3), maps)
    # It flows to the maps only, as in the original.
    assert not roi_align(
        [m.detach() for m in maps], boxes.requires_grad_(), image, level, (8, 16)
    ).requires_grad
