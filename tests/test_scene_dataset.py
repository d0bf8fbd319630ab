"""Scenes as a TorchGeo dataset: TorchGeo's own samplers over real rasters."""

from __future__ import annotations

import os
import pickle
from datetime import UTC, datetime
from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import pyproj
import pytest
import shapely
import torch
from conftest import NORTH_UP, UTM, Raster, files_open, write_raster
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.control import GroundControlPoint
from rasterio.transform import Affine, from_origin
from test_georef import made_up_rpc
from torch.utils.data import DataLoader
from torchgeo.datasets import (
    random_bbox_assignment,
    random_bbox_splitting,
    random_grid_cell_assignment,
    roi_split,
    time_series_split,
)
from torchgeo.samplers import GridGeoSampler, PreChippedGeoSampler, RandomBatchGeoSampler, RandomGeoSampler

from babelrs_geo import open_scene
from babelrs_geo.boxes import bounds
from babelrs_geo.datasets.ground import PIXELS, GroundOptions
from babelrs_geo.datasets.samples import check, collate
from babelrs_geo.datasets.scenes import SceneDataset
from babelrs_geo.datasets.times import ALWAYS, bounds_of, intervals, microseconds
from babelrs_geo.errors import GeorefError, LabelError, ParameterError, SceneError
from babelrs_geo.scenes.blocks import STORE

# Python 3.12 warns where a loader's workers are forked from a process with threads
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

RNG = np.random.default_rng(0)


def noise(height: int = 70, width: int = 90, bands: int = 1) -> np.ndarray:
    return RNG.integers(1, 255, (bands, height, width), dtype=np.uint8)


def padded(scene, window, scale=1.0):
    """Slow and plain: the window of a scene, zero and not valid where it leaves it."""
    x, y, w, h = window
    rows, columns = scene.shape_at(scale)
    whole = scene.read((0, 0, columns, rows), scale)
    image, valid = np.zeros((3, h, w), np.float32), np.zeros((h, w), bool)
    for row in range(h):
        for column in range(w):
            if 0 <= y + row < rows and 0 <= x + column < columns:
                image[:, row, column] = whole.image[:, y + row, x + column]
                valid[row, column] = whole.valid[y + row, x + column]
    return image, valid


def same(sample, scene, window=None, scale=1.0):
    check(sample)
    image, valid = padded(scene, window or (0, 0, scene.width, scene.height), scale)
    assert np.array_equal(sample["image"].numpy(), image)
    assert np.array_equal(sample["valid"].numpy(), valid)


def gcps(width: int, height: int, turn: float = 0.2):
    """Control points of a scene turned on the ground, in degrees."""
    place = Affine.translation(-118.2, 33.7) @ Affine.rotation(np.rad2deg(turn)) @ Affine.scale(1e-4, -1e-4)
    spots = [(c, r) for r in np.linspace(0, height, 4) for c in np.linspace(0, width, 4)]
    return [
        GroundControlPoint(row=r, col=c, x=(place @ (c, r))[0], y=(place @ (c, r))[1], z=0.0, id=str(i))
        for i, (c, r) in enumerate(spots)
    ]


@pytest.fixture(scope="module")
def mapped(tmp_path_factory):

    mask = np.ones((70, 90), bool)
    mask[:20, :30] = False
    path = write_raster(tmp_path_factory.mktemp("mapped") / "a", Raster(noise(), mask=mask))
    return open_scene(path, "sar"), SceneDataset([path], "sar")


@settings(max_examples=60)
@given(x=st.integers(-20, 85), y=st.integers(-20, 65), w=st.integers(1, 50), h=st.integers(1, 50))
def test_a_query_on_the_grid_is_the_scenes_own_window(mapped, x, y, w, h):
    scene, dataset = mapped
    left, top = NORTH_UP @ (x, y)
    right, bottom = NORTH_UP @ (x + w, y + h)
    query = (slice(left, right), slice(bottom, top))
    if x + w <= 0 or y + h <= 0:
        with pytest.raises(IndexError):
            dataset[query]
        return
    sample = dataset[query]
    same(sample, scene, (x, y, w, h))
    assert sample["window"] == (x, y, w, h)
    assert np.allclose(sample["transform"] @ (0, 0), (left, top))
    assert sample["crs"] == UTM


