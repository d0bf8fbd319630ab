"""The whole road on real files: GeoTIFF in, GeoPackage out, and the laws that hold between the two."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import geopandas as gpd
import numpy as np
import pyproj
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.control import GroundControlPoint
from rasterio.transform import Affine
from simple_scenes import (
    SHIPS,
    BrightWeights,
    as_boxes,
    bright_detector,
    canvas,
    pictures,
    rectangles_of,
    write_scene,
)

import babelrs_geo as bg
from babelrs_geo import inference, qgis
from babelrs_geo.tiling import Grid

TESTS = Path(__file__).parent
PACKAGE = Path(bg.__file__).parent
SMALL = bg.DetectOptions(tile=48, overlap=16)


@settings(max_examples=25)
@given(
    pictures(),
    st.sampled_from([{}, {"tiled": True, "blockxsize": 16, "blockysize": 16}, {"compress": "deflate"}]),
    st.integers(1, 5),
    st.integers(1, 3),
)
def test_every_object_in_a_file_is_reported_exactly_once(tmp_path_factory, picture, creation, batch, readers):
    width, height, tile, overlap, ships = picture
    path = tmp_path_factory.mktemp("scenes") / "scene.tif"
    write_scene(path, canvas(width, height, ships), creation=creation)
    options = inference.InferenceOptions(batch=batch, readers=readers)
    with bg.open_scene(path, "sar") as scene:
        grid = Grid(width, height, tile, overlap)
        found, coverage = inference.run(scene, bright_detector, grid, options=options)
    assert rectangles_of(found) == sorted(tuple(map(float, ship)) for ship in ships)
    assert coverage.looked_at == len(grid)


def test_content_does_not_depend_on_readers_and_rows_not_on_the_batch(tmp_path):
    rng = np.random.default_rng(3)
    image = np.where(rng.random((200, 260)) < 0.1, 200, 20).astype(
        np.uint8
    )  # hundreds of patches, many on seams
    path = write_scene(
        tmp_path / "noise.tif", image, creation={"tiled": True, "blockxsize": 64, "blockysize": 64}
    )
    grid = Grid(260, 200, 64, 24)
    results = []
    for readers, batch in ((1, 3), (4, 3), (2, 1), (1, 7)):
        with bg.open_scene(path, "sar") as scene:
            options = inference.InferenceOptions(batch=batch, readers=readers)
            results.append(inference.run(scene, bright_detector, grid, options=options))
    first, ground = results[0]
    assert len(first) > 100
    for found, coverage in results[1:]:
        np.testing.assert_array_equal(found.boxes, first.boxes)
        np.testing.assert_array_equal(found.scores, first.scores)
        assert coverage.states == ground.states


def test_the_coverage_layer_shows_all_of_the_ground_and_how_it_was_looked_at(tmp_path):
    image = canvas(200, 160, [(150, 100, 10, 10)])
    image[:, :70] = 0
    path = write_scene(tmp_path / "half.tif", image, nodata=0)
    with bg.open_scene(path, "sar") as scene:
        found = bg.detect(scene, BrightWeights(), SMALL)
        output = found.save(tmp_path / "half.gpkg")
        grid = Grid(200, 160, 48, 16)
        invalid = [t for t in grid if not scene.valid(t.outer).any()]
    ground = gpd.read_file(output, layer="coverage")
    assert set(ground["state"]) == {"detected", "empty", "invalid"} <= set(inference.STATES)
    assert ground["tiles"].sum() == len(grid) == sum(found.provenance["tiles"].values())
    assert ground.geometry.area.sum() == pytest.approx(200 * 160 * 100)  # a partition: no overlap, no gap
    assert ground.union_all().area == pytest.approx(200 * 160 * 100)
    area = ground.set_index("state").geometry.area
    assert area["invalid"] == pytest.approx(100 * sum(t.inner.width * t.inner.height for t in invalid))


def test_inference_and_styles_name_the_same_states():
    assert set(inference.STATES) == set(qgis.STATES)


def lonlat_on_a_slant(px, py):
    """A known place for every pixel: south-east India seen on a slant, slightly curved."""
    u, v = np.asarray(px) / 100, np.asarray(py) / 100
    return 78.0 + 0.02 * u - 0.004 * v + 1e-4 * u * v, 10.0 - 0.003 * u - 0.02 * v + 1e-4 * u**2


def test_boxes_of_a_scene_with_control_points_lie_where_the_points_say(tmp_path):
    knots = [(px, py) for px in np.linspace(0, 100, 11) for py in np.linspace(0, 100, 11)]
    points = [GroundControlPoint(py, px, *lonlat_on_a_slant(px, py)) for px, py in knots]
    path = write_scene(tmp_path / "swath.tif", canvas(100, 100, SHIPS), crs="EPSG:4326", gcps=points)
    with bg.open_scene(path, "sar") as scene:
        found = bg.detect(scene, BrightWeights(), SMALL)
    features = found.features
    assert features.crs == "EPSG:4326" and len(features) == len(SHIPS)
    geod = pyproj.Geod(ellps="WGS84")
    lon, lat = lonlat_on_a_slant(features.px_x, features.px_y)
    _, _, off = geod.inv(features.lon, features.lat, lon, lat)
    assert np.max(off) < 0.05 * scene.gsd
    centres = (
        features.geometry.centroid if features.crs is None else features.geometry.map(lambda g: g.centroid)
    )
    _, _, off = geod.inv([c.x for c in centres], [c.y for c in centres], lon, lat)
    assert np.max(off) < 0.1 * scene.gsd


def test_boxes_of_a_rotated_scene_lie_where_its_affine_says(tmp_path):
    turned = Affine.translation(380_000, 3_735_000) @ Affine.rotation(30) @ Affine.scale(10, -10)
    path = write_scene(tmp_path / "turned.tif", canvas(100, 100, SHIPS), transform=turned)
    with bg.open_scene(path, "sar") as scene:
        features = bg.detect(scene, BrightWeights(), SMALL).features
    expected = sorted(turned @ tuple(centre) for centre in as_boxes(SHIPS)[:, :2])
    placed = sorted((g.centroid.x, g.centroid.y) for g in features.geometry)
    np.testing.assert_allclose(placed, expected, atol=1e-6)
    np.testing.assert_allclose(
        sorted(features.geometry.area), sorted(SHIPS[:, 2:].prod(1) * 100.0), rtol=1e-9
    )


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_numbers_of_any_type_reach_the_detector_as_pictures(tmp_path, dtype):
    rng = np.random.default_rng(1)
    image = rng.rayleigh(40.0, (100, 100))
    for x, y, w, h in SHIPS:
        image[y : y + h, x : x + w] = 3000
    path = write_scene(tmp_path / "amplitude.tif", image.astype(dtype))
    with bg.open_scene(path, "sar", bg.SceneOptions(units="amplitude")) as scene:
        found = bg.detect(scene, BrightWeights(), SMALL)
    assert rectangles_of(found.detections) == sorted(tuple(map(float, ship)) for ship in SHIPS)


SLOW_PROGRAM = """
import sys, time
sys.path[:0] = [{tests!r}]
from simple_scenes import BrightWeights
class Slow(BrightWeights):
    def detector(self, *arguments):
        inner = super().detector(*arguments)
        def run(images):
            print("looking", flush=True)
            time.sleep(.2)
            return inner(images)
        return run
