"""The whole sentence in Python: what is read how, what is kept, and what is told about it."""

from __future__ import annotations

import json
import sys
import warnings

import geopandas as gpd
import numpy as np
import pyproj
import pytest
import rasterio
from affine import Affine
from rasterio.control import GroundControlPoint
from shapely.geometry import MultiPolygon, box
from simple_scenes import (
    LEFT,
    PIXEL,
    SHIPS,
    TOP,
    UTM,
    BrightHeader,
    BrightWeights,
    as_boxes,
    canvas,
    rectangles_of,
    write_scene,
)

import babelrs_geo as bg
from babelrs_geo import concepts, vectors
from babelrs_geo import detect as detect_function
from babelrs_geo.detect.area import area_of
from babelrs_geo.errors import (
    BatchError,
    GeorefError,
    LabelError,
    OutputError,
    ParameterError,
    SceneError,
    WeightsError,
)
from babelrs_geo.models.detector import DetectorConfig

detect_module = sys.modules["babelrs_geo.detect"]
SMALL = {"tile": 48, "overlap": 16}


@pytest.fixture
def scene(tmp_path):
    with bg.open_scene(write_scene(tmp_path / "harbour.tif", canvas(100, 100, SHIPS)), "sar") as opened:
        yield opened


def scene_of(path, image, sensor="sar", **more):
    return bg.open_scene(write_scene(path, image, **more), sensor)


def area_file(path, left, top, right, bottom, crs=UTM):
    """A rectangle of scene pixels as a vector file in any CRS."""
    outline = box(LEFT + left * PIXEL, TOP - bottom * PIXEL, LEFT + right * PIXEL, TOP - top * PIXEL)
    gpd.GeoDataFrame(geometry=[outline], crs=UTM).to_crs(crs).to_file(path)
    return path


def test_the_package_offers_the_function_not_the_module():
    assert bg.detect is detect_function is detect_module.detect
    assert set(bg.__all__) <= set(dir(bg))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        bg.nothing  # noqa: B018


def test_a_scene_becomes_features_coverage_and_provenance(scene):
    told = []
    found = bg.detect(scene, BrightWeights(), bg.DetectOptions(**SMALL), lambda *p: told.append(p))
    assert rectangles_of(found.detections) == sorted(tuple(map(float, ship)) for ship in SHIPS)
    assert len(found.features) == len(SHIPS)
    assert found.features.crs == found.coverage.crs == UTM
    expected = [
        box(LEFT + x * PIXEL, TOP - (y + h) * PIXEL, LEFT + (x + w) * PIXEL, TOP - y * PIXEL)
        for x, y, w, h in SHIPS
    ]
    assert all(
        any(polygon.equals_exact(other, 1e-6, normalize=True) for other in expected)
        for polygon in found.features.geometry.normalize()
    )
    assert found.coverage.union_all().area == pytest.approx((100 * PIXEL) ** 2)
    assert told[-1] == (9, 9)
    assert sum(found.provenance["tiles"].values()) == 9


def test_provenance_tells_all_parameters_and_nothing_of_the_host(scene, tmp_path, monkeypatch):
    monkeypatch.setenv("OGR_CURRENT_DATE", "2026-01-02T03:04:05.000Z")
    aoi = area_file(tmp_path / "bay.gpkg", 0, 0, 100, 100)
    options = bg.DetectOptions(**SMALL, aoi=aoi, score=0.25)
    told = bg.detect(scene, BrightWeights(), options).provenance
    assert told["software"] == f"babelrs-geo {bg.__version__}"
    assert told["weights"] == {"name": "bright", "sha256": "0" * 64}
    assert told["started"] == told["finished"] == "2026-01-02T03:04:05.000Z"
    parameters = told["parameters"]
    assert {"tile", "overlap", "score", "classes", "gsd", "aoi", "batch", "device", "threads"} <= set(
        parameters
    )
    assert parameters["aoi"] == "bay.gpkg" and parameters["thresholds"] == {"ship": 0.25}
    assert parameters["scale"] == 1 and parameters["model_gsd_m"] == pytest.approx(10, rel=1e-2)
    assert told["radiometry"]["sensor"] == "sar"
    assert told["scene"]["options"]["collar"] is True and told["scene"]["options"]["dem"] is None
    assert str(tmp_path) not in json.dumps(told)
    assert bg.detect(scene, BrightWeights(), options).provenance == told


