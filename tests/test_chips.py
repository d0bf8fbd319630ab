"""Chips: what reaches the model, whose ground is whose, and that stopping changes nothing."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import warnings
from collections import Counter
from contextlib import ExitStack, nullcontext
from datetime import UTC, datetime
from pathlib import Path

import geopandas as gpd
import numpy as np
import pytest
import rasterio.warp
import shapely
from conftest import NORTH_UP, UTM, Raster, write_raster
from distributed import LocalCluster
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kills import children, end_at_random
from rasterio.control import GroundControlPoint
from test_georef import made_up_rpc, slant_gcps

from babelrs_geo import boxes
from babelrs_geo.chips import SPLITS, ChipOptions, Workers, cut_chips, open_chip, read_index, read_labels
from babelrs_geo.chips.plan import Chip, Entry, plan
from babelrs_geo.errors import LabelError, OutputError, ParameterError, SceneError
from babelrs_geo.scenes import SceneOptions, open_scene
from babelrs_geo.vectors import Objects
from babelrs_geo.vectors import read_labels as read_label_file

SMALL = ChipOptions(size=64, overlap=16, block=2, split=(1, 0, 0))
FEW = settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])


def speckle(height: int, width: int, bands: int = 1, dtype: str = "uint8", seed: int = 0) -> np.ndarray:
    r = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "c":
        return (r.normal(size=(bands, height, width)) + 1j * r.normal(size=(bands, height, width))).astype(
            dtype
        )
    if np.dtype(dtype).kind == "f":
        return r.gamma(2.0, 0.1, (bands, height, width)).astype(dtype)
    return r.integers(1, 250, (bands, height, width)).astype(dtype)


def write_labels(path: Path, rects: list[tuple[float, float, float, float, float]], crs: str = UTM) -> Path:
    """Boxes in pixels of a `NORTH_UP` scene as polygons on the map."""
    quads = boxes.corners(np.array(rects, float).reshape(-1, 5))
    a = NORTH_UP
    shapes = shapely.polygons(np.stack([a.c + a.a * quads[..., 0], a.f + a.e * quads[..., 1]], -1))
    names = [("ship", "car")[i % 2] for i in range(len(shapes))]
    gpd.GeoDataFrame({"class": names}, geometry=shapes, crs=UTM).to_crs(crs).to_file(path)
    return path


def control_points() -> list[GroundControlPoint]:
    return [
        GroundControlPoint(row=q, col=p, x=x, y=y) for p, q, x, y in slant_gcps(width=200.0, height=150.0)
    ]


def contents(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


KINDS = {
    "sar dB, nodata": ("sar", {"dtype": "float32", "nodata": -9999.0}),
    "sar complex": ("sar", {"dtype": "complex64"}),
    "ir counts": ("ir", {"dtype": "uint16", "nodata": 0}),
    "rgb with a mask": ("rgb", {"dtype": "uint8", "bands": 3, "mask": True}),
    "rgb with alpha": ("rgb", {"dtype": "uint8", "bands": 4}),
    "rgb 16 bit of four": ("rgb", {"dtype": "uint16", "bands": 4, "nodata": 7}),
    "rgb with a collar": ("rgb", {"dtype": "uint8", "bands": 3, "collar": True}),
    "float64 with NaN": ("sar", {"dtype": "float64", "nan": True}),
}


def make(folder: Path, kind: str, width: int, height: int, seed: int) -> tuple[Path, str]:
    sensor, how = KINDS[kind]
    pixels = speckle(height, width, how.get("bands", 1), how["dtype"], seed)
    r = np.random.default_rng(seed + 1)
    holes = r.random((height, width)) < 0.2
    more = {}
    if "nodata" in how:
        pixels[:, holes] = how["nodata"]
        more["nodata"] = how["nodata"]
    if how.get("nan"):
        pixels[:, holes] = np.nan
    if how.get("collar"):
        pixels[:, : height // 3] = 0
    if how.get("mask"):
        more["mask"] = ~holes
    if kind == "rgb with alpha":
        pixels[3] = np.where(holes, 0, 255)
        more["colours"] = ("red", "green", "blue", "alpha")
    if kind == "rgb 16 bit of four":
        more["colours"] = ("blue", "green", "red", "nir")
        more["descriptions"] = ("B2", "B3", "B4", "B8")
    return write_raster(folder / f"scene{seed}", Raster(pixels, **more)), sensor


@FEW
@given(
    kind=st.sampled_from(sorted(KINDS)),
    width=st.integers(5, 150),
    height=st.integers(5, 150),
    size=st.integers(24, 80),
    seed=st.integers(0, 1000),
)
def test_a_chip_reaches_the_model_as_its_window_of_the_scene_does(
    tmp_path_factory, kind, width, height, size, seed
):
    """Law 5: bit for bit, whatever the type, the validity and the size; the radiometry is the index's."""
    folder = tmp_path_factory.mktemp("law5")
    path, sensor = make(folder, kind, width, height, seed)
    with open_scene(path, sensor) as scene:
        cut_chips(
            [scene], folder / "chips", options=ChipOptions(size=size, overlap=8, block=1, split=(1, 0, 0))
        )
        index = read_index(folder / "chips")
        assert index["chip"].is_unique
        seen = np.zeros((height, width), bool)
        for row in index.itertuples():
            window = (row.x, row.y, row.width, row.height)
            assert (row.width, row.height) == (min(size, width), min(size, height))
            seen[row.y : row.y + row.height, row.x : row.x + row.width] = True
            with open_chip(folder / "chips", row._asdict()) as chip:
                whole = (0, 0, chip.width, chip.height)
                got, expected = chip.read(whole), scene.read(window)
                assert got.image.tobytes() == expected.image.tobytes()
                assert got.valid.tobytes() == expected.valid.tobytes()
                assert row.valid == expected.valid.mean() > 0
                assert chip.read_raw(whole).tobytes() == scene.read_raw(window).tobytes()
                assert chip.facts.bands.interpretations[:3] == scene.facts.bands.interpretations[:3]
                assert chip.facts.bands.descriptions == scene.facts.bands.descriptions
        assert not scene.valid((0, 0, width, height))[~seen].any()