@settings(max_examples=30)
@given(x=st.floats(0, 50), y=st.floats(0, 30), step=st.sampled_from([5.0, 17.0, 20.0, 33.0]))
def test_another_resolution_is_the_scenes_own_read_at_that_scale(mapped, x, y, step):
    scene, dataset = mapped
    left, top = NORTH_UP @ (x, y)
    sample = dataset[slice(left, left + 8 * step, step), slice(top - 8 * step, top, step)]
    assert sample["image"].shape == (3, 8, 8)
    assert sample["scale"] == pytest.approx(10.0 / step)
    same(sample, scene, sample["window"], sample["scale"])


def test_torchgeos_samplers_run_unmodified(make_raster):
    paths = [
        make_raster(noise(), "a"),
        make_raster(noise(40, 40), "b", transform=from_origin(400_000.0, 3_700_000.0, 10.0, 10.0)),
    ]
    dataset = SceneDataset(paths, "ir")
    assert len(dataset) == 2
    windows = [dataset[q]["window"] for q in GridGeoSampler(dataset, 32, 24)]
    assert {(0, 38), (24, 38), (48, 38), (72, 38)} <= {w[:2] for w in windows}
    for sampler in (RandomGeoSampler(dataset, 32, length=6), GridGeoSampler(dataset, 32, 24)):
        for query in sampler:
            sample = dataset[query]
            check(sample)
            assert sample["image"].shape == (3, 32, 32)
    whole = [dataset[q] for q in PreChippedGeoSampler(dataset, shuffle=True)]
    assert {s["name"]: tuple(s["image"].shape) for s in whole} == {"a.tif": (3, 70, 90), "b.tif": (3, 40, 40)}
    loader = DataLoader(
        dataset, batch_sampler=RandomBatchGeoSampler(dataset, 16, 3, length=9), collate_fn=collate
    )
    shapes = [batch["ir"]["image"].shape for batch in loader]
    assert shapes == [(3, 3, 16, 16)] * 3


def test_samples_that_overlap_decode_each_block_once(make_raster):
    path = make_raster(noise(1024, 1536), creation={"tiled": True, "blockxsize": 512, "blockysize": 512})
    dataset = SceneDataset([path], "sar")
    before = STORE.decoded
    windows = [dataset[query]["window"] for query in GridGeoSampler(dataset, 300, 200)]
    assert len(windows) > 20
    assert STORE.decoded - before == 6


def test_region_and_time_of_interest(make_raster):
    times = ["2021-05-01T10:00:00", "2022-05-01T10:00:00"]
    paths = [make_raster(noise(), f"t{i}", tags={"ACQUISITION_TIME": t}) for i, t in enumerate(times)]
    dataset = SceneDataset(paths, "sar")
    roi = shapely.box(380_200, 3_734_600, 380_520, 3_734_920)
    toi = pd.Interval(pd.Timestamp("2022-01-01"), pd.Timestamp("2022-12-31"), closed="both")
    queries = list(GridGeoSampler(dataset, 32, roi=roi, toi=toi))
    assert len(queries) == 1
    same(dataset[queries[0]], open_scene(paths[1], "sar"), (20, 8, 32, 32))


def halves(dataset):
    left, bottom, right, top = dataset.index.total_bounds
    return [
        shapely.box(left, bottom, (left + right) / 2, top),
        shapely.box((left + right) / 2, bottom, right, top),
    ]


SPLITTERS = {
    "pictures": lambda d, g: random_bbox_assignment(d, [0.5, 0.5], g),
    "parts": lambda d, g: random_bbox_splitting(d, [0.6, 0.4], g),
    "cells": lambda d, g: random_grid_cell_assignment(d, [0.5, 0.5], 3, g),
    "regions": lambda d, g: roi_split(d, halves(d)),
    "times": lambda d, g: time_series_split(d, [0.5, 0.5]),
}