@pytest.mark.parametrize(
    ("known", "asked", "scale"),
    [
        ((5.0, 20.0), None, 1.0),  # inside the range: its own pixels
        ((9.9, 9.95), None, 1.0),  # hardly outside: resampling would cost more than it brings
        ((20.0, 40.0), None, 0.5),  # finer than known: read coarser, at the nearest end
        ((1.0, 5.0), None, 2.0),  # coarser than known: read finer
        ((20.0, 40.0), "native", 1.0),
        ((20.0, 40.0), 5.0, 2.0),
    ],
)
def test_ground_sampling_is_brought_into_the_weights_range(scene, known, asked, scale):
    header = BrightHeader(gsd={"sar": known})
    options = bg.DetectOptions(**SMALL, gsd=asked)
    plan = detect_module.plan_for(scene, header, options)
    assert plan.scale == pytest.approx(scale, rel=0.01) and not plan.caution
    assert (plan.grid.height, plan.grid.width) == scene.shape_at(plan.scale)
    found = bg.detect(scene, BrightWeights(header), options)
    assert len(found.detections) == len(SHIPS)
    np.testing.assert_allclose(
        np.sort(found.detections.boxes[:, :2], 0), np.sort(as_boxes(SHIPS)[:, :2], 0), atol=1.01
    )


def test_what_no_pixel_could_show_is_not_looked_for(scene, monkeypatch):
    assert scene.gsd == pytest.approx(10, rel=0.01)
    header = BrightHeader(gsd={"sar": (5.0, 20.0)})
    options = bg.DetectOptions(**SMALL)
    monkeypatch.setitem(concepts.LONGEST, "ship", 2.9 * scene.gsd)
    with pytest.raises(
        SceneError, match=r"pixels of 10 m cannot show .*ship: the longest .* has 2.9 of them"
    ):
        detect_module.plan_for(scene, header, options)
    asked = bg.DetectOptions(**SMALL, gsd=10.0)
    assert detect_module.plan_for(scene, header, asked).classes == header.classes["sar"]
    monkeypatch.setitem(concepts.LONGEST, "ship", 3.1 * scene.gsd)
    assert not detect_module.plan_for(scene, header, options).caution
    two = BrightHeader(gsd={"sar": (5.0, 20.0)}, classes={"sar": ("bridge", "person")})
    plan = detect_module.plan_for(scene, two, options)
    assert plan.classes == ("bridge",) and plan.caution.startswith("person cannot be seen in pixels of 10 m")


@pytest.mark.parametrize(("latitude", "stretched"), [(45, False), (52, True)])
def test_pixels_that_are_no_squares_on_the_ground_are_warned_of(tmp_path, latitude, stretched):
    degrees = rasterio.transform.from_origin(20, latitude, 1e-4, 1e-4)
    path = write_scene(tmp_path / "degrees.tif", canvas(50, 50, []), crs="EPSG:4326", transform=degrees)
    with bg.open_scene(path, "sar") as scene:
        caution = detect_module.plan_for(scene, BrightHeader(), bg.DetectOptions(**SMALL)).caution
    assert caution.startswith("pixels are 6.87 by 11.1 m on the ground") == stretched == bool(caution)


@pytest.mark.parametrize(
    ("known", "asked", "words"),
    [
        ((1.0, 2.0), None, "read resampled 5.0x finer to 2 m .*know 1 to 2 m"),
        ((50.0, 60.0), None, "read resampled 5.0x coarser to 50 m"),
        ((1.0, 2.0), "native", r"read at 10 m a pixel, 5.0x outside"),
    ],
)
def test_beyond_fourfold_one_line_warns(scene, known, asked, words):
    with pytest.warns(UserWarning, match=words) as caught:
        bg.detect(
            scene, BrightWeights(BrightHeader(gsd={"sar": known})), bg.DetectOptions(**SMALL, gsd=asked)
        )
    assert len(caught) == 1 and "\n" not in str(caught[0].message)