@pytest.mark.parametrize("kind", ["affine", "gcps", "rpcs", "high rpcs", "none", "no crs"])
def test_a_chip_lies_where_its_window_lies(tmp_path, kind):
    place = {
        "affine": {},
        "gcps": {"gcps": control_points(), "crs": "EPSG:4326"},
        "rpcs": {"rpcs": made_up_rpc()},
        "high rpcs": {"rpcs": made_up_rpc()},
        "none": {"crs": None, "transform": None},
        "no crs": {"crs": None},
    }[kind]
    path = write_raster(tmp_path / "scene", Raster(speckle(150, 200), **place))
    with open_scene(path, "sar", SceneOptions(height=900.0 if kind == "high rpcs" else None)) as scene:
        cut_chips([scene], tmp_path / "chips", options=SMALL)
        for row in read_index(tmp_path / "chips").itertuples():
            assert (
                row.georef == scene.georef.kind == {"no crs": "affine", "high rpcs": "rpcs"}.get(kind, kind)
            )
            assert row.crs == scene.georef.crs_text
            with open_chip(tmp_path / "chips", row._asdict()) as chip:
                x, y = np.array([0.0, 10.5, 64.0]), np.array([3.0, 0.0, 64.0])
                if kind == "none":
                    assert (chip.georef.kind, row.geometry) == ("none", None)
                    continue
                here, there = chip.georef.to_map(x, y), scene.georef.to_map(x + row.x, y + row.y)
                np.testing.assert_allclose(here, there, rtol=0, atol=1e-9 if kind != "affine" else 1e-6)
                if kind == "no crs":
                    assert row.geometry is None
                    continue
                lon, lat = scene.georef.to_lonlat(row.x + 32, row.y + 32)
                assert row.geometry.contains(shapely.Point(lon, lat))


def test_the_index_says_when_by_whom_and_how(tmp_path):
    path = write_raster(
        tmp_path / "s1",
        Raster(speckle(400, 400, dtype="float32"), tags={"ACQUISITION_TIME": "2024-05-06T07:08:09Z"}),
    )
    with open_scene(path, "sar") as scene:
        cut_chips([scene], tmp_path / "chips", options=ChipOptions(size=300, split=(1, 0, 0)))
        index = read_index(tmp_path / "chips")
        assert index.crs == "EPSG:4326"
        assert set(index["sensor"]) == {"sar"}
        assert set(index["source"]) == {str(path)}
        assert (index["acquired"] == datetime(2024, 5, 6, 7, 8, 9, tzinfo=UTC)).all()
        assert set(index["radiometry"]) == {scene.radiometry.to_json()}
        assert index["gsd"].iloc[0] == pytest.approx(10, abs=0.05)
        with rasterio.open(tmp_path / "chips" / index["path"].iloc[0]) as chip:
            assert chip.block_shapes == [(304, 304)]
            assert chip.compression.name == "zstd"
            assert chip.tags()["ACQUISITION_TIME"]
        assert len(read_labels(tmp_path / "chips")) == 0


def test_two_looks_at_one_file_agree(make_raster):
    pixels = speckle(40, 50, 4, "uint16")
    pixels[:, :10] = 0
    with open_scene(make_raster(pixels, colours=("red", "green", "blue", "nir"), nodata=0), "rgb") as scene:
        raw, valid = scene.read_both((3, 2, 40, 30))
        assert (raw == scene.read_raw((3, 2, 40, 30))).all()
        assert (valid == scene.valid((3, 2, 40, 30))).all()


# ----------------------------------------------------------------------------------------------------
# Ground


