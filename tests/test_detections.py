"""Detections: fields that fit together, and rows that stay together."""

from __future__ import annotations

import numpy as np
import pytest

from babelrs_geo import boxes
from babelrs_geo.detections import Detections, order
from babelrs_geo.errors import ParameterError

NAMES = ("ship", "car", "plane")


def some(n: int = 20, seed: int = 0, oriented: bool = True) -> Detections:
    r = np.random.default_rng(seed)
    b = np.column_stack(
        [r.uniform(0, 99, (n, 2)), r.uniform(2, 30, (n, 2)), r.uniform(-90, 90, n) * oriented]
    )
    return Detections(b, r.random(n), r.integers(0, 3, n), NAMES, oriented)


def same(a: Detections, b: Detections) -> bool:
    return all(np.array_equal(getattr(a, f), getattr(b, f)) for f in ("boxes", "scores", "labels"))


def test_fields_come_out_as_stated():
    d = Detections([[1, 2, 3, 4, 0]], [0.5], [2], ["a", "b", "c"], False)
    assert (d.boxes.dtype, d.scores.dtype, d.labels.dtype) == (np.float64, np.float32, np.int64)
    assert d.classes == ("a", "b", "c") and d.class_names.tolist() == ["c"] and len(d) == 1
    none = Detections([], [], [], NAMES, True)
    assert len(none) == 0 and none.boxes.shape == (0, 5) and none.class_names.shape == (0,)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"boxes": np.ones((3, 4))}, r"shape \(3, 4\); expected \(N, 5\)"),
        ({"scores": np.ones(2)}, "give one per box"),
        ({"labels": np.ones((3, 1))}, "give one per box"),
        ({"labels": [0, 1, 3]}, "labels span 0 to 3 but there are 3 classes"),
        ({"labels": [0, 1, -1]}, "labels span -1 to 1"),
        ({"boxes": np.full((3, 5), np.nan)}, "not finite"),
        ({"scores": [1, np.inf, 0]}, "not finite"),
    ],
)
def test_what_does_not_fit_is_refused(change, told):
    fields = {"boxes": np.ones((3, 5)), "scores": np.ones(3), "labels": [0, 1, 2], "classes": NAMES}
    with pytest.raises(ParameterError, match=told):
        Detections(**{**fields, **change}, oriented=True)


def test_rows_are_selected_as_in_numpy():
    d = some()
    for rows in (d.scores > 0.5, np.array([3, 1, 1]), slice(2, 9, 3), [], [0], np.zeros(20, bool)):
        part = d[rows]
        np.testing.assert_array_equal(part.boxes, d.boxes[rows] if len(part) else np.zeros((0, 5)))
        assert len(part.boxes) == len(part.scores) == len(part.labels) and part.classes == d.classes


def test_concatenate_splits_and_joins():
    d = some()
    assert same(Detections.concatenate([d[:7], d[7:], Detections.empty(NAMES, True)]), d)
    with pytest.raises(ParameterError, match="do not go with"):
        Detections.concatenate([d, Detections.empty(NAMES, False)])
    with pytest.raises(ParameterError, match="do not go with"):
        Detections.concatenate([d, Detections.empty(("x",), True)])
    with pytest.raises(ParameterError, match="nothing to concatenate"):
        Detections.concatenate([])


def test_shift_and_scale_move_the_corners():
    d = some()
    np.testing.assert_allclose(
        boxes.corners(d.shift(100, -7).boxes), boxes.corners(d.boxes) + np.array([100, -7]), atol=1e-9
    )
    np.testing.assert_allclose(boxes.corners(d.scale(3, 3).boxes), boxes.corners(d.boxes) * 3, atol=1e-9)
    flat = some(oriented=False)
    np.testing.assert_allclose(
        boxes.corners(flat.scale(2, 0.5).boxes), boxes.corners(flat.boxes) * (2, 0.5), atol=1e-9
    )
    quarter = Detections([[10, 10, 8, 4, 90]], [1], [0], NAMES, True).scale(2, 0.5)
    np.testing.assert_allclose(quarter.boxes, [[20, 5, 4, 8, 90]])
    with pytest.raises(ParameterError, match="must be positive"):
        d.scale(1, 0)


def test_uneven_scale_keeps_area_and_direction():
    d = some(200)
    scaled = d.scale(1.3, 0.8)
    np.testing.assert_allclose(boxes.areas(scaled.boxes), boxes.areas(d.boxes) * 1.3 * 0.8)
    true = boxes.from_corners(boxes.corners(d.boxes) * (1.3, 0.8))
    assert np.median(boxes.rotated_iou_pairs(scaled.boxes, true)) > 0.75
    close = d.scale(1.001, 0.999)
    assert (
        boxes.rotated_iou_pairs(
            close.boxes, boxes.from_corners(boxes.corners(d.boxes) * (1.001, 0.999))
        ).min()
        > 0.98
    )


def test_sort_is_blind_to_the_order_of_rows():
    d = some(60)
    tied = Detections(
        np.vstack([d.boxes, d.boxes]),
        np.round(np.r_[d.scores, d.scores], 1),
        np.r_[d.labels, d.labels],
        NAMES,
        True,
    )
    first = tied.sort()
    assert (np.diff(first.scores) <= 0).all()
    for seed in range(5):
        assert same(tied[np.random.default_rng(seed).permutation(120)].sort(), first)
    assert sorted(order(tied)) == list(range(120))