@pytest.mark.parametrize("how", SPLITTERS)
@pytest.mark.parametrize("mapped", [True, False])
def test_torchgeos_splitters_run_unmodified(make_raster, how, mapped):
    """Each window is the scene's own, and no ground is in two splits, in another CRS neither."""
    paths = []
    for i in range(4):
        place = (
            {"transform": NORTH_UP @ Affine.translation(200 * i, 0)}
            if mapped
            else {"crs": None, "transform": None}
        )
        tags = {"ACQUISITION_TIME": f"2021-05-0{i + 1}T10:00:00Z"}
        paths.append(make_raster(noise(72, 96), f"s{i}", tags=tags, **place))
    scenes = {path.name: open_scene(path, "sar") for path in paths}
    dataset = SceneDataset(paths, "sar")
    splits = SPLITTERS[how](dataset, torch.Generator().manual_seed(1))
    for part in splits:
        assert part.crs == dataset.crs and len(part)
        for query in GridGeoSampler(part, 24, 24):
            sample = part[query]
            same(sample, scenes[sample["name"]], sample["window"])
            left, top = sample["transform"] @ (0, 0)
            assert (left, top) == pytest.approx((query[0].start, query[1].stop), abs=0.51 * dataset.res[0])
        assert sorted({part[i]["name"] for i in range(len(part))}) == sorted(set(part.index["name"]))
        if mapped:
            part.crs = pyproj.CRS("EPSG:32612")
    first, second = (shapely.union_all(part.index.geometry.to_numpy()) for part in splits)
    assert first.intersection(second).area < 1e-3 * min(first.area, second.area)
    if how == "times":
        assert [list(part.index["name"]) for part in splits] == [["s0.tif", "s1.tif"], ["s2.tif", "s3.tif"]]


@pytest.mark.parametrize("dated", [True, False])
def test_scenes_of_the_same_ground_are_told_apart_by_time(make_raster, dated):
    tags = [{"ACQUISITION_TIME": f"2021-05-0{i + 1}T10:00:00Z"} if dated else {} for i in range(3)]
    paths = [make_raster(noise(), f"t{i}", tags=t) for i, t in enumerate(tags)]
    dataset = SceneDataset(paths, "sar")
    for path, query in zip(paths, PreChippedGeoSampler(dataset), strict=True):
        same(dataset[query], open_scene(path, "sar"))
    for i, query in enumerate(GridGeoSampler(dataset, 30, 30)):
        assert dataset[query]["name"] == f"t{i // 9}.tif"
    if dated:
        first = dataset.index.index[0]
        assert first.left == pd.Timestamp("2021-05-01 10:00")
        none = datetime(2020, 1, 1, tzinfo=UTC)
        with pytest.raises(IndexError):
            dataset[:, :, none:none]


@pytest.mark.parametrize("dated", [True, False])
def test_scenes_that_overlap_are_all_served(make_raster, dated):
    tags = {"ACQUISITION_TIME": "2021-05-01T10:00:00Z"} if dated else {}
    inside = NORTH_UP @ Affine.translation(10, 10)
    large, small = (
        make_raster(np.full((1, 96, 96), 50, np.uint8), "large", tags=tags),
        make_raster(np.full((1, 64, 64), 200, np.uint8), "small", tags=tags, transform=inside),
    )
    dataset = SceneDataset([large, small], "ir")
    names = [dataset[query]["name"] for query in GridGeoSampler(dataset, 32)]
    assert names == ["large.tif"] * 9 + ["small.tif"] * 4
    assert {dataset[query]["name"] for query in RandomGeoSampler(dataset, 32, length=40)} == {
        "large.tif",
        "small.tif",
    }
    left, top = inside @ (-4, -4)  # without a time: most of it is on both, all of it on one
    assert dataset[left : left + 320, top - 320 : top]["name"] == "large.tif"


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.booleans()), max_size=9),
)
def test_no_two_rows_have_one_interval(rows):
    first = np.array([0 if unknown else begin for begin, _, unknown in rows], np.int64)
    until = np.array(
        [microseconds(ALWAYS[1]) if unknown else begin + lasts for begin, lasts, unknown in rows], np.int64
    )
    found = intervals(first, until)
    assert found.is_unique and len(found) == len(rows)
    since, end = bounds_of(found)
    assert ((since >= first) & (end >= until) & (since + end - first - until <= 2 * len(rows))).all()
    assert found.equals(intervals(since, end))  # done twice changes nothing


