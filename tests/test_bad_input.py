"""What cannot be served ends in one line that names the cause and the remedy, with nothing written; what can
be served, is.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import geopandas as gpd
import numpy as np
import pytest
import rasterio
from click.testing import CliRunner
from simple_scenes import SHIPS, BrightHeader, BrightWeights, canvas, write_scene

from babelrs_geo import cli
from babelrs_geo.cli import program

EMPTY_VRT = '<VRTDataset rasterXSize="64" rasterYSize="64"></VRTDataset>'


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a good scene and many bad ones."""
    monkeypatch.chdir(tmp_path)
    grey = canvas(100, 100, SHIPS)
    speckle = np.random.default_rng(0).integers(1, 255, (300, 300), dtype=np.uint8)
    write_scene(tmp_path / "good.tif", grey)
    write_scene(tmp_path / "unplaced.tif", grey, crs=None)
    write_scene(tmp_path / "two.tif", np.stack([grey] * 2))
    write_scene(tmp_path / "colour.tif", np.stack([grey, grey[::-1], grey.T]))
    write_scene(tmp_path / "void.tif", np.zeros((60, 60), np.uint8), nodata=0)
    write_scene(tmp_path / "nan.tif", np.full((60, 60), np.nan, np.float32))
    Path("text.tif").write_text("not a raster")
    Path("empty.tif").touch()
    Path("none.vrt").write_text(EMPTY_VRT)
    whole = write_scene(tmp_path / "whole.tif", speckle).read_bytes()
    Path("cut.tif").write_bytes(whole[: len(whole) // 20])
    Path("whole.tif").unlink()
    Path("folder.gpkg").mkdir()
    Path("exists.gpkg").write_text("precious")
    Path("words.gpkg").write_text("no vectors")
    gpd.GeoDataFrame(geometry=gpd.points_from_xy([380_100], [3_734_900]), crs="EPSG:32611").to_file(
        "point.geojson"
    )
    gpd.GeoDataFrame(geometry=gpd.points_from_xy([-117], [33]).buffer(0.1), crs="EPSG:4326").to_file(
        "far.geojson"
    )
    return tmp_path


@pytest.fixture
def weights(monkeypatch):
    """Weights that know SAR and RGB, and count how often they are made to look."""
    made = BrightWeights()
    monkeypatch.setattr("babelrs_geo.models.zoo.load", lambda name, device: made)
    return made


def contents(folder):
    return {path: path.stat().st_size for path in folder.rglob("*")}


SAR = ("--sensor", "sar")

REFUSED = {
    "missing file": (("nowhere.tif", *SAR), ("nowhere.tif",)),
    "a folder": (("folder.gpkg", *SAR), ("folder.gpkg is a folder: ", "archive run folder.gpkg -o RESULTS")),
    "not a raster": (("text.tif", *SAR), ("text.tif",)),
    "an empty file": (("empty.tif", *SAR), ("empty.tif",)),
    "truncated": (("cut.tif", *SAR), ("cut.tif",)),
    "no bands": (("none.vrt", *SAR), ("none.vrt", "band")),
    "two bands for rgb": (("two.tif", "--sensor", "rgb"), ("two.tif", "band")),
    "colour for sar": (("colour.tif", *SAR), ("colour.tif", "band")),
    "a band that is not there": (("good.tif", *SAR, "--bands", "7"), ("band", "7")),
    "a polarisation that is not there": (("good.tif", *SAR, "--polarisation", "HV"), ("HV",)),
    "units of another sensor": (("good.tif", *SAR, "--units", "kelvin"), ("kelvin", "amplitude")),
    "a range upside down": (("good.tif", *SAR, "--range", "9", "1"), ("9",)),
    "all nodata": (("void.tif", *SAR), ("void.tif", "valid")),
    "all nan": (("nan.tif", *SAR), ("nan.tif", "valid")),
    "sensor unclear": (("good.tif",), ("good.tif", "--sensor")),
    "weights lack the sensor": (("good.tif", "--sensor", "ir"), ("ir", "sar, rgb")),
    "unknown class": (("good.tif", *SAR, "--classes", "shp"), ('"shp"', "ship")),
    "no class": (("good.tif", *SAR, "--classes", ","), ("classes",)),
    "overlap as large as the tile": (("good.tif", *SAR, "--tile", "64", "--overlap", "64"), ("overlap",)),
    "no tile": (("good.tif", *SAR, "--tile", "0"), ("tile",)),
    "score out of range": (("good.tif", *SAR, "--score", "40"), ("score", "40")),
    "gsd of nothing": (("good.tif", *SAR, "--gsd", "-1"), ("gsd", "-1")),
    "gsd without georeference": (("unplaced.tif", *SAR, "--gsd", "5"), ("georeference", "--gsd native")),
    "no batch": (("good.tif", *SAR, "--batch", "0"), ("batch",)),
    "unknown device": (("good.tif", *SAR, "--device", "gpu"), ('"gpu"', "cuda")),
    "absent device": (("good.tif", *SAR, "--device", "cuda:77"), ("cuda:77", "cpu")),
    "unknown crs": (("good.tif", *SAR, "--crs", "EPSG:99999999"), ("EPSG:99999999",)),
    "crs without georeference": (("unplaced.tif", *SAR, "--crs", "EPSG:4326"), ("georeference",)),
    "area missing": (("good.tif", *SAR, "--aoi", "nowhere.gpkg"), ("nowhere.gpkg",)),
    "area not vectors": (("good.tif", *SAR, "--aoi", "words.gpkg"), ("words.gpkg",)),
    "area of points": (("good.tif", *SAR, "--aoi", "point.geojson"), ("point.geojson", "polygon")),
    "area elsewhere": (("good.tif", *SAR, "--aoi", "far.geojson"), ("far.geojson", "good")),
    "missing file of an output's name": (("no/exists.tif", *SAR, "-o", "exists.gpkg"), ("no/exists.tif does not",)),
    "output exists": (("good.tif", *SAR, "-o", "exists.gpkg"), ("exists.gpkg", "--overwrite")),
    "output is a folder": (("good.tif", *SAR, "-o", "folder.gpkg"), ("folder.gpkg",)),
    "output nowhere": (("good.tif", *SAR, "-o", "no/such/out.gpkg"), ("no/such",)),
    "output under a file": (("good.tif", *SAR, "-o", "good.tif/out.gpkg"), ("good.tif",)),
    "output of unknown kind": (("good.tif", *SAR, "-o", "out.shp"), (".shp", ".gpkg")),
    "output in a place that takes no files": (("good.tif", *SAR, "-o", "/proc/out.gpkg"), ("/proc",)),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line_with_nothing_written(folder, weights, case):
    arguments, words = REFUSED[case]
    before = contents(folder)
    result = CliRunner().invoke(cli.main, ["detect", *arguments])
    assert result.exit_code == 1, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("babelrs-geo: error: ") and "unexpected" not in line
    assert all(word in line for word in words), line
    assert result.stdout == ""
    assert contents(folder) == before


def test_weights_that_are_not_there_are_refused(folder):
    for name in ("nowhere.safetensors", "unheard-of", "text.tif"):
        result = CliRunner().invoke(cli.main, ["detect", "good.tif", *SAR, "--weights", name])
        (line,) = result.stderr.splitlines()
        assert result.exit_code == 1 and line.startswith("babelrs-geo: error: ") and name in line
    assert not list(folder.glob("good_*"))


def test_too_little_memory_is_advice(folder, weights):
    weights.fails = RuntimeError("CUDA out of memory. Tried to allocate 20 GiB")
    result = CliRunner().invoke(cli.main, ["detect", "good.tif", *SAR])
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert "out of memory" in line and "smaller batch" in line
    assert not list(folder.glob("good_*"))


@pytest.mark.parametrize(
    ("shape", "rectangles"),
    [
        ((40, 50), [(10, 12, 9, 5), (30, 20, 6, 12)]),  # smaller than a tile
        ((100, 1), [(0, 20, 1, 10)]),  # one pixel wide
        ((1, 100), [(20, 0, 10, 1)]),  # one pixel high
        ((1, 1), []),
    ],
)
def test_small_scenes_are_served(tmp_path, monkeypatch, weights, shape, rectangles):
    monkeypatch.chdir(tmp_path)
    write_scene(tmp_path / "small.tif", canvas(shape[1], shape[0], rectangles))
    result = CliRunner().invoke(cli.main, ["detect", "small.tif", *SAR, "--no-collar"])
    assert (result.exit_code, result.stderr) == (0, "")
    assert len(gpd.read_file("small_detections.gpkg", layer="detections")) == len(rectangles)


def test_a_scene_without_georeference_is_served_in_pixels_with_a_warning(folder, weights):
    result = CliRunner().invoke(cli.main, ["detect", "unplaced.tif", *SAR])
    assert result.exit_code == 0
    (line,) = result.stderr.splitlines()
    assert line.startswith("babelrs-geo: warning: unplaced.tif has no georeference") and "pixels" in line
    found = gpd.read_file("unplaced_detections.gpkg", layer="detections")
    assert len(found) == len(SHIPS)
    x, y, w, h = min(SHIPS.tolist())
    first = found.sort_values("px_x").iloc[0]
    np.testing.assert_allclose(first.geometry.bounds, (x, y, x + w, y + h))


def test_a_file_that_ends_early_is_served_as_far_as_it_goes_and_the_rest_is_told(
    tmp_path, monkeypatch, weights
):
    """Tiles before the end are whole, and limits given by hand spare the look at all of the file."""
    monkeypatch.chdir(tmp_path)
    image = np.random.default_rng(0).integers(1, 90, (256, 256), dtype=np.uint8)
    image[20:30, 20:40] = 200
    with rasterio.open(
        "early.tif", "w", driver="GTiff", count=1, height=256, width=256, dtype="uint8", crs="EPSG:32611",
        transform=rasterio.transform.from_origin(380_000, 3_735_000, 10, 10), tiled=True, blockxsize=64,
        blockysize=64,
    ) as file:  # fmt: skip
        file.write(image, 1)
    whole = Path("early.tif").read_bytes()
    Path("early.tif").write_bytes(whole[: len(whole) * 6 // 10])
    result = CliRunner().invoke(
        cli.main, ["detect", "early.tif", *SAR, "--no-collar", "--tile", "96", "--overlap", "32"]
    )
    (line,) = result.stderr.splitlines()
    if result.exit_code == 1:  # refused when opened is as good
        assert line.startswith("babelrs-geo: error: early.tif")
        assert not list(tmp_path.glob("*.gpkg"))
        return
    assert result.exit_code == program.EXIT_INCOMPLETE
    assert "could not be read" in line
    found = gpd.read_file("early_detections.gpkg", layer="detections")
    assert ((found.px_x.round() == 30) & (found.px_y.round() == 25)).any()
    assert "failed" in set(gpd.read_file("early_detections.gpkg", layer="coverage")["state"])


def test_through_the_real_program(folder):
    """One failure as a user meets it: no traceback, no leftovers, the exit code of a shell."""
    command = [sys.executable, "-m", "babelrs_geo", "detect", "text.tif", *SAR]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 1 and result.stdout == ""
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("babelrs-geo: error: ")
    assert not list(folder.glob("*_detections*"))


def test_weights_are_asked_before_tiles_are_read(folder, weights):
    """A checkpoint that lacks the sensor is refused at once, however large the scene."""
    weights.header = BrightHeader(classes={"rgb": ("ship",)})
    result = CliRunner().invoke(cli.main, ["detect", "good.tif", *SAR])
    assert result.exit_code == 1 and weights.asked == []
