"""Runs that are ended at random moments, by whatever ends programs, and continued: the results are those of an
undisturbed run, and the ledger is true at every moment.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from bright_archive import go, make_archive, write_ships
from kills import end_at_random
from test_archive_run import content, done

from babelrs_geo.archive.check import verify
from babelrs_geo.archive.ledger import Ledger

TESTS = Path(__file__).parent


def command(scenes: Path, results: Path, **asked: float) -> list[str]:
    return [sys.executable, str(TESTS / "bright_archive.py"), str(scenes), str(results), json.dumps(asked)]


def assert_true(results: Path) -> None:
    """Every done row has its output, whole and with its count; nothing else is said of a killed run's files."""
    if (results / "ledger.sqlite").exists():
        with Ledger(results) as ledger:
            assert verify(ledger).faults == ()


def disturbed(
    scenes: Path, results: Path, kinds: Sequence[str], draw: random.Random, last: bool = True, **asked: float
) -> None:
    """A run that is ended once for every kind, a random while after it has got on, and continued each time."""
    total = len(list(scenes.glob("*.tif")))
    for kind in kinds:
        until = min(total - 1, done(results) + draw.randint(0, max(1, total // 10)))
        if kind == "disk":
            limit = draw.randint(20_000, 200_000)
            ended = subprocess.run(
                command(scenes, results, **asked),
                stderr=subprocess.PIPE,
                text=True,
                preexec_fn=lambda limit=limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
                timeout=120,
            )
            assert ended.returncode in (0, 1), ended.stderr
            assert ended.returncode == 0 or len(ended.stderr.splitlines()) == 1, ended.stderr
        elif kind == "worker":
            kill_a_worker(command(scenes, results, **asked), results, draw)
        else:
            number = signal.SIGKILL if kind == "kill" else signal.SIGTERM
            end_at_random(
                command(scenes, results, **asked), lambda: done(results), until, draw, None, (number,)
            )
        assert_true(results)
    if not last:
        return
    finish = subprocess.run(command(scenes, results, **asked), stderr=subprocess.PIPE, text=True, timeout=200)
    assert finish.returncode == 0, finish.stderr
    assert_true(results)


def kill_a_worker(run: list[str], results: Path, draw: random.Random) -> None:
    """Kill processes that work for a run, each time after it has got on; the run goes on to its end."""
    mark = f"CHAOS={draw.random()}"
    name, _, value = mark.partition("=")
    with subprocess.Popen(run, stderr=subprocess.PIPE, text=True, env=os.environ | {name: value}) as process:
        victims, until = 0, done(results)
        while process.poll() is None and victims < 3:
            cells = cells_of(mark) if done(results) > until else []
            if cells:
                until = done(results)
                with suppress(ProcessLookupError):
                    os.kill(draw.choice(cells), signal.SIGKILL)
                victims += 1
            try:
                process.wait(draw.uniform(0, 0.1))
            except subprocess.TimeoutExpired:
                continue
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said


def cells_of(mark: str) -> list[int]:
    """Processes that work on scenes, and have the mark in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                words = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
                if b"babelrs_geo.archive.cell" in words and mark.encode() in words:
                    found.append(int(entry.name))
    return sorted(found)


def test_ended_in_every_way_and_continued_the_results_are_the_same(tmp_path):
    make_archive(tmp_path / "in", 20)
    go(tmp_path / "in", tmp_path / "calm")
    draw = random.Random(7)
    disturbed(
        tmp_path / "in", tmp_path / "out", ["kill", "disk", "term", "worker"], draw, pause=0.02, attempts=9
    )
    assert content(tmp_path / "out") == content(tmp_path / "calm")


@pytest.mark.slow
def test_ten_moments_some_of_them_on_two_workers(tmp_path):
    make_archive(tmp_path / "in", 50)
    go(tmp_path / "in", tmp_path / "calm")
    draw = random.Random(11)
    some, rest = ["kill", "term", "disk", "kill", "disk", "kill", "term"], ["kill", "term", "worker"]
    disturbed(tmp_path / "in", tmp_path / "out", some, draw, last=False, pause=0.02, attempts=9)
    disturbed(tmp_path / "in", tmp_path / "out", rest, draw, processes=2, pause=0.02, attempts=9)
    assert content(tmp_path / "out") == content(tmp_path / "calm")


@pytest.mark.slow
def test_a_disk_that_is_full_stops_the_run_in_one_line_and_it_goes_on_when_there_is_room(tmp_path):
    make_archive(tmp_path / "in", 12)
    out = tmp_path / "small"
    out.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(out)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no right to mount a small disk here")
    try:
        results = out / "results"
        ended = subprocess.run(
            command(tmp_path / "in", results), stderr=subprocess.PIPE, text=True, timeout=120
        )
        assert ended.returncode == 1, ended.stderr
        (line,) = ended.stderr.splitlines()
        assert "check the disk's space" in line
        assert_true(results)
        subprocess.run(["mount", "-o", "remount,size=30m", str(out)], check=True)
        again = subprocess.run(
            command(tmp_path / "in", results), stderr=subprocess.PIPE, text=True, timeout=120
        )
        assert again.returncode == 0, again.stderr
        go(tmp_path / "in", tmp_path / "calm")
        assert content(results) == content(tmp_path / "calm")
    finally:
        subprocess.run(["umount", str(out)], check=True)


def test_the_check_sees_what_is_wrong(tmp_path):
    """A verdict that is clean at every moment means nothing unless it can be another."""
    make_archive(tmp_path / "in", 3)
    write_ships(tmp_path / "in" / "more.tif", 40)
    go(tmp_path / "in", tmp_path / "out")
    with Ledger(tmp_path / "out") as ledger:
        outputs = [row["output"] for row in ledger.rows("SELECT output FROM scenes ORDER BY id")]
    folder = tmp_path / "out"
    (folder / outputs[0]).unlink()
    (folder / outputs[1]).write_bytes((folder / outputs[2]).read_bytes()[:-100])
    with Ledger(folder, write=True) as ledger:
        ledger.settle([(3, {"detections": 99})])
        found = {row: fault for row, _, fault in verify(ledger).faults}
    assert set(found) == {1, 2, 3} or set(found) == {2, 3, 1}
    assert "is missing" in " ".join(found.values()) and "the ledger 99" in " ".join(found.values())
