"""What an archive is made of: what is found where, what is told of it, and what is never told."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import geopandas as gpd
import numpy as np
import pytest
import rasterio
from bright_archive import make_archive, write_ships
from hypothesis import given
from hypothesis import strategies as st
from make_safe import CORNER, NAME, START, grid_points, make_safe, zipped
from shapely.geometry import Point

from babelrs_geo.archive.addresses import bare, scrub
from babelrs_geo.archive.ledger import Ledger
from babelrs_geo.archive.safe import opened
from babelrs_geo.archive.sources import Item, find
from babelrs_geo.archive.stac import Search, read_items, search
from babelrs_geo.errors import LabelError, ParameterError, SceneError
from babelrs_geo.scenes import SceneOptions, open_scene

SECRET = "X-Amz-Signature=0f9e8d7c&sig=topsecret"


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("/data/a b.tif", "/data/a b.tif"),
        ("/data/odd?name#1.tif", "/data/odd?name#1.tif"),
        (f"https://store/b.tif?{SECRET}", "https://store/b.tif"),
        ("https://me:word@store/b.tif", "https://store/b.tif"),
        ("https://store/get?id=7&token=topsecret", "https://store/get?id=7"),
        (f"/vsicurl/https://store/b.tif?{SECRET}#part", "/vsicurl/https://store/b.tif"),
        (
            "/vsicurl?header.Authorization=topsecret&url=https%3A%2F%2Fs%2Fb.tif",
            "/vsicurl/https%3A%2F%2Fs%2Fb.tif",
        ),
        ("s3://bucket/b.tif", "s3://bucket/b.tif"),
    ],
)
def test_addresses_are_shown_without_what_is_secret(address, shown):
    assert bare(address) == shown
    assert bare(shown) == shown
    assert "topsecret" not in scrub(f"cannot open '{address}': HTTP 403", {address: shown})


@given(st.text("abc/.-_", min_size=1), st.text("abcXYZ019=&%+-_", min_size=1))
def test_no_query_survives_in_a_message(path, query):
    message = f"https://store/{path}?token={query}T0P: 403"
    assert scrub(message) == f"https://store/{path}: 403"


def test_a_folder_is_searched_by_name_and_results_and_hidden_files_are_no_scenes(tmp_path):
    make_archive(tmp_path / "in", 2)
    write_ships(tmp_path / "in" / "sub" / "deep.tiff", 9)
    write_ships(tmp_path / "in" / "out" / "result.tif", 8)
    write_ships(tmp_path / "in" / ".cache" / "x.tif", 7)
    (tmp_path / "in" / "notes.txt").write_text("no scene")
    found = list(find([str(tmp_path / "in")], tmp_path / "in" / "out"))
    names = [str(Path(item.source).relative_to(tmp_path / "in")) for item in found]
    assert names == ["s000.tif", "s001.tif", "sub/deep.tiff"]
    first = (tmp_path / "in" / "s000.tif").stat()
    assert (found[0].size, found[0].stamp) == (first.st_size, str(first.st_mtime_ns))
    assert all(item.path == item.source for item in found)


def test_links_back_into_a_folder_are_not_followed_and_those_elsewhere_are(tmp_path):
    make_archive(tmp_path / "in" / "sub", 1)
    make_archive(tmp_path / "elsewhere", 1)
    links = {"here": ".", "sub/top": "..", "itself": "itself", "more": "../elsewhere", "odd.tif": "odd.tif"}
    for link, target in links.items():
        (tmp_path / "in" / link).symlink_to(target)
    found = [str(Path(item.source).relative_to(tmp_path / "in")) for item in find([str(tmp_path / "in")])]
    assert found == ["more/s000.tif", "odd.tif", "sub/s000.tif"]


@pytest.mark.parametrize("pattern", ["", "**/*.tif", "caf*/*.tif"])
def test_a_name_that_is_not_utf_8_costs_itself_alone(tmp_path, pattern):
    make_archive(tmp_path / "café", 1)
    latin = tmp_path / os.fsdecode(b"caf\xe9")
    latin.mkdir()
    (latin / "a.tif").touch()
    with Ledger(tmp_path, write=True) as ledger:
        assert ledger.plan(find([str(tmp_path / pattern)])) == 2
        ((source, reason),) = ledger.failures()
    assert source == f"{tmp_path}/caf\\xe9/a.tif" and reason == f"{source} is not named in UTF-8; rename it"


def test_globs_and_single_scenes(tmp_path, monkeypatch):
    make_archive(tmp_path, 3)
    monkeypatch.chdir(tmp_path)
    assert [Path(i.source).name for i in find(["s*[12].tif"])] == ["s001.tif", "s002.tif"]
    assert [Path(i.source).name for i in find([str(tmp_path / "**" / "s00?.tif")])] == [
        f"s{n:03d}.tif" for n in range(3)
    ]
    assert [i.source for i in find(["s000.tif"])] == [str(tmp_path / "s000.tif")]
    make_archive(tmp_path / "run [2026]", 1)
    monkeypatch.chdir(tmp_path / "run [2026]")
    assert [i.source for i in find(["*.tif"])] == [str(tmp_path / "run [2026]" / "s000.tif")]
    with pytest.raises(ParameterError, match="matches nothing"):
        list(find(["x*.tif"]))
    with pytest.raises(ParameterError, match="nowhere does not exist"):
        list(find(["nowhere"]))
    (remote,) = find([f"https://store/b.tif?{SECRET}"])
    assert remote.source == "https://store/b.tif" and "topsecret" in remote.path


ROWS = [
    ("a.tif", "sar", "VH", "", ""),
    (f"https://store/b.tif?{SECRET}", "rgb", "", "3 2 1", "2.5"),
    ("/abs/c.tif", "lidar", "", "", ""),
    ("../d.tif", "ir", "", "one", ""),
]


@pytest.mark.parametrize("kind", ["csv", "parquet", "txt"])
def test_manifests_say_sensor_and_options_by_scene_and_a_bad_row_is_that_row_alone(tmp_path, kind):
    path = tmp_path / "sub" / f"scenes.{kind}"
    path.parent.mkdir()
    columns = ("scene", "sensor", "polarisation", "bands", "priority")
    if kind == "csv":
        path.write_text("\n".join(",".join(row) for row in (columns, *ROWS)))
    elif kind == "parquet":
        table = {name: [row[n] or None for row in ROWS] for n, name in enumerate(columns)}
        frame = gpd.GeoDataFrame(table, geometry=[Point(n, n) for n in range(len(ROWS))], crs="EPSG:4326")
        frame.to_parquet(path)
    else:
        path.write_text("# comment\n\n" + "\n".join(row[0] for row in ROWS))
    a, b, c, d = find([str(path)])
    assert a.source == str(tmp_path / "sub" / "a.tif")  # need not exist: nothing is touched
    assert b.source == "https://store/b.tif" and b.path.endswith(SECRET)
    assert c.source == "/abs/c.tif" and d.source == str(tmp_path / "d.tif")
    if kind != "txt":
        assert (a.sensor, a.options) == ("sar", {"polarisation": "VH"})
        assert (b.sensor, b.options, b.priority) == ("rgb", {"bands": [3, 2, 1]}, 2.5)
        assert 'sensor "lidar"' in c.fault and "cannot be understood" in d.fault
        assert not (a.fault or b.fault)


def test_a_text_file_of_windows_is_read_without_its_mark(tmp_path):
    (tmp_path / "list.txt").write_bytes("\ufeff/data/a.tif\r\n/data/b.tif\r\n".encode())
    assert [item.source for item in find([str(tmp_path / "list.txt")])] == ["/data/a.tif", "/data/b.tif"]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_what_pandas_writes_of_numbers_that_are_missing_in_some_rows_is_understood(tmp_path, kind):
    path = tmp_path / f"m.{kind}"
    columns = {"size": [123456, None], "bands": [3, None], "priority": [2, None], "height": [1.5, None]}
    frame = gpd.pd.DataFrame({"scene": ["/a.tif", "/b.tif"], "sensor": ["sar", None]} | columns)
    frame.to_csv(path, index=False) if kind == "csv" else frame.to_parquet(path)
    a, b = find([str(path)])
    assert (a.size, a.priority, a.options, a.fault) == (123456, 2, {"bands": [3], "height": 1.5}, "")
    assert b == Item("/b.tif", "/b.tif")


@pytest.mark.parametrize(
    "row", ["1,9e99,", "1,inf,", "1,7.5,", "nan,7,", "high,7,", "1,7,3.5", "1,99999999999999999999,"]
)
def test_numbers_that_are_none_cost_their_row_alone_until_they_are_corrected(tmp_path, row):
    path = tmp_path / "m.csv"
    with Ledger(tmp_path, write=True) as ledger:
        for text, state in ((row, "failed"), (row, "failed"), ("4,7,2", "planned"), (row, "failed")):
            path.write_text(f"scene,priority,size,bands\n/a.tif,{text}\n/b.tif,1,7,\n")
            assert ledger.plan(find([str(path)])) == 2
            assert [each["state"] for each in ledger.rows("SELECT state FROM scenes")] == [state, "planned"]
            assert ledger.retry() == 0
            ledger.begin("a recipe")
            assert ledger.counts()["failed"] == (state == "failed")


def test_a_priority_that_changed_moves_a_scene_and_makes_it_no_new_one(tmp_path):
    with Ledger(tmp_path, write=True) as ledger:
        ledger.plan(Item(name, name, size=7) for name in "ab")
        ledger.settle([(1, {"state": "done", "output": "o"})])
        ledger.plan(Item(name, name, size=7, priority=5) for name in "ab")
        assert [tuple(row) for row in ledger.rows("SELECT state, priority FROM scenes")] == [
            ("done", 5),
            ("planned", 5),
        ]


def test_planning_that_fails_may_be_tried_again(tmp_path):
    def broken():
        raise LabelError("no manifest")
        yield

    with Ledger(tmp_path, write=True) as ledger:
        for _ in range(2):
            with pytest.raises(LabelError, match="no manifest"):
                ledger.plan(broken())
        ledger.plan([Item("a", "a")])
        assert len(ledger.take(1)) == 1


def test_a_manifest_without_scenes_is_refused(tmp_path):
    (tmp_path / "m.csv").write_text("name,sensor\na,b\n")
    with pytest.raises(LabelError, match=r"no column of scenes: it has name, sensor"):
        list(find([str(tmp_path / "m.csv")]))
    (tmp_path / "m.parquet").write_text("no parquet")
    with pytest.raises(LabelError, match="GeoParquet manifest"):
        list(find([str(tmp_path / "m.parquet")]))


def feature(name, assets, **properties):
    return {
        "type": "Feature",
        "stac_version": "1.0.0",
        "id": name,
        "geometry": {"type": "Point", "coordinates": [12, 45]},
        "bbox": [12, 45, 12, 45],
        "properties": {"datetime": "2026-03-01T00:00:00Z"} | properties,
        "links": [],
        "assets": assets,
    }


COG = "image/tiff; application=geotiff; profile=cloud-optimized"
ITEMS = [
    feature(
        "one",
        {
            "vv": {
                "href": f"https://store/one-vv.tif?{SECRET}",
                "type": COG,
                "roles": ["data"],
                "file:size": 7,
            },
            "vh": {"href": "https://store/one-vh.tif", "type": COG, "roles": ["data"]},
            "thumbnail": {"href": "t.png", "type": "image/png", "roles": ["thumbnail"]},
        },
        **{"sar:polarizations": ["VV", "VH"]},
    ),
    feature("two", {"data": {"href": "./two.tif", "type": COG, "roles": ["data"]}}),
]


def test_an_item_collection_gives_the_asset_named_or_the_only_raster(tmp_path):
    path = tmp_path / "items.json"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": ITEMS}))
    one, two = find([str(path)])
    assert "2 rasters of data (vv, vh, thumbnail): name one with --asset" in one.fault
    assert two.source == str(tmp_path / "two.tif") and not two.fault
    one, two = read_items(path, "vv")
    assert (one.source, one.sensor, one.size) == ("https://store/one-vv.tif", "sar", 7)
    assert one.path.endswith(SECRET)
    assert 'no asset "vv", it has data' in two.fault
    with Ledger(tmp_path, write=True) as ledger:
        ledger.plan(find([str(path)]))
        assert (ledger.counts()["failed"], ledger.retry()) == (1, 0)
        ledger.plan(find([str(path)], asset="vv"))
        ((failed, _),) = ledger.failures()
        assert failed == f"{path}#two"  # the first is a scene now
    path.write_text(json.dumps({"type": "Catalog"}))
    with pytest.raises(LabelError, match="is a Catalog, expected a STAC ItemCollection"):
        list(find([str(path)]))


class Api(BaseHTTPRequestHandler):
    """A STAC API with two pages of one item each, by GET and POST."""

    asked: ClassVar[list[dict[str, object]]] = []

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        base = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.reply(
            {
                "type": "Catalog",
                "stac_version": "1.0.0",
                "id": "here",
                "description": "a test",
                "conformsTo": [
                    "https://api.stacspec.org/v1.0.0/core",
                    "https://api.stacspec.org/v1.0.0/item-search",
                ],
                "links": [
                    {"rel": "self", "href": base},
                    {"rel": "root", "href": base},
                    {
                        "rel": "search",
                        "href": f"{base}/search",
                        "type": "application/geo+json",
                        "method": "POST",
                    },
                ],
            }
        )

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Api.asked.append(asked)
        page = int(asked.get("page", 0))
        base = f"http://127.0.0.1:{self.server.server_address[1]}/search"
        more = {"rel": "next", "href": base, "method": "POST", "merge": True, "body": {"page": page + 1}}
        found = {"type": "FeatureCollection", "features": [ITEMS[page]], "links": [more] if page == 0 else []}
        self.reply(found)

    def reply(self, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/geo+json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def api() -> Iterator[str]:
    Api.asked = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Api) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_a_stac_api_is_searched_page_by_page(api):
    pytest.importorskip("pystac_client")
    asked = Search(
        url=api,
        collections=("sentinel-1-grd",),
        bbox=(12, 45, 13, 46),
        datetime="2026-03-01/2026-03-02",
        asset="vv",
    )
    one, two = search(asked)
    assert one.source == "https://store/one-vv.tif" and "topsecret" in one.path and one.sensor == "sar"
    assert "no asset" in two.fault
    first = Api.asked[0]
    assert first["collections"] == ["sentinel-1-grd"] and first["bbox"] == [12, 45, 13, 46]
    assert str(first["datetime"]).startswith("2026-03-01")


def test_an_api_that_is_none_is_told_in_one_line_without_its_password(caplog):
    pytest.importorskip("pystac_client")
    with pytest.raises(ParameterError, match="does not answer as one") as caught:
        list(search(Search(url="http://me:topsecret@127.0.0.1:9/stac?token=topsecret")))
    assert "topsecret" not in str(caught.value) + caplog.text and "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_a_safe_product_has_its_annotations_points_its_polarisations_and_its_time(tmp_path, form):
    pixels = np.random.default_rng(0).gamma(2.0, 40.0, (120, 150)).astype(np.uint16) + 10
    safe = make_safe(tmp_path / "in", pixels)
    if form == "zip":
        path = zipped(safe)
        safe.rename(tmp_path / "elsewhere")
    else:
        path = safe
    (item,) = find([str(tmp_path / "in")])
    assert (item.path, item.sensor) == (str(path), "sar") and item.size
    with opened(str(path)) as vrt, open_scene(vrt) as scene:
        assert scene.name == NAME and scene.acquired.isoformat().startswith(START)
        assert str(scene.sensor) == "sar" and (scene.height, scene.width) == pixels.shape
        points = grid_points(*pixels.shape)
        lines, columns, lon, lat = np.array(points).T
        np.testing.assert_allclose(scene.georef.to_lonlat(columns, lines), (lon, lat), atol=1e-9)
        assert scene.georef.to_lonlat(0.0, 0.0)[0] == pytest.approx(CORNER[0])
        np.testing.assert_array_equal(scene.read_raw((0, 0, 150, 120))[0], pixels)
    with opened(str(path)) as vrt, open_scene(vrt, options=SceneOptions(polarisation="VH")) as scene:
        np.testing.assert_array_equal(scene.read_raw((0, 0, 9, 9))[1], pixels[:9, :9] // 2)


def test_a_safe_product_that_lacks_something_is_told_in_one_line(tmp_path):
    pixels = np.full((60, 60), 50, np.uint16)
    for number, (victim, words) in enumerate(
        [("annotation/*-vh-*.xml", "no whole Sentinel-1 product"), ("measurement/*", "it has no measurement")]
    ):
        safe = make_safe(tmp_path / str(number), pixels)
        for file in safe.glob(victim):
            file.unlink()
        with pytest.raises(SceneError, match=words), opened(str(safe)):
            pass
    bad = tmp_path / "S1A_bad.zip"
    bad.write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(SceneError, match="cannot be opened as a zip"), opened(str(bad)):
        pass


def test_gdal_agrees_with_the_points_of_the_measurement(tmp_path):
    """The test's product is truthful: what GDAL reads of a measurement is what the annotation says."""
    safe = make_safe(tmp_path, np.full((60, 60), 50, np.uint16), ("HH",))
    with rasterio.open(next(safe.glob("measurement/*.tiff"))) as file:
        own, _ = file.gcps
    expected = grid_points(60, 60)
    assert [(p.row, p.col, p.x, p.y) for p in own] == [pytest.approx(p) for p in expected]
