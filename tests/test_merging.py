"""Merging: suppression and joining equal their plain versions, and every object comes out once (laws 2 and 3)."""

from __future__ import annotations

import numpy as np
import pytest
import reference
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from babelrs_geo import boxes
from babelrs_geo.detections import Detections
from babelrs_geo.errors import ParameterError
from babelrs_geo.merging import MergeOptions, merge, nms
from babelrs_geo.tiling import Grid

NAMES = ("ship", "car")
seeds = st.integers(0, 2**32 - 1)


def crowd(seed: int, n: int, oriented: bool, extent: float = 60.0) -> Detections:
    """Random boxes with ties in score, twins, almost twins, half-turned twins, slivers and empty ones."""
    r = np.random.default_rng(seed)
    b = np.column_stack(
        [r.uniform(0, extent, (n, 2)), r.uniform(1, 20, (n, 2)), r.uniform(-90, 90, n) * oriented]
    )
    kind = r.integers(0, 8, n)
    twin = r.integers(0, n, n)
    b[kind == 0] = b[twin[kind == 0]]
    b[kind == 1] = b[twin[kind == 1]] + r.normal(0, 1e-6, ((kind == 1).sum(), 5)) * [1, 1, 1, 1, oriented]
    b[kind == 2, 4] += 180 * oriented
    b[kind == 3] = np.round(b[kind == 3])
    b[kind == 4, 3] = 0.01
    b[(kind == 5) & (r.random(n) < 0.3), 2] = 0
    return Detections(b, np.round(r.random(n), 1), r.integers(0, 2, n), NAMES, oriented)


def same(a: Detections, b: Detections, tolerance: float = 0.0) -> bool:
    return (
        len(a) == len(b)
        and np.array_equal(a.labels, b.labels)
        and np.array_equal(a.scores, b.scores)
        and np.allclose(a.boxes, b.boxes, rtol=0, atol=tolerance)
    )


# ----------------------------------------------------------------------------------------------------
# Law 3: suppression


@given(
    seeds,
    st.integers(1, 80),
    st.booleans(),
    st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]),
    st.sampled_from([30.0, 2000.0]),
)
@settings(max_examples=120)
def test_nms_equals_the_plain_one(seed, n, oriented, iou, extent):
    found = crowd(seed, n, oriented, extent)
    kept = nms(found, iou)
    np.testing.assert_array_equal(kept, reference.nms(found, iou))
    again = found[kept]
    np.testing.assert_array_equal(nms(again, iou), np.arange(len(kept)))
    shuffled = found[np.random.default_rng(seed).permutation(n)]
    assert same(shuffled[nms(shuffled, iou)], again)


def test_nms_over_all_sizes_at_once():
    r = np.random.default_rng(0)
    n = 1500
    size = np.exp(r.uniform(np.log(0.5), np.log(3000), (n, 2)))
    b = np.column_stack([r.uniform(-5e3, 5e3, (n, 2)), size, r.uniform(-90, 90, n)])
    found = Detections(b, r.random(n), r.integers(0, 2, n), NAMES, True)
    for iou in (0.0, 0.05, 0.5):
        np.testing.assert_array_equal(nms(found, iou), reference.nms(found, iou))
    assert len(nms(Detections.empty(NAMES, True))) == 0


@given(seeds, st.booleans(), st.sampled_from([0.0, 0.4, 1.0]))
@settings(max_examples=20)
def test_nms_where_boxes_lie_on_one_another_by_the_dozen(seed, oriented, iou):
    r = np.random.default_rng(seed)
    few = crowd(seed, 3, oriented)
    found = few[r.integers(0, 3, 400)]
    moved = found.boxes + r.normal(0, r.choice([0, 1e-7, 0.1]), found.boxes.shape) * [1, 1, 1, 1, oriented]
    found = Detections(moved, np.round(r.random(400), 2), found.labels, NAMES, oriented)
    np.testing.assert_array_equal(nms(found, iou), reference.nms(found, iou))