def test_slanted_scenes_side_by_side_are_answered_from_their_own_ground(make_raster):
    turned = NORTH_UP @ Affine.rotation(30)
    paths = [
        make_raster(noise(200, 80), f"r{i}", transform=turned @ Affine.translation(85 * i, -49 * i))
        for i in range(2)
    ]
    dataset = SceneDataset(paths, "ir")
    grounds = dict(zip(dataset.index["name"], dataset.index.geometry, strict=True))
    torch.manual_seed(0)
    for query in RandomGeoSampler(dataset, 16, length=150):
        x, y, _ = query
        box = shapely.box(x.start, y.start, x.stop, y.stop)
        shared = {name: ground.intersection(box).area for name, ground in grounds.items()}
        if max(shared.values()) > 1:
            assert dataset[x, y]["name"] == max(shared, key=lambda name: shared[name])
            assert shared[dataset[query]["name"]] > 0


def test_scenes_smaller_than_a_window_are_padded(make_raster):
    path = make_raster(noise(20, 24), "small")
    assert len(GridGeoSampler(SceneDataset([path], "sar"), 32)) == 0  # TorchGeo skips what is smaller
    dataset = SceneDataset([path], "sar", options=GroundOptions(least=32))
    scene = open_scene(path, "sar")
    for sampler in (
        RandomGeoSampler(dataset, 32, length=2),
        GridGeoSampler(dataset, 32),
        PreChippedGeoSampler(dataset),
    ):
        assert len(sampler)
        for query in sampler:
            same(dataset[query], scene, (0, 0, 32, 32))
    left, bottom, right, top = 380_000.0, 3_734_800.0, 380_240.0, 3_735_000.0
    same(dataset[left:right, bottom:top], scene)  # its own bounds give it without padding


@pytest.mark.parametrize("res", [None, 20.0])
def test_padding_counts_the_datasets_pixels(make_raster, res):
    fine = from_origin(400_000.0, 3_700_000.0, 5.0, 5.0)
    paths = [make_raster(noise(), "coarse"), make_raster(noise(40, 50), "fine", transform=fine)]
    dataset = SceneDataset(paths, "sar", options=GroundOptions(least=64, res=res))
    sizes = {dataset[q]["name"]: tuple(dataset[q]["image"].shape) for q in GridGeoSampler(dataset, 64)}
    assert sizes == {"coarse.tif": (3, 64, 64), "fine.tif": (3, 64, 64)}
    for query in GridGeoSampler(dataset, 64):
        sample = dataset[query]
        same(
            sample, open_scene(paths[sample["name"] == "fine.tif"], "sar"), sample["window"], sample["scale"]
        )


def test_pixels_of_another_shape_are_refused(make_raster):
    degrees = make_raster(noise(), "degrees", crs="EPSG:4326", transform=from_origin(12.0, 60.0, 1e-4, 1e-4))
    alone = SceneDataset([degrees], "sar")
    assert {alone[q]["scale"] for q in GridGeoSampler(alone, 32)} == {1.0}
    metres = GroundOptions(crs="EPSG:32633", res=10.0)
    for options in (metres, GroundOptions(res=(1e-4, 2e-4))):
        dataset = SceneDataset([degrees], "sar", options=options)
        for sampler in (GridGeoSampler(dataset, 20), PreChippedGeoSampler(dataset)):
            with pytest.raises(
                GeorefError, match=r"degrees\.tif has pixels of .* no one scale .*--coregister"
            ):
                dataset[next(iter(sampler))]
    whole = SceneDataset([degrees], "sar", options=GroundOptions(crs="EPSG:32633"))
    same(whole[0], open_scene(degrees, "sar"))


