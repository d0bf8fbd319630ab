"""Scenes and Sentinel-1 products on a web server: in few requests, again where it stumbles, and what opens them is told
to nobody.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from bright_archive import go, write_ships
from make_safe import NAME, START, make_safe, zipped
from test_archive_run import rows
from test_remote import Handler, Store

from babelrs_geo.archive import remote
from babelrs_geo.archive.cell import Limits
from babelrs_geo.archive.safe import is_product, opened
from babelrs_geo.archive.sources import find
from babelrs_geo.errors import SceneError
from babelrs_geo.scenes import open_scene

SIGNED = "X-Amz-Signature=topsecret"


class Guarded(Handler):
    """Below /locked, to who knows the word; below /flaky, at the second try; below /hangs, after two seconds."""

    seen: set[str] = set()  # noqa: RUF012 - of the one server in its process

    def answer(self, *, body: bool) -> None:
        known = "topsecret" in self.path or "Authorization" in self.headers
        if self.path.startswith("/locked") and not known:
            self.reply(403, b"", {}, body=body)
        elif self.path.startswith("/flaky") and self.path not in self.seen:
            self.seen.add(self.path)
            Handler.asked += 1
            self.reply(503, b"", {}, body=body)
        else:
            if self.path.startswith("/hangs"):
                time.sleep(2)
            super().answer(body=body)

    def reply(self, status: int, content: bytes, extra: dict[str, str], *, body: bool) -> None:
        super().reply(status, content, extra | {"ETag": '"v1"'}, body=body)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Store]:
    """Folders `open`, `locked` and `flaky`."""
    for name in ("open", "locked", "flaky"):
        (tmp_path / "www" / name).mkdir(parents=True)
    command = [sys.executable, __file__, str(tmp_path / "www")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield Store(tmp_path / "www", f"127.0.0.1:{process.stdout.readline().strip()}")
        process.terminate()


def assert_untold(folder: Path) -> None:
    for path in folder.rglob("*"):
        assert not path.is_file() or b"topsecret" not in path.read_bytes(), path


def test_size_and_etag_of_remote_scenes_are_in_the_ledger_and_signatures_nowhere(server, tmp_path):
    ships = write_ships(server.folder / "locked" / "s.tif", 3)
    write_ships(server.folder / "open" / "known.tif", 4)
    write_ships(server.folder / "flaky" / "again.tif", 5)
    base = f"http://{server.address}"
    manifest = tmp_path / "m.csv"
    manifest.write_text(
        "scene,size,stamp\n"
        f"{base}/locked/s.tif?{SIGNED},,\n{base}/open/known.tif,7,told\n"
        f"{base}/flaky/again.tif,7,told\n"
        f"http://me:topsecret@{server.address}/locked/s.tif?version=2,,\n{base}/locked/s.tif?id=9,,\n"
    )
    server.sent()
    ended = go([str(manifest)], tmp_path / "out", limits=Limits(seconds=60), attempts=1)
    asked = server.sent()[1]
    found = rows(tmp_path / "out")
    assert ended.counts["done"] == 4 and ended.counts["failed"] == 1
    row = found["s.tif"]
    assert row["source"] == f"{base}/locked/s.tif" and row["detections"] == ships
    assert (row["size"], row["stamp"]) == ((server.folder / "locked" / "s.tif").stat().st_size, '"v1"')
    assert (found["known.tif"]["size"], found["known.tif"]["stamp"]) == (7, "told")
    refused = found["s.tif?id=9"]
    assert refused["state"] == "failed" and "403" in refused["reason"]
    assert asked <= 50, asked  # of five scenes
    assert_untold(tmp_path / "out")
    assert go([str(manifest)], tmp_path / "out").worked == 0  # what the server said is no change of the scene


@pytest.mark.parametrize("form", ["folder", "manifest", "zip"])
def test_a_product_on_a_web_server_is_read_as_here(server, tmp_path, form):
    pixels = np.random.default_rng(0).gamma(2.0, 40.0, (120, 150)).astype(np.uint16) + 10
    safe = make_safe(server.folder / "locked", pixels)
    name = {"folder": f"{NAME}/", "manifest": f"{NAME}/manifest.safe", "zip": zipped(safe).name}[form]
    address = f"http://{server.address}/locked/{name}?{SIGNED}"
    (item,) = find([address])
    assert item.sensor == "sar" and is_product(item.path) and "topsecret" not in item.source
    server.sent()
    with (
        opened(str(safe)) as here,
        opened(address) as there,
        open_scene(here) as one,
        open_scene(there) as other,
    ):
        assert other.name == one.name == NAME and other.acquired.isoformat().startswith(START)
        assert other.georef == one.georef
        np.testing.assert_array_equal(other.read_raw((0, 0, 150, 120)), one.read_raw((0, 0, 150, 120)))
    assert server.sent()[1] <= 24


def test_a_run_over_remote_products_tells_no_secret(server, tmp_path):
    pixels = np.full((64, 80), 50, np.uint16)
    zipped(make_safe(server.folder / "locked", pixels))
    zip_ = f"http://{server.address}/locked/{NAME.removesuffix('.SAFE')}.zip"
    scenes = [f"{zip_}?{SIGNED}", f"{zip_}?id=1", f"http://{server.address}/locked/S1A_none.SAFE?{SIGNED}"]
    ended = go(scenes, tmp_path / "out", limits=Limits(seconds=60), attempts=1)
    assert (ended.counts["done"], ended.counts["failed"]) == (1, 2)
    reasons = sorted(row["reason"] for row in rows(tmp_path / "out").values() if row["state"] == "failed")
    assert "cannot be fetched (HTTP 403)" in " ".join(reasons) and "(HTTP 404)" in " ".join(reasons)
    assert_untold(tmp_path / "out")


def test_a_server_that_stumbles_is_asked_again_and_one_that_refuses_is_not(server, monkeypatch):
    monkeypatch.setattr(remote, "_PAUSE", 0.01)
    (server.folder / "flaky" / "a.xml").write_text("whole")
    assert remote.read(f"http://{server.address}/flaky/a.xml") == b"whole"
    assert server.sent()[1] == 2
    with pytest.raises(SceneError, match=r"/locked/b\.xml cannot be fetched \(HTTP 403\)") as caught:
        remote.read(f"http://{server.address}/locked/b.xml?key=none")
    assert "none" not in str(caught.value)
    with pytest.raises(SceneError, match=r"cannot be fetched \(ConnectionRefusedError\)"):
        remote.read("http://127.0.0.1:9/a.xml")
    assert remote.state_of(f"http://{server.address}/locked/b.xml") == {}
    monkeypatch.setattr(remote, "_SECONDS", 0.2)
    (server.folder / "hangs").mkdir()
    with pytest.raises(SceneError, match=r"/hangs/c\.xml cannot be fetched \(TimeoutError\)"):
        remote.read(f"http://{server.address}/hangs/c.xml")


def test_a_remote_file_is_read_by_ranges(server):
    data = np.random.default_rng(0).bytes(300_000)
    (server.folder / "open" / "a.bin").write_bytes(data)
    server.sent()
    with remote.seekable(f"http://{server.address}/open/a.bin") as file:
        file.seek(-1000, 2)
        assert file.read() == data[-1000:]
        file.seek(100_000)
        assert file.read(10) == data[100_000:100_010] and file.tell() == 100_010
    sent, asked = server.sent()
    assert asked == 3 and sent < 80_000


if __name__ == "__main__":
    Handler.folder = Path(sys.argv[1])
    with ThreadingHTTPServer(("127.0.0.1", 0), Guarded) as serving:
        print(serving.server_port, flush=True)
        serving.serve_forever()