# ----------------------------------------------------------------------------------------------------
# Law 2: an oracle detector


def tiles_of(width: int, height: int, tile: int, overlap: int) -> np.ndarray:
    return np.array([t.outer for t in Grid(width, height, tile, overlap)])


def shifted_tiles(width: int, height: int, tile: int, overlap: int, offset: tuple[int, int]) -> np.ndarray:
    """Tiles that start before the scene and are cut by it."""
    step = tile - overlap

    def spans(length: int, start: int) -> list[tuple[int, int]]:
        low = range(-start, max(length - overlap, 1), step)
        return [(max(x, 0), min(x + tile, length)) for x in low]

    return np.array(
        [
            (x1, y1, x2 - x1, y2 - y1)
            for y1, y2 in spans(height, offset[1] % step)
            for x1, x2 in spans(width, offset[0] % step)
        ]
    )


def oracle(
    objects: Detections, outers: np.ndarray, seed: int, jitter: float = 0.0
) -> tuple[Detections, np.ndarray]:
    """Every object in every tile that sees any of it, as the box of the visible part, in any order."""
    r = np.random.default_rng(seed)
    b, labels, tiles = [], [], []
    for outer in outers:
        extent = np.r_[outer[:2], outer[:2] + outer[2:]]
        seen = boxes.clip(objects.boxes, extent)
        # a detector that jitters does not report slivers either
        visible = boxes.areas(seen) > (0.3 * boxes.areas(objects.boxes) if jitter else 1e-9)
        b.append(seen[visible])
        labels.append(objects.labels[visible])
        tiles.append(np.tile(outer, (visible.sum(), 1)))
    b, labels, tiles = np.concatenate(b), np.concatenate(labels), np.concatenate(tiles)
    if jitter:
        b = b + r.normal(0, jitter, b.shape) * [1, 1, 1, 1, objects.oriented]
        b[:, 2:4] = b[:, 2:4].clip(1)
    mixed = r.permutation(len(b))
    scores = r.uniform(0.3, 1, len(b))
    return Detections(b[mixed], scores, labels[mixed], objects.classes, objects.oriented), tiles[mixed]


def objects(
    seed: int, width: int, height: int, largest: float, oriented: bool, apart: float = 0.4
) -> Detections:
    """Objects inside the scene, at most `largest` px wide and high, none sharing more than `apart` of another."""
    r = np.random.default_rng(seed)
    n = 40
    w, h = np.exp(r.uniform(np.log(2), np.log(largest), (2, n)))
    angle = r.uniform(-90, 90, n) * oriented
    b = np.column_stack([np.zeros((n, 2)), w, h, angle])
    x1, y1, x2, y2 = boxes.bounds(b).T
    b[:, 2:4] *= np.minimum(1, largest / np.maximum(x2 - x1, y2 - y1))[:, None]
    x1, y1, x2, y2 = boxes.bounds(b).T
    fits = (x2 - x1 < width) & (y2 - y1 < height)
    b, x2, y2 = b[fits], x2[fits], y2[fits]
    b[:, 0] = x2 + r.random(len(b)) * (width - 2 * x2)
    b[:, 1] = y2 + r.random(len(b)) * (height - 2 * y2)
    kept: list[int] = []
    for k in range(len(b)):
        if kept:
            shared = boxes.intersection_pairs(np.repeat(b[[k]], len(kept), 0), b[kept])
            if (shared > apart * np.minimum(boxes.areas(b[[k]]), boxes.areas(b[kept]))).any():
                continue
        kept.append(k)
    return Detections(b[kept], np.ones(len(kept)), r.integers(0, 2, len(kept)), NAMES, oriented)