def test_control_points_are_indexed_by_footprint_and_not_warped(make_raster):
    path = make_raster(noise(60, 80), "gcps", crs="EPSG:4326", gcps=gcps(80, 60))
    scene, dataset = open_scene(path, "sar"), SceneDataset([path], "sar")
    assert dataset.crs == "EPSG:4326"
    assert dataset.res == pytest.approx((1e-4, 1e-4), rel=1e-3)
    outline = dataset.index.geometry.iloc[0]
    assert (
        outline.area == pytest.approx(80e-4 * 60e-4, rel=1e-3) and outline.area < outline.envelope.area * 0.8
    )
    query = next(iter(PreChippedGeoSampler(dataset)))
    same(dataset[query], scene)
    assert dataset[query]["transform"] is None
    for query in RandomGeoSampler(dataset, 16, length=8):
        sample = dataset[query]
        same(sample, scene, sample["window"])
        x, y, w, h = sample["window"]
        middle = scene.georef.to_map(x + w / 2, y + h / 2)
        asked = [(s.start + s.stop) / 2 for s in query[:2]]
        assert np.hypot(*(np.array(middle) - asked)) < 0.75e-4  # the nearest pixel


def test_rpcs_are_indexed_by_footprint_and_not_warped(make_raster):
    rpcs = made_up_rpc()
    path = make_raster(noise(400, 400), "rpcs", crs=None, transform=None, rpcs=rpcs)
    scene, dataset = open_scene(path, "ir"), SceneDataset([path], "ir")
    assert scene.georef.kind == "rpcs" and dataset.crs == "EPSG:4326"
    same(dataset[next(iter(PreChippedGeoSampler(dataset)))], scene)
    for query in RandomGeoSampler(dataset, 64, length=3):
        sample = dataset[query]
        same(sample, scene, sample["window"])
        x, y, w, h = sample["window"]
        px, py = scene.georef.to_pixel(*((s.start + s.stop) / 2 for s in query[:2]))
        assert abs(x + w / 2 - px) <= 0.5 and abs(y + h / 2 - py) <= 0.5


def test_scenes_in_another_crs_are_found_where_they_are(make_raster):
    here = make_raster(noise(), "here")
    lonlat = from_origin(-118.30, 33.76, 1.2e-4, 1e-4)
    there = make_raster(noise(), "there", crs="EPSG:4326", transform=lonlat)
    dataset = SceneDataset([here, there], "sar")
    assert dataset.crs == UTM
    scene = open_scene(there, "sar")
    second = list(PreChippedGeoSampler(dataset))[1]
    same(dataset[second], scene)
    sample = dataset[next(q for q in RandomGeoSampler(dataset, 8, length=99) if q[1].stop > 3_736_000)]
    same(sample, scene, sample["window"], sample["scale"])


def test_images_without_a_georeference_are_laid_out_apart(make_raster):
    paths = [make_raster(noise(h, 40), f"p{h}", suffix=".png", crs=None, transform=None) for h in (30, 50)]
    dataset = SceneDataset(paths, "ir")
    assert dataset.crs == PIXELS and dataset.res == (1.0, 1.0)
    for path, query in zip(paths, PreChippedGeoSampler(dataset), strict=True):
        same(dataset[query], open_scene(path, "ir"))
    for query in GridGeoSampler(dataset, 25, 20):
        sample = dataset[query]
        same(sample, open_scene(next(p for p in paths if p.name == sample["name"]), "ir"), sample["window"])
    apart = dataset.index.geometry.iloc[0].distance(dataset.index.geometry.iloc[1])
    assert apart >= 50
    mapped = make_raster(noise(), "mapped")
    with pytest.raises(GeorefError, match=r"mapped\.tif has a georeference and p30\.png has none"):
        SceneDataset([paths[0], mapped], "ir")
    for combine in (lambda a, b: a & b, lambda a, b: a | b):
        with pytest.raises(GeorefError, match="combine mapped images with mapped ones"):
            combine(dataset, SceneDataset([mapped], "sar"))


def test_an_unreadable_file_is_an_error_with_its_name(make_raster):
    path = make_raster(noise(600, 600), "cut", creation={"tiled": True, "blockxsize": 64, "blockysize": 64})
    dataset = SceneDataset([path], "sar")
    both = dataset | SceneDataset([make_raster(noise(600, 600, 3), "rgb")], "rgb")
    path.write_bytes(path.read_bytes()[:30_000])
    last = (slice(385_000, 385_900), slice(3_729_100, 3_730_000))
    with pytest.raises(SceneError, match=r"cut\.tif cannot be read"):
        dataset[last]
    with pytest.raises(SceneError, match=r"cut\.tif cannot be read"):
        both[last]
    with pytest.raises(SceneError, match="cannot be opened as a raster"):
        broken = path.with_name("text.tif")
        broken.write_text("no raster")
        SceneDataset([broken], "sar")


