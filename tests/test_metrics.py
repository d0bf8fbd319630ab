"""Metrics against pycocotools, the official rotated evaluation, and plain resampling."""

from __future__ import annotations

import contextlib
import io
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from babelrs_geo import boxes, metrics
from babelrs_geo.detections import Detections
from babelrs_geo.errors import ParameterError

GOLDEN = Path(os.environ.get("BABELRS_GEO_SHARED", Path(__file__).parents[2] / "shared")) / "golden"
NAMES = ("ship", "car", "plane", "absent")


def scenes(images: int, seed: int = 0, oriented: bool = False, ties: bool = False):
    """Truths, and detections of them: jittered, missed, doubled, invented, some of the wrong class."""
    r = np.random.default_rng(seed)
    truths, predictions = [], []
    for _ in range(images):
        n = int(r.integers(0, 9))
        b = np.column_stack(
            [r.uniform(20, 200, (n, 2)), r.uniform(8, 40, (n, 2)), r.uniform(-90, 90, n) * oriented]
        )
        label = r.integers(0, 3, n)
        truths.append(Detections(b, np.ones(n), label, NAMES, oriented))
        pick = r.integers(0, n, int(r.integers(0, 2 * n + 1))) if n else np.zeros(0, int)
        noise = r.normal(0, 1, (len(pick), 5)) * [1.2, 1.2, 1.2, 1.2, 3 * oriented]
        found = np.vstack(
            [
                b[pick] + noise,
                np.column_stack([r.uniform(20, 200, (3, 2)), np.full((3, 2), 20.0), np.zeros(3)]),
            ]
        )
        found[:, 2:4] = found[:, 2:4].clip(2)
        wrong = np.where(r.random(len(pick)) < 0.1, (label[pick] + 1) % 3, label[pick])
        score = r.random(len(found)) * np.r_[np.ones(len(pick)), np.full(3, 0.4)]
        predictions.append(
            Detections(
                found,
                np.round(score, 1) if ties else score,
                np.r_[wrong, r.integers(0, 3, 3)],
                NAMES,
                oriented,
            )
        )
    return predictions, truths


def coco_says(predictions, truths, size: str = "all") -> np.ndarray:
    """(classes, thresholds) by pycocotools, of objects of one of its sizes."""
    coco = pytest.importorskip("pycocotools.coco")
    from pycocotools.cocoeval import COCOeval

    def xywh(row: np.ndarray) -> list[float]:
        return [row[0] - row[2] / 2, row[1] - row[3] / 2, row[2], row[3]]

    data = {
        "images": [],
        "annotations": [],
        "categories": [{"id": k + 1, "name": n} for k, n in enumerate(NAMES)],
    }
    found = []
    for image, (p, t) in enumerate(zip(predictions, truths, strict=True)):
        data["images"].append({"id": image + 1})
        for row, label in zip(t.boxes, t.labels, strict=True):
            number = len(data["annotations"]) + 1
            data["annotations"].append(
                {
                    "id": number,
                    "image_id": image + 1,
                    "category_id": int(label) + 1,
                    "bbox": xywh(row),
                    "area": row[2] * row[3],
                    "iscrowd": 0,
                }
            )
        for row, score, label in zip(p.boxes, p.scores, p.labels, strict=True):
            found.append(
                {
                    "image_id": image + 1,
                    "category_id": int(label) + 1,
                    "bbox": xywh(row),
                    "score": float(score),
                }
            )
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco.COCO()
        truth.dataset = data
        truth.createIndex()
        e = COCOeval(truth, truth.loadRes(found), "bbox")
        e.evaluate()
        e.accumulate()
    which = ["all", "small", "medium", "large"].index(size)
    precision = e.eval["precision"][:, :, :, which, 2]  # T, R, K
    mean = precision.mean(1).T
    return np.where(mean < 0, np.nan, mean)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_coco_equals_pycocotools(seed, ties):
    predictions, truths = scenes(60, seed, ties=ties)
    ours = metrics.average_precision(predictions, truths, interpolation="coco")
    np.testing.assert_allclose(ours.ap, coco_says(predictions, truths), atol=1e-9)
    assert np.isnan(ours.by_class()["absent"]) and 0.1 < ours.map < ours.ap50 < 1