def assert_each_once(merged: Detections, truth: Detections, agreement: float) -> None:
    iou = boxes.rotated_iou(merged.boxes, truth.boxes) * (merged.labels[:, None] == truth.labels)
    assert len(merged) == len(truth), (len(merged), len(truth))
    assert (iou.max(0) > agreement).all() and (np.bincount(iou.argmax(1), minlength=len(truth)) == 1).all()


@given(
    seeds,
    st.integers(40, 400),
    st.integers(40, 400),
    st.integers(24, 120),
    st.floats(0.1, 0.6),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=80)
def test_every_object_up_to_the_overlap_is_reported_once(seed, width, height, tile, share, oriented, shifted):
    overlap = max(4, int(tile * share))
    outers = (
        shifted_tiles(width, height, tile, overlap, (seed % 97, seed % 89))
        if shifted
        else tiles_of(width, height, tile, overlap)
    )
    truth = objects(seed, width, height, overlap, oriented)
    assume(len(truth))
    found, tiles = oracle(truth, outers, seed)
    merged = merge(found, tiles, (height, width))
    assert_each_once(merged, truth, 1 - 1e-6)
    other_order = np.random.default_rng(seed + 1).permutation(len(found))
    assert same(merge(found[other_order], tiles[other_order], (height, width)), merged)


@given(seeds, st.booleans())
@settings(max_examples=8)
def test_joining_equals_the_plain_one(seed, oriented):
    r = np.random.default_rng(seed)
    outers = tiles_of(300, 200, 96, 24)
    truth = objects(seed, 300, 200, 180, oriented, apart=0.6)
    found, tiles = oracle(truth, outers, seed, jitter=1.5)
    some = r.random(len(found)) < 0.9
    found, tiles = found[some], tiles[some]
    assume(len(found))
    for options in (
        MergeOptions(),
        MergeOptions(iou=0.3, containment=1.0, edge=0.5, seam=0.3),
        MergeOptions(join=False),
    ):
        fast, slow = (
            merge(found, tiles, (200, 300), options),
            reference.merge(found, tiles, (200, 300), options),
        )
        assert len(fast) == len(slow) and np.array_equal(fast.scores, slow.scores)
        iou = boxes.rotated_iou_pairs(fast.boxes, slow.boxes)
        assert iou.min() > 1 - 1e-6


@given(seeds, st.booleans(), st.floats(0, 4))
@settings(max_examples=60)
def test_no_two_boxes_of_a_class_share_more_than_half_and_merging_again_changes_nothing(
    seed, oriented, jitter
):
    truth = objects(seed, 300, 200, 150, oriented, apart=0.9)
    found, tiles = oracle(truth, tiles_of(300, 200, 96, 24), seed, jitter)
    merged = merge(found, tiles, (200, 300))
    i, j = np.triu_indices(len(merged), 1)
    i, j = (k[merged.labels[i] == merged.labels[j]] for k in (i, j))
    shared = boxes.intersection_pairs(merged.boxes[i], merged.boxes[j])
    a, b = boxes.areas(merged.boxes[i]), boxes.areas(merged.boxes[j])
    assert (shared <= 0.5 * np.minimum(a, b)).all()
    again = merge(merged, np.tile([0, 0, 300, 200], (len(merged), 1)), (200, 300))
    assert same(again, merged)


# ----------------------------------------------------------------------------------------------------
# Joining


@given(seeds)
@settings(max_examples=60)
def test_upright_objects_larger_than_the_overlap_become_one(seed):
    truth = objects(seed, 500, 400, 300, oriented=False, apart=0.0)
    found, tiles = oracle(truth, tiles_of(500, 400, 128, 32), seed)
    assert_each_once(merge(found, tiles, (400, 500)), truth, 1 - 1e-9)


@pytest.mark.parametrize("angle", [0, 10, 33, 45, 71, 90, -20, -60])
def test_long_turned_objects_become_one(angle):
    truth = Detections(
        [[250, 200, 260, 40, angle], [120, 330, 150, 30, angle - 5]], [1, 1], [0, 0], NAMES, True
    )
    found, tiles = oracle(truth, tiles_of(500, 400, 128, 32), 0)
    assert len(found) > 6
    assert_each_once(merge(found, tiles, (400, 500)), truth, 0.85)


