"""`&` and `|` of real TorchGeo datasets: nested by sensor, paired by ground or by name."""

from __future__ import annotations

import pickle
import warnings
from datetime import timedelta

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import NORTH_UP, Raster, write_raster
from rasterio.transform import from_origin
from torch.utils.data import DataLoader
from torchgeo.datasets import IntersectionDataset, RasterDataset, UnionDataset
from torchgeo.samplers import GridGeoSampler, PreChippedGeoSampler, RandomBatchGeoSampler, RandomGeoSampler

from babelrs_geo import open_scene
from babelrs_geo.chips import ChipOptions
from babelrs_geo.chips.plan import Entry
from babelrs_geo.chips.run import cut_entries
from babelrs_geo.datasets.chips import ChipDataset
from babelrs_geo.datasets.combine import Paired, United
from babelrs_geo.datasets.ground import GroundOptions
from babelrs_geo.datasets.samplers import Draw, Mixture
from babelrs_geo.datasets.samples import check, collate, unbatch
from babelrs_geo.datasets.scenes import SceneDataset
from babelrs_geo.datasets.transforms import Augmentation, Together
from babelrs_geo.errors import GeorefError, ParameterError

# Python 3.12 warns where a loader's workers are forked from a process with threads
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

RNG = np.random.default_rng(2)


def noise(height=70, width=90, bands=1):
    return RNG.integers(1, 255, (bands, height, width), dtype=np.uint8)


def moved(columns, rows, size=10.0):
    return from_origin(380_000.0 + columns * 10, 3_735_000.0 - rows * 10, size, size)


def taken(day):
    return {"ACQUISITION_TIME": f"2021-05-{day:02d}T10:00:00Z"}


def samples(nested):
    return {sensor: unbatch(batch) for sensor, batch in nested.items()}


def test_what_both_saw_is_nested_by_sensor(make_raster):
    sar, rgb = make_raster(noise(), "sar"), make_raster(noise(bands=3), "rgb", transform=moved(20, 30))
    both = SceneDataset([sar], "sar") & SceneDataset([rgb], "rgb")
    assert isinstance(both, IntersectionDataset) and len(both) == 1
    assert both.index.geometry.iloc[0].bounds == (380_200.0, 3_734_300.0, 380_900.0, 3_734_700.0)
    scenes = {"sar": open_scene(sar, "sar"), "rgb": open_scene(rgb, "rgb")}
    for query in [
        *RandomGeoSampler(both, 16, length=8),
        *GridGeoSampler(both, 20, 10),
        *PreChippedGeoSampler(both),
    ]:
        found = samples(both[query])
        assert set(found) == {"sar", "rgb"}
        for sensor, (sample,) in found.items():
            check(sample)
            x, y, w, h = sample["window"]
            assert np.array_equal(sample["image"].numpy(), scenes[sensor].read((x, y, w, h)).image)
        left, right = (found[s][0]["transform"] @ (0, 0) for s in ("sar", "rgb"))
        assert np.allclose(left, right)
    loader = DataLoader(
        both, batch_sampler=RandomBatchGeoSampler(both, 16, 3, length=6), collate_fn=collate, num_workers=2
    )
    for batch in loader:
        assert {s: tuple(b["image"].shape) for s, b in batch.items()} == {
            "sar": (3, 3, 16, 16),
            "rgb": (3, 3, 16, 16),
        }
        assert [len(b["boxes"]) for b in batch.values()] == [3, 3]