def test_classes_are_selected_in_the_order_of_the_weights_and_unknown_ones_are_refused(tmp_path):
    image = np.stack([canvas(60, 60, SHIPS[:2])] * 3)
    with scene_of(tmp_path / "town.tif", image, "rgb") as scene:
        weights = BrightWeights()
        found = bg.detect(scene, weights, bg.DetectOptions(classes=("ship", "plane"), score=0.1))
        assert weights.asked == [("rgb", 0.1, ("plane", "ship"))]
        assert found.provenance["parameters"]["classes"] == ["plane", "ship"]
        with pytest.raises(ParameterError, match=r'unknown class "car" for rgb: .* plane, ship, vehicle'):
            bg.detect(scene, weights, bg.DetectOptions(classes=("car",)))


def test_weights_that_lack_the_sensor_are_refused(tmp_path):
    with (
        scene_of(tmp_path / "warm.tif", canvas(60, 60, SHIPS[:2]), "ir") as scene,
        pytest.raises(WeightsError, match=r'"bright" know nothing of ir \(they know sar, rgb\)'),
    ):
        bg.detect(scene, BrightWeights())


@pytest.mark.parametrize("crs", [UTM, "EPSG:4326"])
def test_an_area_of_interest_limits_detections_and_coverage(scene, tmp_path, crs):
    aoi = area_file(tmp_path / "aoi.gpkg", 0, 0, 60, 50, crs)
    found = bg.detect(scene, BrightWeights(), bg.DetectOptions(**SMALL, aoi=aoi))
    assert rectangles_of(found.detections) == [(10, 12, 9, 5), (40, 20, 6, 12)]
    assert len(found.features) == 2
    area = found.coverage.dissolve("state").area / PIXEL**2
    looked = area.drop("outside").sum()
    assert looked == pytest.approx(60 * 50, rel=0.01)
    assert area.sum() == pytest.approx(100 * 100)
    assert found.coverage["tiles"].sum() == 9
    assert found.coverage["area_km2"].sum() == pytest.approx(1.0, rel=0.01)


def degrees(kind):
    """Keywords of a scene of 100 by 100 pixels with the antimeridian through its middle."""
    if kind == "affine":
        return {"crs": "EPSG:4326", "transform": Affine(0.001, 0, 179.95, 0, -0.001, 10)}
    if kind == "utm":
        x, y = pyproj.Transformer.from_crs(4326, 32601, always_xy=True).transform(-180.0, 10.0)
        return {"crs": "EPSG:32601", "transform": Affine(110, 0, x - 5500, 0, -110, y)}
    lon = {px: (179.95 + px * 0.001 + 180) % 360 - 180 for px in (0, 50.5, 100)}
    points = [GroundControlPoint(py, px, lon[px], 10 - py * 0.001) for px in lon for py in (0, 50, 100)]
    return {"crs": "EPSG:4326", "gcps": points}


@pytest.mark.parametrize("kind", ["affine", "gcps", "utm"])
@pytest.mark.parametrize("crs", ["EPSG:4326", "EPSG:32660"])
def test_an_area_on_both_sides_of_the_antimeridian_is_all_looked_at(tmp_path, kind, crs):
    halves = [box(179.9, 9.92, 180, 9.98), box(-180, 9.92, -179.9, 9.98)]
    whole = gpd.GeoSeries([MultiPolygon(halves)], crs="EPSG:4326").to_crs(crs)
    if crs != "EPSG:4326":  # in one piece, as drawn on such a map
        whole = whole.buffer(1).buffer(-1)
    whole.to_file(tmp_path / "aoi.gpkg")
    with scene_of(tmp_path / "s.tif", canvas(100, 100, SHIPS), **degrees(kind)) as scene:
        area = area_of(scene, tmp_path / "aoi.gpkg")
        tiles = np.array([[x, y, 25, 25] for y in (25, 50) for x in (0, 25, 50, 75)])
        assert area.touches(tiles).all()
        px, py = np.meshgrid([3.0, 47, 53, 97], [10.0, 50, 90])
        assert area.holds(px.ravel(), py.ravel()).reshape(3, 4).tolist() == [
            [False] * 4,
            [True] * 4,
            [False] * 4,
        ]


