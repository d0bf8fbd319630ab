"""Truth laid out on the ellipsoid comes back, coverage partitions the scene, files are whole or absent."""

from __future__ import annotations

import datetime as dt
import functools
import hashlib
import json
import sqlite3
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pyogrio
import pyproj
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from babelrs_geo import boxes, qgis, vectors
from babelrs_geo.detections import Detections
from babelrs_geo.errors import GeorefError, LabelError, OutputError
from babelrs_geo.georef import Georef
from babelrs_geo.tiling import Grid

GEOD = pyproj.Geod(ellps="WGS84")
COLUMNS = [
    "class",
    "score",
    "sensor",
    "box",
    "length_m",
    "width_m",
    "area_m2",
    "heading_deg",
    "lon",
    "lat",
    "px_x",
    "px_y",
    "scene",
    "acquired",
    "geometry",
]
ORIGIN = vectors.Origin("harbour", "sar", dt.datetime(2024, 5, 17, 3, 4, 5, tzinfo=dt.UTC))
PROVENANCE = {
    "software": "babelrs-geo 0",
    "weights": {"name": "compact", "sha256": "ab"},
    "parameters": {"tile": 640, "score": None, "classes": ["ship", "Fähre"]},
    "started": dt.datetime(2024, 5, 17, tzinfo=dt.UTC),
}


def rotated(crs: str, x: float, y: float, metres: float, degrees: float) -> Georef:
    """Square pixels of so many CRS units, the image turned on the map."""
    c, s = metres * np.cos(np.radians(degrees)), metres * np.sin(np.radians(degrees))
    return Georef.from_affine((c, s, x, s, -c, y), crs)


def with_gcps() -> Georef:
    """A grid of ground control points in longitude and latitude over a UTM-like image of 1000 px at 10 m."""
    to_lonlat = pyproj.Transformer.from_crs("EPSG:32611", "EPSG:4326", always_xy=True)
    px, py = (a.ravel() for a in np.meshgrid(np.linspace(0, 1000, 6), np.linspace(0, 1000, 6)))
    lon, lat = to_lonlat.transform(380_000 + 10 * px, 3_735_000 - 10 * py)
    return Georef.from_gcps(list(zip(px, py, lon, lat, strict=True)), "EPSG:4326")


GEOREFS = {
    "utm": rotated("EPSG:32611", 380_000, 3_735_000, 0.5, 0),
    "utm-turned": rotated("EPSG:32611", 380_000, 3_735_000, 0.5, 33),
    "mercator": rotated("EPSG:3395", 13_467_532, 1_632_019, 0.1, 0),
    "dutch": rotated("EPSG:28992", 127_375, 428_250, 0.25, 0),
    "gcps": with_gcps(),
}


@functools.cache
def from_lonlat(crs: pyproj.CRS) -> pyproj.Transformer:
    return pyproj.Transformer.from_crs("EPSG:4326", crs, always_xy=True)


def detections(rows: np.ndarray, *, oriented: bool = True) -> Detections:
    count = len(rows)
    return Detections(rows, np.linspace(0.9, 0.4, count), np.arange(count) % 2, ("ship", "car"), oriented)


@pytest.fixture(scope="module")
def found() -> gpd.GeoDataFrame:
    rows = np.array([[30.5, 40.25, 20, 6, 30.0], [80, 20, 8, 30, 0], [50, 90, 12, 12, -75]])
    return vectors.features(detections(rows), GEOREFS["utm"], ORIGIN)


@pytest.fixture(scope="module")
def ground() -> gpd.GeoDataFrame:
    inners = [tuple(tile.inner) for tile in Grid(120, 100, tile=64, overlap=16)]
    states = ["detected", "empty", "failed", "invalid", "outside", "empty"][: len(inners)]
    reasons = ["block 3 is damaged" if state == "failed" else "" for state in states]
    return vectors.coverage(inners, states, reasons, GEOREFS["utm"])


# --- features ---


@pytest.mark.parametrize("name", GEOREFS)
@given(
    length=st.floats(8, 300),
    ratio=st.floats(0.1, 0.9),
    heading=st.floats(0, 179.9),
    place=st.tuples(st.floats(50, 900), st.floats(50, 900)),
)
@settings(max_examples=25)
def test_a_rectangle_laid_out_on_the_ellipsoid_comes_back_in_true_metres_and_heading(
    name: str, length: float, ratio: float, heading: float, place: tuple[float, float]
) -> None:
    georef = GEOREFS[name]
    width = length * ratio
    lon, lat = (float(v) for v in georef.to_lonlat(*place))
    reach, turn = np.hypot(length, width) / 2, np.degrees(np.arctan2(width, length))
    bearings = heading + np.array([turn, -turn, 180 + turn, 180 - turn])
    corners = GEOD.fwd(np.full(4, lon), np.full(4, lat), bearings, np.full(4, reach))[:2]
    to_map = from_lonlat(georef.crs)
    quad = np.stack(georef.to_pixel(*to_map.transform(*corners)), -1)
    row = vectors.features(detections(boxes.from_corners(quad[None])), georef, ORIGIN).iloc[0]
    assert row["length_m"] == pytest.approx(length, rel=1e-3, abs=2e-3)
    assert row["width_m"] == pytest.approx(width, rel=1e-3, abs=2e-3)
    assert row["area_m2"] == pytest.approx(length * width, rel=2e-3, abs=2e-3)
    assert abs((row["heading_deg"] - heading + 90) % 180 - 90) < 0.1
    assert 0 <= row["heading_deg"] < 180
    assert (row["lon"], row["lat"]) == pytest.approx((lon, lat), abs=1e-6)
    assert (row["px_x"], row["px_y"]) == pytest.approx(place, abs=0.05)


