"""Runs over archives: a bad scene costs itself alone, the ledger is true, and running again goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import geopandas as gpd
import numpy as np
import pytest
import rasterio
from bright_archive import SMALL, BrightWork, go, make_archive, write_ships
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from rasterio.errors import NotGeoreferencedWarning

from babelrs_geo import cli
from babelrs_geo.archive.cell import Limits
from babelrs_geo.archive.ledger import DONE, DUPLICATE, FAILED, INCOMPLETE, STALE, Ledger, locked, on_network
from babelrs_geo.archive.outputs import files_of
from babelrs_geo.archive.run import RunOptions
from babelrs_geo.archive.sources import Item
from babelrs_geo.archive.work import fingerprint
from babelrs_geo.cluster import Workers
from babelrs_geo.errors import OutputError, ParameterError, WeightsError
from babelrs_geo.vectors import read_result

TESTS = Path(__file__).parent


def rows(results: Path) -> dict[str, sqlite3.Row]:
    """The ledger's rows by the scene's file name."""
    with Ledger(results) as ledger:
        return {Path(row["source"]).name: row for row in ledger.rows("SELECT * FROM scenes ORDER BY id")}


def test_an_archive_runs_through_and_again_does_nothing(tmp_path):
    ships = make_archive(tmp_path / "in", 6)
    ended = go(tmp_path / "in", tmp_path / "out")
    assert ended.counts[DONE] == ended.worked == 6 and ended.whole
    for name, row in rows(tmp_path / "out").items():
        found = read_result(tmp_path / "out" / row["output"])
        assert len(found.features) == ships[name] == row["detections"]
        assert json.loads(row["classes"] or "{}") == ({"ship": ships[name]} if ships[name] else {})
        assert (row["tiles"], row["tiles_failed"], row["attempts"]) == (4, 0, 1)
        assert (
            row["sensor"] == "sar"
            and row["acquired"].startswith("2026-03-")
            and row["host"]
            and row["seconds"] > 0
        )
        assert all((tmp_path / "out" / each).exists() for each in files_of(row["output"]))
        assert json.loads(row["footprint"])[0] == json.loads(row["footprint"])[-1]
    assert not (tmp_path / "out" / ".drafts").exists()
    again = go(tmp_path / "in", tmp_path / "out")
    assert (again.worked, again.counts) == (0, ended.counts)


def test_every_scene_is_judged_alone_and_bad_ones_are_told_with_their_reason(tmp_path):
    make_archive(tmp_path / "in", 3)
    folder = tmp_path / "in"
    (folder / "corrupt.tif").write_bytes(b"II*\0" + bytes(200))
    (folder / "empty.tif").touch()
    (folder / "text.tif").write_text("no raster at all")
    write_ships(folder / "cut.tif", 50, side=512)
    os.truncate(folder / "cut.tif", 9000)
    write_ships(folder / "crash.tif", 51)
    write_ships(folder / "exits.tif", 52)
    os.mkfifo(folder / "hangs.tif")  # nobody ever writes to it
    with rasterio.open(folder / "void.tif", "w", driver="GTiff", width=60, height=60, count=1, dtype="uint8",
                       nodata=0, crs="EPSG:32633", transform=(10, 0, 0, 0, -10, 0)) as file:  # fmt: skip
        file.write(np.zeros((1, 60, 60), np.uint8))
    write_ships(folder / "once.tif", 53)
    ended = go(folder, tmp_path / "out", limits=Limits(seconds=8.0), attempts=2)
    found = rows(tmp_path / "out")
    expected = {
        "corrupt.tif": "cannot be opened",
        "empty.tif": "cannot be opened",
        "text.tif": "cannot be opened",
        "cut.tif": "cannot be opened",
        "crash.tif": "crashed its process (SIGSEGV)",
        "exits.tif": "ended its process with code 7 (no more of this)",
        "hangs.tif": "took longer than the 8 s",
        "void.tif": "no pixel in it is valid",
    }
    for name, words in expected.items():
        assert found[name]["state"] in (FAILED, INCOMPLETE), name
        assert words in found[name]["reason"], (name, found[name]["reason"])
    good = set(found) - set(expected)
    assert good == {"s000.tif", "s001.tif", "s002.tif", "once.tif"}
    assert {found[name]["state"] for name in good} == {DONE}
    assert found["once.tif"]["attempts"] == 2 == found["crash.tif"]["attempts"]
    assert found["corrupt.tif"]["attempts"] == 1 == found["hangs.tif"]["attempts"]
    assert not ended.whole and ended.worked == len(found)


def test_a_scene_that_needs_too_much_memory_is_ended(tmp_path):
    make_archive(tmp_path / "in", 1)
    write_ships(tmp_path / "in" / "hungry.tif", 5)
    go(tmp_path / "in", tmp_path / "out", limits=Limits(seconds=50, memory=700 << 20))
    found = rows(tmp_path / "out")
    assert "needed more than the 734 MB it may have" in found["hungry.tif"]["reason"]
    assert found["s000.tif"]["state"] == DONE


def test_failed_scenes_wait_for_retry(tmp_path):
    make_archive(tmp_path / "in", 1)
    bad = tmp_path / "in" / "bad.tif"
    bad.write_text("no raster")
    go(tmp_path / "in", tmp_path / "out")
    assert go(tmp_path / "in", tmp_path / "out").worked == 0
    with Ledger(tmp_path / "out", write=True) as ledger:
        assert ledger.retry("disk is on fire") == 0 and ledger.retry("OPENED AS") == 1
    assert go(tmp_path / "in", tmp_path / "out").worked == 1
    write_ships(bad, 9)  # a new file of that name is a new scene
    assert go(tmp_path / "in", tmp_path / "out").whole


def test_an_interrupt_waits_for_the_end_of_a_step_and_the_run_goes_on(tmp_path):
    make_archive(tmp_path / "in", 4)
    step: list[int] = []

    def interrupted(done: int, total: int) -> None:
        signal.raise_signal(signal.SIGINT)
        step.append(done)

    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "in", tmp_path / "out", progress=interrupted)
    assert len(step) == 1
    ended = go(tmp_path / "in", tmp_path / "out")
    assert ended.counts[DONE] == 4 and ended.worked == 4 - step[0]


def test_other_parameters_or_a_changed_scene_make_results_stale_and_are_not_mixed(tmp_path):
    make_archive(tmp_path / "in", 3)
    go(tmp_path / "in", tmp_path / "out")
    before = rows(tmp_path / "out")
    first = before["s000.tif"]["output"]
    with Ledger(tmp_path / "out", write=True) as ledger:
        assert ledger.begin("of another recipe") == 3
        assert {row["state"] for row in rows(tmp_path / "out").values()} == {STALE}
        assert {row["reason"] for row in rows(tmp_path / "out").values()} == {
            "made with other weights or parameters"
        }
    ended = go(tmp_path / "in", tmp_path / "out", changed="score")
    after = rows(tmp_path / "out")
    assert ended.worked == 3 == ended.counts[DONE]
    assert after["s000.tif"]["output"] != first and not (tmp_path / "out" / first).exists()
    assert len({Path(row["output"]).parts[1] for row in after.values()}) == 1
    ships = write_ships(tmp_path / "in" / "s001.tif", 77)
    os.utime(tmp_path / "in" / "s001.tif", ns=(1, 1))
    ended = go(tmp_path / "in", tmp_path / "out", changed="score")
    assert ended.worked == 1 and rows(tmp_path / "out")["s001.tif"]["detections"] == ships


def test_duplicates_are_found_and_the_first_is_kept(tmp_path):
    make_archive(tmp_path / "in", 3)
    for name in ("s0001.tif", "s9.tif"):
        shutil.copy(tmp_path / "in" / "s001.tif", tmp_path / "in" / name)
    ended = go(tmp_path / "in", tmp_path / "out")
    found = rows(tmp_path / "out")
    first = min(("s0001.tif", "s001.tif", "s9.tif"), key=lambda name: found[name]["id"])
    assert ended.counts[DUPLICATE] == 2 and ended.counts[DONE] == 3 and ended.whole
    for name in {"s0001.tif", "s001.tif", "s9.tif"} - {first}:
        assert (found[name]["state"], found[name]["twin"], found[name]["output"]) == (
            DUPLICATE, found[first]["id"], None)  # fmt: skip
    assert len(list((tmp_path / "out" / "results").rglob("*_coverage.parquet"))) == 3


@pytest.mark.parametrize("fate", ["another", "corrupt"])
def test_a_duplicate_has_its_own_turn_once_its_twin_is_another_scene(tmp_path, fate):
    ships = write_ships(tmp_path / "in" / "a.tif", 5)
    for name in ("b.tif", "c.tif"):
        shutil.copy(tmp_path / "in" / "a.tif", tmp_path / "in" / name)
    assert go(tmp_path / "in", tmp_path / "out").counts[DUPLICATE] == 2
    if fate == "another":
        write_ships(tmp_path / "in" / "a.tif", 9, side=80)
    else:
        (tmp_path / "in" / "a.tif").write_text("no raster")
    go(tmp_path / "in", tmp_path / "out")
    found = rows(tmp_path / "out")
    assert found["a.tif"]["state"] == (DONE if fate == "another" else FAILED)
    assert (found["b.tif"]["state"], found["b.tif"]["detections"]) == (DONE, ships)
    assert (found["c.tif"]["state"], found["c.tif"]["twin"]) == (DUPLICATE, found["b.tif"]["id"])
    assert go(tmp_path / "in", tmp_path / "out").worked == 0


@given(
    st.lists(
        st.tuples(
            st.sampled_from([DONE, INCOMPLETE, FAILED, STALE, DUPLICATE]),
            st.sampled_from("xy"),
            st.integers(1, 5),
        ),
        min_size=5,
        max_size=5,
    )
)
def test_when_a_run_begins_every_duplicate_has_a_twin_of_its_content_that_is_there(scenes):
    with tempfile.TemporaryDirectory() as folder, Ledger(Path(folder), write=True) as ledger:
        ledger.plan(Item(f"{n}", f"{n}") for n in range(5))
        told = [
            (n, {"state": state, "fingerprint": mark, "twin": twin, "recipe": "r", "output": "o"})
            for n, (state, mark, twin) in enumerate(scenes, 1)
        ]
        ledger.settle(told)
        ledger.begin("r")
        left = list(ledger.rows("SELECT * FROM scenes ORDER BY id"))
        for before, row in zip(told, left, strict=True):
            first = left[before[1]["twin"] - 1]
            there = first["state"] in (DONE, INCOMPLETE) and first["fingerprint"] == row["fingerprint"]
            expected = before[1]["state"] if before[1]["state"] != DUPLICATE or there else "planned"
            assert row["state"] == expected


@given(st.binary(min_size=1, max_size=3000), st.integers(0, 2999))
def test_a_fingerprint_sees_a_change_in_a_small_file_and_knows_a_copy(tmp_path_factory, content, place):
    folder = tmp_path_factory.mktemp("f")
    (folder / "a").write_bytes(content)
    (folder / "b").write_bytes(content)
    changed = bytearray(content)
    changed[place % len(content)] ^= 1
    (folder / "c").write_bytes(changed)
    for whole in (False, True):
        a, b, c = (fingerprint(folder / name, whole=whole) for name in "abc")
        assert a == b != c


def test_only_the_whole_hash_sees_what_lies_between_the_sampled_blocks(tmp_path):
    data = bytearray(np.random.default_rng(0).bytes(3_000_000))
    (tmp_path / "a").write_bytes(data)
    data[200_000] ^= 1
    (tmp_path / "b").write_bytes(data)
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")
    assert fingerprint(tmp_path / "a", whole=True) != fingerprint(tmp_path / "b", whole=True)


@pytest.mark.slow
def test_workers_of_a_dask_cluster_give_the_same_and_a_scene_costs_itself_alone(tmp_path):
    make_archive(tmp_path / "in", 24)
    write_ships(tmp_path / "in" / "crash.tif", 90)
    os.mkfifo(tmp_path / "in" / "hangs.tif")
    go(tmp_path / "in", tmp_path / "one", limits=Limits(seconds=5))
    ended = go(tmp_path / "in", tmp_path / "two", limits=Limits(seconds=5), workers=Workers(processes=2))
    assert (ended.counts[DONE], ended.counts[FAILED]) == (24, 2)
    assert content(tmp_path / "one") == content(tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("deadly", [False, True])
def test_a_giant_scene_is_shared_by_all_workers_and_the_same_as_alone(tmp_path, deadly):
    make_archive(tmp_path / "in", 12)
    name = "once-giant" if deadly else "giant"  # kills the first process that takes it
    write_ships(tmp_path / "in" / f"{name}.tif", 70, side=600)
    (tmp_path / "seen").mkdir()
    go(tmp_path / "in", tmp_path / "one")
    (tmp_path / "in" / f"{name}.seen").unlink(missing_ok=True)
    work = BrightWork(seen=str(tmp_path / "seen"), pause=0.2)
    assert go(tmp_path / "in", tmp_path / "two", work=work, workers=Workers(processes=2)).whole
    assert content(tmp_path / "two") == content(tmp_path / "one")
    told = [path.name.rsplit(" ", 1) for path in (tmp_path / "seen").iterdir() if "giant" in path.name]
    parts = {task: worker for task, worker in told if "(" in task}
    assert len(parts) >= 6
    # Where a process has to start anew, the other worker may have done all of it by then.
    assert deadly or len(set(parts.values())) == 2
    assert not (tmp_path / "two" / ".parts").exists()


@pytest.mark.slow
def test_parts_of_a_giant_scene_that_a_killed_run_left_are_not_done_again(tmp_path):
    write_ships(tmp_path / "in" / "giant.tif", 70, side=600)
    (tmp_path / "seen").mkdir()
    go(tmp_path / "in", tmp_path / "one")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\nfrom bright_archive import *\n"
        "if __name__ == '__main__':\n"
        "    go(Path(sys.argv[2]), Path(sys.argv[3]), BrightWork(pause=1), workers=Workers(processes=2))"
    )
    command = [sys.executable, "-c", code, str(TESTS), str(tmp_path / "in"), str(tmp_path / "two")]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        wait_for(lambda: list((tmp_path / "two").glob(".parts/*/*/*.arrow")), 60)
        os.killpg(process.pid, signal.SIGKILL)
    left = {path: path.stat().st_mtime_ns for path in (tmp_path / "two").glob(".parts/*/*/*.arrow")}
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        found: dict[Path, int] = {}
        while process.poll() is None:
            with suppress(FileNotFoundError):
                found |= {
                    path: path.stat().st_mtime_ns for path in (tmp_path / "two").glob(".parts/*/*/*.arrow")
                }
            time.sleep(0.01)
    assert process.returncode == 0 and len(left) and len(found) > len(left)
    assert {path: found[path] for path in left} == left
    assert content(tmp_path / "two") == content(tmp_path / "one")


def content(results: Path) -> dict[str, object]:
    """All that a run leaves, recorded times aside."""
    found: dict[str, object] = {}
    for name, row in rows(results).items():
        told = {
            k: row[k] for k in ("state", "tiles", "tiles_failed", "detections", "classes", "output", "sensor")
        }
        if row["output"]:
            result = read_result(results / row["output"])
            told["features"] = result.features.to_wkb().to_csv()
            told["coverage"] = result.coverage.to_wkb().to_csv()
            told["provenance"] = {
                k: v for k, v in result.provenance.items() if k not in ("started", "finished")
            }
        found[name] = told
    files = {str(p.relative_to(results)) for p in (results / "results").rglob("*") if p.is_file()}
    return found | {"files": files}


def test_one_folder_is_one_runs_and_the_other_is_named(tmp_path):
    make_archive(tmp_path / "in", 1)
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out"), pytest.raises(OutputError, match=rf"in use by process {os.getpid()} on "):
        go(tmp_path / "in", tmp_path / "out")
    assert go(tmp_path / "in", tmp_path / "out").whole


def test_a_run_that_cannot_start_says_why(tmp_path):
    make_archive(tmp_path / "in", 1)
    with pytest.raises(WeightsError, match='no weights "nothing"'):
        go(tmp_path / "in", tmp_path / "out", work=RealWork(weights="nothing"))
    assert rows(tmp_path / "out")["s000.tif"]["attempts"] == 0
    with pytest.raises(ParameterError, match=r"no Dask scheduler answers at tcp://127\.0\.0\.1:9"):
        go(tmp_path / "in", tmp_path / "out", workers=Workers(scheduler="tcp://127.0.0.1:9", patience=0.5))


class RealWork(BrightWork):
    """With weights that must be there."""

    def load(self):
        from babelrs_geo.archive.work import Detection

        return Detection.load(self)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"suffix": ".shp"}, "no kind of result"),
        ({"attempts": 0}, "attempts is 0"),
        ({"watch": 0.0}, "watch is 0.0 s"),
        ({"limits": Limits(seconds=-1)}, "time limit is -1"),
    ],
)
def test_options_that_cannot_work_are_refused(options, words):
    with pytest.raises(ParameterError, match=words):
        RunOptions(**options)


def test_geopackages_and_a_scene_without_georeference(tmp_path):
    make_archive(tmp_path / "in", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        ships = write_ships(tmp_path / "in" / "plain.tif", 4, crs=None)
    assert go(tmp_path / "in", tmp_path / "out", suffix=".gpkg").whole
    row = rows(tmp_path / "out")["plain.tif"]
    assert row["footprint"] is None and row["reason"].startswith("caution: plain.tif has no georeference")
    assert (
        len(gpd.read_file(tmp_path / "out" / row["output"], layer="detections")) == ships == row["detections"]
    )
    item = json.loads((tmp_path / "out" / row["output"]).with_suffix(".json").read_text())
    assert item["geometry"] is None and "bbox" not in item


def test_what_is_secret_in_an_address_is_in_no_file_and_no_reason(tmp_path):
    manifest = tmp_path / "m.txt"
    manifest.write_text("http://me:topsecret@127.0.0.1:9/a.tif?X-Amz-Signature=topsecret\n")
    ended = go([str(manifest)], tmp_path / "out", limits=Limits(seconds=20), attempts=1)
    assert ended.counts[FAILED] == 1
    assert rows(tmp_path / "out")["a.tif"]["source"] == "http://127.0.0.1:9/a.tif"
    for path in (tmp_path / "out").rglob("*"):
        assert not path.is_file() or b"topsecret" not in path.read_bytes(), path


@pytest.mark.parametrize(
    ("kind", "network"),
    [
        ("ext4", False),
        ("fuseblk", False),
        ("overlay", False),
        ("nfs4", True),
        ("smb3", True),
        ("ceph", True),
        ("fuse.ceph-fuse", True),
        ("fuse.glusterfs", True),
        ("fuse.sshfs", True),
    ],
)
def test_network_file_systems_are_known_by_what_their_mounts_are_called(tmp_path, monkeypatch, kind, network):
    (tmp_path / "the share").mkdir()
    place = str(tmp_path / "the share").replace(" ", "\\040")
    lines = f"27 1 254:0 / / rw - ext4 /dev/vda rw\n28 27 0:25 / {place} rw shared:1 - {kind} caf\xe9:/x rw\n"
    (tmp_path / "mountinfo").write_bytes(lines.encode("latin-1"))
    monkeypatch.setattr("babelrs_geo.archive.ledger._MOUNTS", tmp_path / "mountinfo")
    assert on_network(tmp_path / "the share") is network and on_network(tmp_path) is False


@pytest.fixture
def read_only() -> Iterator[Path]:
    """An archive that was copied to where one may read and not write."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        with Ledger(folder, write=True) as ledger:
            ledger.plan([Item("a", "a"), Item("b", "b", fault="no scene")])
        assert [path.name for path in folder.iterdir()] == ["ledger.sqlite"]
        folder.chmod(0o555)
        root = os.geteuid() == 0
        if root:  # who writes whatever the permissions say
            os.seteuid(65534)
        try:
            yield folder
        finally:
            if root:
                os.seteuid(0)
            folder.chmod(0o755)