@pytest.mark.parametrize("size", ["small", "medium", "large"])
def test_coco_by_size_equals_pycocotools(size):
    predictions, truths = scenes(60, 9)
    sides = np.random.default_rng(2).uniform(0.8, 6, 60)  # objects of 5 to 150 pixels
    grown = [
        [
            Detections(d.boxes * [k, k, k, k, 1], d.scores, d.labels, NAMES, False)
            for d, k in zip(group, sides, strict=True)
        ]
        for group in (predictions, truths)
    ]
    ours = metrics.average_precision(*grown, interpolation="coco", span=metrics.SIZES[size])
    np.testing.assert_allclose(ours.ap, coco_says(*grown, size), atol=1e-9)
    assert 0.1 < ours.map < 1 and 0 < ours.truths.sum() < sum(len(t) for t in truths)


def test_voc_by_size_neither_asks_for_other_sizes_nor_counts_them():
    small, large = [20.0, 20, 10, 10, 0], [200.0, 200, 200, 100, 30]
    truth = [Detections(np.array([small, large]), [1, 1], [0, 0], ("ship",), True)]
    lost = [500.0, 500, 200, 200, 0]
    found = [Detections(np.array([lost, large, small]), [0.9, 0.8, 0.7], [0, 0, 0], ("ship",), True)]
    ap = {
        name: metrics.average_precision(found, truth, span=span).by_class()["ship"]
        for name, span in metrics.SIZES.items()
    }
    assert ap["small"] == 1.0 and np.isnan(ap["medium"]) and ap["large"] == pytest.approx(0.5)
    spread = metrics.bootstrap(found * 2, truth * 2, n=3, span=metrics.SIZES["small"])
    assert spread.ap50() == (1.0, 1.0)


@pytest.mark.parametrize("interpolation", ["voc", "coco"])
def test_the_sizes_part_the_objects(interpolation):
    predictions, truths = scenes(30, 10, oriented=True)
    counts = [
        metrics.average_precision(predictions, truths, interpolation=interpolation, span=span).truths
        for span in metrics.SIZES.values()
    ]
    whole = metrics.average_precision(predictions, truths, interpolation=interpolation)
    np.testing.assert_array_equal(sum(counts), whole.truths)


def test_a_curve_has_the_area_that_voc_counts():
    predictions, truths = scenes(40, 11, oriented=True)
    ours = metrics.average_precision(predictions, truths).by_class()
    found = metrics.curves(predictions, truths)
    assert set(found) == {name for name, value in ours.items() if not np.isnan(value)}
    for name, curve in found.items():
        assert curve.area == pytest.approx(ours[name], abs=1e-12)
        assert (np.diff(curve.scores) <= 0).all() and (np.diff(curve.recall) >= 0).all()
        rate = metrics.precision_recall(predictions, truths)[name]
        assert rate[0] == pytest.approx(curve.precision[-1], abs=0.05)
    nothing = metrics.Curve.of([], [], 3)
    assert nothing.area == 0.0


def test_wilson_intervals_hold_the_share_and_reach_the_level():
    assert np.isnan(metrics.wilson(0, 0)).all()
    for hits, of in ((0, 1), (1, 1), (0, 50), (50, 50), (7, 20)):
        low, high = metrics.wilson(hits, of)
        assert 0 <= low <= hits / of <= high <= 1 and low < high
    # Wilson's own equation: the share is one standard error of either end times z away
    low, high = metrics.wilson(7, 20)
    for end in (low, high):
        assert abs(0.35 - end) / np.sqrt(end * (1 - end) / 20) == pytest.approx(1.959964, abs=1e-5)