def test_an_area_elsewhere_is_refused_and_for_a_scene_without_georeference_it_is_in_pixels(scene, tmp_path):
    aoi = area_file(tmp_path / "aoi.gpkg", 200, 200, 300, 300)
    with pytest.raises(LabelError, match=r"aoi.gpkg does not touch harbour"):
        bg.detect(scene, BrightWeights(), bg.DetectOptions(aoi=aoi))
    with scene_of(tmp_path / "plain.tif", canvas(60, 60, SHIPS[:2]), crs=None) as plain:
        with pytest.raises(LabelError, match="the scene has none"):
            bg.detect(plain, BrightWeights(), bg.DetectOptions(aoi=aoi))
        pixels = tmp_path / "pixels.gpkg"
        with pytest.warns(UserWarning, match="'crs' was not provided"):
            gpd.GeoDataFrame(geometry=[box(0, 0, 30, 60)]).to_file(pixels)
        with pytest.warns(UserWarning, match="pixels"):
            found = bg.detect(plain, BrightWeights(), bg.DetectOptions(aoi=pixels))
        assert rectangles_of(found.detections) == [(10, 12, 9, 5)]


def test_a_scene_without_georeference_is_served_in_pixels_and_has_no_metres(tmp_path):
    with scene_of(tmp_path / "plain.tif", canvas(60, 60, SHIPS[:2]), crs=None) as scene:
        with pytest.warns(UserWarning, match="pixels"):
            found = bg.detect(scene, BrightWeights())
        assert found.features.crs is None and len(found.features) == 2
        with pytest.raises(ParameterError, match="cannot be read at 5 m"):
            bg.detect(scene, BrightWeights(), bg.DetectOptions(gsd=5.0))
        with pytest.raises(GeorefError, match="cannot be written in EPSG:4326"):
            found.save(tmp_path / "out.gpkg", crs="EPSG:4326")


def test_a_scene_without_a_valid_pixel_is_refused(tmp_path):
    path = write_scene(tmp_path / "void.tif", np.zeros((60, 60), np.uint8), nodata=0)
    with pytest.raises(SceneError, match="valid"), bg.open_scene(path, "sar") as scene:
        bg.detect(scene, BrightWeights())


@pytest.mark.parametrize("suffix", [".gpkg", ".parquet", ".geojson"])
def test_results_are_saved_in_any_crs_and_never_over_an_existing_file_by_accident(scene, tmp_path, suffix):
    layer = "detections" if suffix == ".gpkg" else "out"
    found = bg.detect(scene, BrightWeights(), bg.DetectOptions(**SMALL))
    path = found.save(tmp_path / f"out{suffix}", crs="EPSG:3857")
    with pytest.raises(OutputError, match="exists"):
        found.save(path)
    read = gpd.read_parquet(path) if suffix == ".parquet" else gpd.read_file(path, layer=layer)
    assert len(read) == len(SHIPS)
    moved = found.features.to_crs(read.crs)
    np.testing.assert_allclose(read.total_bounds, moved.total_bounds, atol=1e-3)
    found.save(path, overwrite=True)


@pytest.mark.parametrize("suffix", [".gpkg", ".parquet", ".geojson"])
def test_a_result_on_both_sides_of_the_antimeridian_is_cut_there(tmp_path, suffix):
    x, y = pyproj.Transformer.from_crs(4326, 32601, always_xy=True).transform(-180.0, 10.0)
    place = {"crs": "EPSG:32601", "transform": Affine(10, 0, x - 500, 0, -10, y)}
    ships = [(47, 20, 6, 6), (10, 10, 9, 5), (70, 60, 9, 5)]
    with scene_of(tmp_path / "s.tif", canvas(100, 100, ships), **place) as scene:
        found = bg.detect(scene, BrightWeights(), bg.DetectOptions(**SMALL))
    path = found.save(tmp_path / f"out{suffix}", crs="EPSG:4326")
    back = vectors.read_result(path)
    assert len(back.features) == 3 and len(back.coverage) == len(found.coverage)
    for frame, own in ((back.features, found.features), (back.coverage, found.coverage)):
        pieces = frame.geometry.explode().bounds
        assert (pieces["maxx"] - pieces["minx"]).max() < 0.1 and set(np.sign(pieces["minx"])) == {-1, 1}
        np.testing.assert_allclose(
            vectors.area_km2(frame.geometry), vectors.area_km2(own.geometry), rtol=1e-3
        )


