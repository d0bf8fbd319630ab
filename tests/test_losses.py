"""Assignments and losses of the heads against plain loops, and their gradients against finite differences."""

from __future__ import annotations

import model_reference
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from torchvision.ops import generalized_box_iou_loss

from babelrs_geo.models.adapter import DeformableAttention
from babelrs_geo.models.gfl import GFLConfig, GFLHead, HorizontalTarget, atss_assign
from babelrs_geo.models.oriented_rcnn import OrientedRoI, OrientedRPN, OrientedTarget, RoIConfig, RPNConfig
from babelrs_geo.models.rotated import outer

seeds = st.integers(0, 10**6)


def upright(rng: np.random.Generator, count: int, side: float = 64) -> np.ndarray:
    corner = rng.uniform(0, side * 0.6, (count, 2))
    return np.concatenate([corner, corner + rng.uniform(6, side * 0.5, (count, 2))], 1)


@settings(max_examples=25)
@given(seeds, st.integers(0, 5), st.integers(1, 9))
def test_atss_equals_plain_loops(seed: int, objects: int, candidates: int) -> None:
    rng = np.random.default_rng(seed)
    anchors, counts = [], []
    for stride in (8, 16, 32):
        grid = np.arange(0, 64, stride)
        x, y = (v.ravel() for v in np.meshgrid(grid, grid))
        # Unequal places, so that no two anchors are equally far.
        centre = np.stack([x, y], 1) + rng.uniform(-0.3, 0.3, (len(x), 2))
        anchors.append(np.concatenate([centre - stride, centre + stride], 1))
        counts.append(len(x))
    anchors, boxes = np.concatenate(anchors), upright(rng, objects)
    got = atss_assign(torch.from_numpy(anchors), counts, torch.from_numpy(boxes), candidates)
    assert got.tolist() == model_reference.atss(anchors, counts, boxes, candidates)


@settings(max_examples=25)
@given(seeds, st.integers(1, 4))
def test_rpn_assignment_equals_plain_loops(seed: int, objects: int) -> None:
    rng = np.random.default_rng(seed)
    boxes = torch.from_numpy(
        np.column_stack(
            [
                rng.uniform(8, 56, (objects, 2)),
                rng.uniform(6, 40, (objects, 2)),
                rng.uniform(-1.5, 1.5, objects),
            ]
        )
    )
    anchors = torch.from_numpy(upright(rng, 80) - 2)
    target = OrientedTarget(boxes, torch.zeros(objects, dtype=torch.long), (60, 64))
    got = OrientedRPN(RPNConfig(channels=4), 4).assign(anchors, target)
    assert got.tolist() == model_reference.rpn_owners(anchors.numpy(), outer(boxes).numpy(), (60, 64))


@pytest.mark.parametrize("objects", [(3, 1), (2, 0), (0, 0)])
def test_gfl_losses_equal_plain_loops(objects: tuple[int, int]) -> None:
    torch.manual_seed(0)
    head = GFLHead(GFLConfig(channels=8, convs=1, groups=2), 8, 3)
    torch.nn.init.normal_(head.gfl_reg.weight, std=0.3)
    torch.nn.init.normal_(head.gfl_cls.weight, std=0.3)
    maps = [torch.randn(2, 8, max(64 // s, 1), max(64 // s, 1)) for s in head.config.strides]
    rng = np.random.default_rng(0)
    truths = [(upright(rng, n), rng.integers(0, 3, n)) for n in objects]
    targets = [
        HorizontalTarget(torch.from_numpy(b).float(), torch.from_numpy(k), (64, 64)) for b, k in truths
    ]
    losses = head.loss(maps, targets)
    with torch.no_grad():
        scores, sides = head(maps)
    wanted = model_reference.gfl_losses(
        [s.double().numpy() for s in scores], [s.double().numpy() for s in sides], head.config.strides, truths
    )
    for name, value in wanted.items():
        assert losses[name].item() == pytest.approx(value, rel=1e-4, abs=1e-6), name


def exact(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, dtype=torch.float64) * scale).requires_grad_()


def test_the_losses_gradients_equal_their_differences() -> None:
    torch.manual_seed(0)
    quality = torch.rand(5, 3, dtype=torch.float64) * (torch.rand(5, 3) > 0.5)
    assert gradcheck(lambda x: GFLHead._quality_loss(x, quality), exact(5, 3, scale=3))
    wanted = torch.rand(4, 4, dtype=torch.float64) * 15.9
    assert gradcheck(lambda x: GFLHead._distribution_loss(x, wanted), exact(4, 4 * 17))
    head = GFLHead(GFLConfig(channels=8, convs=0, groups=2), 8, 3)
    assert gradcheck(head.integral, exact(6, 4 * 17))
    truth = torch.tensor([[0.0, 0, 4, 3], [2, 2, 5, 9], [8, 1, 9, 3]], dtype=torch.float64)
    boxes = (truth + torch.randn(3, 4) * 0.3 + torch.tensor([0.0, 0, 1, 1])).requires_grad_()
    assert gradcheck(lambda x: generalized_box_iou_loss(x, truth, eps=1e-7), boxes)
    for beta in (1 / 9, 1.0):
        assert gradcheck(
            lambda x, beta=beta: F.smooth_l1_loss(x, torch.zeros_like(x), beta=beta), exact(6, 5)
        )


def test_the_box_weight_is_of_the_boxes_alone() -> None:
    rng = np.random.default_rng(0)
    maps = [torch.from_numpy(rng.normal(size=(1, 4, 64 // s, 64 // s))).float() for s in (4, 8, 16, 32)]
    target = OrientedTarget(
        torch.tensor([[20.0, 20, 16, 8, 0.3]]), torch.zeros(1, dtype=torch.long), (64, 64)
    )
    found = target.boxes + torch.tensor([[1.0, -1, 2, 1, 0.05]])
    told = []
    for weight in (1.0, 4.0):
        torch.manual_seed(0)
        roi = OrientedRoI(RoIConfig(channels=8, samples=8, box_weight=weight), 4, 2)
        told.append(roi.loss(maps, [found], [target]))
    assert told[0]["loss_bbox"] > 0
    torch.testing.assert_close(told[1]["loss_bbox"], 4 * told[0]["loss_bbox"])
    torch.testing.assert_close(told[1]["loss_cls"], told[0]["loss_cls"])


def test_deformable_attention_looks_where_it_says() -> None:
    torch.manual_seed(0)
    shapes, heads, points, dim = [(4, 6), (2, 3)], 2, 3, 8
    layer = DeformableAttention(dim, heads, points, 2).double()
    torch.nn.init.normal_(layer.sampling_offsets.weight, std=0.3)
    torch.nn.init.normal_(layer.attention_weights.weight)
    query, places = exact(1, 5, dim), torch.rand(5, 2, dtype=torch.float64)
    value = exact(1, 24 + 6, dim)
    with torch.no_grad():
        mixed = model_reference.deformable_attention(
            layer.value_proj(value)[0].view(30, heads, dim // heads).numpy(),
            layer.sampling_offsets(query)[0].view(5, heads, 2, points, 2).numpy(),
            layer.attention_weights(query)[0]
            .view(5, heads, -1)
            .softmax(-1)
            .view(5, heads, 2, points)
            .numpy(),
            places.numpy(),
            shapes,
        )
        wanted = layer.output_proj(torch.from_numpy(mixed).flatten(1))
        np.testing.assert_allclose(layer(query, places, value, shapes)[0].numpy(), wanted.numpy(), atol=1e-6)
    assert gradcheck(lambda q, v: layer(q, places, v, shapes), (query, value), atol=1e-4)
