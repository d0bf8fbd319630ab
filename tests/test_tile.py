"""`babelrs-geo tile`: what it says, how it ends, and labels of every kind on the way to other tools."""

from __future__ import annotations

import json

import geopandas as gpd
import numpy as np
import pytest
import rasterio
import shapely
from click.testing import CliRunner
from conftest import NORTH_UP, UTM, Raster, files_open, write_raster
from rasterio.transform import Affine
from simple_scenes import SHIPS, canvas, write_scene

from babelrs_geo import cli
from babelrs_geo.boxes import corners, rotated_iou
from babelrs_geo.chips import open_chip, read_index, read_labels

SMALL = ["--size", "64", "--overlap", "16", "--split", "1/0/0", "--workers", "1"]


def call(*arguments):
    return CliRunner().invoke(cli.main, [str(each) for each in arguments])


def speckle(side, bands=1):
    return np.random.default_rng(0).integers(1, 250, (bands, side, side), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with scenes and the same ships as labels of every kind."""
    monkeypatch.chdir(tmp_path)
    write_scene(tmp_path / "good.tif", canvas(100, 100, SHIPS))
    write_scene(tmp_path / "unplaced.tif", canvas(100, 100, SHIPS), crs=None)
    (tmp_path / "text.tif").write_text("not a raster")
    x, y, w, h = SHIPS.T
    on_map = shapely.box(
        NORTH_UP.c + 10 * x, NORTH_UP.f - 10 * (y + h), NORTH_UP.c + 10 * (x + w), NORTH_UP.f - 10 * y
    )
    gpd.GeoDataFrame({"class": "ship", "kind": "a"}, geometry=on_map, crs=UTM, index=range(4)).to_file(
        "labels.gpkg"
    )
    gpd.read_file("labels.gpkg").drop(columns="class").to_file("nameless.gpkg")
    with pytest.warns(UserWarning, match="'crs' was not provided"):
        gpd.read_file("labels.gpkg").set_crs(None, allow_override=True).to_file("nowhere.gpkg")
    gpd.GeoDataFrame({"class": ["ship"]}, geometry=[shapely.box(5, 5, 6, 6)], crs=4326).to_file("far.gpkg")
    gpd.GeoDataFrame({"class": ["ship"]}, geometry=[shapely.Point(1, 1)], crs=4326).to_file("points.gpkg")
    quads = [[a, b, a + c, b, a + c, b + d, a, b + d] for a, b, c, d in SHIPS.tolist()]
    (tmp_path / "dota").mkdir()
    lines = [" ".join(map(str, q)) + " ship 0" for q in quads]
    (tmp_path / "dota" / "unplaced.txt").write_text("\n".join(["imagesource:x", "gsd:1", *lines]))
    (tmp_path / "broken.txt").write_text("1 2 3 ship")
    coco = {
        "images": [{"id": 7, "file_name": "some/unplaced.tif"}, {"id": 8, "file_name": "other.tif"}],
        "annotations": [
            *({"image_id": 7, "category_id": 3, "bbox": each} for each in SHIPS.tolist()),
            {"image_id": 7, "category_id": 3, "bbox": [0, 0, 9, 9], "iscrowd": 1},
            {"image_id": 8, "category_id": 3, "bbox": [0, 0, 9, 9]},
        ],
        "categories": [{"id": 3, "name": "ship"}],
    }
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    return tmp_path


@pytest.mark.parametrize(
    ("scene", "labels", "oriented"),
    [
        ("good.tif", ["labels.gpkg"], False),
        ("good.tif", ["labels.gpkg", "--boxes", "oriented"], True),
        ("unplaced.tif", ["dota"], True),
        ("unplaced.tif", ["dota/unplaced.txt", "--boxes", "horizontal"], False),
        ("unplaced.tif", ["coco.json"], False),
    ],
)
def test_labels_of_every_kind_come_to_the_same_chips(folder, scene, labels, oriented):
    result = call("tile", scene, "--sensor", "sar", "--labels", *labels, "-o", "chips", *SMALL)
    assert (result.exit_code, result.stderr) == (0, "")
    first, second = result.stdout.splitlines()
    assert first.startswith("Cut 4 chips (4 train, 0 val, 0 test) with ")
    assert second.startswith("Written to chips: ")
    index, found = read_index("chips"), read_labels("chips")
    assert set(found["oriented"]) == {oriented}
    rows = found.merge(index[["chip", "x", "y"]], on="chip")
    back = np.column_stack([rows["cx"] + rows["x"], rows["cy"] + rows["y"], rows[["w", "h", "r"]]])
    truth = np.column_stack([SHIPS[:, :2] + SHIPS[:, 2:] / 2, SHIPS[:, 2:], np.zeros(4)])
    best = rotated_iou(truth, back)
    np.testing.assert_allclose(best.max(1), 1, atol=1e-6)
    np.testing.assert_allclose(best.max(0), 1, atol=1e-6)


def test_what_detect_writes_is_a_labels_file(folder):
    from babelrs_geo import qgis  # noqa: F401  the style of its layer comes along
    from babelrs_geo.detections import Detections
    from babelrs_geo.georef import Georef
    from babelrs_geo.vectors import Origin, coverage, features, write

    georef = Georef.from_affine(tuple(NORTH_UP), UTM)
    found = Detections(np.array([[40, 40, 20, 9, 30.0]]), np.ones(1), np.zeros(1, int), ("ship",), True)
    ground = coverage(np.array([[0, 0, 100, 100]]), ["detected"], [""], georef)
    write("found.gpkg", features(found, georef, Origin("good.tif", "sar")), ground, {})
    result = call("tile", "good.tif", "--sensor", "sar", "--labels", "found.gpkg", "-o", "chips", *SMALL)
    assert result.exit_code == 0
    assert read_labels("chips")[["w", "h", "r"]].to_numpy()[0] == pytest.approx([20, 9, 30])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["good.tif", "--labels", "nameless.gpkg"], "no column 'class' for the class (it has: kind)"),
        (["good.tif", "--labels", "nowhere.gpkg"], "the labels have no CRS"),
        (["unplaced.tif", "--labels", "labels.gpkg"], "the labels have a CRS, scene unplaced none"),
        (["good.tif", "--labels", "points.gpkg"], "holds Point; labels are polygons"),
        (["good.tif", "--labels", "absent.gpkg"], "absent.gpkg does not exist"),
        (["good.tif", "--labels", "text.tif"], "cannot be read as vectors"),
        (["good.tif", "--labels", "broken.txt"], "broken.txt, line 1: '1 2 3 ship' is no DOTA label"),
        (["text.tif"], "text.tif cannot be opened as a raster"),
        (["absent.tif"], "absent.tif does not exist"),
        (["good.tif", "good.tif"], "was given twice"),
        (["good.tif", "--overlap", "64"], "overlap is 64 and tile 64"),
        (["good.tif", "--split", "0.5/0.1/0.1"], "split is 0.5/0.1/0.1"),
        (["good.tif", "--background", "2"], "background is 2"),
        (["good.tif", "--workers", "0"], "workers is 0"),
        (["good.tif", "--dask", "nonsense"], "no Dask scheduler answers at nonsense"),
        (
            ["good.tif", "--dask", "coco.json"],
            "coco.json is not what a Dask scheduler writes (KeyError",
        ),
        (["good.tif", "-o", "good.tif"], "good.tif is a file"),
        (["good.tif", "-o", "."], "is not empty and no chip folder"),
        (["--coregister", "sar=good.tif", "rgb=text.tif"], "text.tif cannot be opened"),
        (["--coregister", "sar=good.tif"], "pass at least two"),
    ],
)
def test_what_cannot_be_done_ends_in_one_line(folder, arguments, said):
    result = call("tile", "--sensor", "sar", "-o", "chips", *SMALL, *arguments)
    assert result.exit_code == 1
    (line,) = [line for line in result.stderr.splitlines() if "error" in line]
    assert line.startswith("babelrs-geo: error: ")
    assert said in line
    assert not (folder / "chips" / "index.parquet").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--split", "a/b"], '"a/b" is no split'),
        (["--to", "yolo"], "--to knows no yolo"),
        (["--correct-shift"], "go with --coregister"),
        (["--coregister"], "is not sensor=FILE"),
    ],
)
def test_wrong_usage_is_told(folder, arguments, said):
    result = call("tile", "good.tif", "-o", "chips", *arguments)
    assert result.exit_code == 2
    assert said in result.stderr


def test_labels_that_miss_the_scene_and_splits_that_stay_empty_are_warned_of(folder):
    result = call(
        "tile", "good.tif", "--sensor", "sar", "--labels", "far.gpkg", "-o", "chips", "--size", "64",
        "--overlap", "16", "--workers", "1",
    )  # fmt: skip
    assert result.exit_code == 0
    assert "no label lies on scene good.tif" in result.stderr
    assert "no chip goes to val and test" in result.stderr
    again = call("tile", "good.tif", "--sensor", "sar", "-o", "chips", "--size", "64", "--overlap", "16")
    assert "the labels differ" in again.stderr


def test_two_scenes_of_one_name_keep_apart_and_the_summary_is_json(folder):
    (folder / "b").mkdir()
    write_scene(folder / "b" / "good.tif", canvas(80, 80, []))
    result = call("tile", "good.tif", "b/good.tif", "--sensor", "sar", "-o", "chips", "--json", *SMALL)
    told = json.loads(result.stdout)
    assert told["chips"] == {"train": 8, "val": 0, "test": 0}
    index = read_index("chips")
    assert set(index["scene"]) == {"good", "good-2"}
    assert index["chip"].is_unique


@pytest.mark.filterwarnings("ignore:Dataset has no geotransform")  # a PNG, read back
def test_other_tools_get_pictures_and_labels_that_fit_them(folder):
    path = write_raster(folder / "sar", Raster(speckle(150).astype(np.uint16) * 9))
    done = call(
        "tile", path, "--sensor", "sar", "--labels", "labels.gpkg", "--boxes", "oriented", "-o", "chips", *SMALL,
        "--to", "coco,dota",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    index, labels = read_index("chips"), read_labels("chips")
    coco = json.loads((folder / "chips/coco_sar_train.json").read_text())
    assert len(coco["images"]) == len(index)
    assert len(coco["annotations"]) == len(labels) > 0
    for image, row in zip(coco["images"], index.itertuples(), strict=True):
        with rasterio.open(folder / "chips" / image["file_name"]) as png:
            picture = png.read()
        with open_chip("chips", row._asdict()) as chip:
            model = chip.read((0, 0, chip.width, chip.height)).image[:1]
        assert np.abs(picture / 255 - model).max() <= 0.5 / 255 + 1e-6
        mine = labels[labels["chip"] == row.chip]
        text = (folder / f"chips/dota/sar/train/{row.chip}.txt").read_text().splitlines()
        read = np.array([[float(v) for v in line.split()[:8]] for line in text]).reshape(-1, 4, 2)
        np.testing.assert_allclose(read, corners(mine[["cx", "cy", "w", "h", "r"]]), atol=6e-4)
        boxes = [a["bbox"] for a in coco["annotations"] if a["image_id"] == image["id"]]
        for x, y, w, h in boxes:
            assert min(x, y) >= 0 and x + w <= row.width and y + h <= row.height


def test_more_scenes_than_files_may_be_open(folder):
    for i in range(60):
        place = NORTH_UP @ Affine.translation(100 * i, 0)
        write_raster(folder / f"s{i}", Raster(speckle(64), transform=place))
    assert call("tile", "s0.tif", "--sensor", "sar", "-o", "first", *SMALL).exit_code == 0  # imports
    with files_open(40):
        result = call("tile", *(f"s{i}.tif" for i in range(60)), "--sensor", "sar", "-o", "chips", *SMALL)
    assert result.exit_code == 0, result.stderr
    assert len(read_index("chips")) == 60


def test_coregister_tells_the_shift_and_cuts_alike(folder):
    r = np.random.default_rng(0)
    ground = np.kron(r.uniform(0.1, 0.9, (20, 20)), np.ones((15, 15)))
    rgb = write_raster(folder / "rgb", Raster(np.stack([ground * 250] * 3).astype(np.uint8)))
    sar = write_raster(folder / "sar", Raster((np.roll(ground, 2, 1) * 900 + 20).astype(np.float32)))
    result = call(
        "tile", "--coregister", f"rgb={rgb}", f"sar={sar}", "--reference", "rgb", "-o", "chips", *SMALL
    )
    assert result.exit_code == 0, result.stderr
    told = result.stdout.splitlines()
    assert told[0].startswith("sar lies +") and "of rgb" in told[0] and "left as it is" in told[0]
    assert float(told[0].split()[2]) == pytest.approx(2, abs=0.2)
    index = read_index("chips")
    assert index.groupby("chip")["sensor"].agg(set).map({"rgb", "sar"}.__eq__).all()