@FEW
@given(data=st.data())
def test_splits_share_no_ground(tmp_path_factory, data):
    """Within a scene and between scenes of any offset, resolution, size and CRS."""
    folder = tmp_path_factory.mktemp("ground")
    entries = []
    for n in range(data.draw(st.integers(1, 3))):
        width, height = data.draw(st.integers(30, 700)), data.draw(st.integers(30, 700))
        pixel = data.draw(st.sampled_from([10.0, 10.0, 5.0, 23.7]))
        dx, dy = data.draw(st.integers(-3000, 3000)), data.draw(st.integers(-3000, 3000))
        crs = data.draw(st.sampled_from([UTM, UTM, "EPSG:32610"]))
        transform = rasterio.transform.from_origin(NORTH_UP.c + dx, NORTH_UP.f + dy, pixel, pixel)
        if crs != UTM:
            x, y = rasterio.warp.transform(UTM, crs, [transform.c], [transform.f])
            transform = rasterio.transform.from_origin(x[0], y[0], pixel, pixel)
        vrt = folder / f"s{n}.tif"
        with rasterio.open(
            vrt, "w", driver="GTiff", width=width, height=height, count=1, dtype="uint8", crs=crs,
            transform=transform, tiled=True, blockxsize=64, blockysize=64, sparse_ok=True,
        ):  # fmt: skip
            pass
        scene = open_scene(vrt, "sar", SceneOptions(collar=False))
        entries.append(Entry(f"s{n}", f"s{n}", str(vrt), scene, None))
    options = ChipOptions(
        size=data.draw(st.integers(40, 128)),
        overlap=data.draw(st.integers(0, 30)),
        block=data.draw(st.integers(1, 4)),
        split=data.draw(st.sampled_from([(0.8, 0.1, 0.1), (0.5, 0.5, 0), (0.34, 0.33, 0.33)])),
        seed=data.draw(st.integers(0, 5)),
    )
    planned = plan(entries, options)
    chips = [(t.entry, c) for t in planned.tasks for r in t.regions for c in r.chips]
    for entry in entries:  # exactly, in pixels
        owner = np.full((entry.scene.height, entry.scene.width), -1)
        for n, name in enumerate(("train", "val", "test")):
            for _, chip in [pair for pair in chips if pair[0] is entry and pair[1].split == name]:
                assert (np.isin(owner[chip.rect.slices], (-1, n))).all()
                owner[chip.rect.slices] = n
        if len(entries) == 1:
            assert (owner >= 0).all()
    shapes = np.array([chip.footprint for _, chip in chips])  # on the ground, between scenes
    one, other = shapely.STRtree(shapes).query(shapes, predicate="intersects")
    split = np.array([chip.split for _, chip in chips])
    apart = split[one] != split[other]
    shared = shapely.area(shapely.intersection(shapes[one[apart]], shapes[other[apart]]))
    assert (shared <= 1e-6 * shapely.area(shapes[one[apart]])).all()


def entry_of(path: Path, name: str) -> Entry:
    return Entry(name, name, str(path), open_scene(path, "sar", SceneOptions(collar=False)), None)


def blank(path: Path, width: int, height: int, **more) -> Path:
    with rasterio.open(
        path, "w", driver="GTiff", width=width, height=height, count=1, crs=UTM,
        **{"dtype": "uint8", "transform": NORTH_UP, "sparse_ok": True, **more},
    ):  # fmt: skip
        return path


def test_scenes_of_one_grid_agree_however_they_are_stored(tmp_path):
    a = blank(tmp_path / "a.tif", 4000, 3000, tiled=True, blockxsize=256, blockysize=256)
    b = blank(tmp_path / "b.tif", 4000, 3000, dtype="uint16")  # in strips
    options = ChipOptions(size=200, overlap=50, block=3)
    planned = plan([entry_of(a, "a"), entry_of(b, "b")], options)
    assert planned.conflicts == 0
    cut = {
        name: {
            (c.rect, c.split)
            for t in planned.tasks
            if t.entry.name == name
            for r in t.regions
            for c in r.chips
        }
        for name in "ab"
    }
    assert cut["a"] == cut["b"]
    assert {split for _, split in cut["a"]} == {"train", "val", "test"}


def test_shares_are_met_as_closely_as_blocks_allow_and_the_seed_moves_them(tmp_path):
    scene = entry_of(blank(tmp_path / "a.tif", 10_000, 10_000, tiled=True), "a")
    plans = [plan([scene], ChipOptions(size=200, overlap=50, block=3, seed=seed)) for seed in (0, 0, 1)]
    for each in plans:
        assert {k: v / 1e8 for k, v in each.area.items()} == pytest.approx(
            {"train": 0.8, "val": 0.1, "test": 0.1}, abs=0.01
        )
    first, again, other = (
        {c.name: c.split for t in p.tasks for r in t.regions for c in r.chips} for p in plans
    )
    assert first == again != other