def test_an_archive_that_cannot_be_written_is_read_and_a_run_is_told_in_one_line(read_only):
    with Ledger(read_only) as ledger:
        assert ledger.counts()["planned"] == 1 and ledger.failures() == [("b", "no scene")]
    with (
        pytest.raises(OutputError, match=r"run\.lock cannot be written \(Permission denied\)"),
        locked(read_only),
    ):
        pass
    for verb, code, words in [
        ("status", 0, "failed: b: no scene"),
        ("verify", 0, ""),
        ("export", 1, "cannot be written ([Errno 13] Permission denied"),
        ("retry", 1, "run.lock cannot be written (Permission denied)"),
    ]:
        where = ["-o", str(read_only / "all")] if verb == "export" else []
        done = CliRunner().invoke(cli.main, ["archive", verb, str(read_only), *where])
        assert done.exit_code == code and words in done.stderr and done.stderr.count("\n") == bool(words)


def test_the_ledger_says_which_journal_suits_the_folder(tmp_path):
    assert on_network(tmp_path) is False
    with Ledger(tmp_path, write=True) as ledger:
        assert ledger.one("PRAGMA journal_mode") == "wal"
        ledger.plan([Item("a", "a")])
    with pytest.raises(ParameterError, match="holds no archive"):
        Ledger(tmp_path / "elsewhere")


