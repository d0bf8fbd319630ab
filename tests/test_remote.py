"""Scenes on an object store: read over HTTP and S3 from a server of this machine, by ranges, and no more than is
needed. Bad addresses end in one line.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
import rasterio
from click.testing import CliRunner
from rasterio.transform import from_origin

from babelrs_geo import cli
from babelrs_geo.errors import SceneError
from babelrs_geo.scenes import SceneOptions, open_scene
from babelrs_geo.tiling import Grid

SIDE = 2048


class Handler(BaseHTTPRequestHandler):
    """An object store: whole objects or one range. `/sent` tells bytes and requests since it was asked last."""

    protocol_version = "HTTP/1.1"
    folder = Path()
    sent = asked = 0

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        if self.path == "/sent":
            content = f"{Handler.sent} {Handler.asked}".encode()
            Handler.sent = Handler.asked = 0
            self.reply(200, content, {}, body=body)
            return
        Handler.asked += 1
        file = self.folder / self.path.partition("?")[0].lstrip("/")
        if not file.is_file():
            self.reply(404, b"", {}, body=body)
            return
        content, asked = file.read_bytes(), self.headers.get("Range")
        status, extra, size = 200, {"Accept-Ranges": "bytes"}, file.stat().st_size
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last or size - 1), size - 1)
            content, status = content[start : stop + 1], 206
            extra["Content-Range"] = f"bytes {start}-{stop}/{size}"
        if body:
            Handler.sent += len(content)
        self.reply(status, content, extra, body=body)

    def reply(self, status: int, content: bytes, extra: dict[str, str], *, body: bool) -> None:
        self.send_response(status)
        for name, value in (extra | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


@dataclass(frozen=True)
class Store:
    """The server, in a process of its own: GDAL may hold this one's interpreter while it waits for an answer."""

    folder: Path
    address: str

    def sent(self) -> tuple[int, int]:
        """Bytes sent and requests answered since this was asked last."""
        with urlopen(f"http://{self.address}/sent", timeout=10) as answer:
            told, asked = answer.read().split()
            return int(told), int(asked)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A bucket with one COG in it."""
    (tmp_path / "bucket").mkdir()
    raster = np.random.default_rng(0).integers(1, 256, (1, SIDE, SIDE), dtype=np.uint8)
    place = {"crs": "EPSG:32633", "transform": from_origin(500_000, 4_600_000, 10, 10)}
    profile = {"driver": "COG", "width": SIDE, "height": SIDE, "count": 1, "dtype": "uint8", **place}
    with rasterio.open(
        tmp_path / "bucket" / "scene.tif", "w", **profile, BLOCKSIZE=128, COMPRESS="NONE"
    ) as out:
        out.write(raster)
    command = [sys.executable, __file__, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield Store(tmp_path, f"127.0.0.1:{server.stdout.readline().strip()}")
        server.terminate()


def path_of(store: Store, kind: str, monkeypatch: pytest.MonkeyPatch, name: str = "scene.tif") -> str:
    for variable, value in {
        "AWS_S3_ENDPOINT": store.address,
        "AWS_HTTPS": "NO",
        "AWS_VIRTUAL_HOSTING": "FALSE",
        "AWS_NO_SIGN_REQUEST": "YES",
        "GDAL_HTTP_MAX_RETRY": "0",
    }.items():
        monkeypatch.setenv(variable, value)
    http = f"http://{store.address}/bucket/{name}"
    return {
        "http": http,
        "vsicurl": f"/vsicurl/{http}",
        "s3": f"s3://bucket/{name}",
        "vsis3": f"/vsis3/bucket/{name}",
    }[kind]


@pytest.mark.parametrize("kind", ["http", "vsicurl", "s3", "vsis3"])
def test_a_remote_scene_reads_as_the_file_does(
    store: Store, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = path_of(store, kind, monkeypatch)
    bare = SceneOptions(collar=False)  # a search for a collar looks at the whole border
    here, there = (
        open_scene(store.folder / "bucket" / "scene.tif", "ir", bare),
        open_scene(remote, "ir", bare),
    )
    with here, there:
        assert there.name == "scene.tif"
        assert there.georef == here.georef and there.radiometry == here.radiometry
        window = (300, 200, 100, 90)
        pixels = there.read(window)
        assert np.array_equal(pixels.image, here.read(window).image)
        assert np.array_equal(pixels.valid, here.read(window).valid)
    size = (store.folder / "bucket" / "scene.tif").stat().st_size
    assert 0 < store.sent()[0] < size // 2  # what is asked for, not the file


@pytest.mark.parametrize("threads", [1, 2])
def test_a_remote_scene_is_visited_in_few_requests(
    store: Store, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = path_of(store, "http", monkeypatch)
    for address, most in ((path, 12), (f"{path}?signature=a%2Fb", 3)):  # a signature is for one file alone
        store.sent()
        with open_scene(address, "sar", SceneOptions(limits=(0, 255))) as scene:
            assert store.sent()[1] <= most
            assert scene.name == "scene.tif"
            grid = Grid(scene.width, scene.height, 200, 40)
            tiles = [grid[i].outer for i in grid.order(scene.strip(), paired=scene.is_tiled)]
            with ThreadPoolExecutor(threads) as pool, scene.expecting(tiles):
                for tile, read in zip(tiles, pool.map(scene.read, tiles), strict=True):
                    assert read.image.shape == (3, tile.height, tile.width)
        sent, asked = store.sent()
        assert sent < 1.1 * SIDE * SIDE  # each byte of the full resolution once
        assert asked <= 12  # of 256 blocks


@pytest.mark.parametrize("kind", ["http", "s3"])
def test_a_remote_scene_that_is_not_there_is_told_in_one_line(
    store: Store, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    missing = path_of(store, kind, monkeypatch, "nowhere.tif")
    with pytest.raises(SceneError, match=r"nowhere\.tif"):
        open_scene(missing, "sar")
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli.main, ["detect", missing, "--sensor", "sar"])
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1 and "nowhere.tif" in result.stderr
    assert not list(tmp_path.glob("*.gpkg"))


if __name__ == "__main__":
    Handler.folder = Path(sys.argv[1])
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as serving:
        print(serving.server_port, flush=True)
        serving.serve_forever()