def test_a_small_scene_stays_whole_and_an_empty_split_is_told(tmp_path):
    path = write_raster(tmp_path / "scene", Raster(speckle(100, 100)))
    with open_scene(path, "sar") as scene, pytest.warns(UserWarning, match="no chip goes to val and test"):
        cut = cut_chips([scene], tmp_path / "chips", options=ChipOptions(size=64, overlap=16))
    assert cut.chips == {"train": 4, "val": 0, "test": 0}


def test_a_split_whose_ground_has_nothing_to_keep_is_told(tmp_path):
    labels = read_label_file(write_labels(tmp_path / "labels.gpkg", [(30, 30, 9, 5, 0)]))
    path = write_raster(tmp_path / "scene", Raster(speckle(640, 640)))
    options = ChipOptions(size=64, overlap=0, block=1, background=0)
    with (
        open_scene(path, "sar") as scene,
        pytest.warns(UserWarning, match="no chip goes to .* and .*: on the ground .* no chip has an object"),
    ):
        cut = cut_chips([scene], tmp_path / "chips", [labels], options)
    assert 1 <= sum(cut.chips.values()) == max(cut.chips.values())


def test_chips_that_are_not_cut_leave_out_no_others(tmp_path, monkeypatch):
    """Of scenes that lie askew on one ground: what is left out shares ground with a chip that is cut."""
    r = np.random.default_rng(3)
    with ExitStack() as stack:
        entries = []
        for k in range(3):
            place = NORTH_UP @ rasterio.Affine.translation(*r.uniform(0, 400, 2))
            place = place @ rasterio.Affine.rotation(r.uniform(-40, 40))
            path = write_raster(
                tmp_path / f"s{k}", Raster(np.full((1, 600, 600), 77, np.uint8), transform=place)
            )
            scene = stack.enter_context(open_scene(path, "sar", SceneOptions(collar=False)))
            rects = np.column_stack([r.uniform(0, 600, (40, 2)), np.full((40, 2), 5.0), np.zeros(40)])
            objects = Objects(rects, np.full(40, "ship", object), np.zeros(40, bool))
            entries.append(Entry(f"s{k}", f"s{k}", str(path), scene, objects))
        options = ChipOptions(size=64, overlap=16, block=2, split=(0.5, 0.25, 0.25), background=0)

        def chips() -> dict[str, tuple[Entry, Chip]]:
            tasks = plan(entries, options).tasks
            return {c.name: (t.entry, c) for t in tasks for region in t.regions for c in region.chips}

        planned = chips()
        monkeypatch.setattr("babelrs_geo.chips.plan._conflicts", lambda regions: set())
        every = chips()
    for entry, chip in every.values():
        x, y = entry.objects.boxes[:, :2].T
        across = np.minimum(x + 2.5, chip.rect.x1) - np.maximum(x - 2.5, chip.rect.x)
        down = np.minimum(y + 2.5, chip.rect.y1) - np.maximum(y - 2.5, chip.rect.y)
        assert (np.maximum(across, 0) * np.maximum(down, 0) >= 0.7 * 25).any()
    rank = SPLITS.index
    for name in every.keys() - planned.keys():
        entry, chip = every[name]
        assert any(
            rank(other.split) > rank(chip.split)
            and there is not entry
            and other.footprint.intersection(chip.footprint).area > 1e-6 * chip.footprint.area
            for there, other in planned.values()
        )
    assert len(every) > len(planned) > 60


# ----------------------------------------------------------------------------------------------------
# Labels


@FEW
@given(
    seed=st.integers(0, 1000),
    keep=st.sampled_from([0.0, 0.3, 1.0]),
    crs=st.sampled_from([UTM, "EPSG:4326"]),
)
def test_labels_to_chips_to_labels_lose_only_what_the_rule_drops(tmp_path_factory, seed, keep, crs):
    folder = tmp_path_factory.mktemp("labels")
    r = np.random.default_rng(seed)
    truth = np.column_stack(
        [r.uniform(-5, 205, (30, 2)), r.uniform(2, 40, 30), r.uniform(2, 20, 30), r.uniform(-90, 90, 30)]
    )
    labels = read_label_file(write_labels(folder / "labels.gpkg", truth.tolist(), crs), kind="oriented")
    path = write_raster(folder / "scene", Raster(speckle(200, 200)))
    with open_scene(path, "sar") as scene:
        cut_chips(
            [scene], folder / "chips", [labels],
            ChipOptions(size=64, overlap=20, split=(1, 0, 0), keep_truncated=keep),
        )  # fmt: skip
    index, found = read_index(folder / "chips"), read_labels(folder / "chips")
    assert found.crs == "EPSG:4326"
    counts = found["chip"].value_counts()
    rows = found.merge(index[["chip", "x", "y"]], on="chip")
    back = rows[["cx", "cy", "w", "h", "r"]].to_numpy() + np.column_stack(
        [rows[["x", "y"]], np.zeros((len(rows), 3))]
    )
    matched = boxes.rotated_iou(truth, back).argmax(0) if len(back) else np.zeros(0, int)
    np.testing.assert_allclose(boxes.rotated_iou_pairs(truth[matched], back), 1, atol=1e-3)
    assert [("ship", "car")[m % 2] for m in matched] == list(rows["class"])
    for chip in index.itertuples():  # a slow reference of the rule, by shapely
        area = shapely.box(chip.x, chip.y, chip.x + chip.width, chip.y + chip.height)
        shapes = shapely.polygons(boxes.corners(truth))
        outside = 1 - shapely.area(shapely.intersection(shapes, area)) / shapely.area(shapes)
        clear = np.abs(outside - keep) > 1e-3  # placed to a thousandth of a pixel
        expected = set(np.flatnonzero((outside < 1 - 1e-6) & (outside <= keep + 1e-6)))
        here = (rows["chip"] == chip.chip).to_numpy()
        got = set(matched[here])
        if keep == 0.0:
            assert got <= set(np.flatnonzero(outside < 1e-3))
        else:
            assert {m for m in got if clear[m]} == {m for m in expected if clear[m]}
        assert chip.objects == counts.get(chip.chip, 0) == len(got)
        np.testing.assert_allclose(rows["truncated"][here], outside[matched[here]], atol=2e-3)
    assert (rows["truncated"] <= keep).all()