@pytest.mark.parametrize("name", GEOREFS)
def test_polygons_are_the_boxes_corners_counter_clockwise_in_the_scenes_crs(name: str) -> None:
    rng = np.random.default_rng(1)
    rows = np.column_stack(
        [rng.uniform(100, 900, (50, 2)), rng.uniform(1, 80, (50, 2)), rng.uniform(-180, 180, 50)]
    )
    table = vectors.features(detections(rows), GEOREFS[name], ORIGIN)
    assert table.crs == GEOREFS[name].crs
    assert shapely.is_ccw(shapely.get_exterior_ring(table.geometry.to_numpy())).all()
    ring = shapely.get_coordinates(table.geometry.to_numpy()).reshape(50, 5, 2)[:, :4]
    back = np.stack(GEOREFS[name].to_pixel(ring[..., 0], ring[..., 1]), -1)
    expected = boxes.corners(rows)
    gaps = np.hypot(*np.moveaxis(back[:, :, None] - expected[:, None], -1, 0))  # (50, 4, 4)
    assert gaps.min(1).max() < 1e-4
    assert gaps.min(2).max() < 1e-4
    assert np.allclose(np.hypot(*(back[:, 1] - back[:, 0]).T), rows[:, 2], atol=1e-4)  # first the width
    assert (table["length_m"] >= table["width_m"]).all()


def test_areas_equal_those_of_geodesic_polygons_up_to_whole_tiles_of_radar() -> None:
    georef = rotated("EPSG:32611", 380_000, 3_735_000, 40, 12)
    rows = np.array([[500, 500, 900, 700, 20.0], [10, 10, 50, 3, 80], [300, 800, 400, 400, 45]])
    table = vectors.features(detections(rows), georef, ORIGIN)
    areas = [
        abs(GEOD.geometry_area_perimeter(shape)[0])
        for shape in table.geometry.segmentize(500).to_crs("EPSG:4326")
    ]
    assert table["area_m2"].to_numpy() == pytest.approx(areas, rel=2e-5)


def test_metres_are_true_where_those_of_the_projection_are_not() -> None:
    row = vectors.features(detections(np.array([[500, 500, 45, 20, 0.0]])), GEOREFS["mercator"], ORIGIN).iloc[
        0
    ]
    projected = 4.5
    assert row["length_m"] == pytest.approx(projected * np.cos(np.radians(row["lat"])), rel=3e-3)
    assert row["length_m"] < 0.975 * projected
    assert row["heading_deg"] == pytest.approx(90, abs=0.02)


def test_columns_order_and_types_are_the_same_for_any_number_of_features(found: gpd.GeoDataFrame) -> None:
    assert list(found.columns) == COLUMNS
    none = vectors.features(Detections.empty(("ship",), oriented=False), GEOREFS["utm"], ORIGIN)
    assert list(none.columns) == COLUMNS
    assert none.dtypes.equals(found.dtypes)
    assert none.crs == found.crs
    assert found["class"].tolist() == ["ship", "car", "ship"]
    assert found["score"].tolist() == [0.9, 0.65, 0.4]  # not 0.8999999761581421
    assert found["box"].unique().tolist() == ["oriented"]
    assert found["sensor"].unique().tolist() == ["sar"]
    assert found["acquired"].iloc[0] == pd.Timestamp("2024-05-17T03:04:05Z")


def test_horizontal_boxes_have_no_heading_and_the_time_may_be_unknown() -> None:
    rows = np.array([[30, 40, 20, 6, 0.0]])
    row = vectors.features(detections(rows, oriented=False), GEOREFS["utm"], vectors.Origin("a", "sar")).iloc[
        0
    ]
    assert row["box"] == "horizontal"
    assert np.isnan(row["heading_deg"])
    assert (row["length_m"], row["width_m"]) == pytest.approx((10, 3), rel=1e-3)
    assert pd.isna(row["acquired"])


def test_a_scene_without_georeference_stays_in_pixels_y_down_and_says_so() -> None:
    rows = np.array([[30, 40, 20, 6, 0.0]])
    with pytest.warns(UserWarning, match="harbour has no georeference: its features are in pixels"):
        table = vectors.features(detections(rows), Georef(), ORIGIN)
    assert table.crs is None
    assert table.total_bounds.tolist() == [20, 37, 40, 43]
    assert table[["length_m", "width_m", "area_m2", "heading_deg", "lon", "lat"]].isna().all(axis=None)
    assert table.loc[0, ["px_x", "px_y"]].tolist() == [30, 40]
    with pytest.warns(UserWarning, match="no CRS"):
        unknown = vectors.features(detections(rows), Georef.from_affine((2, 0, 100, 0, -2, 100)), ORIGIN)
    assert unknown.total_bounds.tolist() == [140, 14, 180, 26]
    local = Georef.from_affine((2, 0, 100, 0, -2, 100), 'LOCAL_CS["Local Coordinates (m)",UNIT["metre",1]]')
    with pytest.warns(UserWarning, match=r"not of the Earth \(Local Coordinates"):
        table = vectors.features(detections(rows), local, ORIGIN)
    assert table.crs == local.crs and table.total_bounds.tolist() == [140, 14, 180, 26]
    assert table[["length_m", "lon", "lat"]].isna().all(axis=None)
    assert vectors.coverage([(0, 0, 9, 9)], ["empty"], [""], local)["area_km2"].isna().all()


