"""Weights on labelled images, results against labels on the ground, and the reports that are written of both."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import warnings
from pathlib import Path

import geopandas as gpd
import numpy as np
import pyogrio
import pytest
import shapely
import torch
from click.testing import CliRunner
from conftest import NORTH_UP, UTM, Raster, write_raster
from hypothesis import given, settings
from hypothesis import strategies as st
from test_checkpoints import header
from test_datasets import write_soi
from test_qgis import environment
from test_qgis import system_python as system_python
from test_vectors import rotated
from tiny_model import TINY

from babelrs_geo import boxes, cli, evaluation, metrics, open_scene, vectors
from babelrs_geo.chips import ChipOptions, cut_chips
from babelrs_geo.detections import Detections
from babelrs_geo.errors import LabelError, OutputError, ParameterError, WeightsError
from babelrs_geo.evaluation import DataOptions, GroundOptions, find_frames, judge_ground, writing
from babelrs_geo.evaluation.ground import match, metric_crs
from babelrs_geo.georef import Georef
from babelrs_geo.models import checkpoints
from babelrs_geo.models.detector import Detector


def call(*arguments):
    return CliRunner().invoke(cli.main, ["evaluate", *map(str, arguments)])


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    checkpoints.save(path, Detector(TINY), header())
    return path


@pytest.fixture(scope="module")
def soi(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "soi"
    write_soi(folder)
    return folder


@pytest.fixture(scope="module")
def chips(tmp_path_factory) -> Path:
    """Chips of 64 px of a SAR scene with ships, one of them drawn aslant, and a boat that weights do not know."""
    root = tmp_path_factory.mktemp("scene")
    amplitude = np.random.default_rng(1).rayleigh(0.1, (64, 128)).astype(np.float32)
    amplitude[:10, :10] = np.nan
    scene = write_raster(root / "harbour", Raster(amplitude))
    drawn = boxes.corners([[20, 20, 10, 6, 0], [30, 44, 20, 4, 45], [100, 30, 8, 8, 0], [60, 30, 12, 8, 0]])
    shapes = [shapely.Polygon([NORTH_UP @ p for p in quad]) for quad in drawn]
    frame = gpd.GeoDataFrame({"class": ["ship", "ship", "boat", "ship"]}, geometry=shapes, crs=UTM)
    frame.to_file(root / "labels.gpkg")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # splits that stay empty are told
        labels = vectors.read_labels(root / "labels.gpkg", kind="oriented")
        options = ChipOptions(size=64, overlap=0, split=(0, 1, 0), keep_truncated=0.9)
        cut_chips([open_scene(scene, "sar")], root / "out", [labels], options)
    return root / "out"


# --- images ---


def test_weights_on_a_benchmark_give_a_report_of_three_files(weights, soi, tmp_path):
    out = tmp_path / "report"
    result = call("--weights", weights, "--data", soi, "--split", "train", "--replicates", 20, "-o", out)
    assert (result.exit_code, result.stderr) == (0, ""), result.stderr
    assert sorted(p.name for p in out.iterdir()) == ["pr.png", "report.json", "report.md"]
    assert [p.name for p in tmp_path.iterdir()] == ["report"]
    told = json.loads((out / "report.json").read_text())
    assert set(told["sensors"]) == {"sar", "rgb", "ir"} and not told["sensors_left_out"]
    assert told["overall"]["classes"] == 3  # one labelled class a sensor, so all three weigh the same
    maps = [own["map"] for own in told["sensors"].values()]
    assert told["overall"]["map"] == pytest.approx(np.mean(maps), abs=1e-6)
    assert told["overall"]["h_map"] == pytest.approx(metrics.h_mean(*maps), abs=1e-5)
    sar = told["sensors"]["sar"]
    assert (sar["images"], sar["counting"], sar["by_class"]["ship"]["objects"]) == (2, "coco", 2)
    assert {k: v["objects"] for k, v in sar["by_size"].items()} == {"small": 2, "medium": 0, "large": 0}
    assert sar["by_size"]["large"]["map"] is None  # never NaN, which JSON does not have
    assert (out / "pr.png").read_bytes()[:4] == b"\x89PNG"
    text = (out / "report.md").read_text()
    assert "| sar | train | 2 | 1 |" in text and "| H-mAP |" in text


def test_frames_of_a_benchmark_are_its_images_and_boxes(soi):
    found, left_out = find_frames(soi, header(), DataOptions(split="train", sensors=("ir",)))
    assert list(found) == ["ir"] and left_out == {}
    first = next(iter(found["ir"]))
    assert first.image.shape == (3, 70, 90) and first.truth.classes == ("car",) and first.truth.oriented
    np.testing.assert_allclose(boxes.bounds(first.truth.boxes), [[30, 20, 60, 32]], atol=1e-6)
    assert found["ir"].unlabelled == ("person", "bicycle", "other-vehicle")


def test_fitted_frames_are_shown_at_the_weights_size_and_found_boxes_come_back(soi):
    options = DataOptions(split="train", sensors=("rgb",), fit=True)
    frames = find_frames(soi, header(), options)[0]["rgb"]
    frame = next(iter(frames))
    side = header().tile
    assert frame.image.shape == (3, side, side) and frame.size == (round(70 * side / 90), side)
    assert frame.back == (90 / side, 70 / frame.size[0])
    # what lies on the object in the image shown lies on it in the pixels of the labels
    shown = Detections([[45 * side / 90, 26 * side / 90, 4, 4, 0]], [1], [0], ("plane",), True)
    np.testing.assert_allclose(shown.scale(*frame.back).boxes[0, :2], [45, 26], atol=0.5)


def test_only_classes_that_both_know_are_judged(soi, tmp_path):
    extra = tmp_path / "soi"
    write_soi(extra)
    text = extra / "DroneVehicle" / "dota_train" / "annfiles" / "0.txt"
    text.write_text(text.read_text() + "1 1 20 1 20 9 1 9 lorry 0\n")
    frames = find_frames(extra, header(), DataOptions(split="train", sensors=("ir",)))[0]["ir"]
    assert frames.unknown == {"lorry": 1} and [len(f.truth) for f in frames] == [1, 1]
    renamed = DataOptions(split="train", sensors=("ir",), rename={"lorry": "car"})
    frames = find_frames(extra, header(), renamed)[0]["ir"]
    assert frames.unknown == {} and [len(f.truth) for f in frames] == [2, 1]
    nothing = DataOptions(split="train", sensors=("ir",), rename={"lorry": "x", "car": "y"})
    with pytest.raises(LabelError, match="no class is shared: the data has x, y, the weights person"):
        find_frames(extra, header(), nothing)


def test_images_without_labels_count_unless_they_are_left_out(tmp_path):
    write_soi(tmp_path)
    (tmp_path / "DOTA_800pix" / "train" / "annfiles" / "1.txt").write_text("")
    for background, count in ((True, 2), (False, 1)):
        options = DataOptions(split="train", sensors=("rgb",), background=background)
        assert len(find_frames(tmp_path, header(), options)[0]["rgb"]) == count


def test_a_split_without_an_object_is_told_before_anything_runs(chips, weights, tmp_path):
    folder = tmp_path / "chips"
    shutil.copytree(chips, folder)
    index, labels = (gpd.read_parquet(folder / f"{name}.parquet") for name in ("index", "labels"))
    index.loc[0, "split"] = "test"
    index.to_parquet(folder / "index.parquet")
    labels[labels["chip"] != index.loc[0, "chip"]].to_parquet(folder / "labels.parquet")
    assert find_frames(folder, header())[0]["sar"].objects == 1
    result = call("--weights", weights, "--data", folder, "--split", "test", "-o", tmp_path / "report")
    assert (result.exit_code, result.stderr) == (
        1,
        "babelrs-geo: error: nothing to count: no labelled object in split test; choose another --split\n",
    )
    assert not (tmp_path / "report").exists()


def test_splits_may_differ_by_sensor(soi):
    options = DataOptions(split={"sar": "train", "ir": "train"}, sensors=("sar", "ir"))
    assert set(find_frames(soi, header(), options)[0]) == {"sar", "ir"}
    with pytest.raises(ParameterError, match="no split is given for rgb"):
        find_frames(soi, header(), DataOptions(split={"sar": "train"}))


def test_frames_of_chips_are_the_chips_with_what_can_be_seen_of_the_objects(chips):
    frames = find_frames(chips, header())[0]["sar"]
    assert len(frames) == 2 and frames.unknown == {"boat": 1}
    left, right = sorted(frames, key=lambda f: f.name)
    assert left.image.shape == (3, 64, 64) and left.back == (1.0, 1.0) and not left.valid[:10, :10].any()
    # SAR boxes are upright: the aslant ship's are its bounds; the one on the edge is cut by it
    reach = (20 + 4) / np.sqrt(2) / 2
    expected = [[15, 17, 25, 23], [30 - reach, 44 - reach, 30 + reach, 44 + reach], [54, 26, 64, 34]]
    found = boxes.bounds(left.truth.boxes)
    np.testing.assert_allclose(found[np.argsort(found[:, 0])], sorted(expected), atol=0.02)
    np.testing.assert_allclose(boxes.bounds(right.truth.boxes), [[0, 26, 2, 34]], atol=0.02)


def test_chips_are_shown_at_the_ground_sampling_asked_for(chips):
    frames = find_frames(chips, header(), DataOptions(gsd=NORTH_UP.a / 2))[0]["sar"]
    frame = next(iter(frames))
    assert frame.image.shape == (3, 128, 128) and frame.back == (0.5, 0.5)
    assert boxes.bounds(frame.truth.boxes).max() <= 64


def test_a_chip_folder_is_judged_like_a_benchmark(weights, chips, tmp_path):
    result = call("--weights", weights, "--data", chips, "--replicates", 5, "--json", "-o", tmp_path / "r")
    told = json.loads(result.stdout)
    assert result.exit_code == 0, result.stderr
    assert told["sensors"]["sar"]["left_out"]["unknown_to_the_weights"] == {"boat": 1}
    assert told["sensors"]["sar"]["by_class"]["ship"]["objects"] == 4 and "h_map" not in told["overall"]
    assert "1 objects of class boat, which the weights do not know" in (tmp_path / "r/report.md").read_text()


def test_what_is_labelled_on_invalid_pixels_does_not_count(chips, tmp_path):
    shutil.copytree(chips, tmp_path / "chips")
    labels = gpd.read_parquet(chips / "labels.parquet")
    left = (labels["chip"] == labels["chip"].min()) & (labels["class"] == "ship")
    labels.loc[labels.index[left][:2], ["cx", "cy"]] = [[5.0, 5.0], [15.0, 5.0]]
    labels.to_parquet(tmp_path / "chips" / "labels.parquet")
    before, after = (
        sum(len(frame.truth) for frame in find_frames(folder, header())[0]["sar"])
        for folder in (chips, tmp_path / "chips")
    )
    assert after == before - 1


def test_what_is_found_on_invalid_pixels_does_not_count(chips, monkeypatch):
    frames = find_frames(chips, header())[0]["sar"]
    torch.manual_seed(0)
    model = Detector(TINY).eval()

    def everywhere(images, sensor, sizes=None):
        box = torch.tensor([[0.0, 0, 8, 8], [20, 20, 40, 40]])
        return [(box, torch.tensor([0.9, 0.8]), torch.zeros(2, dtype=torch.long))]

    monkeypatch.setattr(model, "predict", everywhere)
    found = evaluation.evaluate(model, frames)
    assert sorted(len(p) for p in found.predictions) == [1, 2]


def test_overall_figures_weigh_sensors_by_their_classes():
    def measured(names, right):
        """The first `right` of the classes are found, the others not."""
        rows = [[20.0 + 30 * k, 20, 10, 10, 0] for k in range(len(names))]
        truth = [Detections(rows, np.ones(len(rows)), np.arange(len(rows)), names, True)] * 3
        found = [each[:right] for each in truth]
        return evaluation.Evaluation("rgb", found, truth).measured(10)

    sensors = {"sar": measured(("a", "b"), 1), "rgb": measured(tuple("cdefgh"), 6), "ir": measured(("i",), 1)}
    told = evaluation.overall(sensors)
    assert (
        told["classes"] == 9 and told["map"] == pytest.approx(8 / 9) and told["ap50"] == pytest.approx(8 / 9)
    )
    assert told["h_map"] == pytest.approx(3 / (2 + 1 + 1))
    assert told["map_interval"] == pytest.approx([8 / 9, 8 / 9])
    assert "h_map" not in evaluation.overall({"sar": sensors["sar"]})


# --- files ---


def report() -> evaluation.Report:
    truth = [Detections([[20, 20, 10, 10, 0]], [1], [0], ("ship",), False)]
    found = evaluation.Evaluation("sar", truth, truth)
    own = {"split": "val", **found.report(("ship",), 5), "by_size": found.by_size(5)}
    own["left_out"] = {"unknown_to_the_weights": {}, "not_labelled": []}
    figures = {
        "software": "babelrs-geo",
        "kind": "images",
        "weights": {"name": "tiny", "sha256": "ab"},
        "data": "soi",
        "overall": evaluation.overall({"sar": found.measured(5)}),
        "sensors": {"sar": own},
        "sensors_left_out": {},
    }
    return evaluation.Report(figures, {"sar": found.curves()})


def test_a_report_is_whole_or_absent(tmp_path, monkeypatch):
    folder = tmp_path / "report"

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="No space left"):
        evaluation.write_report(folder, report(), {"matches.gpkg": full}, picture=False)
    assert not list(tmp_path.iterdir())
    evaluation.write_report(folder, report(), picture=False)
    before = (folder / "report.json").read_bytes()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="--overwrite"):
        evaluation.write_report(folder, report(), picture=False)
    with pytest.raises(OutputError):
        evaluation.write_report(folder, report(), {"x": full}, overwrite=True, picture=False)
    assert (folder / "report.json").read_bytes() == before
    with pytest.raises(OutputError, match=r'r!/matches\.gpkg cannot be written: a "!"'):
        evaluation.write_report(tmp_path / "r!", report(), {"matches.gpkg": full}, picture=False)
    drafts = []
    extras = {"matches.gpkg": lambda p: (p.touch(), drafts.append(p))}
    evaluation.write_report(folder, report(), extras, overwrite=True)
    assert folder in drafts[0].parents  # what holds it may be read-only
    assert {p.name for p in folder.iterdir()} == {
        "notes.txt",
        "report.json",
        "report.md",
        "pr.png",
        "matches.gpkg",
    }
    (folder / "matches.gpkg-wal").write_text("of the layer that goes")
    evaluation.write_report(folder, report(), overwrite=True, picture=False)
    assert {p.name for p in folder.iterdir()} == {"notes.txt", "report.json", "report.md"}


def test_the_table_says_percent_and_a_missing_picture_is_told_before_the_work(tmp_path, monkeypatch):
    text = writing.markdown(report().figures)
    assert "| sar | val | 1 | 1 | 100.00 (100.0 to 100.0) |" in text and "## Not judged" not in text
    monkeypatch.setattr(writing, "find_spec", lambda name: None)
    with pytest.raises(ParameterError, match="--no-picture"):
        evaluation.check_folder(tmp_path / "r")
    evaluation.check_folder(tmp_path / "r", picture=False)


# --- the ground ---

ORIGIN = vectors.Origin("harbour.tif", "sar")
NAMES = ("ship", "car")


def save(path: Path, found: Detections, georef: Georef, failed: int | None = None, **provenance) -> Path:
    """A result over 400 x 400 px, of whose four quarters one may have failed."""
    states = ["detected"] * 4
    if failed is not None:
        states[failed] = "failed"
    inners = [(x, y, 200, 200) for y in (0, 200) for x in (0, 200)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # pixels have no metres
        frame = vectors.features(found, georef, ORIGIN)
    ground = vectors.coverage(inners, states, [""] * 4, georef)
    told = {"scene": {"name": "harbour.tif"}, "weights": {"name": "w", "sha256": "ab"}, **provenance}
    return vectors.write(path, frame, ground, told)


def labels_of(path: Path, rows, names, georef: Georef, crs: str | None = None) -> Path:
    """Labels drawn in pixels, on the map."""
    quads = boxes.corners(rows)
    placed = np.stack(georef.to_map(quads[..., 0], quads[..., 1]), -1)
    frame = gpd.GeoDataFrame({"class": list(names)}, geometry=shapely.polygons(placed), crs=georef.crs)
    frame = frame if crs is None else frame.to_crs(crs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        frame.to_file(path)
    return path


GEOREFS = {
    "utm": rotated("EPSG:32611", 380_000, 3_735_000, 0.5, 33),
    "degrees": Georef.from_affine((1e-5, 0, 24.9, 0, -5e-6, 60.2), "EPSG:4326"),
    "antimeridian": Georef.from_affine((1e-5, 0, 179.998, 0, -1e-5, -17.0), "EPSG:4326"),
    "pixels": Georef.from_affine((1, 0, 0, 0, 1, 0)),
    "site": Georef.from_affine((2, 0, 50, 0, -2, 90), 'LOCAL_CS["site",UNIT["metre",1]]'),
}


def objects(seed: int, n: int = 40, oriented: bool = True) -> np.ndarray:
    """Boxes apart from one another: one to a cell of a grid."""
    r = np.random.default_rng(seed)
    cell = r.permutation(64)[:n]
    centre = np.stack([cell % 8, cell // 8], 1) * 50 + r.uniform(20, 30, (n, 2))
    angle = r.uniform(-90, 90, (n, 1)) if oriented else np.zeros((n, 1))
    return np.hstack([centre, r.uniform(8, 25, (n, 2)), angle])


@pytest.mark.parametrize("suffix", [".gpkg", ".parquet"])
@pytest.mark.parametrize("name", ["utm", "degrees", "antimeridian"])
def test_what_lies_on_its_labels_is_hit_wherever_it_is(name, suffix, tmp_path):
    rows = objects(1)
    found = Detections(rows, np.linspace(0.9, 0.5, 40), np.arange(40) % 2, NAMES, True)
    result = save(tmp_path / f"out{suffix}", found, GEOREFS[name])
    names = [NAMES[k % 2] for k in range(40)]
    labels = labels_of(tmp_path / "labels.gpkg", rows, names, GEOREFS[name], "EPSG:4326")
    cut = name == "antimeridian" and suffix == ".parquet"  # as `--crs` leaves it
    if cut:
        whole = vectors.read_result(result)
        vectors.write(
            result,
            *(
                f.set_geometry(vectors.to_crs(f.geometry, "EPSG:4326"))
                for f in (whole.features, whole.coverage)
            ),
            whole.provenance,
            overwrite=True,
        )
    done, matches, _ = judge_ground(result, labels, GroundOptions(iou=0.9))
    overall = done.figures["overall"]
    assert (overall["hits"], overall["false"], overall["missed"], overall["mean_ap"]) == (40, 0, 0, 1.0)
    assert (matches.iou > (0.95 if cut else 0.99)).all()  # of two pieces, the rectangle around both
    assert overall["recall_interval"][0] == pytest.approx(metrics.wilson(40, 40)[0])


@pytest.mark.parametrize("name", ["pixels", "site"])
def test_results_in_pixels_or_on_a_sites_own_axes_are_matched_there(name, tmp_path):
    rows = objects(2)
    result = save(
        tmp_path / "o.gpkg", Detections(rows, np.ones(40), np.zeros(40), NAMES, True), GEOREFS[name]
    )
    labels = labels_of(tmp_path / "labels.gpkg", rows, ["ship"] * 40, GEOREFS[name])
    assert judge_ground(result, labels)[0].figures["overall"]["hits"] == 40


def test_geojson_results_are_read_too(tmp_path):
    rows = objects(3)
    result = save(
        tmp_path / "o.geojson", Detections(rows, np.ones(40), np.zeros(40), NAMES, True), GEOREFS["utm"]
    )
    labels = labels_of(tmp_path / "labels.gpkg", rows, ["ship"] * 40, GEOREFS["utm"])
    assert judge_ground(result, labels)[0].figures["overall"]["hits"] == 40


@pytest.mark.parametrize("name", ["utm", "degrees"])
@given(seed=st.integers(0, 10_000))
@settings(max_examples=15)
def test_hits_on_the_ground_are_the_hits_in_pixels(name, seed):
    r = np.random.default_rng(seed)
    truth = objects(seed)
    moved = truth[r.integers(0, 40, 45)] + r.normal(0, 1, (45, 5)) * [2, 2, 2, 2, 4]
    moved[:, 2:4] = moved[:, 2:4].clip(3)
    scores, labels = r.permutation(45) / 50 + 0.05, r.integers(0, 2, 45)
    found = Detections(moved, scores, labels, NAMES, True)
    kinds = r.integers(0, 2, 40)
    georef = GEOREFS[name]
    frame = vectors.features(found, georef, ORIGIN)
    ground = vectors.coverage([(0, 0, 500, 500)], ["detected"], [""], georef)
    quads = boxes.corners(truth)
    shapes = shapely.polygons(np.stack(georef.to_map(quads[..., 0], quads[..., 1]), -1))
    drawn = gpd.GeoDataFrame({"class": np.array(NAMES)[kinds]}, geometry=shapes, crs=georef.crs)
    matches = match(vectors.Result(frame, ground, {}), drawn, NAMES, 0.5)
    pixels = metrics.precision_recall([found], [Detections(truth, np.ones(40), kinds, NAMES, True)])
    for k, kind in enumerate(NAMES):
        mine = (matches.detections["class"] == kind).to_numpy()
        hits = (matches.outcomes[mine] == "hit").sum()
        assert hits / mine.sum() == pytest.approx(pixels[kind][0])
        assert hits / (kinds == k).sum() == pytest.approx(pixels[kind][1])
    assert matches.taken.sum() == (matches.outcomes == "hit").sum()


@pytest.mark.parametrize("name", ["utm", "degrees"])
def test_a_horizontal_detection_is_held_to_the_reach_of_the_object_along_its_sides(name, tmp_path):
    rows = objects(4)
    upright = boxes.from_xyxy(boxes.bounds(rows))
    found = Detections(upright, np.ones(40), np.zeros(40), NAMES, False)
    result = save(tmp_path / "o.gpkg", found, GEOREFS[name])
    labels = labels_of(tmp_path / "labels.gpkg", rows, ["ship"] * 40, GEOREFS[name])
    done, matches, _ = judge_ground(result, labels, GroundOptions(iou=0.95))
    assert done.figures["overall"]["hits"] == 40 and (matches.iou > 0.999).all()


def test_only_ground_that_was_looked_at_counts(tmp_path):
    # ships in each quarter, one on the border of the last, which failed; the detector saw its half
    truth = np.array([[50, 50, 20, 10, 0], [250, 50, 20, 10, 0], [50, 250, 20, 10, 0], [300, 300, 20, 10, 0],
                      [204, 250, 20, 10, 0], [120, 120, 20, 10, 0]])  # fmt: skip
    seen = np.array([[50, 50, 20, 10, 0], [250, 60, 20, 10, 0], [52, 250, 20, 10, 0], [199, 250, 20, 10, 0]])
    found = Detections(seen, [0.9, 0.8, 0.7, 0.6], [0, 0, 1, 0], NAMES, True)
    thresholds = {"parameters": {"thresholds": {"ship": 0.4}, "classes": ["ship", "car"]}}
    result = save(tmp_path / "o.gpkg", found, GEOREFS["utm"], failed=3, **thresholds)
    labels = labels_of(tmp_path / "labels.gpkg", truth, ["ship"] * 5 + ["kiosk"], GEOREFS["utm"])
    done, matches, read = judge_ground(result, labels)
    ship = done.figures["by_class"]["ship"]
    assert (ship["objects"], ship["hits"], ship["false"], ship["missed"]) == (3, 1, 1, 2)
    assert (ship["precision"], ship["threshold"], ship["ap"]) == (0.5, 0.4, pytest.approx(1 / 3))
    assert ship["f1"] == pytest.approx(2 * 0.5 * (1 / 3) / (0.5 + 1 / 3))
    assert ship["f1_interval"][0] < ship["f1"] < ship["f1_interval"][1]
    assert done.figures["left_out"] == {
        "unknown_to_the_detector": {"kiosk": 1},
        "not_labelled": {"car": 1},
        "labels_where_nobody_looked": 2,
        "detections_ignored": 1,
    }
    table = matches.table()
    assert table["outcome"].value_counts().to_dict() == {"missed": 2, "hit": 1, "false": 1, "ignored": 1}
    assert metric_crs(read) == "EPSG:32611" and table.crs == "EPSG:32611"


def test_a_find_of_the_wrong_class_says_what_was_labelled(tmp_path):
    rows = objects(5, 2)
    result = save(tmp_path / "o.gpkg", Detections(rows, [0.9, 0.8], [0, 1], NAMES, True), GEOREFS["utm"])
    labels = labels_of(tmp_path / "labels.gpkg", rows, ["ship", "ship"], GEOREFS["utm"])
    labels_of(
        tmp_path / "both.gpkg",
        np.vstack([rows, [[390, 390, 4, 4, 0]]]),
        ["ship", "ship", "car"],
        GEOREFS["utm"],
    )
    assert judge_ground(result, labels)[0].figures["left_out"]["not_labelled"] == {"car": 1}
    table = judge_ground(result, tmp_path / "both.gpkg")[1].table()
    false = table[table["outcome"] == "false"].iloc[0]
    assert (false["class"], false["labelled"]) == ("car", "ship") and false["iou"] > 0.99
    assert table[table["outcome"] == "missed"]["score"].isna().all()


def test_the_verb_writes_a_styled_layer_of_errors(tmp_path):
    rows = objects(6)
    found = Detections(rows[:30], np.linspace(1, 0.5, 30), np.zeros(30), NAMES, True)
    result = save(tmp_path / "o.gpkg", found, GEOREFS["utm"])
    labels = labels_of(tmp_path / "l.gpkg", rows, ["Ship"] * 40, GEOREFS["utm"])
    done = call(
        "--detections", result, "--labels", labels, "--rename", "Ship=ship", "--matches", "-o", tmp_path / "r"
    )
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.startswith("30 of 40 objects hit, 0 false: precision 1.000, recall 0.750, F1 0.857.")
    layers = pyogrio.list_layers(tmp_path / "r/matches.gpkg")[:, 0].tolist()
    assert layers[:2] == ["matches", "coverage"]
    assert len(gpd.read_file(tmp_path / "r/matches.gpkg", layer="matches")) == 40
    style = gpd.read_file(tmp_path / "r/matches.gpkg", layer="layer_styles").iloc[0]
    assert style["f_table_name"] == "matches" and all(
        k in style["styleQML"] for k in ("missed", "false", "hit")
    )
    text = (tmp_path / "r/report.md").read_text()
    assert "| ship |  | 40 | 30 | 10 | 0 | 100.00 (88.6 to 100.0) |" in text
    assert not math.isnan(json.loads((tmp_path / "r/report.json").read_text())["by_class"]["ship"]["ap"])


PROBE = """
import json, sys
from qgis.core import QgsApplication, QgsMapRendererParallelJob, QgsMapSettings, QgsVectorLayer
from qgis.PyQt.QtCore import QSize