@FEW
@given(seed=st.integers(0, 1000), keep=st.sampled_from([0.0, 0.3, 1.0]), background=st.sampled_from([0, 1]))
def test_an_object_counts_by_what_is_valid_of_it(tmp_path_factory, seed, keep, background):
    """By the turned box, not by its bounds; what is hidden too far is dropped as what lies outside is."""
    folder = tmp_path_factory.mktemp("hidden")
    r = np.random.default_rng(seed)
    truth = np.column_stack(
        [r.uniform(0, 120, (25, 2)), r.uniform(2, 40, 25), r.uniform(2, 20, 25), r.uniform(-90, 90, 25)]
    )
    cells = r.random((15, 15)) > 0.25
    cells[8:] &= r.random() > 0.5
    valid = np.kron(cells, np.ones((8, 8))) > 0
    labels = read_label_file(write_labels(folder / "labels.gpkg", truth.tolist()), kind="oriented")
    path = write_raster(folder / "scene", Raster(speckle(120, 120), mask=valid))
    options = ChipOptions(size=64, overlap=8, split=(1, 0, 0), keep_truncated=keep, background=background)
    with open_scene(path, "sar", SceneOptions(collar=False)) as scene, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no chip goes to train")  # all may be hidden
        cut_chips([scene], folder / "chips", [labels], options)
    index, found = read_index(folder / "chips").set_index("chip"), read_labels(folder / "chips")
    ground = shapely.union_all(
        [shapely.box(8 * j, 8 * i, 8 * j + 8, 8 * i + 8) for i, j in np.argwhere(cells)]
    )
    shapes = shapely.polygons(boxes.corners(truth))
    for x, y in ((0, 0), (56, 0), (0, 56), (56, 56)):
        name, area = f"scene_{x}_{y}", shapely.box(x, y, x + 64, y + 64)
        inside = shapely.area(shapely.intersection(shapes, area)) / shapely.area(shapes)
        shown = shapely.area(shapely.intersection(shapes, ground.intersection(area))) / shapely.area(shapes)
        kept = (shown > 1e-9) & (1 - shown <= keep + 1e-9)
        hidden = 1 - shown
        if ((np.abs(hidden - keep) < 1e-3) & (hidden > 1e-9) & (shown > 1e-9)).any():
            continue  # placed to a thousandth of a pixel
        rows = found[found["chip"] == name]
        assert len(rows) == kept.sum()
        np.testing.assert_allclose(rows["truncated"], 1 - shown[kept], atol=2e-3)
        assert (name in index.index) == (valid[y : y + 64, x : x + 64].any() and (background or kept.any()))
        if name in index.index:
            assert index.loc[name, "objects"] == kept.sum()
            assert index.loc[name, "dropped"] == ((inside > 1e-6) & ~kept).sum()


def test_the_box_on_the_map_is_where_its_label_was(tmp_path):
    labels = read_label_file(write_labels(tmp_path / "labels.gpkg", [(30, 40, 20, 8, 25)]))
    path = write_raster(tmp_path / "scene", Raster(speckle(60, 60)))
    with open_scene(path, "sar") as scene:
        cut_chips([scene], tmp_path / "chips", [labels], ChipOptions(size=64, overlap=0, split=(1, 0, 0)))
    (row,) = read_labels(tmp_path / "chips").to_crs(UTM).itertuples()
    given_ = gpd.read_file(tmp_path / "labels.gpkg").geometry[0]
    assert row.oriented
    assert (row.w, row.h, row.r) == pytest.approx((20, 8, 25), abs=1e-6)
    assert row.geometry.symmetric_difference(given_).area < 1e-3