def test_a_crs_that_is_none_or_cannot_show_the_ground_is_refused(scene, tmp_path):
    found = bg.detect(scene, BrightWeights(), bg.DetectOptions(**SMALL))
    with pytest.raises(ParameterError, match='"EPSG:0" is not a coordinate reference system'):
        found.save(tmp_path / "out.gpkg", crs="EPSG:0")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"tile": 0}, "tile is 0"),
        (
            {"tile": 640, "overlap": 640},
            "overlap is 640 and tile 640: .*; lower --overlap, or take larger tiles",
        ),
        ({"overlap": -1}, "overlap is -1, but must be 0 pixels or more"),
        ({"scales": (0.25,)}, "pass --gsd"),
        ({"score": 1.5}, "score is 1.5"),
        ({"classes": ()}, "classes is empty"),
        ({"classes": "ship"}, "classes is the text"),
        ({"batch": 2.5}, "batch is 2.5"),
        ({"gsd": "fine"}, 'gsd is "fine"'),
        ({"gsd": 0}, "gsd is 0"),
        ({"batch": 0}, "batch is 0"),
        ({"threads": 0}, "threads is 0"),
    ],
)
def test_options_out_of_range_are_refused_before_anything_is_opened(given, words):
    with pytest.raises(ParameterError, match=words):
        bg.DetectOptions(**given)


def test_the_tile_is_the_weights_own_unless_given(tmp_path):
    with bg.open_scene(write_scene(tmp_path / "s.tif", canvas(900, 50, [])), "sar") as scene:
        plan = detect_module.plan_for
        assert plan(scene, BrightHeader(), bg.DetectOptions()).grid.tile == 640
        full = BrightHeader(architecture=DetectorConfig().to_dict())
        assert plan(scene, full, bg.DetectOptions()).grid.tile == 800
        assert plan(scene, full, bg.DetectOptions(tile=320)).grid.tile == 320
        with pytest.raises(ParameterError, match="overlap is 800 and tile 800"):
            plan(scene, full, bg.DetectOptions(overlap=800))


def test_devices():
    import torch

    devices = detect_module.devices
    assert devices("cpu") == ["cpu"]
    assert devices("auto") == ["cuda" if torch.cuda.is_available() else "cpu"]
    for text, words in (("gpu", "unknown device"), ("cuda:x", "unknown device"), ("cpu,cpu", "twice")):
        with pytest.raises(ParameterError, match=words):
            devices(text)
    with pytest.raises(ParameterError, match="device cuda:99 is not there"):
        devices("cuda:99")


def test_threads_are_set_for_the_run_and_set_back(scene):
    import torch

    before = torch.get_num_threads()
    seen = []

    class Watching(BrightWeights):
        def detector(self, sensor, score=None, classes=None):
            seen.append(torch.get_num_threads())
            inner = super().detector(sensor, score, classes)

            def run(images):
                seen.append(torch.get_num_threads())
                return inner(images)

            return run

    bg.detect(scene, Watching(), bg.DetectOptions(threads=1))
    assert seen[-1] == 1 and torch.get_num_threads() == before


def test_the_outlook_counts_valid_tiles_and_measures_time(tmp_path):
    image = canvas(100, 100, SHIPS)
    image[50:] = 0
    image[:50] += 20
    with scene_of(tmp_path / "half.tif", image, nodata=0) as scene, warnings.catch_warnings():
        warnings.simplefilter("error")
        plan, cost = detect_module.outlook(scene, BrightWeights(), bg.DetectOptions(**SMALL))
    assert len(plan.grid) == 9 and 4 <= cost.tiles <= 5
    assert cost.seconds == pytest.approx(cost.tiles * cost.seconds_per_tile)