app = QgsApplication([], False)
app.initQgis()
layer = QgsVectorLayer(sys.argv[1] + "|layername=matches", "matches", "ogr")
renderer = layer.renderer()
settings = QgsMapSettings()
settings.setLayers([layer])
settings.setOutputSize(QSize(600, 600))
settings.setExtent(layer.extent())
settings.setDestinationCrs(layer.crs())
job = QgsMapRendererParallelJob(settings)
job.start()
job.waitForFinished()
job.renderedImage().save(sys.argv[2])
told = {
    "attribute": renderer.classAttribute(),
    "categories": [c.value() for c in renderer.categories()],
    "labels": layer.labelsEnabled(),
}
labels = job.takeLabelingResults()
told["texts"] = sorted(label.labelText for label in labels.labelsWithinRect(settings.visibleExtent()))
print("TOLD" + json.dumps(told))
sys.stdout.flush()
del labels, job, layer
app.exitQgis()
"""


@pytest.mark.qgis
def test_qgis_tells_hits_from_errors(tmp_path, system_python):
    rows = objects(8, 3)
    result = save(tmp_path / "o.gpkg", Detections(rows[:2], [0.9, 0.8], [0, 1], NAMES, True), GEOREFS["utm"])
    labels = labels_of(tmp_path / "l.gpkg", rows[[0, 2, 2]], ["ship", "ship", "car"], GEOREFS["utm"])
    assert call("--detections", result, "--labels", labels, "--matches", "-o", tmp_path / "r").exit_code == 0
    done = subprocess.run(
        [system_python, "-c", PROBE, tmp_path / "r/matches.gpkg", tmp_path / "picture.png"],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=120,
    )
    answers = [line[4:] for line in done.stdout.splitlines() if line.startswith("TOLD")]
    assert answers, done.stderr
    told = json.loads(answers[0])
    assert told["attribute"] == "outcome" and told["categories"] == ["hit", "missed", "false", "ignored"]
    # two misses lie on one another, so one of their labels gives way
    assert told["labels"] and {"ship 0.90", "car 0.80"} < set(told["texts"])


# --- bad input ---


def test_bad_input_ends_in_one_line(weights, soi, tmp_path):
    rows = objects(7, 4)
    result = save(tmp_path / "o.gpkg", Detections(rows, np.ones(4), np.zeros(4), NAMES, True), GEOREFS["utm"])
    labels = labels_of(tmp_path / "l.gpkg", rows, ["tree"] * 4, GEOREFS["utm"])
    flat = labels_of(tmp_path / "flat.gpkg", rows, ["ship"] * 4, GEOREFS["pixels"])
    (tmp_path / "dota.txt").write_text("1 1 9 1 9 9 1 9 ship 0\n")
    (tmp_path / "file").touch()
    data = ("--weights", weights, "--data", soi)
    ground = ("--detections", result)
    cases = [
        (2, "either --data, or --detections", ()),
        (2, "either --data, or --detections", (*data, *ground, "--labels", labels)),
        (2, "either --data, or --detections", ground),
        (2, "--matches goes with --detections and --labels", (*data, "--matches")),
        (2, "--iou goes with --detections and --labels", (*data, "--iou", 0.75)),
        (2, "--split goes with --data", (*ground, "--labels", labels, "--split", "val")),
        (2, "expected FROM=TO", (*data, "--rename", "Ship")),
        (2, "is no split", (*data, "--split", "radar=val")),
        (1, "holds no labelled images", ("--weights", weights, "--data", tmp_path)),
        (1, "after_merge_val.json is missing", data),
        (1, "has nothing of x, only sar, rgb, ir", (*data, "--sensor", "x")),
        (1, "there are no weights", ("--weights", "none", "--data", soi)),
        (1, "unknown device", (*data, "--device", "tpu")),
        (1, "gsd is 0", (*data, "--gsd", "0")),
        (1, "share no class: labelled are tree, the detector knows ship", (*ground, "--labels", labels)),
        (1, "the labels have no CRS", (*ground, "--labels", flat)),
        (1, "boxes in pixels of images", (*ground, "--labels", tmp_path / "dota.txt")),
        (1, "does not exist", ("--detections", tmp_path / "no.gpkg", "--labels", labels)),
        (1, "cannot be read with its coverage", ("--detections", labels, "--labels", labels)),
        (1, "iou is 2", (*ground, "--labels", labels, "--iou", 2)),
        (1, "no column 'kind'", (*ground, "--labels", labels, "--class-column", "kind")),
    ]
    for code, message, arguments in cases:
        done = call(*arguments, "-o", tmp_path / "r")
        assert done.exit_code == code and message in done.stderr, (arguments, done.stderr)
        assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "r").exists()
    done = call(*ground, "--labels", labels, "-o", tmp_path / "file")
    assert done.exit_code == 1 and "is a file" in done.stderr
    unseen = save(tmp_path / "u.gpkg", Detections.empty(NAMES, True), GEOREFS["utm"])
    frame = pyogrio.read_dataframe(unseen, layer="coverage").assign(state="failed")
    pyogrio.write_dataframe(frame, unseen, layer="coverage", driver="GPKG")


def test_nothing_looked_at_and_weights_without_the_sensor_are_told(soi):
    georef = GEOREFS["utm"]
    frame = vectors.features(Detections.empty(NAMES, True), georef, ORIGIN)
    ground = vectors.coverage([(0, 0, 9, 9)], ["failed"], ["damaged"], georef)
    with pytest.raises(LabelError, match="no ground was looked at"):
        match(
            vectors.Result(frame, ground, {}),
            gpd.GeoDataFrame({"class": []}, geometry=[], crs=georef.crs),
            NAMES,
        )
    lacking = header()
    lacking = type(lacking)(**{**vars(lacking), "classes": {"rgb": lacking.classes["rgb"]}})
    with pytest.raises(WeightsError, match="know nothing of sar"):
        find_frames(soi, lacking, DataOptions(split="train", sensors=("sar",)))
    found, left_out = find_frames(soi, lacking, DataOptions(split="train"))
    assert set(found) == {"rgb"} and set(left_out) == {"sar", "ir"}