def test_an_index_error_on_the_way_is_not_taken_for_no_such_place(make_raster):
    def careless(sample):
        return [][0]

    options = GroundOptions(transforms=careless)
    dataset = SceneDataset([make_raster(noise(), "a")], "sar", options=options)
    union = dataset | SceneDataset([make_raster(noise(bands=3), "b")], "rgb")
    with pytest.raises(SceneError, match=r"a\.tif cannot be made a sample: IndexError"):
        union[next(iter(PreChippedGeoSampler(union)))]


def test_labels_lie_on_their_pixels(make_raster, tmp_path):
    pixels = np.full((80, 100), 20, np.uint8)
    pixels[30:40, 50:70] = 250
    path = make_raster(pixels, "a")
    corner = [NORTH_UP @ p for p in ((50, 30), (70, 30), (70, 40), (50, 40))]
    frame = gpd.GeoDataFrame({"class": ["ship"]}, geometry=[shapely.Polygon(corner)], crs=UTM)
    frame.to_crs("EPSG:4326").to_file(tmp_path / "labels.gpkg")
    visible = 0.41  # no share of 20 by 10 pixels is just that
    options = GroundOptions(visible=visible)
    dataset = SceneDataset([path], "sar", tmp_path / "labels.gpkg", ("car", "ship"), options)
    for query in RandomGeoSampler(dataset, 40, length=40):
        sample = dataset[query]
        bright = np.argwhere(sample["image"][0].numpy() > 0.5)
        x, y, _, _ = sample["window"]
        seen = max(0, min(x + 40, 70) - max(x, 50)) * max(0, min(y + 40, 40) - max(y, 30)) / 200
        assert len(sample["boxes"]) == (seen >= visible)
        assert sample["labels"].tolist() == [1] * (seen >= visible)
        if seen == 1:
            box = bounds(sample["boxes"])[0]
            assert np.allclose(box, [*bright.min(0)[::-1], *(bright.max(0)[::-1] + 1)], atol=0.05)
    assert SceneDataset([path], "sar", tmp_path / "labels.gpkg").classes == ("ship",)
    with pytest.raises(LabelError, match="class 'ship'; expected one of car"):
        SceneDataset([path], "sar", tmp_path / "labels.gpkg", classes=("car",))


@pytest.mark.parametrize("res", [5.0, 20.0])
def test_labels_are_scaled_with_the_pixels(make_raster, tmp_path, res):
    pixels = np.full((80, 100), 20, np.uint8)
    pixels[30:42, 50:70] = 250
    path = make_raster(pixels, "a")
    ring = [NORTH_UP @ p for p in ((50, 30), (70, 30), (70, 42), (50, 42))]
    frame = gpd.GeoDataFrame({"class": ["ship"]}, geometry=[shapely.Polygon(ring)], crs=UTM)
    frame.to_file(tmp_path / "labels.gpkg")
    dataset = SceneDataset([path], "sar", tmp_path / "labels.gpkg", options=GroundOptions(res=res))
    for query in (
        next(iter(PreChippedGeoSampler(dataset))),
        (slice(380_310, 380_910), slice(3_734_430, 3_734_870)),
    ):
        sample = dataset[query]
        check(sample)
        bright = np.argwhere(sample["image"][0].numpy() > 0.5)
        box = bounds(sample["boxes"])[0]
        assert np.allclose(box, [*bright.min(0)[::-1], *(bright.max(0)[::-1] + 1)], atol=1.01)
        assert np.allclose(box[2:] - box[:2], (200 / res, 120 / res), atol=0.01)
        assert np.allclose(sample["transform"] @ box[:2], ring[0], atol=0.01)


def test_labels_in_pixels_of_images_without_a_georeference(make_raster, tmp_path):
    paths = [make_raster(noise(), f"p{k}", suffix=".png", crs=None, transform=None) for k in range(2)]
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "p1.txt").write_text("10 20 40 20 40 30 10 30 ship 0\n")
    dataset = SceneDataset(paths, "ir", tmp_path / "labels")
    found = [dataset[q] for q in PreChippedGeoSampler(dataset)]
    assert [len(s["boxes"]) for s in found] == [0, 1]
    assert np.allclose(found[1]["boxes"][0], [25, 25, 30, 10, 0])
    assert dataset.files == sorted(str(p) for p in paths)