def test_the_outlook_is_of_the_area_of_interest_and_refuses_one_as_detect_does(scene, tmp_path):
    aoi = area_file(tmp_path / "corner.gpkg", 0, 0, 20, 10)
    options = bg.DetectOptions(**SMALL, aoi=aoi)
    _, cost = detect_module.outlook(scene, BrightWeights(), options)
    looked_at = bg.detect(scene, BrightWeights(), options).provenance["tiles"]
    assert cost.tiles == looked_at["detected"] + looked_at["empty"] == 1
    far = area_file(tmp_path / "far.gpkg", 200, 200, 300, 300)
    with pytest.raises(LabelError, match="does not touch harbour"):
        detect_module.outlook(scene, BrightWeights(), bg.DetectOptions(aoi=far))


def test_several_devices_get_weights_each_and_share_the_batches(scene, monkeypatch):
    loaded = []

    def load(name, device):
        made = BrightWeights()
        made.batches = []
        detector = made.detector

        def watched(*arguments):
            inner = detector(*arguments)
            return lambda images: made.batches.append(len(images)) or inner(images)

        made.detector = watched
        loaded.append((device, made))
        return made

    monkeypatch.setattr("babelrs_geo.models.zoo.load", load)
    monkeypatch.setattr(sys.modules["babelrs_geo.detect.crew"], "devices", lambda text: text.split(","))
    found = bg.detect(scene, "compact", bg.DetectOptions(**SMALL, device="cuda:0,cuda:1", batch=2))
    assert [device for device, _ in loaded] == ["cuda:0", "cuda:1"]
    assert [len(made.batches) for _, made in loaded] == [3, 2]  # nine tiles in five batches
    assert len(found.detections) == len(SHIPS)
    assert found.provenance["parameters"]["device"] == "cuda"


def test_out_of_memory_ends_with_advice_or_begins_again_with_a_smaller_batch(scene, tmp_path):
    options = bg.DetectOptions(**SMALL, batch=4)
    plain = bg.detect(scene, BrightWeights(), bg.DetectOptions(**SMALL, batch=2))
    with pytest.raises(BatchError, match=r"with a batch of 4 tiles of 48 px: pass a smaller batch .or auto"):
        bg.detect(scene, BrightWeights(holds=3), options)
    told = r"memory did not suffice for batches of 4 tiles: begun again with 2"
    spool = detect_module.Running(spool=tmp_path / "parts")
    with pytest.warns(UserWarning, match=told):
        found = bg.detect(
            scene, BrightWeights(holds=3), bg.DetectOptions(**SMALL, batch="auto"), running=spool
        )
    assert found.features.equals(plain.features)
    assert found.provenance["parameters"]["batch"] == 2
    assert found.provenance["parameters"] == plain.provenance["parameters"]
    with pytest.raises(BatchError, match="with a batch of 1 tiles"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bg.detect(scene, BrightWeights(holds=0), bg.DetectOptions(**SMALL, batch="auto"))


def test_a_run_by_auto_goes_on_with_the_batch_that_it_had_come_to(scene, tmp_path):
    """What is kept is of that size; where more memory is free the next day, it would be another."""
    options, parts = bg.DetectOptions(**SMALL, batch="auto"), tmp_path / "parts"
    running = detect_module.Running(spool=parts, resume=True)

    def stop(done, total):
        if done > 4:
            raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="begun again with 2"), pytest.raises(KeyboardInterrupt):
        bg.detect(scene, BrightWeights(holds=2), options, stop, running)
    kept = len(list(parts.glob("*.arrow")))
    assert kept >= 2
    told = []
    found = bg.detect(scene, BrightWeights(), options, lambda *p: told.append(p), running)
    assert told[0][0] == 2 * kept and found.provenance["parameters"]["batch"] == 2


@pytest.mark.parametrize("batch", [0, -1, "many"])
def test_batches_that_cannot_be(batch):
    with pytest.raises(
        ParameterError, match=f'batch is {batch}, expected a whole number of at least 1, or "auto"'
    ):
        bg.DetectOptions(batch=batch)


@pytest.mark.gpu
def test_batches_are_sized_to_the_memory_of_the_gpu():
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    from babelrs_geo.detect.crew import fitting_batch

    def hungry(images):
        torch.zeros(len(images) << 28, device="cuda")  # 1 GiB for each

    free = torch.cuda.mem_get_info()[0] / 2**30
    size = fitting_batch(["cuda"], [hungry], (8, 8))
    assert size <= 0.7 * free and (size == 64 or 2 * size > 0.65 * free)