def test_pairs_are_as_far_apart_in_time_as_stated(make_raster):
    sar = [make_raster(noise(), f"s{d}", tags=taken(d)) for d in (1, 5, 20)]
    rgb = [make_raster(noise(bands=3), f"r{d}", tags=taken(d)) for d in (3, 7)]

    def pairs(tolerance):
        options = GroundOptions(tolerance=tolerance)
        both = SceneDataset(sar, "sar", options=options) & SceneDataset(rgb, "rgb")
        for query in PreChippedGeoSampler(both):
            found = samples(both[query])
            yield found["sar"][0]["name"][:-4], found["rgb"][0]["name"][:-4]

    assert list(pairs(timedelta(days=2))) == [("s1", "r3"), ("s5", "r3"), ("s5", "r7")]
    assert list(pairs(timedelta(days=6))) == [("s1", "r3"), ("s1", "r7"), ("s5", "r3"), ("s5", "r7")]
    assert len(list(pairs(None))) == 6  # however far
    with pytest.raises(ParameterError, match="share ground and were taken within 1 day, 0:00:00"):
        list(pairs(timedelta(days=1)))


def test_an_undated_scene_goes_with_any_time(make_raster):
    options = GroundOptions(tolerance=timedelta(days=1))
    undated = SceneDataset([make_raster(noise(), "s")], "sar", options=options)
    dated = SceneDataset([make_raster(noise(bands=3), "r", tags=taken(3))], "rgb", options=options)
    both = undated & dated
    assert both.index.index[0] == dated.index.index[0]
    assert dated.index.index[0].left == pd.Timestamp("2021-05-03 10:00")


def test_another_crs_and_resolution(make_raster):
    sar = SceneDataset([make_raster(noise(), "sar")], "sar")
    lonlat = from_origin(-118.2970, 33.7500, 6e-5, 5e-5)
    path = make_raster(noise(140, 180, 3), "rgb", crs="EPSG:4326", transform=lonlat)
    rgb = SceneDataset([path], "rgb")
    before = rgb.crs, rgb.res, rgb.index.total_bounds.tolist()
    both = sar & rgb
    assert (rgb.crs, rgb.res, rgb.index.total_bounds.tolist()) == before  # the second is not touched
    assert both.crs == sar.crs and both.res == (10.0, 10.0)
    scene = open_scene(path, "rgb")
    for query in RandomGeoSampler(both, 12, length=6):
        found = samples(both[query])
        assert found["sar"][0]["image"].shape == found["rgb"][0]["image"].shape == (3, 12, 12)
        window, scale = found["rgb"][0]["window"], found["rgb"][0]["scale"]
        x, y, w, h = window
        lon, lat = scene.georef.to_map((x + w / 2) / scale, (y + h / 2) / scale)
        east, north = found["sar"][0]["transform"] @ (6, 6)
        back = open_scene(make_raster(noise(), "grid"), "sar").georef.to_lonlat(*(~NORTH_UP @ (east, north)))
        assert np.allclose((lon, lat), back, atol=6e-5)  # the nearest pixel


def test_neighbours_that_touch_are_no_pair(make_raster):
    sar = SceneDataset([make_raster(noise(), "sar")], "sar")
    for columns in (90, 89.95):
        beside = SceneDataset([make_raster(noise(bands=3), "rgb", transform=moved(columns, 0))], "rgb")
        with pytest.raises(ParameterError, match="no two pictures of the datasets share ground"):
            sar & beside


def test_three_sensors_chain(make_raster):
    a = SceneDataset([make_raster(noise(), "a")], "sar")
    b = SceneDataset([make_raster(noise(bands=3), "b", transform=moved(10, 0))], "rgb")
    c = SceneDataset([make_raster(noise(), "c", transform=moved(0, 10))], "ir")
    for both in ((a & b) & c, a & (b & c)):
        assert isinstance(both, Paired) and len(both) == 1
        for query in GridGeoSampler(both, 20):
            found = samples(both[query])
            assert {k: len(v) for k, v in found.items()} == {"sar": 1, "rgb": 1, "ir": 1}
    mixed = (a | b) & c
    assert len(mixed) == 2
    assert {s for q in PreChippedGeoSampler(mixed) for s in mixed[q]} == {"sar", "rgb", "ir"}
    twin = pickle.loads(pickle.dumps(mixed))
    query = next(iter(PreChippedGeoSampler(twin)))
    assert torch.equal(twin[query]["ir"]["image"], mixed[query]["ir"]["image"])


