"""What an archive leaves for others: STAC items, a dataset, one file for QGIS, a report."""

from __future__ import annotations

import json
import re
import sqlite3
import warnings
from contextlib import closing
from html.parser import HTMLParser
from pathlib import Path

import duckdb
import geopandas as gpd
import numpy as np
import pyarrow.parquet as pq
import pyogrio
import pyproj
import pystac
import pytest
import rasterio
import shapely
from bright_archive import go, make_archive, write_ships
from click.testing import CliRunner
from conftest import Raster, write_raster
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rasterio.errors import NotGeoreferencedWarning
from rasterio.io import MemoryFile
from rasterio.transform import from_origin
from test_vectors import shown

from babelrs_geo import cli
from babelrs_geo.archive.check import verify
from babelrs_geo.archive.drawing import map_of, png
from babelrs_geo.archive.export import best_of_doubles, cells, export
from babelrs_geo.archive.ledger import Ledger
from babelrs_geo.archive.outputs import files_of, output_of, remove
from babelrs_geo.archive.report import report
from babelrs_geo.errors import OutputError, ParameterError


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """An archive of three days with a scene without georeference, one without ships, a failed and a stale one."""
    folder = tmp_path_factory.mktemp("archive")
    make_archive(folder / "in", 9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        write_ships(folder / "in" / "plain.tif", 31, crs=None)
    (folder / "in" / "bad.tif").write_text("no raster")
    go(folder / "in", folder / "out")
    with Ledger(folder / "out", write=True) as ledger:
        ledger.settle([(3, {"state": "stale"})])
    return folder / "out"


def recorded(results: Path) -> tuple[int, dict[str, int]]:
    """Detections of what is done, in all and by date."""
    with Ledger(results) as ledger:
        rows = list(ledger.rows("SELECT acquired, detections FROM scenes WHERE state = 'done'"))
    by: dict[str, int] = {}
    for row in rows:
        date = (row["acquired"] or "unknown")[:10]
        by[date] = by.get(date, 0) + row["detections"]
    return sum(by.values()), by


@pytest.fixture(scope="module")
def dataset(results) -> Path:
    with Ledger(results) as ledger:
        done = export(ledger, results.parent / "dataset")
    assert done.detections == recorded(results)[0] > 20 and done.scenes == 9 and done.dropped == 0
    return done.path


def test_duckdb_reads_the_dataset_without_extensions_and_counts_what_the_ledger_does(dataset, results):
    with duckdb.connect(
        config={"autoinstall_known_extensions": False, "autoload_known_extensions": False}
    ) as db:
        files = (
            f"read_parquet('{dataset}/**/*.parquet', hive_partitioning = true, hive_types_autocast = false)"
        )
        (total,) = db.execute(f"SELECT count(*) FROM {files}").fetchall()[0]
        by = dict(db.execute(f"SELECT date, count(*) FROM {files} GROUP BY date").fetchall())
        (west,) = db.execute(f"SELECT min(bbox.xmin) FROM {files} WHERE cell <> 'none'").fetchall()[0]
        told = db.execute(f"SELECT class, score, sensor, source, cell FROM {files} LIMIT 1").fetchall()[0]
    assert (total, by) == (recorded(results)[0], {k: v for k, v in recorded(results)[1].items() if v})
    assert 14 < west < 16 and told[0] == "ship" and 0 < told[1] <= 1


def test_geopandas_reads_the_dataset_and_filters_by_box(dataset, results):
    frame = gpd.read_parquet(dataset)
    assert len(frame) == recorded(results)[0] and frame.crs == "EPSG:4326"
    placed = frame[frame.geometry.notna()]
    inside = shapely.contains_xy(placed.geometry, placed["lon"], placed["lat"])
    assert inside.all() and frame.geometry.isna().sum() == (frame["cell"].astype(str) == "none").sum() > 0
    half = (float(placed.geometry.bounds["minx"].median()), 40.0, 20.0, 45.0)
    some = gpd.read_parquet(dataset, bbox=half)
    assert 0 < len(some) < len(placed)


def test_every_part_is_geoparquet_1_1_with_a_covering(dataset):
    for part in dataset.rglob("*.parquet"):
        told = json.loads(pq.read_schema(part).metadata[b"geo"])
        assert told["version"] == "1.1.0"
        assert told["columns"]["geometry"]["covering"]["bbox"]["xmin"] == ["bbox", "xmin"]


@pytest.mark.parametrize("suffix", [".gpkg", ".fgb"])
def test_one_file_for_qgis_holds_what_has_a_place(results, tmp_path, suffix):
    with Ledger(results) as ledger:
        done = export(ledger, tmp_path / f"all{suffix}")
        plain = int(ledger.one("SELECT detections FROM scenes WHERE source LIKE '%plain.tif'"))
        with pytest.raises(OutputError, match="exists; pass --overwrite"):
            export(ledger, done.path)
        export(ledger, done.path, overwrite=True)
    info = pyogrio.read_info(done.path, layer="detections")
    assert info["features"] == done.detections == recorded(results)[0] - plain and info["crs"] == "EPSG:4326"
    assert {"class", "score", "source", "acquired"} <= set(info["fields"])
    assert [p.name for p in tmp_path.iterdir()] == [f"all{suffix}"]


def test_an_export_over_one_that_qgis_shows_is_sound(results, tmp_path):
    with Ledger(results) as ledger:
        path = export(ledger, tmp_path / "all.gpkg").path
        with closing(shown(path)):
            export(ledger, path, overwrite=True)
            assert sound(path) and [p.name for p in tmp_path.iterdir()] == ["all.gpkg"]


def sound(path: Path) -> bool:
    """Whether a GeoPackage is whole, and nothing of an earlier one is in it."""
    with closing(sqlite3.connect(path)) as file:
        (state,) = file.execute("PRAGMA integrity_check").fetchone()
        return state == "ok" and ("old",) not in file.execute("SELECT description FROM gpkg_contents")


@example("衛" * 78)
@given(st.text("a é衛𐐷", min_size=1, max_size=200))
def test_a_result_is_called_after_its_scene_as_far_as_a_file_system_allows(name):
    output = output_of(f"/scenes/{name}.tif", "0" * 32, ".parquet")
    for file in files_of(output):
        assert len(Path(file).name.encode()) < 200 and Path(file).parts[:2] == ("results", "0" * 12)


def test_a_result_that_qgis_shows_is_replaced_and_removed_with_its_journal(tmp_path):
    write_ships(tmp_path / "in" / "a.tif", 4)
    go(tmp_path / "in", tmp_path / "out", suffix=".gpkg")
    with Ledger(tmp_path / "out") as ledger:
        output = str(ledger.one("SELECT output FROM scenes"))
    with closing(shown(tmp_path / "out" / output)):
        ships = write_ships(tmp_path / "in" / "a.tif", 5, side=160)
        assert go(tmp_path / "in", tmp_path / "out", suffix=".gpkg").worked == 1
        assert sound(tmp_path / "out" / output)
        with Ledger(tmp_path / "out") as ledger:
            assert verify(ledger).clean and ledger.totals()["detections"] == ships
    with closing(shown(tmp_path / "out" / output)):
        remove(tmp_path / "out", output)
        assert not list((tmp_path / "out" / output).parent.iterdir())


def test_an_export_elsewhere_or_of_another_kind_is_refused(results, tmp_path):
    with Ledger(results) as ledger:
        with pytest.raises(ParameterError, match="no kind of export"):
            export(ledger, tmp_path / "all.shp")
        with pytest.raises(OutputError, match=r'all!\.fgb cannot be written: a "!" in the name'):
            export(ledger, tmp_path / "all!.fgb")
        with pytest.raises(OutputError, match="is not a directory"):
            export(ledger, tmp_path / "no" / "all.gpkg")


@st.composite
def overlapping(draw):
    """Squares of some scenes, many of them over one another."""
    n = draw(st.integers(0, 12))
    place = st.integers(0, 6)
    rows = [
        {
            "x": draw(place) / 4,
            "y": draw(place) / 4,
            "source": draw(st.sampled_from("abc")),
            "class": draw(st.sampled_from(["ship", "car"])),
            "score": draw(st.integers(1, 9)) / 10,
            "minute": draw(st.sampled_from([0, 0.5, 30])),
        }
        for _ in range(n)
    ]
    times = np.array(
        [np.datetime64("2026-03-01T10:00:00") + np.timedelta64(int(r["minute"] * 60), "s") for r in rows],
        "datetime64[ms]",
    )
    table = {k: [r[k] for r in rows] for k in ("source", "class", "score")}
    frame = gpd.GeoDataFrame(
        table | {"sensor": ["sar"] * n},
        geometry=[shapely.box(r["x"], r["y"], r["x"] + 1, r["y"] + 1) for r in rows],
        crs="EPSG:4326",
    )
    frame["acquired"] = (
        gpd.pd.Series(times).dt.tz_localize("UTC") if n else gpd.pd.Series([], dtype="datetime64[ms, UTC]")
    )
    return frame


def plain_best(frame: gpd.GeoDataFrame) -> list[int]:
    """The reference: by score, each row against all that stay."""
    kept: list[int] = []
    for row in sorted(range(len(frame)), key=lambda r: (-frame["score"].iloc[r], r)):
        for other in kept:
            a, b = frame.iloc[row], frame.iloc[other]
            shared = a.geometry.intersection(b.geometry).area
            iou = shared / (a.geometry.area + b.geometry.area - shared)
            near = abs((a["acquired"] - b["acquired"]).total_seconds()) <= 60
            if a["source"] != b["source"] and a["class"] == b["class"] and near and iou > 0.5:
                break
        else:
            kept.append(row)
    return sorted(kept)


@settings(max_examples=40)
@given(overlapping())
def test_of_doubles_across_scenes_the_best_stays_as_in_a_plain_reference(frame):
    assert np.flatnonzero(best_of_doubles(frame)).tolist() == plain_best(frame)


@pytest.mark.parametrize("times", [("01T11:59:45", "01T12:00:10"), ("01T23:59:45", "02T00:00:10")])
def test_doubles_of_overlapping_scenes_are_exported_once_be_it_over_midnight(tmp_path, times):
    for name, time, more in zip(
        "ab", times, ({}, {"compress": "deflate"}), strict=True
    ):  # of the same ground
        path = tmp_path / "in" / f"{name}.tif"
        ships = write_ships(path, 3, **more)
        with rasterio.open(path, "r+") as file:
            file.update_tags(ACQUISITION_DATETIME=f"2026-03-{time}Z")
    go(tmp_path / "in", tmp_path / "out")
    with Ledger(tmp_path / "out") as ledger:
        whole, once = (export(ledger, tmp_path / name, once=name == "once") for name in ("all", "once"))
    assert (whole.detections, whole.dropped) == (2 * ships, 0)
    assert (once.detections, once.dropped) == (ships, ships)
    assert {p.name for p in whole.path.iterdir()} == {f"date=2026-03-{time[:2]}" for time in times}
    frame = gpd.read_parquet(whole.path)
    assert (frame["date"].astype(str) == frame["acquired"].dt.strftime("%Y-%m-%d")).all()
    assert len(gpd.read_parquet(once.path)) == ships


@given(st.floats(-180, 179.99), st.floats(-90, 90))
@example(0.0, -5e-324)
def test_a_cell_names_the_square_that_holds_the_place(lon, lat):
    (name,) = cells(gpd.GeoDataFrame({"lon": [lon], "lat": [lat]}))
    south, y, west, x = re.fullmatch(r"([NS])(\d\d)([EW])(\d\d\d)", name).groups()
    low, left = int(y) * (-1 if south == "S" else 1), int(x) * (-1 if west == "W" else 1)
    assert low <= lat < low + 10 and left <= lon < left + 10


def test_every_result_has_a_valid_stac_item_without_paths_of_the_host(results):
    with Ledger(results) as ledger:
        rows = list(ledger.rows("SELECT * FROM scenes WHERE output IS NOT NULL"))
    assert len(rows) == 10
    for row in rows:
        path = (results / row["output"]).with_suffix(".json")
        text = path.read_text()
        item = pystac.Item.from_dict(json.loads(text))
        assert item.id == path.stem and str(results) not in text and "/in/" not in text
        assert item.properties["babelrs_geo:detections"] == row["detections"]
        for key in ("detections", "coverage"):
            assert (path.parent / item.assets[key].href).is_file()
        assert item.datetime.isoformat().startswith("2026-03-")
        if row["footprint"]:
            assert item.bbox == list(shapely.geometry.shape(item.geometry).bounds)
            assert shapely.geometry.shape(item.geometry).is_valid


@pytest.fixture(scope="module")
def across(tmp_path_factory) -> Path:
    """An archive of a scene on both sides of the antimeridian, and one with a site's own axes."""
    folder = tmp_path_factory.mktemp("across")
    (folder / "in").mkdir()
    x, y = pyproj.Transformer.from_crs(4326, 32601, always_xy=True).transform(-180.0, 52.0)
    image = np.full((96, 96), 20, np.uint8)
    image[40:46, 40:56] = 200
    places = {"aleutians": "EPSG:32601", "site": 'LOCAL_CS["site",UNIT["metre",1]]'}
    for name, crs in places.items():
        transform = from_origin(x - 480, y + 480, 10, 10)
        write_raster(folder / "in" / name, Raster(image, crs=crs, transform=transform))
    go(folder / "in", folder / "out", suffix=".gpkg")
    return folder / "out"


def test_across_the_antimeridian_nothing_spans_the_world(across, tmp_path):
    with Ledger(across) as ledger:
        rows = {Path(row["source"]).stem: row for row in ledger.rows("SELECT * FROM scenes")}
        assert {row["state"] for row in rows.values()} == {"done"}
        done = export(ledger, tmp_path / "all.gpkg")
        page = report(ledger, tmp_path / "page.html").read_text()
    assert done.detections == 1  # the site's has no place
    items = {
        name: json.loads((across / row["output"]).with_suffix(".json").read_text())
        for name, row in rows.items()
    }
    assert items["site"]["geometry"] is None and rows["site"]["footprint"] is None
    west, _, east, _ = items["aleutians"]["bbox"]
    assert 179.99 < west < 180 and -180 < east < -179.99
    outline = shapely.geometry.shape(items["aleutians"]["geometry"])
    assert outline.is_valid and len(outline.geoms) == 2 and outline.area < 1e-3
    (ship,) = gpd.read_file(tmp_path / "all.gpkg", layer="detections").geometry
    assert len(ship.geoms) == 2 and ship.area < 1e-5
    corners = [point.split(",") for point in re.search(r'<polygon points="([^"]+)"', page)[1].split()]
    assert np.ptp(np.array(corners, float)[:, 0]) > 100  # the map is of the scene, not of the world


def test_the_map_is_of_the_narrower_world():
    def ring(west):
        return [[west, 0], [west + 2, 0], [west + 2, 1], [west, 1], [west, 0]]

    def left(drawn):
        return [float(x) for x in re.findall(r'<polygon points="([\d.]+),', drawn)]

    across, within = (left(map_of([("done", ring(170)), ("done", ring(other))])) for other in (-175, 155))
    assert np.ptp(across) == pytest.approx(np.ptp(within), abs=0.2)
    degrees = map_of([("done", ring(178)), ("done", ring(-179))])
    assert "-179" in degrees and "181" not in degrees


def test_export_and_report_from_the_command_line(results, tmp_path):
    out = tmp_path / "all"
    done = CliRunner().invoke(cli.main, ["archive", "export", str(results), "-o", str(out), "--json"])
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["detections"] == recorded(results)[0] and Path(told["path"]) == out
    again = CliRunner().invoke(
        cli.main, ["archive", "export", str(results), "-o", str(out), "--once", "--overwrite"]
    )
    assert again.exit_code == 0 and again.stdout.startswith(f"{told['detections']} detections of 9 scenes")
    page = CliRunner().invoke(
        cli.main, ["archive", "report", str(results), "-o", str(tmp_path / "page.html")]
    )
    assert page.exit_code == 0 and (tmp_path / "page.html").read_text().startswith("<!doctype html>")


def test_the_report_is_one_file_that_says_all_and_needs_nothing(results, tmp_path):
    with Ledger(results) as ledger:
        total = recorded(results)[0]
        page = report(ledger, tmp_path / "r.html").read_text()
        with pytest.raises(OutputError, match="exists; pass --overwrite"):
            report(ledger, tmp_path / "r.html")
    assert not re.search(r'(src|href)="(?!data:)', page) and "http" not in page.replace(
        "http://www.w3.org", ""
    )
    assert page.count("<polygon points=") >= 9 and page.count("data:image/png;base64,") == 6
    assert f"<b>{9}</b>" in page and f"{total:,} detections" in page
    assert "bad.tif cannot be opened as a raster" in page and "ship (sar)" in page and "2026-03-02" in page
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]
    HTMLChecker().feed(page)


class HTMLChecker(HTMLParser):
    """Every element that is opened is closed, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@given(st.integers(1, 9), st.integers(1, 9), st.booleans(), st.integers(0, 99))
def test_the_pictures_are_pngs_that_others_read(width, height, grey, seed):
    drawn = np.random.default_rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8)
    image = np.repeat(drawn[:1], 3, 0) if grey else drawn
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with MemoryFile(png(image)) as memory, memory.open() as file:
            read = file.read()
    np.testing.assert_array_equal(read, image[: len(read)])


def test_a_scene_that_is_gone_does_not_end_the_report(tmp_path):
    write_ships(tmp_path / "in" / "a.tif", 3)
    go(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in" / "a.tif").unlink()
    with Ledger(tmp_path / "out") as ledger:
        assert "Cannot be shown: " in report(ledger, tmp_path / "r.html").read_text()