# AP50 and mAP of SAR, RGB and infrared in the paper's main table, and the overall figures it gives for them
PUBLISHED = {
    "BabelRS": ((63.3, 46.96, 51.32), 51.57, 53.02, (91.7, 77.73, 79.63), 81.32),
    "SM3Det": ((60.64, 46.47, 48.87), 50.2, 51.31, (89.94, 77.88, 77.99), 80.68),
    "simple joint training": ((53.46, 45.18, 44.99), 47.05, 47.57, (84.11, 76.37, 73.28), 77.56),
}


@pytest.mark.parametrize("row", PUBLISHED.values(), ids=PUBLISHED.keys())
def test_overall_figures_equal_the_published_ones(row):
    values, overall, harmonic, ap50, overall50 = row
    counts = {"sar": 6, "rgb": 15, "ir": 5}

    def by_sensor(figures):
        return dict(zip(counts, figures, strict=True))

    assert round(metrics.class_weighted(by_sensor(values), counts), 2) == overall
    assert round(metrics.class_weighted(by_sensor(ap50), counts), 2) == overall50
    assert round(metrics.h_mean(*values), 2) == harmonic


def test_coco_gives_a_tie_to_the_later_truth():
    t = Detections(boxes.from_xyxy([[0, 0, 10, 10], [4, 0, 14, 10]]), [1, 1], [0, 0], NAMES, False)
    p = Detections(boxes.from_xyxy([[2, 0, 12, 10], [4, 0, 14, 10]]), [0.9, 0.8], [0, 0], NAMES, False)
    ours = metrics.average_precision([p], [t], interpolation="coco")
    np.testing.assert_allclose(ours.ap, coco_says([p], [t]))
    assert 0.4 < ours.by_class()["ship"] < 0.6


def test_coco_counts_a_hundred_an_image():
    r = np.random.default_rng(0)
    t = Detections(boxes.from_xyxy([[0, 0, 10, 10]]), [1], [0], NAMES, False)
    p = Detections(
        np.tile(boxes.from_xyxy([[0, 0, 10, 10]]), (101, 1))
        + np.r_[np.full(100, 500), 0][:, None] * [1, 0, 0, 0, 0],
        np.r_[r.random(100) + 1, 0.5],
        np.zeros(101),
        NAMES,
        False,
    )
    assert metrics.average_precision([p], [t], interpolation="coco").by_class()["ship"] == 0
    assert metrics.average_precision([p], [t], interpolation="voc").by_class()["ship"] > 0
    np.testing.assert_allclose(coco_says([p], [t])[0], 0)


@pytest.mark.shared
@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the official module's numbers (shared/golden) are not here")
def test_voc_equals_the_official_evaluation():
    z = np.load(GOLDEN / "eval_rbbox_map.npz")
    names = tuple("abcde")
    predictions, truths = [], []
    for k in range(int(z["n_images"])):
        d, g = z[f"det{k}"], z[f"gt{k}"]
        predictions.append(Detections(boxes.from_le90(d[:, :5]), d[:, 5], z[f"detlabel{k}"], names, True))
        truths.append(Detections(boxes.from_le90(g), np.ones(len(g)), z[f"gtlabel{k}"], names, True))
    ours = metrics.average_precision(predictions, truths)
    np.testing.assert_allclose(np.nan_to_num(list(ours.by_class().values())), z["ap50"], atol=1e-6)
    np.testing.assert_allclose(np.nan_to_num(list(ours.by_class(0.75).values())), z["ap75"], atol=1e-6)
    np.testing.assert_allclose([ours.ap50, ours.map], [z["mAP50"], z["mAP"]], atol=1e-6)
    assert ours.truths.tolist() == z["num_gts"].tolist()


@pytest.mark.shared
@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the official module's numbers (shared/golden) are not here")
def test_h_mean_equals_the_published_one():
    for row in json.loads((GOLDEN / "hmap.json").read_text()).values():
        if "H_mAP" in row:
            assert metrics.h_mean(*row["sar_dota_ifr_mAP"]) == pytest.approx(row["H_mAP"])


def test_h_mean_is_zero_with_any_sensor():
    assert metrics.h_mean(0.5, 0.5, 0.5) == pytest.approx(0.5)
    assert metrics.h_mean(0.9, 0, 0.9) == 0