def test_background_is_kept_at_the_ratio_and_by_name(tmp_path):
    labels = read_label_file(write_labels(tmp_path / "labels.gpkg", [(30, 30, 9, 5, 0)]))
    path = write_raster(tmp_path / "scene", Raster(speckle(640, 640)))
    kept = []
    with open_scene(path, "sar") as scene:
        for n, ratio in enumerate((0.0, 0.5, 0.7, 1.0)):
            options = ChipOptions(size=64, overlap=0, background=ratio, split=(1, 0, 0))
            cut_chips([scene], tmp_path / f"c{n}", [labels], options)
            kept.append(set(read_index(tmp_path / f"c{n}")["chip"]))
    assert kept[0] == {"scene_0_0"}
    assert kept[0] < kept[1] < kept[2] < kept[3]
    assert len(kept[3]) >= 100
    assert 35 <= len(kept[1]) <= 65


# ----------------------------------------------------------------------------------------------------
# The run


@pytest.mark.parametrize("layout", ["tiled", "strips", "png"])
def test_every_block_of_the_file_is_read_once(tmp_path, monkeypatch, layout):
    creation = {"tiled": True, "blockxsize": 64, "blockysize": 64} if layout == "tiled" else {"blockysize": 8}
    suffix = ".png" if layout == "png" else ".tif"
    path = write_raster(tmp_path / "scene", Raster(speckle(1300, 1100), suffix=suffix, creation=creation))
    read: Counter[tuple[int, int]] = Counter()
    with open_scene(path, "sar", SceneOptions(collar=False)) as scene:
        down, across = scene.facts.block
        whole = type(scene).read_both

        def counted(self, window, **how):
            x, y, w, h = window
            for r in range(y // down, -(-(y + h) // down)):
                for c in range(x // across, -(-(x + w) // across)):
                    read[r, c] += 1
            return whole(self, window, **how)

        monkeypatch.setattr(type(scene), "read_both", counted)
        cut_chips([scene], tmp_path / "chips", options=ChipOptions(size=100, overlap=25, block=3))
        assert set(read.values()) == {1}
        assert len(read) == -(-scene.height // down) * -(-scene.width // across)


def test_chips_are_the_same_whoever_works_and_a_whole_run_does_nothing(tmp_path):
    valid = np.ones((1100, 1100), bool)
    valid[300:620, 300:620] = False
    tiled = {"tiled": True, "blockxsize": 128, "blockysize": 128}
    path = write_raster(tmp_path / "scene", Raster(speckle(1100, 1100, 3), mask=valid, creation=tiled))
    labels = read_label_file(
        write_labels(tmp_path / "labels.gpkg", [(i, i, 9, 5, i) for i in range(0, 1100, 7)])
    )
    options = ChipOptions(size=128, overlap=32, background=0.5)
    with open_scene(path, "rgb") as scene:
        alone = cut_chips([scene], tmp_path / "one", [labels], options)
        together = cut_chips([scene], tmp_path / "two", [labels], options, Workers(processes=2))
        with LocalCluster(
            n_workers=1, threads_per_worker=1, dashboard_address=None, silence_logs=50
        ) as cluster:
            theirs = Workers(scheduler=cluster.scheduler_address)
            cut_chips([scene], tmp_path / "three", [labels], options, theirs)
        assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "three")
        assert alone.chips == together.chips
        before = {p: p.stat().st_mtime_ns for p in (tmp_path / "one").rglob("*")}
        assert cut_chips([scene], tmp_path / "one", [labels], options) == alone
        assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "one").rglob("*")}
        with pytest.raises(OutputError, match=r"cut otherwise \(overlap 32 there, 30 now\)"):
            cut_chips([scene], tmp_path / "one", [labels], ChipOptions(size=128, overlap=30, background=0.5))
        with pytest.raises(OutputError, match="no chip folder"):
            cut_chips([scene], tmp_path, [labels], options)
        with pytest.raises(ParameterError, match="given twice"):
            cut_chips([scene, scene], tmp_path / "four")


def test_scenes_of_one_name_do_not_take_each_others_chips(tmp_path):
    """Nor does one that happens to bear the name that another was given."""
    with ExitStack() as stack:
        scenes = []
        for k, name in enumerate(("x/a", "y/a", "a-2", "z/a")):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            pixels = np.full((1, 64, 64), 50 * k + 40, np.uint8)
            scenes.append(
                stack.enter_context(open_scene(write_raster(tmp_path / name, Raster(pixels)), "sar"))
            )
        cut_chips(
            scenes, tmp_path / "chips", options=ChipOptions(size=64, overlap=0, block=1, split=(1, 0, 0))
        )
        index = read_index(tmp_path / "chips")
        assert index["scene"].tolist() == ["a", "a-2", "a-2-2", "a-3"]
        for row, scene in zip(index.itertuples(), scenes, strict=True):
            with open_chip(tmp_path / "chips", row._asdict()) as chip:
                assert (chip.read_raw((0, 0, 64, 64)) == scene.read_raw((0, 0, 64, 64))).all()