def test_what_either_saw(make_raster):
    paths = {
        "sar": make_raster(noise(), "sar"),
        "rgb": make_raster(noise(40, 40, 3), "rgb", transform=moved(500, 0)),
    }
    either = SceneDataset([paths["sar"]], "sar") | SceneDataset([paths["rgb"]], "rgb")
    assert isinstance(either, UnionDataset) and isinstance(either, United) and len(either) == 2
    for (sensor, path), query in zip(paths.items(), PreChippedGeoSampler(either), strict=True):
        ((name, (sample,)),) = samples(either[query]).items()
        scene = open_scene(path, sensor)
        assert name == sensor
        assert np.array_equal(sample["image"].numpy(), scene.read((0, 0, scene.width, scene.height)).image)
    for query in [*RandomGeoSampler(either, 16, length=9), *GridGeoSampler(either, 16)]:
        assert len(either[query]) == 1
    for number, (sensor, path) in enumerate(paths.items()):
        assert either[number][sensor]["name"] == [path.name] and len(either[number]) == 1
    for outside in ((slice(0, 10), slice(0, 10)), 2):
        with pytest.raises(IndexError):
            either[outside]


def test_ground_that_both_saw_is_never_mixed(make_raster):
    sar, rgb = make_raster(noise(), "sar"), make_raster(noise(bands=3), "rgb")
    either = SceneDataset([sar], "sar") | SceneDataset([rgb], "rgb")
    found = samples(either[next(iter(GridGeoSampler(either, 32)))])
    for sensor, path in (("sar", sar), ("rgb", rgb)):
        (sample,) = found[sensor]
        assert np.array_equal(sample["image"].numpy(), open_scene(path, sensor).read(sample["window"]).image)
    again = SceneDataset([sar], "sar") | SceneDataset([make_raster(noise(), "other")], "sar")
    assert again[next(iter(GridGeoSampler(again, 32)))]["sar"]["image"].shape == (2, 3, 32, 32)


def test_of_a_union_each_dataset_answers_from_its_own_best_picture(make_raster):
    """The second picture of one dataset is no reason for the second of the other."""
    sar = [make_raster(noise(), f"s{i}", transform=moved(i * 200, 0)) for i in range(2)]
    rgb = [make_raster(noise(bands=3), f"r{i}", transform=moved(x, 0)) for i, x in enumerate((200, 200 + 80))]
    either = SceneDataset(sar, "sar") | SceneDataset(rgb, "rgb")
    assert either.index.index.is_unique
    query = next(q for q in GridGeoSampler(either, 32, 26) if q[0].start == 382_520.0)  # columns 252 to 284
    found = samples(either[query])
    assert found["sar"][0]["name"] == "s1.tif" and found["rgb"][0]["name"] == "r0.tif"


def test_pairs_that_overlap_are_all_served(make_raster):
    sar = [make_raster(noise(), f"s{i}", transform=moved(10 * i, 0)) for i in range(2)]
    rgb = [make_raster(noise(bands=3), f"r{i}", transform=moved(0, 10 * i)) for i in range(2)]
    both = SceneDataset(sar, "sar") & SceneDataset(rgb, "rgb")
    found = [samples(both[query]) for query in GridGeoSampler(both, 40)]
    pairs = {(f["sar"][0]["name"][:2], f["rgb"][0]["name"][:2]) for f in found}
    assert pairs == {("s0", "r0"), ("s0", "r1"), ("s1", "r0"), ("s1", "r1")}


def test_whole_pictures_keep_their_pixels_in_a_union_of_crs(make_raster):
    sar = SceneDataset([make_raster(noise(), "sar")], "sar")
    fine = from_origin(-118.4, 33.9, 1e-5, 1e-5)
    path = make_raster(noise(50, 60, 3), "rgb", crs="EPSG:4326", transform=fine)
    either = sar | SceneDataset([path], "rgb")
    (sample,) = samples(either[list(PreChippedGeoSampler(either))[1]])["rgb"]
    assert np.array_equal(sample["image"].numpy(), open_scene(path, "rgb").read((0, 0, 60, 50)).image)