@pytest.mark.parametrize("interpolation", ["voc", "coco"])
def test_bootstrap_equals_evaluating_each_resample(interpolation):
    predictions, truths = scenes(12, 3, oriented=True)
    found = metrics.bootstrap(predictions, truths, n=8, seed=5, interpolation=interpolation)
    draws = np.random.default_rng(5).multinomial(12, np.full(12, 1 / 12), size=8)
    for k, draw in enumerate(draws):
        pick = np.repeat(np.arange(12), draw)
        plain = metrics.average_precision(
            [predictions[i] for i in pick], [truths[i] for i in pick], interpolation=interpolation
        )
        np.testing.assert_allclose(found.replicates[k], plain.ap, atol=1e-12)
        np.testing.assert_allclose(found.ap50_replicates()[k], plain.ap50)
        np.testing.assert_allclose(found.map_replicates()[k], plain.map)


def test_intervals_hold_the_estimate_and_narrow_with_more_images():
    predictions, truths = scenes(400, 4)
    whole = metrics.average_precision(predictions, truths)
    before = time.perf_counter()
    wide, narrow = metrics.bootstrap(predictions[:60], truths[:60]), metrics.bootstrap(predictions, truths)
    assert time.perf_counter() - before < 30
    low, high = narrow.ap50()
    assert low < whole.ap50 < high and high - low < np.diff(wide.ap50())[0]
    low, high = narrow.map()
    assert low < whole.map < high
    assert narrow.by_class()["ship"][0] < whole.by_class()["ship"] < narrow.by_class()["ship"][1]
    assert np.isnan(narrow.by_class()["absent"]).all()
    one = narrow.ap50(["ship"])
    assert one == narrow.by_class()["ship"]
    assert (
        metrics.bootstrap(predictions, truths, n=50, seed=1).ap50()
        == metrics.bootstrap(predictions, truths, n=50, seed=1).ap50()
    )


def f1(predictions: list[Detections], truths: list[Detections], name: str, threshold: float) -> float:
    kept = [p[p.scores >= threshold] for p in predictions]
    precision, recall = metrics.precision_recall(kept, truths)[name]
    return 2 * precision * recall / (precision + recall) if precision > 0 else 0.0


@pytest.mark.parametrize("borrowed", [0.0, 3.0, 30.0, 1e9])
@pytest.mark.parametrize("slack", [0.0, 0.01, 0.1])
def test_no_threshold_has_an_f1_better_by_more_than_the_slack(slack: float, borrowed: float):
    predictions, truths = scenes(40, 6, ties=True)
    best = metrics.best_f1_thresholds(predictions, truths, slack=slack, borrowed=borrowed)
    objects = {name: sum(int((t.class_names == name).sum()) for t in truths) for name in truths[0].classes}
    there = [name for name, count in objects.items() if count]

    def mixed(name: str, threshold: float) -> float:
        own = f1(predictions, truths, name, threshold) if objects[name] else 0.0
        common = sum(f1(predictions, truths, each, threshold) for each in there) / len(there)
        return (objects[name] * own + borrowed * common) / (objects[name] + borrowed)

    assert set(best) == (set(truths[0].classes) if borrowed else {"ship", "car", "plane"})
    for name, threshold in best.items():
        tried = [mixed(name, t) for t in np.arange(-0.05, 1.0, 0.05)]
        assert mixed(name, threshold) >= max(tried) - slack - 1e-12
    assert borrowed < 1e9 or len(set(best.values())) == 1