def test_what_changes_a_label_or_a_place_is_another_run(tmp_path):
    labels = tmp_path / "labels.gpkg"
    box = shapely.box(NORTH_UP.c + 200, NORTH_UP.f - 400, NORTH_UP.c + 300, NORTH_UP.f - 300)
    gpd.GeoDataFrame({"class": ["ship"], "fine": ["tanker"]}, geometry=[box], crs=UTM).to_file(labels)
    with open_scene(write_raster(tmp_path / "a", Raster(speckle(150, 200))), "sar") as scene:
        cut_chips([scene], tmp_path / "a-chips", [read_label_file(labels)], SMALL)
        with pytest.raises(OutputError, match="cut otherwise"):
            cut_chips([scene], tmp_path / "a-chips", [read_label_file(labels, "fine")], SMALL)
    path = write_raster(tmp_path / "b", Raster(speckle(150, 200), rpcs=made_up_rpc()))
    for height, told in ((100.0, nullcontext()), (900.0, pytest.raises(OutputError, match="cut otherwise"))):
        with open_scene(path, "sar", SceneOptions(height=height)) as scene, told:
            cut_chips([scene], tmp_path / "b-chips", options=SMALL)


def test_labels_in_pixels_are_refused_where_two_scenes_bear_their_name(tmp_path):
    """Unless they show nothing of that name."""
    quad = "20 15 40 15 40 35 20 35 ship 0\n"
    for name in ("a", "b", "labels"):
        (tmp_path / name).mkdir()
    paths = [
        write_raster(tmp_path / name, Raster(speckle(64, 64), crs=None, transform=None))
        for name in ("a/img", "b/img", "other")
    ]
    box = shapely.box(20, 15, 40, 35)
    with pytest.warns(UserWarning, match="'crs' was not provided"):
        gpd.GeoDataFrame({"class": ["ship"], "scene": ["img.tif"]}, geometry=[box]).to_file(
            tmp_path / "l.gpkg"
        )
    (tmp_path / "labels" / "img.txt").write_text(quad)
    with ExitStack() as stack:
        scenes = [stack.enter_context(open_scene(path, "sar")) for path in paths]
        for labels in ("labels", "l.gpkg"):
            given_ = [read_label_file(tmp_path / labels)]
            with pytest.raises(LabelError, match=r"a/img\.tif and .*b/img\.tif are both named img") as caught:
                cut_chips(scenes, tmp_path / "chips", given_, SMALL)
            assert "\n" not in str(caught.value)
        (tmp_path / "labels" / "img.txt").rename(tmp_path / "labels" / "other.txt")
        with pytest.warns(UserWarning, match="no label lies on scene img"):
            cut_chips(scenes, tmp_path / "chips", [read_label_file(tmp_path / "labels")], SMALL)
    assert set(read_labels(tmp_path / "chips")["chip"]) == {"other_0_0"}


def test_what_is_not_a_draft_of_its_own_stays_in_the_folder(tmp_path):
    chips = tmp_path / "chips"
    with open_scene(write_raster(tmp_path / "scene", Raster(speckle(64, 64))), "sar") as scene:

        def add(done: int, total: int) -> None:
            (chips / ".git").mkdir(exist_ok=True)
            for name in (".gitignore", ".git/.x", ".hidden.tif", "images/.scene_0_0.tif.4711"):
                (chips / name).parent.mkdir(exist_ok=True)
                (chips / name).write_text("mine")

        cut_chips([scene], chips, options=SMALL, progress=add)
    left = {name for name in contents(chips) if Path(name).name.startswith(".")}
    assert left == {".gitignore", ".git/.x", ".hidden.tif"}


def test_where_another_run_of_the_folder_ends_first_it_is_told(tmp_path):
    path = write_raster(tmp_path / "scene", Raster(speckle(64, 64)))
    other = list[int]()

    def race(done: int, total: int) -> None:
        if done == total and not other:
            with open_scene(path, "sar") as again:
                other.append(sum(cut_chips([again], tmp_path / "chips", options=SMALL).chips.values()))

    with open_scene(path, "sar") as scene:
        with pytest.raises(OutputError, match="another run") as caught:
            cut_chips([scene], tmp_path / "chips", options=SMALL, progress=race)
        assert "\n" not in str(caught.value)
        assert other == [sum(cut_chips([scene], tmp_path / "chips", options=SMALL).chips.values())]