from babelrs_geo import cli
from babelrs_geo.models import zoo
zoo.load = lambda name, device: Slow()
cli.main()
"""


def test_interrupted_by_a_signal_it_ends_with_130_and_leaves_nothing(tmp_path):
    write_scene(tmp_path / "large.tif", canvas(2000, 2000, SHIPS))
    command = [sys.executable, "-c", SLOW_PROGRAM.format(tests=str(TESTS)), "detect", "large.tif"]
    command += ["--sensor", "sar", "--tile", "128", "--overlap", "32", "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == "looking\n"
        process.send_signal(signal.SIGINT)
        looked, told = process.communicate(timeout=120)
    assert looked.count("looking") < 55  # of some 110 batches: what was under way ends, nothing else begins
    assert process.returncode == 130
    assert told.split("\n")[-2] == "babelrs-geo: error: interrupted, nothing was written"
    assert "Traceback" not in told
    assert [path.name for path in tmp_path.iterdir()] == ["large.tif"]


HARBOUR = TESTS.parent / "examples" / "harbour_sar.tif"


def same_rows(one, other):
    """The same objects: coordinates within .01 px, scores within 1e-3."""
    assert len(one.detections) == len(other.detections)
    a, b = (each.detections[np.lexsort(each.detections.boxes[:, :2].round(1).T)] for each in (one, other))
    np.testing.assert_allclose(a.boxes, b.boxes, atol=0.01)
    np.testing.assert_allclose(a.scores, b.scores, atol=1e-3)
    np.testing.assert_array_equal(a.labels, b.labels)


@pytest.mark.slow
def test_bundled_weights_give_the_same_content_again_and_the_same_rows_in_other_batches(tmp_path):
    def found(batch):
        with bg.open_scene(HARBOUR) as scene:
            return bg.detect(scene, options=bg.DetectOptions(tile=384, overlap=96, batch=batch))

    first, again, single = found(5), found(5), found(1)
    assert len(first.features) > 0
    np.testing.assert_array_equal(first.detections.boxes, again.detections.boxes)
    np.testing.assert_array_equal(first.detections.scores, again.detections.scores)
    same_rows(first, single)


def tanks():
    """Six bright discs with shadows on grey: storage tanks from above, to whoever looks at colours."""
    y, x = np.mgrid[:240, :360]
    picture = np.random.default_rng(5).normal(90, 4, y.shape)
    for cy in (60, 170):
        for cx in (60, 150, 240):
            picture[np.hypot(x - cx - 6, y - cy - 6) < 22] = 40
            picture[np.hypot(x - cx, y - cy) < 22] = 235
    return picture.clip(1, 255).astype(np.uint8)


@pytest.mark.slow
@pytest.mark.parametrize(("sensor", "bands", "kind"), [("ir", 1, "oriented"), ("rgb", 3, "oriented")])
def test_bundled_weights_take_every_sensor_from_file_to_file(tmp_path, sensor, bands, kind):
    picture = np.stack([tanks()] * bands)
    metre = Affine.translation(380_000, 3_735_000) @ Affine.scale(0.3, -0.3)
    path = write_scene(tmp_path / "town.tif", picture, transform=metre)
    with bg.open_scene(path, sensor) as scene:
        found = bg.detect(scene, options=bg.DetectOptions(tile=256, overlap=64, score=0.01))
    output = gpd.read_file(found.save(tmp_path / "town.gpkg"), layer="detections")
    assert len(output) == len(found.features) > 0
    if sensor == "rgb":
        assert ((output["class"] == "storage-tank") & (output["score"] > 0.9)).sum() == 6
    assert set(output["box"]) == {kind} and set(output["sensor"]) == {sensor}
    x, y = output["px_x"], output["px_y"]
    assert ((x >= 0) & (x <= 360) & (y >= 0) & (y <= 240)).all()


@pytest.mark.gpu
def test_a_gpu_gives_the_same_rows_as_the_processor():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    results = []
    for device in ("cpu", "cuda"):
        with bg.open_scene(HARBOUR) as scene:
            results.append(bg.detect(scene, options=bg.DetectOptions(device=device)))
    same_rows(*results)
