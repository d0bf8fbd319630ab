"""The detector's parts against the official modules' numbers and against slow, obvious references."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import TINY
from torch import Tensor
from torchvision.ops import box_iou

from babelrs_geo.models.detector import COMPACT, Detector, DetectorConfig, HorizontalTarget, OrientedTarget
from babelrs_geo.models.gfl import atss_assign
from babelrs_geo.models.oriented_rcnn import OrientedRPN, RPNConfig, rotated_nms
from babelrs_geo.models.rotated import outer
from babelrs_geo.models.vit import attention


def same(got: Tensor, wanted: Tensor, tolerance: float = 1e-4) -> None:
    assert got.shape == wanted.shape
    scale = wanted.abs().max().item() or 1.0
    assert (got - wanted).abs().max().item() <= tolerance * scale


def test_the_full_configuration_has_378_million_parameters() -> None:
    with torch.device("meta"):
        model = Detector()
    assert sum(p.numel() for p in model.parameters()) == 378_012_045


# ---- slow references


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_explicit_and_fused_attention_agree(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 50, 16) for _ in range(3))
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    got = attention(q.to(dtype), k.to(dtype), v.to(dtype))
    assert got.dtype == dtype
    same(got.float(), wanted, tolerance)


def test_an_anchor_claimed_twice_goes_to_the_box_it_overlaps_most() -> None:
    anchors = torch.tensor([[0.0, 0, 10, 10], [4, 4, 14, 14], [50, 50, 60, 60]])
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 11, 11]])
    assert atss_assign(anchors, [3], boxes, 1).tolist() == [0, -1, -1]
    assert atss_assign(anchors, [3], boxes[:0], 9).tolist() == [-1, -1, -1]


@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 6))
def test_each_box_owns_its_best_anchors_and_of_several_boxes_the_last(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    rpn = OrientedRPN(RPNConfig(channels=8), 8)
    anchors = torch.cat(rpn.anchors([torch.zeros(1, 8, 64 // s, 64 // s) for s in (4, 8, 16, 32, 64)]))
    boxes = np.column_stack(
        [rng.integers(8, 56, (count, 2)), rng.integers(4, 24, (count, 2)), rng.choice([0.0, 0.3], count)]
    )
    boxes[-1] = boxes[0]  # two that tie
    target = OrientedTarget(torch.from_numpy(boxes).float(), torch.zeros(count, dtype=torch.long), (64, 64))
    owner = rpn.assign(anchors, target)
    inside = ((anchors[:, :2] >= 0).all(1) & (anchors[:, 2:] < 64).all(1)).tolist()
    iou = box_iou(anchors, outer(target.boxes))
    top = iou[inside].amax(0)
    for anchor, own in enumerate(owner.tolist()):
        if not inside[anchor]:
            assert own == -2
            continue
        overlap = iou[anchor]
        best = [g for g in range(count) if overlap[g] == top[g] >= rpn.config.negative_iou]
        if best:
            assert own == best[-1]
        elif overlap.max() >= rpn.config.positive_iou:
            assert own == int(overlap.argmax())
        else:
            assert own == (-1 if overlap.max() < rpn.config.negative_iou else -2)


def test_rotated_nms_keeps_classes_apart() -> None:
    boxes = torch.tensor([[50.0, 50, 40, 10, 0.3], [50, 50, 40, 10, 0.3], [51, 50, 40, 10, 0.3]])
    scores = torch.tensor([0.5, 0.9, 0.8])
    assert rotated_nms(boxes, scores, torch.tensor([0, 0, 0]), 0.1).tolist() == [1]
    assert rotated_nms(boxes, scores, torch.tensor([0, 1, 1]), 0.1).tolist() == [1, 0]


# ---- the detector as a whole


@pytest.fixture(scope="module")
def tiny() -> Detector:
    torch.manual_seed(0)
    return Detector(TINY).eval()


def test_the_compact_configuration_is_small_enough() -> None:
    with torch.device("meta"):
        count = sum(p.numel() for p in Detector(COMPACT).parameters())
    assert count <= 15_000_000
    assert COMPACT.rpn.proposals <= 300


def test_a_configuration_survives_json() -> None:
    for config in (COMPACT, DetectorConfig()):
        assert DetectorConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_one_backward_pass_reaches_every_sensor(tiny: Detector) -> None:
    torch.manual_seed(0)
    box = torch.tensor([[32.0, 32, 24, 12, 0.5]])
    batch = {
        "sar": (torch.rand(1, 3, 64, 64), [HorizontalTarget(outer(box), torch.tensor([0]), (64, 64))]),
        "rgb": (torch.rand(1, 3, 64, 64), [OrientedTarget(box, torch.tensor([3]), (64, 64))]),
        "ir": (
            torch.rand(1, 3, 64, 64),
            [OrientedTarget(box[:0], torch.tensor([], dtype=torch.long), (64, 64))],
        ),
    }
    tiny.zero_grad()
    losses = tiny.losses(batch)
    assert {name.split("_")[0] for name in losses} == {"sar", "rgb", "ir"}
    sum(losses.values()).backward()
    for part in (tiny.backbone, tiny.neck, tiny.sar_bbox_head, tiny.rgb_roi_head, tiny.ifr_rpn_head):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())


@pytest.mark.parametrize("sensor", ["sar", "rgb", "ir"])
def test_any_size_is_served_and_labels_are_the_sensors_own(tiny: Detector, sensor: str) -> None:
    labels = tiny.config.labels(sensor)
    for height, width in ((64, 64), (50, 70), (33, 31)):
        boxes, scores, found = tiny.predict(torch.rand(1, 3, height, width), sensor)[0]
        assert len(boxes) == len(scores) == len(found) > 0
        assert ((found >= labels.start) & (found < labels.stop)).all()
        assert (scores.diff() <= 0).all()


def test_an_image_is_found_alike_alone_and_in_a_batch(tiny: Detector) -> None:
    images = torch.rand(3, 3, 64, 64)
    together = tiny.predict(images, "sar")
    for i in range(3):
        alone = tiny.predict(images[i : i + 1], "sar")[0]
        assert len(alone[0]) == len(together[i][0])
        assert (alone[1] - together[i][1]).abs().max() < 1e-4
