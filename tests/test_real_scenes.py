"""Real scenes: places, marks made by eye, and the rules that `benchmarks/real_scenes.py` measures by."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pyproj
import pytest
import rasterio
import shapely
from hypothesis import given
from hypothesis import strategies as st
from shapely.geometry import shape

from babelrs_geo import boxes as bx
from babelrs_geo import open_scene
from babelrs_geo.detections import Detections
from babelrs_geo.georef import Georef
from babelrs_geo.scenes import Scene, SceneOptions

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from real import airbus, infrared, marks

SHARED = Path(os.environ.get("BABELRS_GEO_SHARED", Path(__file__).parents[2] / "shared"))
SCENES = SHARED / "data" / "scenes"
FOLDER = Path(__file__).parent / "marks"
SENSORS = {
    "sentinel1_port_la_db.tif": "sar",
    "sentinel1_grd_gcps.tif": "sar",
    "rgb_manila_drone.tif": "rgb",
}
MARKED = {"port_la_vessels.geojson": ("vessel", 41), "manila_cars.geojson": ("car", 72)}
LANDMARKS = json.loads((FOLDER / "landmarks.geojson").read_text(encoding="utf-8"))["features"]

on_shared_scenes = pytest.mark.skipif(not SCENES.is_dir(), reason="the shared scenes are not here")


def opened(name: str) -> Scene:
    return open_scene(SCENES / name, SENSORS[name])


def collection(file: str) -> dict:
    return json.loads((FOLDER / file).read_text(encoding="utf-8"))


# The files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", MARKED)
def test_marks_are_complete_and_lie_in_their_area(file):
    kind, count = MARKED[file]
    held = collection(file)["features"]
    shapes = {k: [shape(f["geometry"]) for f in held if f["properties"]["kind"] == k] for k in (kind, "area")}
    area = shapely.union_all(shapes["area"])
    assert len(shapes[kind]) == count
    assert area.is_valid and all(s.is_valid and area.contains(s.centroid) for s in shapes[kind])
    assert {f["properties"]["kind"] for f in held} == {kind, "doubtful", "area"}
    names = [f["properties"]["id"] for f in held]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("file", "low", "high"), [("port_la_vessels.geojson", 90, 540), ("manila_cars.geojson", 2.9, 6)]
)
def test_marked_objects_are_as_long_as_such_things_are(file, low, high):
    geod = pyproj.Geod(ellps="WGS84")
    for feature in collection(file)["features"]:
        if feature["properties"]["kind"] == MARKED[file][0]:
            ring = np.array(feature["geometry"]["coordinates"][0])
            sides = [geod.inv(*ring[i], *ring[i + 1])[2] for i in range(2)]
            assert low <= max(sides) <= high
            assert max(sides) == pytest.approx(feature["properties"]["length_m"], abs=1)


@pytest.mark.shared
@on_shared_scenes
@pytest.mark.parametrize("file", MARKED)
def test_marks_come_back_to_the_pixels_they_were_made_at(file):
    held = collection(file)
    with opened(held["scene"]) as scene:
        read = marks.read_marks(FOLDER / file, scene.georef)
        inside = shapely.box(0, 0, scene.width, scene.height)
        assert inside.covers(read.area.buffer(-0.1))
        assert shapely.contains_xy(inside, read.objects[:, 0], read.objects[:, 1]).all()
    made = [f["properties"]["pixel"] for f in held["features"] if f["properties"]["kind"] == MARKED[file][0]]
    iou = bx.rotated_iou_pairs(read.objects, np.array(made, np.float64))
    assert iou.min() > 0.9  # the file's pixel values are rounded to a tenth of a degree


# True geography -----------------------------------------------------------------------------------


@pytest.mark.shared
@on_shared_scenes
@pytest.mark.parametrize("landmark", LANDMARKS, ids=lambda f: f["properties"]["id"])
def test_landmarks_lie_where_they_are_published_to_be(landmark):
    about = landmark["properties"]
    with opened(about["scene"]) as scene:
        lon, lat = (float(v) for v in scene.georef.to_lonlat(*about["pixel"]))
        back = marks.lonlat_to_pixel(np.array([[lon, lat]]), scene.georef)[0]
    off = pyproj.Geod(ellps="WGS84").inv(lon, lat, *landmark["geometry"]["coordinates"])[2]
    assert off <= about["within_m"]
    assert back == pytest.approx(about["pixel"], abs=1e-3)


@pytest.mark.shared
@on_shared_scenes
def test_control_points_are_reproduced():
    with opened("sentinel1_grd_gcps.tif") as scene:
        residuals = scene.georef.gcp_residuals()
    assert len(residuals) == 210
    assert residuals.max() < 0.1


@pytest.mark.shared
@on_shared_scenes
def test_metres_in_manila_are_true_metres():
    # EPSG:3395 stretches by 1 / cos(latitude): a pixel of 0.1 map units is shorter on the ground.
    with opened("rgb_manila_drone.tif") as scene:
        assert scene.gsd == pytest.approx(0.1 * np.cos(np.deg2rad(14.596)), rel=0.005)


# The rules ----------------------------------------------------------------------------------------

AREA = shapely.box(0, 0, 100, 100)
NONE = np.zeros((0, 5))


def rows(*boxes: tuple[float, float, float, float, float]) -> np.ndarray:
    return np.array(boxes, np.float64).reshape(-1, 5)


def test_each_mark_is_hit_once_and_doubles_are_false_alarms():
    truth = marks.Marks(rows((20, 20, 10, 4, 30)), NONE, AREA)
    scored = marks.score(rows((20, 20, 10, 4, 30), (21, 20, 10, 4, 30)), truth)
    assert (scored.hits, scored.false_alarms, scored.hits_iou50) == (1, 1, 1)


def test_a_centre_within_half_the_length_hits_and_further_off_does_not():
    truth = marks.Marks(rows((20, 20, 12, 2, 0)), NONE, AREA)
    assert marks.score(rows((20, 25.9, 2, 2, 0)), truth).hits == 1
    assert marks.score(rows((20, 26.1, 2, 2, 0)), truth).hits == 0


def test_small_marks_are_given_two_pixels():
    truth = marks.Marks(rows((20, 20, 1, 1, 0)), NONE, AREA)
    assert marks.score(rows((20, 21.9, 1, 1, 0)), truth).hits == 1


def test_doubtful_marks_and_the_ground_outside_count_neither_way():
    truth = marks.Marks(NONE, rows((50, 50, 6, 3, 0)), AREA)
    scored = marks.score(rows((50, 50, 6, 3, 0), (150, 50, 6, 3, 0), (80, 80, 6, 3, 0)), truth)
    assert (scored.false_alarms, scored.ignored) == (1, 2)


def test_upright_boxes_are_held_against_bounds():
    tilted = rows((50, 50, 30, 4, 45))
    upright = bx.from_xyxy(bx.bounds(tilted))
    assert marks.score(upright, marks.Marks(tilted, NONE, AREA)).hits_iou50 == 1


def test_wilson_interval():
    # 81 of 263: the worked example in Newcombe, Statistics in Medicine 17 (1998), table I.
    assert marks.share(81, 263) == {"value": 0.308, "low": 0.2553, "high": 0.3662}
    assert marks.share(0, 0) is None


box = st.tuples(st.floats(0, 100), st.floats(0, 100), st.floats(1, 20), st.floats(1, 20), st.floats(-90, 90))


@given(st.lists(box, max_size=8), st.lists(box, max_size=8), st.randoms(use_true_random=False))
def test_scores_add_up_whatever_the_order(found, truth, random):
    held = marks.Marks(rows(*truth), NONE, AREA)
    scored = marks.score(rows(*found), held)
    assert scored.hits + scored.false_alarms + scored.ignored == len(found)
    assert scored.hits_iou50 <= scored.hits <= min(len(found), len(truth))
    shuffled = found.copy()
    random.shuffle(shuffled)
    assert marks.score(rows(*shuffled), held).hits == scored.hits


def test_twice_counts_overlap_and_containment_of_one_class():
    boxes = rows((20, 20, 10, 10, 0), (21, 20, 10, 10, 0), (20, 20, 3, 3, 0), (60, 60, 10, 10, 0))
    ones, labels = np.ones(4, np.float32), np.array([0, 0, 0, 0])
    assert airbus.twice(Detections(boxes, ones, labels, ("plane", "ship"), True)) == 3
    apart = np.array([0, 1, 0, 0])
    assert airbus.twice(Detections(boxes, ones, apart, ("plane", "ship"), True)) == 1


# The infrared mosaic ------------------------------------------------------------------------------


@pytest.fixture
def frames(tmp_path):
    """Two frames of different size that hold every byte."""
    folder = tmp_path / "DroneVehicle" / "dota_val"
    (folder / "images").mkdir(parents=True)
    (folder / "annfiles").mkdir()
    for name, (height, width) in {"a": (16, 32), "b": (32, 24)}.items():
        image = (np.arange(height * width) % 256).astype(np.uint8).reshape(1, height, width)
        path = folder / "images" / f"{name}.png"
        with rasterio.open(
            path, "w", driver="PNG", width=width, height=height, count=1, dtype="uint8"
        ) as out:
            out.write(image)
        (folder / "annfiles" / f"{name}.txt").write_text("2 2 12 2 12 6 2 6 car 0\n")
    return infrared.read_frames(tmp_path, ("person", "car"))


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_centikelvin_maps_back_to_the_bytes(frames, tmp_path):
    path = tmp_path / "mosaic.tif"
    infrared.write_frames(path, frames, 0.2, centikelvin=True)
    options = SceneOptions(units="centikelvin", limits=infrared.LIMITS_CK)
    with open_scene(path, "ir", options) as scene:
        assert scene.gsd == pytest.approx(0.2, rel=0.01)
        whole = scene.read((0, 0, scene.width, scene.height))
        for frame in frames:
            with rasterio.open(frame.record.path) as source:
                byte = source.read(1)
            window = np.s_[frame.y : frame.y + frame.height, frame.x : frame.x + frame.width]
            np.testing.assert_allclose(whole.image[0][window], byte / 255, atol=1e-6)
            assert whole.valid[window].all()
    assert whole.valid.sum() == sum(f.width * f.height for f in frames)


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_the_mosaic_of_bytes_holds_the_same_ground(frames, tmp_path):
    path = tmp_path / "mosaic.tif"
    infrared.write_frames(path, frames, 0.2, centikelvin=False)
    with open_scene(path, "ir", infrared.AS_IT_IS) as scene:
        whole = scene.read((0, 0, scene.width, scene.height))
    assert whole.valid.sum() == sum(f.width * f.height for f in frames)
    frame = frames[1]
    assert whole.valid[frame.y : frame.y + frame.height, frame.x : frame.x + frame.width].all()


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_detections_of_the_mosaic_go_back_to_their_frames(frames):
    truths = [infrared.truth(f, ("person", "car")) for f in frames]
    placed = Detections.concatenate([t.shift(f.x, f.y) for t, f in zip(truths, frames, strict=True)])
    back = infrared.by_frame(placed, frames)
    for truth, found in zip(truths, back, strict=True):
        np.testing.assert_allclose(found.boxes, truth.boxes)
    assert len(infrared.by_frame(placed.shift(-40, -40), frames)[0]) == 0


def test_georef_of_marks_needs_no_scene():
    # A rotated affine: reading marks is the georeference's inverse and nothing else.
    georef = Georef.from_affine((3.0, 1.0, 377000.0, 1.0, -3.0, 3739000.0), "EPSG:32611")
    at = np.array([[10.5, 20.25], [300.0, 4.0]])
    lonlat = np.stack(georef.to_lonlat(at[:, 0], at[:, 1]), axis=-1)
    np.testing.assert_allclose(marks.lonlat_to_pixel(lonlat, georef), at, atol=1e-6)