def test_turns_go_by_attempts_then_priority_then_size(tmp_path):
    sizes = {"small": (0.0, 1), "urgent": (5.0, 1), "large": (0.0, 9), "unknown": (0.0, None)}
    with Ledger(tmp_path, write=True) as ledger:
        ledger.plan(Item(name, name, priority=p, size=s) for name, (p, s) in sizes.items())
        first = ledger.take(2)
        assert [row.source for row in first] == ["urgent", "large"]
        ledger.settle([(row.id, {"state": "planned"}) for row in first])
        assert [row.source for row in ledger.take(4)] == ["small", "unknown", "urgent", "large"]
        ledger.begin("x")  # as after a kill: what ran is planned, and its attempt does not count
        assert [row.attempts for row in ledger.take(4)] == [0, 0, 1, 1]


def test_watching_takes_up_new_scenes_until_stopped(tmp_path):
    make_archive(tmp_path / "in", 1)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\nfrom bright_archive import go\nfrom pathlib import Path\n"
        "go(Path(sys.argv[2]), Path(sys.argv[3]), watch=0.2)"
    )
    command = [sys.executable, "-c", code, str(TESTS), str(tmp_path / "in"), str(tmp_path / "out")]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            wait_for(lambda: done(tmp_path / "out") == 1)
            make_archive(tmp_path / "in", 3)
            wait_for(lambda: done(tmp_path / "out") == 3)
        finally:
            process.kill()


def done(results: Path) -> int:
    if not (results / "ledger.sqlite").exists():
        return 0
    try:
        with Ledger(results) as ledger:
            return int(ledger.one("SELECT count(*) FROM scenes WHERE state = 'done'"))
    except OutputError:
        return 0  # its tables are being made


def wait_for(happened, seconds=30.0):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "did not happen"
        time.sleep(0.05)


def test_the_options_of_the_tests_are_those_of_detect():
    assert SMALL.tile == 48