# --- coverage ---


@given(
    width=st.integers(1, 700),
    height=st.integers(1, 500),
    tile=st.integers(40, 160),
    name=st.sampled_from([*GEOREFS, "none"]),
    data=st.data(),
)
@settings(max_examples=40)
def test_coverage_partitions_the_scene_and_counts_every_tile(
    width: int, height: int, tile: int, name: str, data: st.DataObject
) -> None:
    georef = GEOREFS.get(name, Georef())
    inners = np.array([tuple(t.inner) for t in Grid(width, height, tile=tile, overlap=tile // 4)])
    states = data.draw(st.lists(st.sampled_from(qgis.STATES), min_size=len(inners), max_size=len(inners)))
    reasons = ["why" if state == "failed" and i % 2 else "" for i, state in enumerate(states)]
    table = vectors.coverage(inners, states, reasons, georef)
    assert list(table.columns) == ["state", "reason", "tiles", "area_km2", "geometry"]
    assert table["tiles"].sum() == len(inners)
    assert table["state"].tolist() == sorted(table["state"], key=qgis.STATES.index)
    assert table.is_valid.all()
    parts = shapely.get_parts(table.geometry.to_numpy())
    assert shapely.coverage_is_valid(parts)  # neighbours share every vertex: no gap, no overlap
    for row in table.itertuples():  # in pixels, the areas are exact
        chosen = [s == row.state and r == row.reason for s, r in zip(states, reasons, strict=True)]
        pixels = shapely.transform(row.geometry, lambda p: np.stack(georef.to_pixel(*p.T), -1))
        assert pixels.area == pytest.approx(inners[chosen, 2:].prod(1).sum(), rel=1e-6)
    if name == "none":
        assert table["area_km2"].isna().all()
    else:
        whole = vectors.coverage([[0, 0, width, height]], ["empty"], [""], georef)
        assert table["area_km2"].sum() == pytest.approx(whole["area_km2"].sum(), rel=1e-4, abs=1e-5)


def test_coverage_of_areas_that_are_no_grid_is_dissolved_all_the_same() -> None:
    inners = [[0, 0, 10, 10], [10, 0, 10, 5], [10, 5, 10, 5]]  # a T junction
    table = vectors.coverage(inners, ["empty"] * 3, [""] * 3, Georef())
    assert table.geometry.iloc[0].normalize().equals(shapely.MultiPolygon([shapely.box(0, 0, 20, 10)]))
    assert len(vectors.coverage(np.zeros((0, 4)), [], [], GEOREFS["utm"])) == 0


def test_edges_of_the_coverage_follow_ground_control_points() -> None:
    georef = GEOREFS["gcps"]
    (whole,) = vectors.coverage([[0, 0, 1000, 1000]], ["empty"], [""], georef).geometry
    px, py = georef.to_pixel(*shapely.get_coordinates(shapely.segmentize(whole, 0.001)).T)
    off = np.min([np.abs(px), np.abs(px - 1000), np.abs(py), np.abs(py - 1000)], axis=0)
    assert off.max() < 0.05


@pytest.mark.parametrize("name", ["utm-turned", "gcps"])
def test_an_area_of_interest_cuts_the_coverage_and_no_tile_is_lost(name: str) -> None:
    georef = GEOREFS[name]
    inners = [tuple(tile.inner) for tile in Grid(400, 400, tile=100, overlap=0)]
    states = ["detected", "empty", "failed", "outside"] * 4  # four columns
    table = vectors.coverage(inners, states, [""] * 16, georef)

    def window(x: float, y: float, width: float, height: float) -> shapely.Polygon:
        sides = shapely.get_coordinates(shapely.segmentize(shapely.box(x, y, x + width, y + height), 5))
        return shapely.Polygon(np.stack(georef.to_map(*sides.T), -1))

    part = vectors.cut(table, window(50, 50, 100, 300))
    assert part["state"].tolist() == ["detected", "empty", "outside"]
    assert part["tiles"].tolist() == [4, 4, 8]
    assert set(part.geom_type) == {"MultiPolygon"}
    assert part["area_km2"].sum() == pytest.approx(table["area_km2"].sum(), rel=1e-5, abs=5e-6)
    assert part["area_km2"].iloc[0] == pytest.approx(table["area_km2"].sum() * 50 * 300 / 400**2, rel=1e-3)
    whole = vectors.cut(table, window(-50, -50, 500, 500))
    assert whole["state"].tolist() == ["detected", "empty", "outside", "failed"]
    assert whole["tiles"].tolist() == [4, 4, 4, 4]
    assert whole["area_km2"].tolist() == pytest.approx(table["area_km2"].tolist(), abs=2e-6)


@settings(max_examples=20)
@given(
    crs=st.sampled_from(["EPSG:32601", "EPSG:32660", "EPSG:3413", "EPSG:3031"]),
    place=st.tuples(st.floats(-6000, 6000), st.floats(-6000, 6000)),
)
def test_a_hole_is_not_counted_wherever_it_lies(crs: str, place: tuple[float, float]) -> None:
    polar = crs in ("EPSG:3413", "EPSG:3031")
    x, y = (0.0, 0.0) if polar else from_lonlat(pyproj.CRS(crs)).transform(180.0, 52.0)
    west, north = x - 5000 + place[0], y + 5000 + place[1]
    georef = Georef.from_affine((10, 0, west, 0, -10, north), crs)
    tiles = [(column * 200, row * 200, 200, 200) for row in range(5) for column in range(5)]
    states = ["empty"] * 12 + ["detected"] + ["empty"] * 12
    table = vectors.coverage(tiles, states, [""] * 25, georef).set_index("state")
    assert table.loc["empty", "area_km2"] == pytest.approx(24 * table.loc["detected", "area_km2"], rel=1e-3)
    assert table["area_km2"].sum() == pytest.approx(100.0, rel=0.07)


def square(crs: str, x: float, y: float, side: float) -> gpd.GeoSeries:
    """A square with a hole of a ninth of it, about a place in map coordinates."""
    outer, inner = (shapely.box(x - s, y - s, x + s, y + s) for s in (side / 2, side / 6))
    return gpd.GeoSeries([shapely.difference(outer, inner), None], crs=crs)


@settings(max_examples=30)
@given(
    crs=st.sampled_from(["EPSG:32601", "EPSG:32660", "EPSG:3832"]),
    lon=st.floats(179.9, 180.1),
    lat=st.floats(-60.0, 60.0),
)
def test_what_crosses_the_antimeridian_is_cut_there(crs: str, lon: float, lat: float) -> None:
    shapes = square(crs, *from_lonlat(pyproj.CRS(crs)).transform(lon, lat), 5000.0)
    cut = vectors.to_crs(shapes, "EPSG:4326")
    assert cut.crs == "EPSG:4326" and cut.iloc[1] is None and cut.iloc[0].is_valid
    pieces = cut.explode().dropna()
    assert (pieces.bounds["maxx"] - pieces.bounds["minx"]).max() < 0.2
    assert vectors.area_km2(cut)[0] == pytest.approx(vectors.area_km2(shapes)[0], rel=1e-3)
    back = cut.to_crs(crs)
    assert back.iloc[0].symmetric_difference(shapes.iloc[0]).area < 1e-3 * shapes.iloc[0].area


def test_a_grid_in_degrees_is_cut_and_a_globe_is_not() -> None:
    shapes = gpd.GeoSeries([shapely.box(179, 0, 181, 1), shapely.box(-180, -90, 180, 90)], crs="EPSG:4326")
    cut = vectors.to_crs(shapes, "EPSG:4326")
    assert shapely.bounds(shapely.get_parts(cut.iloc[0])).tolist() == [[-180, 0, -179, 1], [179, 0, 180, 1]]
    assert cut.iloc[1].equals(shapes.iloc[1])


@pytest.mark.parametrize(("crs", "lat"), [("EPSG:3413", 89.9), ("EPSG:3031", -89.9)])
def test_what_lies_around_a_pole_reaches_it(crs: str, lat: float) -> None:
    solid = gpd.GeoSeries([shapely.Point(300.0, 200.0).buffer(5000.0)], crs=crs)
    cut = vectors.to_crs(solid, "EPSG:4326").iloc[0]
    west, south, east, north = cut.bounds
    assert (west, east) == (-180, 180) and 90 in (-south, north)
    assert cut.is_valid and cut.area == pytest.approx(360 * 5000 / 111_700, rel=0.05)
    ring = vectors.to_crs(square(crs, 300.0, 200.0, 15000.0), "EPSG:4326").iloc[0]
    assert not ring.intersects(shapely.Point(40.0, np.copysign(89.999, lat)))
    assert ring.intersects(shapely.Point(40.0, np.copysign(89.955, lat)))


def test_a_crs_that_nothing_leads_to_is_told() -> None:
    shapes = gpd.GeoSeries([shapely.box(0, 0, 1, 1)], crs='LOCAL_CS["site",UNIT["metre",1]]')
    with pytest.raises(GeorefError, match="no transformation leads from site"):
        vectors.to_crs(shapes, "EPSG:4326")


def test_an_area_along_the_edges_of_tiles_leaves_polygons_alone() -> None:
    table = vectors.coverage([[0, 0, 9, 9], [9, 0, 9, 9]], ["detected", "empty"], ["", ""], Georef())
    part = vectors.cut(table, shapely.box(0, 0, 9, 9))
    assert part["state"].tolist() == ["detected", "outside"]
    assert part["tiles"].tolist() == [1, 1]
    assert set(part.geom_type) == {"MultiPolygon"}
    assert part.area.tolist() == [81, 81]


# --- files ---


def read(path: Path, layer: str) -> gpd.GeoDataFrame:
    beside = path if layer == "detections" else path.with_name(f"{path.stem}_coverage{path.suffix}")
    if path.suffix == ".parquet":
        return gpd.read_parquet(beside)
    return gpd.read_file(path, layer=layer) if path.suffix == ".gpkg" else gpd.read_file(beside)


@pytest.mark.parametrize("suffix", vectors.SUFFIXES)
def test_all_that_is_written_is_read_back(
    tmp_path: Path, found: gpd.GeoDataFrame, ground: gpd.GeoDataFrame, suffix: str
) -> None:
    path = vectors.write(tmp_path / f"out{suffix}", found, ground, PROVENANCE)
    for layer, frame in (("detections", found), ("coverage", ground)):
        back = read(path, layer)
        expected = frame.to_crs("EPSG:4326") if suffix == ".geojson" else frame
        assert back.crs == expected.crs
        assert [c for c in back.columns if c != "bbox"] == list(frame.columns)
        values = [c for c in frame.columns if c != "geometry"]
        pd.testing.assert_frame_equal(
            pd.DataFrame(back[values]), pd.DataFrame(frame[values]), check_dtype=False
        )
        tolerance = 2e-8 if suffix == ".geojson" else 0
        for mine, theirs in zip(back.geometry, expected.geometry, strict=True):
            assert shapely.hausdorff_distance(mine, theirs) <= tolerance
    assert {p.name for p in tmp_path.iterdir()} == (
        {"out.gpkg"} if suffix == ".gpkg" else {f"out{suffix}", f"out_coverage{suffix}"}
    )


@pytest.mark.parametrize("suffix", vectors.SUFFIXES)
@pytest.mark.parametrize("georef", ["utm", "none"])
def test_no_detections_still_give_a_layer_with_its_columns(
    tmp_path: Path, ground: gpd.GeoDataFrame, suffix: str, georef: str
) -> None:
    if georef == "none":
        if suffix == ".geojson":
            pytest.skip("GeoJSON cannot hold pixels")
        with pytest.warns(UserWarning):
            none = vectors.features(Detections.empty(("ship",), oriented=True), Georef(), ORIGIN)
        ground = vectors.coverage([[0, 0, 9, 9]], ["empty"], [""], Georef())
    else:
        none = vectors.features(Detections.empty(("ship",), oriented=True), GEOREFS[georef], ORIGIN)
    path = vectors.write(tmp_path / f"out{suffix}", none, ground, PROVENANCE)
    back = read(path, "detections")
    assert len(back) == 0
    assert back.crs == (none.to_crs("EPSG:4326") if suffix == ".geojson" else none).crs
    if suffix == ".gpkg":
        info = pyogrio.read_info(path, layer="detections")
        assert info["fields"].tolist() == COLUMNS[:-1]
        assert info["geometry_type"] == "Polygon"
        types = dict(zip(info["fields"], info["ogr_types"], strict=True))
        assert (types["class"], types["score"], types["acquired"]) == ("OFTString", "OFTReal", "OFTDateTime")
    if suffix == ".parquet":
        assert back.dtypes.drop("bbox", errors="ignore").equals(none.dtypes)
    assert len(vectors.read_result(path).features[["class", "score", "box", "sensor"]]) == 0
    assert len(vectors.read_labels(path).frame) == 0


@pytest.mark.parametrize("suffix", vectors.SUFFIXES)
def test_the_same_content_gives_the_same_bytes_when_the_clock_stands(
    tmp_path: Path,
    found: gpd.GeoDataFrame,
    ground: gpd.GeoDataFrame,
    suffix: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OGR_CURRENT_DATE", "2024-06-01T12:00:00.000Z")
    digests = set()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        path = vectors.write(tmp_path / name / f"out{suffix}", found, ground, PROVENANCE)
        digests.add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(digests) == 1
    if suffix == ".gpkg":
        assert b"2024-06-01T12:00:00.000Z" in path.read_bytes()
        database = sqlite3.connect(path)
        for table, column in (("gpkg_contents", "last_change"), ("layer_styles", "update_time")):
            assert {row[0][:4] for row in database.execute(f"SELECT {column} FROM {table}")} == {"2024"}
        database.close()


def test_the_geopackage_is_sound_and_holds_styles_and_provenance(
    tmp_path: Path, found: gpd.GeoDataFrame, ground: gpd.GeoDataFrame
) -> None:
    path = vectors.write(tmp_path / "out.gpkg", found, ground, PROVENANCE)
    database = sqlite3.connect(path)
    assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert database.execute("PRAGMA foreign_key_check").fetchall() == []
    assert dict(database.execute("SELECT key, value FROM provenance")) == {
        "software": "babelrs-geo 0",
        "weights.name": "compact",
        "weights.sha256": "ab",
        "parameters.tile": "640",
        "parameters.score": None,
        "parameters.classes": '["ship", "Fähre"]',
        "started": "2024-05-17T00:00:00+00:00",
    }
    styles = database.execute(
        "SELECT f_table_name, f_geometry_column, useAsDefault, styleQML, styleSLD"
        " FROM layer_styles ORDER BY f_table_name"
    ).fetchall()
    contents = dict(database.execute("SELECT table_name, data_type FROM gpkg_contents"))
    database.close()
    coverage_style, detections_style = qgis.coverage_style(), qgis.detections_style(["car", "ship"])
    assert styles == [
        ("coverage", "geom", 1, coverage_style.qml, coverage_style.sld),
        ("detections", "geom", 1, detections_style.qml, detections_style.sld),
    ]
    assert contents == {
        "detections": "features",
        "coverage": "features",
        "layer_styles": "attributes",
        "provenance": "attributes",
    }


def test_provenance_travels_in_parquet_and_geojson_too(
    tmp_path: Path, found: gpd.GeoDataFrame, ground: gpd.GeoDataFrame
) -> None:
    expected = PROVENANCE | {"started": "2024-05-17T00:00:00+00:00"}
    parquet = vectors.write(tmp_path / "out.parquet", found, ground, PROVENANCE)
    assert json.loads(pq.read_schema(parquet).metadata[vectors.PROVENANCE_KEY]) == expected
    geojson = vectors.write(tmp_path / "out.geojson", found, ground, PROVENANCE)
    assert json.loads(geojson.read_text())["provenance"] == expected


@pytest.mark.parametrize("crs", [None, 'LOCAL_CS["site",UNIT["metre",1]]'])
def test_geojson_takes_only_what_has_longitude_and_latitude(
    tmp_path: Path, found: gpd.GeoDataFrame, ground: gpd.GeoDataFrame, crs: str | None
) -> None:
    found, ground = (table.set_crs(crs, allow_override=True) for table in (found, ground))
    with pytest.raises(OutputError, match=r"out\.geojson: GeoJSON holds .* write \.gpkg or \.parquet"):
        vectors.write(tmp_path / "out.geojson", found, ground, {})
    assert not list(tmp_path.iterdir())


def test_geojson_is_cut_at_the_antimeridian(tmp_path: Path) -> None:
    georef = Georef.from_affine((10, 0, 165_000, 0, -10, 5_000), "EPSG:32601")  # 180 degrees at x = 166021
    table = vectors.features(detections(np.array([[102.1, 100, 40, 10, 0.0]])), georef, ORIGIN)
    ground = vectors.coverage([[0, 0, 200, 200]], ["detected"], [""], georef)
    assert ground["area_km2"].iloc[0] == pytest.approx(4, rel=2e-3)
    assert table["length_m"].iloc[0] == pytest.approx(400, rel=2e-3)
    path = vectors.write(tmp_path / "out.geojson", table, ground, {})
    west, _, east, _ = zip(*gpd.read_file(path).explode().bounds.to_numpy(), strict=True)
    assert sorted(np.round(west, 2)) == [-180, 180]
    assert np.subtract(east, west).max() < 0.01


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("out.shp", "unknown kind of output '.shp'"),
        ("out", "unknown kind of output ''"),
        ("nowhere/out.gpkg", "not a directory; create it"),
        ("file/out.gpkg", "not a directory; create it"),
        ("folder.gpkg", "is a directory"),
        ("new!.gpkg", r'new!\.gpkg cannot be written: a "!" in the name .* rename it'),
        ("new!/out.geojson", r'new!/out\.geojson cannot be written: a "!" in the name .* rename it'),
    ],
)
def test_targets_that_cannot_be_are_refused_in_one_line(
    tmp_path: Path, found: gpd.GeoDataFrame, ground: gpd.GeoDataFrame, name: str, message: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "new!").mkdir()
    (tmp_path / "folder.gpkg").mkdir()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OutputError, match=message) as caught:
        vectors.write(tmp_path / name, found, ground, PROVENANCE, overwrite=True)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def test_parquet_may_have_any_name(tmp_path: Path, found: gpd.GeoDataFrame, ground: gpd.GeoDataFrame) -> None:
    (tmp_path / "new!").mkdir()
    path = vectors.write(tmp_path / "new!" / "o!.parquet", found, ground, PROVENANCE)
    assert len(vectors.read_result(path).features) == len(found)


def test_an_unwritable_directory_is_refused(found: gpd.GeoDataFrame, ground: gpd.GeoDataFrame) -> None:
    with pytest.raises(OutputError, match=r"/proc(/out.gpkg cannot be written| is not writable)"):
        vectors.write("/proc/out.gpkg", found, ground, PROVENANCE)


@pytest.mark.parametrize("suffix", vectors.SUFFIXES)
def test_existing_files_are_kept_unless_told_otherwise(
    tmp_path: Path, found: gpd.GeoDataFrame, ground: gpd.GeoDataFrame, suffix: str
) -> None:
    path = tmp_path / f"out{suffix}"
    path.write_text("mine")
    with pytest.raises(OutputError, match="--overwrite"):
        vectors.write(path, found, ground, PROVENANCE)
    assert path.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [path]
    vectors.write(path, found, ground, PROVENANCE, overwrite=True)
    assert len(read(path, "detections")) == len(found)


def test_a_run_that_was_overtaken_by_another_keeps_the_others_file(
    tmp_path: Path, found: gpd.GeoDataFrame, ground: gpd.GeoDataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    from babelrs_geo.vectors import files

    path = tmp_path / "out.gpkg"
    monkeypatch.setattr(files, "_flush", lambda _: path.write_text("theirs"))
    with pytest.raises(OutputError, match="--overwrite"):
        vectors.write(path, found, ground, PROVENANCE)
    assert path.read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [path]


def test_the_companion_of_an_output_is_kept_too(
    tmp_path: Path, found: gpd.GeoDataFrame, ground: gpd.GeoDataFrame
) -> None:
    (tmp_path / "out_coverage.parquet").write_text("mine")
    with pytest.raises(OutputError, match=r"out_coverage\.parquet exists"):
        vectors.write(tmp_path / "out.parquet", found, ground, PROVENANCE)


def shown(path: Path) -> sqlite3.Connection:
    """A GeoPackage with a log beside it, as QGIS has it while it shows a layer, and leaves it where it is ended."""
    viewer = sqlite3.connect(path)
    viewer.execute("PRAGMA journal_mode = WAL")
    viewer.execute("UPDATE gpkg_contents SET description = 'old'")
    viewer.commit()
    assert path.with_name(f"{path.name}-wal").stat().st_size > 0
    return viewer


def test_the_journal_of_the_file_that_is_replaced_goes_with_it(
    tmp_path: Path, found: gpd.GeoDataFrame, ground: gpd.GeoDataFrame
) -> None:
    path = vectors.write(tmp_path / "out.gpkg", found, ground, PROVENANCE)
    viewer = shown(path)
    vectors.write(path, found, ground, {"software": "new"}, overwrite=True)
    for _ in range(2):  # while the old file is open elsewhere, and after
        reader = sqlite3.connect(path)
        assert reader.execute("SELECT value FROM provenance").fetchall() == [("new",)]
        reader.close()
        viewer.close()


@pytest.mark.parametrize("suffix", vectors.SUFFIXES)
@pytest.mark.parametrize("fault", [KeyboardInterrupt, RuntimeError("full")])
def test_an_interrupted_write_leaves_nothing_and_touches_nothing(
    tmp_path: Path,
    found: gpd.GeoDataFrame,
    ground: gpd.GeoDataFrame,
    suffix: str,
    fault: type[BaseException] | BaseException,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from babelrs_geo.vectors import files

    path = tmp_path / f"out{suffix}"
    path.write_text("mine")

    def stop(_: Path) -> None:
        raise fault

    monkeypatch.setattr(files, "_flush", stop)
    with pytest.raises(KeyboardInterrupt if fault is KeyboardInterrupt else OutputError):
        vectors.write(path, found, ground, PROVENANCE, overwrite=True)
    assert path.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    code = f"""
        import resource, signal
        import numpy as np
        from babelrs_geo import vectors
        from babelrs_geo.detections import Detections
        from babelrs_geo.errors import OutputError
        from babelrs_geo.georef import Georef

        n = 3000
        places = np.random.default_rng(0).uniform(50, 900, (n, 2))
        rows = np.column_stack([places, np.full((n, 2), 9.5), np.zeros(n)])
        georef = Georef.from_affine((1, 0, 4e5, 0, -1, 5e6), "EPSG:32631")
        found = Detections(rows, np.full(n, 0.5), np.zeros(n, int), ("ship",), True)
        table = vectors.features(found, georef, vectors.Origin("a", "sar"))
        ground = vectors.coverage([[0, 0, 1000, 1000]], ["detected"], [""], georef)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))
        for suffix in vectors.SUFFIXES:
            try:
                vectors.write({str(tmp_path / "out")!r} + suffix, table, ground, {{}})
            except OutputError as error:
                print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    assert ["cannot be written" in line for line in told] == [True] * 3, told
    assert list(tmp_path.iterdir()) == []


def test_geojson_refuses_pixels(tmp_path: Path) -> None:
    with pytest.warns(UserWarning):
        table = vectors.features(detections(np.array([[30, 40, 20, 6, 0.0]])), Georef(), ORIGIN)
    ground = vectors.coverage([[0, 0, 9, 9]], ["empty"], [""], Georef())
    with pytest.raises(OutputError, match=r"write \.gpkg or \.parquet instead"):
        vectors.write(tmp_path / "out.geojson", table, ground, PROVENANCE)
    assert list(tmp_path.iterdir()) == []


# --- areas of interest ---


def save_area(path: Path, shapes: list[shapely.Geometry], crs: str | None) -> Path:
    frame = gpd.GeoDataFrame(geometry=shapes, crs=crs)
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_file(path)
    return path


@pytest.mark.parametrize("suffix", [".gpkg", ".geojson", ".shp", ".fgb", ".parquet"])
def test_an_area_is_dissolved_and_brought_to_the_scenes_crs(tmp_path: Path, suffix: str) -> None:
    halves = [shapely.box(-118.3, 33.6, -118.2, 33.8), shapely.box(-118.25, 33.6, -118.1, 33.8)]
    area = vectors.read_area(save_area(tmp_path / f"area{suffix}", halves, "EPSG:4326"), "EPSG:32611")
    assert area.geom_type == "Polygon"
    to_map = pyproj.Transformer.from_crs("EPSG:4326", "EPSG:32611", always_xy=True)
    side = shapely.Point(to_map.transform(-118.2, 33.6))
    assert area.boundary.distance(side) < 0.1  # long edges bend: the chord would miss by metres
    expected = GEOD.geometry_area_perimeter(shapely.box(-118.3, 33.6, -118.1, 33.8))[0] / 1e6
    geodesic = vectors.area_km2(gpd.GeoSeries([area], crs="EPSG:32611"))[0]
    assert geodesic == pytest.approx(expected, rel=1e-3)


def test_an_area_that_crosses_itself_is_mended_and_other_shapes_ignored(tmp_path: Path) -> None:
    bow = shapely.Polygon([(0, 0), (2, 2), (2, 0), (0, 2)])
    path = save_area(tmp_path / "area.gpkg", [bow, shapely.box(5, 5, 6, 6, ccw=False)], "EPSG:32611")
    assert vectors.read_area(path, "EPSG:32611").area == pytest.approx(3)
    mixed = save_area(tmp_path / "mixed.geojson", [shapely.Point(0, 0), shapely.box(0, 0, 1, 1)], "EPSG:4326")
    assert vectors.read_area(mixed, "EPSG:4326").area == pytest.approx(1)


def test_the_whole_world_is_an_area_like_any_other(tmp_path: Path) -> None:
    world = save_area(tmp_path / "world.gpkg", [shapely.box(-180, -90, 180, 90)], "EPSG:4326")
    for georef in (GEOREFS["utm"], GEOREFS["dutch"], GEOREFS["mercator"], GEOREFS["gcps"]):
        area = vectors.read_area(world, georef.crs)
        assert area.is_valid
        assert area.contains(shapely.MultiPoint(np.stack(georef.to_map([0, 900], [900, 0]), -1)))


def test_areas_that_cannot_be_used_are_refused_in_one_line(tmp_path: Path) -> None:
    square = shapely.box(0, 0, 1, 1)
    junk = tmp_path / "junk.gpkg"
    junk.write_text("not a GeoPackage")
    table = tmp_path / "table.csv"
    table.write_text("a,b\n1,2\n")
    two = save_area(tmp_path / "two.gpkg", [square], "EPSG:4326")
    gpd.GeoDataFrame(geometry=[square], crs="EPSG:4326").to_file(two, layer="fields")
    pyogrio.write_dataframe(pd.DataFrame({"a": [1]}), two, layer="notes")
    with pytest.warns(UserWarning, match="'crs' was not provided"):
        bare = save_area(tmp_path / "bare.shp", [square], None)
    far = save_area(tmp_path / "far.gpkg", [shapely.box(10, 40, 11, 41)], "EPSG:4326")
    cases = [
        (tmp_path / "missing.gpkg", "cannot be read as vectors"),
        (junk, "cannot be read as vectors"),
        (table, "no geometry"),
        (save_area(tmp_path / "points.gpkg", [shapely.Point(0, 0)], "EPSG:4326"), "holds no polygons"),
        (bare, "has no CRS"),
        (far, "beyond the ground"),
        (two, r"2 layers \(two, fields\).*\|layername=two"),
        (f"{two}|layername=forests", "cannot be read as vectors"),
        (f"{two}|layername=notes", "no geometry in layer notes"),
    ]
    for path, message in cases:
        with pytest.raises(LabelError, match=message) as caught:
            vectors.read_area(path, "EPSG:32611")
        assert "\n" not in str(caught.value)
    with pytest.raises(LabelError, match="the scene has none"):
        vectors.read_area(f"{two}|layername=fields", None)
    with pytest.raises(LabelError, match="cannot be laid over the scene: no transformation"):
        vectors.read_area(f"{two}|layername=fields", 'LOCAL_CS["site",UNIT["metre",1]]')
    assert vectors.read_area(f"{two}|layername=fields", "EPSG:4326").equals(square)


# --- labels ---


def on_scene(shapes: list[shapely.Geometry], name: str = "utm") -> vectors.Objects:
    """Shapes in scene pixels as labels in its CRS, brought back."""
    georef = replace(GEOREFS[name], size=(1000, 1000))
    drawn = shapely.transform(shapes, lambda p: np.stack(georef.to_map(*p.T), 1))
    frame = gpd.GeoDataFrame({"class": list(map(str, range(len(drawn))))}, geometry=drawn, crs=georef.crs)
    return vectors.Labels("labels", "auto", frame).on("scene", georef, alone=True)


@settings(max_examples=25)
@given(
    st.lists(
        st.tuples(st.integers(-300, 1300), st.integers(-300, 1300), st.integers(3, 9), st.floats(0, 360)),
        max_size=12,
    ),
    st.booleans(),
)
def test_labels_come_back_as_they_do_one_by_one(
    many: list[tuple[int, int, int, float]], upright: bool
) -> None:
    shapes = []
    for x, y, corners, turn in many:
        around = np.radians(turn + np.linspace(0, 360, corners, endpoint=False))
        shapes.append(shapely.Polygon(np.stack([x + 20 * np.cos(around), y + 9 * np.sin(around)], 1)))
    if upright:
        shapes = list(shapely.envelope(shapes))
    together, apart = on_scene(shapes), [on_scene([shape]) for shape in shapes]
    inside = [bool(shapely.box(0, 0, 1000, 1000).intersects(shapely.envelope(s))) for s in shapes]
    assert [len(one) for one in apart] == inside
    assert together.classes.tolist() == [str(i) for i, kept in enumerate(inside) if kept]
    if len({bool(o) for one in apart for o in one.oriented}) == 1:
        np.testing.assert_allclose(together.boxes, np.concatenate([one.boxes for one in apart]), atol=1e-6)


def test_labels_of_another_scene_do_not_turn_the_boxes_of_this_one() -> None:
    here, there = (
        shapely.box(10, 10, 40, 30),
        shapely.Polygon([(2000, 0), (2040, 10), (2035, 30), (1995, 20)]),
    )
    assert on_scene([here, there]).oriented.tolist() == [False]
    assert on_scene([shapely.transform(there, lambda p: p - [1900, 0]), here]).oriented.tolist() == [
        True,
        True,
    ]


def test_labels_that_nothing_brings_to_the_scene_are_told() -> None:
    local = Georef.from_affine((1, 0, 0, 0, -1, 9), 'LOCAL_CS["site",UNIT["metre",1]]', (9, 9))
    frame = gpd.GeoDataFrame({"class": ["ship"]}, geometry=[shapely.box(0, 0, 1, 1)], crs="EPSG:4326")
    with pytest.raises(LabelError, match="no transformation leads from WGS 84 to the scene's site"):
        vectors.Labels("labels", "auto", frame).on("scene", local, alone=True)
    assert len(vectors.Labels("labels", "auto", frame.iloc[:0]).on("s", local, alone=True)) == 0