def test_a_dataset_has_one_sensor(make_raster):
    grey, colour = (
        make_raster(noise(), "grey"),
        make_raster(noise(bands=3), "colour", colours=("red", "green", "blue")),
    )
    with pytest.raises(ParameterError, match="one sensor"):
        SceneDataset([open_scene(grey, "sar"), open_scene(colour, "rgb")])
    with pytest.raises(ParameterError, match="no pictures"):
        SceneDataset([], "sar")
    with pytest.raises(ParameterError, match="visible"):
        GroundOptions(visible=0)


def test_workers_read_what_the_parent_reads(make_raster):
    dataset = SceneDataset([make_raster(noise(), f"s{i}") for i in range(3)], "sar")
    queries = list(GridGeoSampler(dataset, 32, 32))
    expected = [dataset[q] for q in queries]  # the handles are open when the workers fork
    loader = DataLoader(dataset, batch_size=3, sampler=queries, num_workers=2, collate_fn=collate)
    found = torch.cat([batch["sar"]["image"] for batch in loader])
    assert torch.equal(found, torch.stack([s["image"] for s in expected]))
    twin = pickle.loads(pickle.dumps(dataset))
    assert all(torch.equal(twin[q]["image"], s["image"]) for q, s in zip(queries, expected, strict=True))


def test_more_scenes_than_files_may_be_open(make_raster):
    paths = [make_raster(noise(8, 8), f"s{i}") for i in range(60)]
    SceneDataset(paths[:1], "sar")  # imports what is needed
    with files_open(40):
        dataset = SceneDataset(paths, "sar")
        assert [dataset[i]["name"] for i in (0, 59)] == ["s0.tif", "s59.tif"]


def test_one_scene_is_given_as_it_is(make_raster, tmp_path):
    path = make_raster(noise(), "a")
    for scenes in (path, str(path), open_scene(path, "sar"), (path,)):
        dataset = SceneDataset(scenes, "sar")
        assert dataset.files == [str(path)]
        same(dataset[0], open_scene(path, "sar"))
    with pytest.raises(SceneError, match="is a folder: name a raster in it"):
        SceneDataset(tmp_path, "sar")


def test_many_scenes_do_not_stay_open(make_raster, tmp_path):
    dataset = SceneDataset([make_raster(noise(8, 8), f"s{i}") for i in range(40)], "sar")
    names = [dataset[i]["name"] for i in range(40)]
    held = {str(p.resolve()) for p in Path("/proc/self/fd").iterdir() if p.exists()}
    assert len(names) == 40 and not [h for h in held if str(tmp_path) in h]
    assert pickle.loads(pickle.dumps(dataset))[3]["name"] == "s3.tif"


SCENES = Path(os.environ.get("BABELRS_GEO_SHARED", Path(__file__).parents[2] / "shared")) / "data" / "scenes"


@pytest.mark.shared
@pytest.mark.skipif(not SCENES.is_dir(), reason="the shared scenes are not here")
@pytest.mark.parametrize(
    ("name", "sensor"),
    [("sentinel1_grd_gcps", "sar"), ("sentinel1_port_la_db", "sar"), ("rgb_dutch_orthophoto", "rgb")],
)
def test_real_scenes_are_read_as_they_are(name, sensor):
    path = SCENES / f"{name}.tif"
    scene, dataset = open_scene(path, sensor), SceneDataset([path], sensor)
    whole = scene.read((0, 0, scene.width, scene.height))
    sample = dataset[next(iter(PreChippedGeoSampler(dataset)))]
    check(sample)
    assert np.array_equal(sample["image"].numpy(), whole.image)
    for query in RandomGeoSampler(dataset, 128, length=5):
        sample = dataset[query]
        check(sample)
        x, y, w, h = sample["window"]
        if min(x, y) >= 0 and x + w <= scene.width and y + h <= scene.height:
            assert np.array_equal(sample["image"].numpy(), whole.image[:, y : y + h, x : x + w])