@pytest.mark.parametrize("lost", [2, 3])
def test_a_process_that_is_lost_costs_nothing_twice(tmp_path, lost):
    path = write_raster(
        tmp_path / "scene",
        Raster(speckle(1900, 1900), creation={"tiled": True, "blockxsize": 128, "blockysize": 128}),
    )
    options = ChipOptions(size=128, overlap=32, block=1, split=(1, 0, 0))
    left = [lost]

    def kill(done: int, total: int) -> None:
        if left[0] and done:
            for server in children(os.getpid()):
                if b"forkserver" in Path(f"/proc/{server}/cmdline").read_bytes():
                    for worker in children(server):
                        os.kill(worker, signal.SIGKILL)
            left[0] -= 1

    with open_scene(path, "sar", SceneOptions(collar=False)) as scene:
        cut_chips([scene], tmp_path / "one", options=options)
        if lost == 3:
            with pytest.raises(OutputError, match="3 times a process that cuts chips was lost"):
                cut_chips(
                    [scene], tmp_path / "two", options=options, workers=Workers(processes=2), progress=kill
                )
        cut_chips([scene], tmp_path / "two", options=options, workers=Workers(processes=2), progress=kill)
    assert left == [0]
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupt_waits_for_the_end_of_a_task(tmp_path, workers):
    options, step = ChipOptions(size=128, overlap=32, block=1, split=(1, 0, 0)), list[int]()

    def interrupted(done: int, total: int) -> None:
        if done == 2:
            signal.raise_signal(signal.SIGINT)
        step.append(done)

    with open_scene(write_raster(tmp_path / "scene", Raster(speckle(600, 600))), "sar") as scene:
        with pytest.raises(KeyboardInterrupt):
            cut_chips(
                [scene],
                tmp_path / "chips",
                options=options,
                workers=Workers(processes=workers),
                progress=interrupted,
            )
        assert step == [0, 1, 2]
        cut_chips(
            [scene], tmp_path / "chips", options=options, progress=lambda done, total: step.append(done)
        )
        assert step[3] >= 2 and len(step) > 4


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_random_moments_and_run_again_it_leaves_the_same_files(tmp_path, workers):
    path = write_raster(
        tmp_path / "scene",
        Raster(speckle(2000, 2000, 3), creation={"tiled": True, "blockxsize": 128, "blockysize": 128}),
    )
    write_labels(tmp_path / "labels.gpkg", [(i, i, 9, 5, i) for i in range(0, 2000, 7)])
    command = [sys.executable, "-m", "babelrs_geo", "tile", str(path), "--sensor", "rgb", "--quiet"]
    command += ["--labels", str(tmp_path / "labels.gpkg"), "--size", "128", "--overlap", "32"]
    command += ["--workers", str(workers), "-o"]
    whole, chips = tmp_path / "whole", tmp_path / "chips"
    subprocess.run([*command, str(whole)], check=True)

    def cut() -> int:
        return len(list(chips.glob("images/*/*.tif")))

    draw, before = random.Random(workers), 0
    total = len(list(whole.glob("images/*/*.tif")))
    for until in [0, *sorted(draw.sample(range(1, total * 3 // 4), 3))]:
        assert end_at_random([*command, str(chips)], cut, until, draw) or cut() == total
        assert cut() >= before  # what was cut is kept
        before = cut()
        if chips.exists() and not (chips / "index.parquet").exists():
            with pytest.raises(LabelError, match="did not end"):
                read_index(chips)
    subprocess.run([*command, str(chips)], check=True)
    assert contents(chips) == contents(whole)


def test_a_broken_scene_ends_the_run_and_a_mended_one_is_another(tmp_path):
    path = write_raster(
        tmp_path / "scene",
        Raster(speckle(800, 800, 3), creation={"tiled": True, "blockxsize": 64, "blockysize": 64}),
    )
    whole = path.read_bytes()
    with open_scene(path, "rgb", SceneOptions(collar=False)) as scene:
        path.write_bytes(whole[: len(whole) // 2])
        scene.close()
        options = ChipOptions(size=64, overlap=0, block=2, split=(1, 0, 0))
        with pytest.raises(SceneError, match="cannot be"):
            cut_chips([scene], tmp_path / "chips", options=options)
        assert not (tmp_path / "chips" / "index.parquet").exists()
        path.write_bytes(whole)
        with pytest.raises(OutputError, match="the scenes differ"):
            cut_chips([scene], tmp_path / "chips", options=options)
        assert sum(cut_chips([scene], tmp_path / "new", options=options).chips.values()) > 100


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"split": (0.5, 0.1, 0.1)}, "sum to 1"),
        ({"overlap": 64}, "overlap"),
        ({"block": 0}, "block"),
        ({"background": 1.5}, "background"),
        ({"keep_truncated": -0.1}, "keep_truncated"),
        ({"compress": "jpeg"}, "compress"),
    ],
)
def test_wrong_numbers_are_refused_in_one_line(wrong, said):
    with pytest.raises(ParameterError, match=said) as caught:
        ChipOptions(**{"size": 64, "overlap": 16, **wrong})
    assert "\n" not in str(caught.value)