def test_images_without_a_georeference_unite_but_do_not_pair(make_raster):
    plain = {"suffix": ".png", "crs": None, "transform": None}
    a, b = (
        SceneDataset([make_raster(noise(), "a", **plain)], "ir"),
        SceneDataset([make_raster(noise(), "b", **plain)], "sar"),
    )
    either = a | b
    found = [samples(either[q]) for q in PreChippedGeoSampler(either)]
    assert [list(f) for f in found] == [["ir"], ["sar"]]
    assert np.array_equal(found[1]["sar"][0]["image"].numpy(), b[0]["image"].numpy())
    with pytest.raises(GeorefError, match="no ground to pair on"):
        a & b


@pytest.fixture(scope="module")
def registered(tmp_path_factory):
    """Chips of one place by two sensors, overlapping each other, with one name a place."""
    root = tmp_path_factory.mktemp("registered")
    scenes = [
        open_scene(write_raster(root / "a", Raster(noise(150, 150), tags=taken(1))), "sar"),
        open_scene(write_raster(root / "b", Raster(noise(150, 150, 3), tags=taken(9))), "rgb"),
    ]
    entries = [Entry("place", str(s.sensor), s.path, s, None) for s in scenes]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        cut_entries(entries, root / "out", ChipOptions(size=64, overlap=32, split=(1, 0, 0)))
    return root / "out", scenes


def test_chips_of_one_name_are_paired(registered):
    folder, scenes = registered
    both = ChipDataset(folder, "sar") & ChipDataset(folder, "rgb")
    assert len(both) == len(ChipDataset(folder, "sar")) == 16
    ground = IntersectionDataset(ChipDataset(folder, "sar"), ChipDataset(folder, "rgb"), spatial_only=True)
    assert len(ground) > 2 * len(both)  # the slivers that TorchGeo's own overlay gives
    for query, name in zip(PreChippedGeoSampler(both), both.index["name"], strict=True):
        found = samples(both[query])
        x, y = (int(v) for v in name.split("_")[1:])
        for scene in scenes:
            (sample,) = found[str(scene.sensor)]
            assert sample["name"] == name
            assert np.array_equal(sample["image"].numpy(), scene.read((x, y, 64, 64)).image)
    views = Together({s: Augmentation(size=32) for s in ("sar", "rgb")})
    for pair in (both[3], Mixture({"pairs": both}, {"pairs": views})[Draw("pairs", 3, (0, 0, 0, 0))]):
        assert {s: b["name"] for s, b in pair.items()} == {
            s: [both.index["name"].iloc[3]] for s in ("sar", "rgb")
        }
    for query in RandomGeoSampler(both, 24, length=20):
        pair = samples(both[query])
        (a,), (b,) = pair["sar"], pair["rgb"]
        assert a["window"] == b["window"] and a["transform"] == b["transform"]


def test_chips_that_share_no_name_or_no_place(registered, tmp_path):
    folder, scenes = registered
    elsewhere = write_raster(tmp_path / "c", Raster(noise(150, 150), transform=moved(3, 0)))
    for name, error, told in (
        ("other", ParameterError, "have the same name"),
        ("place", GeorefError, r"lie 3\.0 px apart"),
    ):
        scene = open_scene(elsewhere, "ir")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            cut_entries(
                [Entry(name, "ir", scene.path, scene, None)],
                tmp_path / name,
                ChipOptions(size=64, overlap=32),
            )
        with pytest.raises(error, match=told):
            ChipDataset(folder, "sar") & ChipDataset(tmp_path / name, "ir")
    assert len(scenes) == 2


def test_what_is_not_ours_is_refused(make_raster, tmp_path):
    ours = SceneDataset([make_raster(noise(), "a")], "sar")
    with pytest.raises(ParameterError, match="RasterDataset does not yield samples of this package"):
        ours & RasterDataset([str(make_raster(noise(), "b"))])