@pytest.mark.parametrize("angle", [0, 15, 45, 80, 90, -30])
@pytest.mark.parametrize("oriented", [True, False])
def test_rows_of_ships_side_by_side_stay_apart(angle, oriented):
    """40 x 10 px, 13 px apart, over many seams; whole ones and, in small tiles, ones that no tile sees whole."""
    if not oriented:
        angle = 90 * (angle >= 45)
    turn = np.deg2rad(angle)
    step = np.array([np.sin(turn), np.cos(turn)]) * 13
    k = np.arange(24)[:, None]
    w, h = (40, 10) if oriented or angle == 0 else (10, 40)
    row = np.column_stack(
        [np.array([200, 200]) + (k - 12) * step, np.tile([w, h, angle * oriented], (24, 1)).astype(float)]
    )
    truth = Detections(row, np.ones(24), np.zeros(24), NAMES, oriented)
    for overlap, jitter, agreement in ((60, 0.0, 1 - 1e-6), (60, 0.5, 0.6), (20, 0.0, 0.5)):
        found, tiles = oracle(truth, tiles_of(400, 400, 120, overlap), 3, jitter)
        assert_each_once(merge(found, tiles, (400, 400)), truth, agreement)


@pytest.mark.parametrize("angle", [0, 12, 45, 78])
def test_a_large_turned_object_in_four_corners_comes_out_as_it_is(angle):
    """The smallest box around what a corner shows of it often lies along another direction."""
    truth = Detections([[250, 250, 170, 150, angle]], [1], [0], NAMES, True)
    found, tiles = oracle(truth, tiles_of(500, 500, 266, 32), 0)
    assert len(found) == 4
    assert_each_once(merge(found, tiles, (500, 500)), truth, 0.9)


def test_what_several_tiles_saw_whole_is_their_mean_with_the_best_score():
    outers = [[0, 0, 100, 100], [60, 0, 100, 100], [60, 0, 100, 100]]
    found = Detections(
        [[80, 50, 20, 10, 0], [82, 50, 10, 22, 94], [80, 75, 20, 10, 0]],
        [0.5, 0.75, 0.3],
        [0] * 3,
        NAMES,
        True,
    )
    merged = merge(found, outers, (100, 160))
    np.testing.assert_allclose(merged.boxes, [[81.2, 50, 10, 21.2, -87.6], [80, 75, 20, 10, 0]])
    np.testing.assert_allclose(merged.scores, [0.75, 0.3])


def test_small_objects_match_across_tiles_though_their_boxes_hardly_meet():
    """12 x 4 px, 3 px off across; of two in each tile each goes to its own."""
    outers = [[0, 0, 100, 100], [60, 0, 100, 100]] * 2
    rows = [[80, 50, 12, 4, 0], [80, 53, 12, 4, 0], [80, 60, 12, 4, 0], [80, 61, 12, 4, 0]]
    found = Detections(rows, [0.5] * 4, [0] * 4, NAMES, True)
    merged = merge(found, outers, (100, 160))
    np.testing.assert_allclose(np.sort(merged.boxes[:, 1]), [51.5, 60.5])
    one_tile = merge(found[:2], [outers[0]] * 2, (100, 160))
    assert len(one_tile) == 2


def test_a_box_at_an_edge_moves_the_whole_one_by_what_it_shows():
    """Its tile ends at x = 100 and shows 18 of 20 px; it saw the object 2 px lower."""
    found = Detections(
        boxes.from_xyxy([[82, 40, 102, 50], [82, 42, 100, 52]]), [0.5, 0.5], [0, 0], NAMES, False
    )
    merged = merge(found, [[60, 0, 100, 100], [0, 0, 100, 100]], (100, 160))
    np.testing.assert_allclose(boxes.bounds(merged.boxes), [[82, 41, 102, 51]])


