"""The example scene says that it is simulated, and its ships are where its truth says."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import geopandas
import numpy as np
import pytest
import rasterio
import rasterio.transform
from pyproj import Geod

import babelrs_geo as bg
from babelrs_geo import boxes, vectors
from babelrs_geo.detections import Detections

EXAMPLES = Path(__file__).parents[1] / "examples"
SCENE = EXAMPLES / "harbour_sar.tif"
TRUTH = EXAMPLES / "harbour_ships.geojson"


def script(name: str) -> ModuleType:
    """A script of examples/ as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    return script("make_harbour")


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    with rasterio.open(SCENE) as source:
        return source.read(1)


@pytest.fixture(scope="module")
def ships() -> list[dict]:
    return json.loads(TRUTH.read_text())["features"]


def test_the_stored_scene_is_what_the_script_makes(maker, pixels, tmp_path):
    maker.main(["--folder", str(tmp_path)])
    assert (tmp_path / TRUTH.name).read_text() == TRUTH.read_text()
    with rasterio.open(tmp_path / SCENE.name) as again:
        # another CPU may round one sum differently; more than that is another scene
        difference = np.abs(again.read(1).astype(int) - pixels)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-4


def test_the_scene_says_what_it_is():
    with rasterio.open(SCENE) as scene:
        tags = scene.tags()
        assert tags["SIMULATED"] == "yes"
        assert "imulated" in tags["TIFFTAG_IMAGEDESCRIPTION"]
        assert tags["SENSOR"] == "SAR"
        assert scene.crs.to_epsg() == 32631
        assert scene.nodata == 0
        assert scene.res == (5.0, 5.0)
        assert scene.block_shapes == [(256, 256)]
    assert SCENE.stat().st_size < 1_000_000


def test_nodata_is_a_border_and_nothing_else(pixels):
    empty = pixels == 0
    assert 0.02 < empty.mean() < 0.15
    rows, columns = np.nonzero(~empty)
    assert rows.min() > 0
    assert columns.min() > 0
    for row in pixels[:: len(pixels) // 40]:
        valid = np.flatnonzero(row)
        assert valid.size == 0 or valid[-1] - valid[0] + 1 == valid.size  # no hole inside the strip


def test_every_ship_is_bright_where_the_truth_says(pixels, ships):
    sea = np.median(pixels[pixels > 0])
    for ship in ships:
        x0, y0, x1, y1 = (round(value) for value in ship["properties"]["px_bounds"])
        inside = pixels[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)]
        assert inside.max() > 10 * sea, ship["properties"]
        assert (inside > 0).all(), "ships lie on valid ground"


def test_the_truth_lies_on_the_map_where_it_lies_in_the_picture(ships):
    with rasterio.open(SCENE) as scene:
        transform, crs = scene.transform, scene.crs
    table = geopandas.read_file(TRUTH)
    assert table.crs.to_epsg() == 4326
    on_grid = table.to_crs(crs.to_wkt())
    for geometry, ship in zip(on_grid.geometry, ships, strict=True):
        west, south, east, north = geometry.bounds
        rows, columns = rasterio.transform.rowcol(transform, [west, east], [north, south], op=float)
        assert np.allclose(
            [columns[0], rows[0], columns[1], rows[1]], ship["properties"]["px_bounds"], atol=0.02
        )


def test_lengths_are_metres_on_the_ground(ships):
    geod = Geod(ellps="WGS84")
    for ship in ships:
        lon, lat = np.array(ship["geometry"]["coordinates"][0]).T
        west, east = geod.line_length(lon[:2], lat[:2]), geod.line_length(lon[2:4], lat[2:4])
        assert max(west, east) < 2 * ship["properties"]["length_m"]
        perimeter = abs(geod.polygon_area_perimeter(lon, lat)[1])
        rectangle = 2 * (ship["properties"]["length_m"] + ship["properties"]["width_m"])
        assert perimeter == pytest.approx(
            rectangle, rel=0.12
        )  # the bow is pointed, the grid's scale is .9999


def test_ships_are_the_size_the_weights_were_shown(ships):
    lengths = [ship["properties"]["length_m"] / 5 for ship in ships]
    assert len(ships) >= 20
    assert min(lengths) >= 8
    assert max(lengths) <= 70


def test_a_result_is_drawn_over_its_scene(ships, tmp_path):
    bounds = np.array([ship["properties"]["px_bounds"] for ship in ships], float)
    ones, labels = np.ones(len(bounds), np.float32), np.zeros(len(bounds), int)
    truth = Detections(boxes.from_xyxy(bounds), ones, labels, ("ship",), False)
    with bg.open_scene(SCENE) as scene:
        features = vectors.features(truth, scene.georef, vectors.Origin(scene.name, "sar", scene.acquired))
        whole = np.array([[0, 0, scene.width, scene.height]])
        ground = vectors.coverage(whole, ("detected",), ("",), scene.georef)
    result = vectors.write(tmp_path / "truth.gpkg", features, ground, {})
    picture = tmp_path / "all.png"
    render = script("render")
    render.main([str(result), str(SCENE), str(picture), "--truth", str(TRUTH), "--side", "600"])
    drawn = render.plt.imread(picture)
    assert drawn.shape[:2] == (450, 600)
    orange = (drawn[..., 0] > 0.8) & (np.abs(drawn[..., 1] - 0.62) < 0.15) & (drawn[..., 2] < 0.2)
    for x0, y0, x1, y1 in bounds / 2:  # half size: each box's outline is there, where the ship is
        box = orange[int(y0) - 2 : int(y1) + 3, int(x0) - 2 : int(x1) + 3]
        assert box.any()
    with bg.open_scene(SCENE) as scene:
        part = render.Picture(crop=(0, 0, 600, 450), side=300)
        x0, y0, x1, y1 = bounds.T
        assert render.draw(result, scene, tmp_path / "part.png", part) == ((x1 <= 600) & (y1 <= 450)).sum()


@pytest.mark.slow
def test_the_bundled_weights_find_the_ships(ships):
    with bg.open_scene(SCENE) as scene:
        found = bg.detect(scene).features
    at_sea = [ship["properties"] for ship in ships if ship["properties"]["state"] != "moored"]
    hit = 0
    for ship in at_sea:
        x0, y0, x1, y1 = ship["px_bounds"]
        near = found["px_x"].between(x0 - 2, x1 + 2) & found["px_y"].between(y0 - 2, y1 + 2)
        assert near.sum() <= 1, "each ship once"
        hit += int(near.any())
    assert hit >= 0.8 * len(at_sea)
    assert len(found) <= 1.5 * len(ships)
    assert set(found["class"]) == {"ship"}
