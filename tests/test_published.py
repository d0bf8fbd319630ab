"""The published pipeline and the quota of sources, without the original's numbers."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import TINY

from babelrs_geo.boxes import from_xyxy, rotated_iou_pairs
from babelrs_geo.datasets.published import Published, flip, kept, pad, prepare, resize, train_sample, turn
from babelrs_geo.datasets.sampling import QuotaBatches, quota
from babelrs_geo.errors import ParameterError
from babelrs_geo.models.detector import Detector
from babelrs_geo.training import LayerDecay, StepSchedule, layer_decay_groups, step_schedule

BOX = np.array([[30.0, 20.0, 16.0, 8.0, 25.0]])


def marked(box: np.ndarray, height: int = 60, width: int = 80) -> np.ndarray:
    """A frame that is white inside the box and black elsewhere."""
    y, x = np.mgrid[:height, :width] + 0.5
    cx, cy, w, h, r = box
    cos, sin = np.cos(np.deg2rad(r)), np.sin(np.deg2rad(r))
    along, across = (x - cx) * cos - (y - cy) * sin, (x - cx) * sin + (y - cy) * cos
    inside = (np.abs(along) < w / 2) & (np.abs(across) < h / 2)
    return np.repeat((inside * 255).astype(np.uint8)[..., None], 3, 2)


def seen(image: np.ndarray) -> tuple[float, float]:
    """Where the white lies."""
    y, x = np.mgrid[: image.shape[0], : image.shape[1]] + 0.5
    weight = image[..., 0] / image[..., 0].sum()
    return float((x * weight).sum()), float((y * weight).sum())


@pytest.mark.parametrize("degrees", [0, 37, 90, -123, 180])
def test_a_box_turns_with_its_pixels(degrees: float) -> None:
    image, boxes = turn(marked(BOX[0]), BOX, degrees)
    assert seen(image) == pytest.approx(boxes[0, :2], abs=0.3)
    assert rotated_iou_pairs(turn(image, boxes, -degrees)[1], BOX)[0] > 1 - 1e-9
    expected = marked(boxes[0])
    assert np.abs(image.astype(float) - expected).mean() < 4


@pytest.mark.parametrize("direction", ["horizontal", "vertical", "diagonal"])
def test_a_box_flips_with_its_pixels(direction: str) -> None:
    image, boxes = flip(marked(BOX[0]), BOX, direction)
    assert np.array_equal(image, marked(boxes[0]))
    back, again = flip(image, boxes, direction)
    assert np.array_equal(back, marked(BOX[0])) and np.array_equal(again, BOX)
    assert flip(image, boxes, direction, 1.0)[1][0, :2] == pytest.approx(
        again[0, :2] - [direction != "vertical", direction != "horizontal"]
    )


def test_resizing_keeps_the_ratio_and_cuts_upright_boxes() -> None:
    image, boxes = resize(marked(BOX[0]), BOX, 160, True)
    assert image.shape == (120, 160, 3)
    assert boxes[0].tolist() == [60, 40, 32, 16, 25]
    _, cut = resize(image, from_xyxy([[-10, 5, 50, 300]]), 80, False)
    assert cut.tolist() == from_xyxy([[0, 2.5, 25, 60]]).tolist()


def test_padding_is_zero_once_the_detector_has_normalised() -> None:
    torch.manual_seed(0)
    image, size = prepare(np.full((30, 40, 3), 255, np.uint8), Published(size=64))
    assert image.shape == (3, 64, 64) and size == (48, 64)
    model = Detector(TINY)
    mean = Published(size=64, mean=TINY.mean)
    padded = pad(np.full((48, 64, 3), 255, np.uint8), 64, mean.mean)
    assert ((padded - model.mean[0]) / model.std[0])[:, 48:].abs().max() < 1e-6
    with pytest.raises(ParameterError, match="resize it first"):
        pad(np.zeros((70, 10, 3), np.uint8), 64, mean.mean)


def test_samples_keep_objects_that_are_large_and_inside() -> None:
    boxes = np.array([[30.0, 20, 16, 8, 25], [30, 20, 16, 5, 25], [-1, 20, 16, 8, 0], [80, 20, 16, 8, 0]])
    assert kept(boxes, (60, 80), 5.0).tolist() == [True, False, False, False]
    rng = np.random.default_rng(0)
    still = Published(size=80, flips=0, turns=0)
    drawn = train_sample(marked(BOX[0]), boxes, np.arange(4), True, rng, still)
    assert drawn is not None
    image, left, labels, size = drawn
    assert image.shape == (3, 80, 80) and left.tolist() == boxes[:1].tolist() and labels.tolist() == [0]
    assert size == (60, 80)
    assert train_sample(marked(BOX[0]), boxes[1:], np.arange(3), True, rng, still) is None


def test_frames_with_round_objects_turn_by_quarters() -> None:
    turning, angles = Published(size=80, flips=0, turns=1), {16: set(), 7: set()}
    for label, found in angles.items():
        for seed in range(12):
            rng = np.random.default_rng(seed)
            frame = np.array([[40.0, 30, 16, 8, 0]])
            drawn = train_sample(marked(frame[0]), frame, np.array([label]), True, rng, turning)
            assert drawn is not None
            found.add(round(drawn[1][0, 4] % 90, 6))
    assert angles[16] == {0.0}
    assert len(angles[7]) == 12


def test_a_batch_has_its_quota() -> None:
    assert quota(4, (2, 1, 1)) == (2, 1, 1)
    assert quota(5, (2, 1, 1)) == (3, 1, 1)
    for batch in islice(QuotaBatches((11, 7, 5)), 20):
        assert [sum(low <= k < high for k in batch) for low, high in ((0, 11), (11, 18), (18, 23))] == [
            2,
            1,
            1,
        ]
    with pytest.raises(ParameterError, match="none empty"):
        QuotaBatches((3, 0, 2))
    with pytest.raises(ParameterError, match="rank 2 of 2"):
        QuotaBatches((3, 1, 2), rank=2, world=2)


@settings(max_examples=30)
@given(st.tuples(*[st.integers(1, 9)] * 3), st.integers(1, 3), st.integers(0, 5), st.integers(0, 99))
def test_processes_share_the_images_and_a_run_goes_on(
    sizes: tuple[int, int, int], world: int, start: int, seed: int
) -> None:
    ranks = [list(islice(QuotaBatches(sizes, 4, seed=seed, rank=r, world=world), 12)) for r in range(world)]
    # Dealt back, the first source's stream is whole permutations.
    stream = [
        k for pair in zip(*[[i for b in rank for i in b[:2]] for rank in ranks], strict=True) for k in pair
    ]
    for first in range(0, len(stream) - sizes[0] + 1, sizes[0]):
        assert sorted(stream[first : first + sizes[0]]) == list(range(sizes[0]))
    again = QuotaBatches(sizes, 4, seed=seed, rank=0, world=world, start=start)
    assert list(islice(again, 12 - start)) == ranks[0][start:]


def test_the_layers_nearer_to_the_heads_learn_faster() -> None:
    torch.manual_seed(0)
    model = Detector(TINY)
    model.neck.requires_grad_(False)
    groups = layer_decay_groups(model, LayerDecay(lr=1.0, decay=0.5, weight_decay=0.1))
    grouped = [p for group in groups for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == sum(p.requires_grad for p in model.parameters())
    rate = {name: (group["lr"], group["weight_decay"]) for group in groups for name in group["names"]}
    assert rate["backbone.embeddings.position_embedding"] == (0.125, 0.1)
    assert rate["backbone.layers.0.mlp.fc1.weight"] == (0.25, 0.1)
    assert rate["backbone.layers.1.mlp.fc1.bias"] == (0.5, 0.0)
    assert rate["sar_bbox_head.scales.0.scale"] == (1.0, 0.1)
    assert rate["backbone.up.weight"] == (1.0, 0.1)
    torch.optim.AdamW(groups)


def test_the_step_schedule_warms_up_and_drops() -> None:
    plan = StepSchedule(warmup=10, start=0.5, milestones=(20, 30), drop=0.1)
    factors = [step_schedule(k, plan) for k in range(40)]
    assert factors[:3] == pytest.approx([0.5, 0.55, 0.6])
    assert factors[10:20] == [1.0] * 10
    assert factors[20:] == pytest.approx([0.1] * 10 + [0.01] * 10)