def test_a_class_of_few_objects_borrows_its_threshold_and_one_of_many_keeps_its_own():
    def images(
        right: float, wrong: float, count: int, label: int
    ) -> tuple[list[Detections], list[Detections]]:
        box = np.array([[10.0, 10, 8, 8, 0], [50.0, 10, 8, 8, 0]])
        found = Detections(box, [right, wrong], [label, label], ("many", "few"), True)
        return [found] * count, [Detections(box[:1], [1], [label], ("many", "few"), True)] * count

    many, few = images(0.6, 0.4, 1000, 0), images(0.99, 0.9, 1, 1)
    given = many[0] + few[0], many[1] + few[1]
    alone = metrics.best_f1_thresholds(*given, borrowed=0)
    assert alone == {"many": pytest.approx(0.5), "few": pytest.approx(0.945)}
    mixed = metrics.best_f1_thresholds(*given)
    assert mixed == {"many": pytest.approx(0.5), "few": pytest.approx(0.5)}


def test_where_nothing_is_found_there_is_no_threshold():
    predictions, truths = scenes(3)
    assert metrics.best_f1_thresholds([p[:0] for p in predictions], truths) == {}
    assert metrics.best_f1_thresholds(predictions, [t[:0] for t in truths]) == {}


def test_the_threshold_lies_in_the_middle_of_the_range_that_is_as_good():
    rows = [[10.0 + 20 * i, 10, 8, 8, 0] for i in range(4)]
    truth = [Detections(np.array(rows[:3]), [1, 1, 1], [0, 0, 0], ("ship",), False)]
    found = [Detections(np.array(rows), [0.95, 0.9, 0.8, 0.2], [0, 0, 0, 0], ("ship",), False)]
    assert metrics.best_f1_thresholds(found, truth) == {"ship": pytest.approx(0.5)}
    # with the last one dropped as well, F1 is .8 in place of 1: within a slack of .2 its whole range counts
    assert metrics.best_f1_thresholds(found, truth, slack=0.21) == {"ship": pytest.approx(0.45)}


def test_crowded_images_count_whole_but_for_average_precision_as_coco_has_it():
    places = np.arange(150)
    crowd = np.column_stack([places * 20.0, np.full(150, 5.0), np.full((150, 2), 10.0), np.zeros(150)])
    labels, scores = np.zeros(150, np.int64), 0.9 - places * 0.005
    truth = [Detections(crowd, np.ones(150), labels, ("car",), True)]
    found = [Detections(crowd, scores, labels, ("car",), True)]
    assert metrics.precision_recall(found, truth) == {"car": (1.0, 1.0)}
    assert metrics.best_f1_thresholds(found, truth)["car"] < 0.17
    assert metrics.average_precision(found, truth, (0.5,), "coco").detections.tolist() == [100]


def test_what_cannot_be_evaluated_is_told():
    predictions, truths = scenes(3)
    with pytest.raises(ParameterError, match="2 predictions and 3 truths"):
        metrics.average_precision(predictions[:2], truths)
    with pytest.raises(ParameterError, match="at least one"):
        metrics.average_precision([], [])
    with pytest.raises(ParameterError, match="is unknown"):
        metrics.average_precision(predictions, truths, interpolation="eleven")
    with pytest.raises(ParameterError, match=r"IoU 0\.5 was not evaluated"):
        _ = metrics.average_precision(predictions, truths, thresholds=(0.75,)).ap50
    with pytest.raises(ParameterError, match="one set at a time"):
        metrics.average_precision(predictions, [*truths[:2], Detections.empty(("x",), False)])
    with pytest.raises(ParameterError, match="'tank' was not evaluated"):
        metrics.bootstrap(predictions, truths, n=2).ap50(["tank"])


def test_classes_are_matched_by_name_and_others_are_not_counted():
    predictions, truths = scenes(20, 8)
    more = ("tank", "plane", "ship", "car", "absent")
    place = np.array([more.index(name) for name in NAMES])
    renamed = [Detections(p.boxes, p.scores, place[p.labels], more, False) for p in predictions]
    extra = [
        Detections.concatenate([p, Detections(p.boxes, p.scores, np.zeros(len(p)), more, False)])
        for p in renamed
    ]
    np.testing.assert_array_equal(
        metrics.average_precision(extra, truths).ap, metrics.average_precision(predictions, truths).ap
    )
    none = [Detections.empty(("ship",), False)] * 20
    assert metrics.average_precision(none, truths).ap50 == 0