@given(seeds, st.integers(1, 60), st.booleans())
@settings(max_examples=40)
def test_any_boxes_merge(seed, n, oriented):
    """Identical, almost identical, half-turned, touching, sliver, empty and huge ones, in any tiles."""
    r = np.random.default_rng(seed)
    found = crowd(seed, n, oriented, 200.0)
    b = found.boxes.copy()
    huge = r.random(n) < 0.1
    b[huge, 2:4] *= r.choice([1e-9, 30.0, 1e6])
    beside = np.flatnonzero(r.random(n) < 0.2)
    b[beside] = b[r.integers(0, n, len(beside))]
    b[beside, 0] += b[beside, 2]
    found = Detections(b, found.scores, found.labels, NAMES, oriented)
    tiles = tiles_of(200, 200, 80, 30)[r.integers(0, len(tiles_of(200, 200, 80, 30)), n)]
    merged = merge(found, tiles, (200, 200))
    assert len(merged) <= n and np.isfinite(merged.boxes).all() and (merged.boxes[:, 2:4] > 0).all()
    mixed = r.permutation(n)
    assert same(merge(found[mixed], tiles[mixed], (200, 200)), merged)


def test_a_cut_box_loses_to_the_whole_one_even_with_a_better_score():
    found = Detections(
        boxes.from_xyxy([[90, 10, 100, 20], [90, 10, 112, 20]]), [0.99, 0.4], [0, 0], NAMES, False
    )
    merged = merge(found, [[0, 0, 100, 100], [80, 0, 100, 100]], (100, 180))
    np.testing.assert_allclose(boxes.bounds(merged.boxes), [[90, 10, 112, 20]])
    at_the_scene_edge = merge(found[:1], [[0, 0, 100, 100]], (100, 100))
    np.testing.assert_allclose(boxes.bounds(at_the_scene_edge.boxes), [[90, 10, 100, 20]])
    of_another_class = Detections(found.boxes, found.scores, [0, 1], NAMES, False)
    assert len(merge(of_another_class, [[0, 0, 100, 100], [80, 0, 100, 100]], (100, 180))) == 2


def test_pieces_become_one_box_with_the_best_score_or_stay_if_asked():
    found = Detections(
        boxes.from_xyxy([[20, 10, 100, 20], [80, 10, 170, 20]]), [0.5, 0.75], [0, 0], NAMES, False
    )
    outers = [[0, 0, 100, 100], [80, 0, 100, 100]]
    merged = merge(found, outers, (100, 180))
    np.testing.assert_allclose(boxes.bounds(merged.boxes), [[20, 10, 170, 20]])
    assert merged.scores.tolist() == [0.75]
    assert len(merge(found, outers, (100, 180), MergeOptions(join=False))) == 2
    one_tile = merge(found, [[0, 0, 100, 100]] * 2, (100, 180))
    assert len(one_tile) == 2


def test_empty_input_and_bad_input():
    nothing = Detections.empty(NAMES, True)
    assert len(merge(nothing, [], (10, 10))) == 0
    one = Detections([[5, 5, 4, 4, 0]], [1], [0], NAMES, True)
    assert len(merge(Detections([[5, 5, 0, 4, 0]], [1], [0], NAMES, True), [[0, 0, 9, 9]], (9, 9))) == 0
    with pytest.raises(ParameterError, match="expected \\(1, 4\\)"):
        merge(one, [[0, 0, 9, 9]] * 2, (9, 9))
    with pytest.raises(ParameterError, match="leaves the scene of 9 x 9 px"):
        merge(one, [[0, 0, 10, 9]], (9, 9))
    with pytest.raises(ParameterError, match="seam is 2; it is a share"):
        MergeOptions(seam=2)
    with pytest.raises(ParameterError, match="edge is -1 px"):
        MergeOptions(edge=-1)
