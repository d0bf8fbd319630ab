"""Law 6: the same content by one process or many, in any order, killed and resumed; with real Dask workers that die."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import dask
import numpy as np
import pytest
import torch
from distributed import LocalCluster
from hypothesis import given, settings
from hypothesis import strategies as st
from kills import drafts, end_at_random, last_words
from simple_scenes import bright_detector, canvas, write_scene
from test_checkpoints import header
from test_inference import ArrayScene
from tiny_model import TINY

from babelrs_geo import cluster
from babelrs_geo.cluster import Workers, connect, held_back
from babelrs_geo.detect.crew import _shared_threads
from babelrs_geo.detections import Detections
from babelrs_geo.errors import OutputError, ParameterError, SceneError, SchedulerError
from babelrs_geo.inference import FAILED, INVALID, Group, InferenceOptions, Look, Part, gather, over_dask, run
from babelrs_geo.inference.spool import Spool
from babelrs_geo.models import checkpoints
from babelrs_geo.models.detector import Detector
from babelrs_geo.scenes import open_scene
from babelrs_geo.tiling import Grid

ODD = 77  # a pixel of this value makes the detector fail
SIDE = 300


@dataclass(frozen=True)
class Bright:
    """Makes `bright_detector`; a process that does leaves a file in `seen`. Who finds `trap` removes it and dies."""

    seen: str
    trap: str = ""
    full: bool = False
    deadly: bool = False
    """Whether an odd pixel costs the worker, not only the group."""

    def __call__(self):
        Path(self.seen, str(os.getpid())).touch()

        def detector(images):
            if self.trap and Path(self.trap).exists():
                Path(self.trap).unlink()
                os.kill(os.getpid(), signal.SIGKILL)
            if self.full:
                raise RuntimeError("CUDA out of memory")
            if np.isclose(images, ODD / 255).any():
                if self.deadly:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise ValueError("an odd\npixel")
            return bright_detector(images)

        return [detector]


def town(path: Path, seed: int = 0):
    draw = np.random.default_rng(seed)
    image = canvas(SIDE, SIDE, [(x, y, 9, 5) for x, y in draw.integers(0, 19, (40, 2)) * 15])
    return write_scene(path, image)


def look_at(scene) -> Look:
    grid = Grid(scene.width, scene.height, tile=48, overlap=16)
    return Look(scene, grid, options=InferenceOptions(batch=2))


def same(one, other) -> bool:
    (found, ground), (others, its) = one, other
    arrays = ("boxes", "scores", "labels")
    equal = all(np.array_equal(getattr(found, name), getattr(others, name)) for name in arrays)
    return equal and len(found) > 0 and ground.states == its.states and ground.reasons == its.reasons


@pytest.fixture(scope="module")
def client():
    with connect(Workers(processes=2)) as client:
        yield client


def alone(look: Look):
    return run(look.scene, bright_detector, look.grid, options=look.options)


def test_workers_give_the_same_and_load_once_each(tmp_path, client):
    (tmp_path / "seen").mkdir()
    with open_scene(town(tmp_path / "town.tif"), "sar") as scene:
        look, ticks = look_at(scene), []
        assert len(look.groups(np.ones(len(look.grid), bool))) >= 5
        crew = over_dask.crew(client, look, Bright(str(tmp_path / "seen")))
        found = gather(look, crew, progress=lambda *told: ticks.append(told))
        assert same(found, alone(look))
        assert ticks == sorted(ticks) and ticks[-1] == (len(look.grid), len(look.grid))
    pids = {int(path.name) for path in (tmp_path / "seen").iterdir()}
    assert len(pids) == 2 and pids == set(client.run(os.getpid).values())


def test_a_worker_that_dies_costs_nothing(tmp_path, client):
    (tmp_path / "seen").mkdir()
    (tmp_path / "trap").touch()
    with open_scene(town(tmp_path / "town.tif"), "sar") as scene:
        look = look_at(scene)
        load = Bright(str(tmp_path / "seen"), str(tmp_path / "trap"))
        assert same(gather(look, over_dask.crew(client, look, load)), alone(look))
    assert not (tmp_path / "trap").exists() and len(list((tmp_path / "seen").iterdir())) in (2, 3)


def test_a_group_that_keeps_failing_is_told_in_the_coverage_and_memory_is_advised_on(tmp_path, client):
    (tmp_path / "seen").mkdir()
    image = canvas(SIDE, SIDE, [(200, 200, 9, 5)])
    image[10, 10] = ODD
    with open_scene(write_scene(tmp_path / "odd.tif", image), "sar") as scene:
        look = look_at(scene)
        found, ground = gather(look, over_dask.crew(client, look, Bright(str(tmp_path / "seen"))))
        first = look.groups(np.ones(len(look.grid), bool))[0]
        failed = {i for i, state in enumerate(ground.states) if state == FAILED}
        assert failed == set(first.tiles) and len(found) == 1
        assert ground.reasons[0] == "its worker failed (ValueError: an odd pixel)"
        full = over_dask.crew(client, look, Bright(str(tmp_path / "seen"), full=True))
        with pytest.raises(ParameterError, match="out of memory with a batch of 2 tiles of 48 px"):
            gather(look, full)


@pytest.mark.slow
def test_a_group_that_kills_every_worker_costs_its_own_tiles_alone(tmp_path, client):
    (tmp_path / "seen").mkdir()
    image = canvas(SIDE, SIDE, [(200, 200, 9, 5)])
    image[10, 10] = ODD
    with open_scene(write_scene(tmp_path / "odd.tif", image), "sar") as scene:
        look = look_at(scene)
        deadly = Bright(str(tmp_path / "seen"), deadly=True)
        found, ground = gather(look, over_dask.crew(client, look, deadly))
        first = look.groups(np.ones(len(look.grid), bool))[0]
    assert {i for i, state in enumerate(ground.states) if state == FAILED} == set(first.tiles)
    assert len(found) == 1 and "its worker failed (KilledWorker" in ground.reasons[0]


@settings(max_examples=25)
@given(
    data=st.data(),
    stop=st.integers(0, 6),
    away=st.sets(st.integers(0, 9), max_size=3),
    seed=st.integers(0, 3),
)
def test_any_order_any_stop_and_groups_that_could_not_be_read_at_first_give_the_same(
    tmp_path_factory, data, stop, away, seed
):
    folder = tmp_path_factory.mktemp("order")
    with open_scene(town(folder / "town.tif", seed), "sar") as scene:
        look, about = look_at(scene), {"of": seed}
        every = dict(look.parts([bright_detector], look.groups(np.ones(len(look.grid), bool))))

        def crew(groups, tick, most, away=frozenset()):
            for group in data.draw(st.permutations(list(groups)))[:most]:
                asked.append(group.number)
                yield group, unread(group) if group.number in away else every[group]
            if most < len(groups):
                raise KeyboardInterrupt

        asked: list[int] = []
        with suppress(KeyboardInterrupt, SceneError):
            gather(look, partial(crew, most=stop, away=away), keep=Spool(folder / "spool", about))
        kept = Spool(folder / "spool", about, resume=True)
        assert set(kept.parts()) == set(asked) - away
        found = gather(look, partial(crew, most=len(every)), keep=kept)
        assert same(found, alone(look))
        assert not drafts(folder / "spool")


def unread(group: Group) -> Part:
    """What comes of a group while the server that has the scene is away."""
    return Part(None, np.zeros(0, np.int64), tuple((i, FAILED, "away") for i in group.tiles))


parts = st.builds(
    lambda rows, unseen: Part(
        Detections(
            np.array([r[:5] for r in rows], float).reshape(-1, 5),
            np.array([r[5] for r in rows], np.float32),
            np.zeros(len(rows), np.int64),
            ("ship", "plane"),
            oriented=True,
        ),
        np.arange(len(rows), dtype=np.int64),
        tuple((i, INVALID, reason) for i, reason in enumerate(unseen)),
    ),
    st.lists(st.tuples(*[st.floats(-1e6, 1e6)] * 5, st.floats(0, 1, width=32)), max_size=4),
    st.lists(st.text(max_size=9), max_size=3),
)


@given(part=parts, none=st.booleans())
def test_parts_come_back_as_they_were(tmp_path_factory, part, none):
    if none:
        part = Part(None, np.zeros(0, np.int64), part.ended)
    spool = Spool(tmp_path_factory.mktemp("spool") / "parts", {})
    spool.put(3, part)
    (back,) = spool.parts().values()
    assert back.ended == part.ended and np.array_equal(back.tiles, part.tiles)
    assert (back.found is None) == none
    if back.found is not None:
        assert np.array_equal(back.found.boxes, part.found.boxes)
        assert np.array_equal(back.found.scores, part.found.scores)
        assert (back.found.classes, back.found.oriented) == (part.found.classes, True)
    spool.put(4, replace(part, ended=(*part.ended, (9, FAILED, "away"))))
    assert list(spool.parts()) == [3]


def test_parts_of_another_run_are_refused_and_stay(tmp_path):
    spool = Spool(tmp_path / "parts", {"weights": "a", "tile": 640})
    spool.put(0, Part(None, np.zeros(0, np.int64), ()))
    with pytest.raises(OutputError, match=r"an earlier run left 1 parts .* pass --resume to go on"):
        Spool(tmp_path / "parts", {"weights": "a", "tile": 640})
    with pytest.raises(OutputError, match=r"of another run .with other weights.; .* --overwrite"):
        Spool(tmp_path / "parts", {"weights": "b", "tile": 640}, resume=True)
    assert list(Spool(tmp_path / "parts", {"tile": 640, "weights": "a"}, resume=True).parts()) == [0]
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot be written .* --resume"):
        Spool(tmp_path / "file" / "parts", {})


def test_a_torn_part_is_done_again_and_a_torn_note_is_told_of(tmp_path):
    spool = Spool(tmp_path / "parts", {})
    for number in (0, 1, 2):
        spool.put(number, Part(None, np.zeros(0, np.int64), ()))
    (tmp_path / "parts" / "00000000.arrow").write_bytes(b"")
    torn = tmp_path / "parts" / "00000002.arrow"
    torn.write_bytes(torn.read_bytes()[:-40])
    assert list(spool.parts()) == [1]
    (tmp_path / "parts" / "run.json").write_bytes(b"")
    with pytest.raises(OutputError, match=r"run\.json cannot be read .* --overwrite"):
        Spool(tmp_path / "parts", {}, resume=True)


def test_groups_are_whole_batches_and_hold_every_wanted_tile_once(tmp_path):
    with open_scene(town(tmp_path / "town.tif"), "sar") as scene:
        look = look_at(scene)
        wanted = np.random.default_rng(0).random(len(look.grid)) < 0.7
        groups = look.groups(wanted)
    assert sorted(i for g in groups for i in g.tiles) == np.flatnonzero(wanted).tolist()
    assert [g.number for g in groups] == list(range(len(groups))) and isinstance(groups[0], Group)
    assert {len(g.tiles) for g in groups[:-1]} == {
        2
    }  # one batch: there are fewer than two for each of 32 groups
    wide = Grid(9000, 9000, tile=48, overlap=16)
    many = replace(look, grid=wide, scene=ArrayScene(np.zeros((9000, 9000), np.uint8)))
    assert {len(g.tiles) for g in many.groups(np.ones(len(wide), bool))[:-1]} == {16}


# The command ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    checkpoints.save(path, Detector(TINY), header())
    return path


def command(folder: Path, weights: Path, output: str, *more: str) -> list[str]:
    words = ["detect", str(folder / "town.tif"), "--sensor", "sar", "--weights", str(weights)]
    words += ["-o", str(folder / output), "--gsd", "native", "--tile", "32", "--overlap", "8"]
    return [sys.executable, "-m", "babelrs_geo", *words, "--batch", "1", "--score", "0.01", *more]


ENVIRONMENT = os.environ | {"OGR_CURRENT_DATE": "2026-01-01T00:00:00Z", "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_killed_at_random_and_resumed_the_file_is_the_same_to_the_byte(tmp_path, weights):
    town(tmp_path / "town.tif")
    subprocess.run(command(tmp_path, weights, "whole.gpkg", "--quiet"), env=ENVIRONMENT, check=True)
    draw, spool = random.Random(0), tmp_path / ".cut.gpkg.parts"
    resumed = command(tmp_path, weights, "cut.gpkg", "--quiet", "--resume")
    kills = 0
    for until in (1, 4, 8, 12, 16):
        kills += end_at_random(
            resumed, lambda: len(list(spool.glob("*.arrow"))), until, draw, environment=ENVIRONMENT
        )
        assert not (tmp_path / "cut.gpkg").exists() or kills < until
    assert kills >= 2
    subprocess.run([*resumed, "--workers", "2"], env=ENVIRONMENT, check=True)
    assert not spool.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut.gpkg", "town.tif", "whole.gpkg"]
    assert rows(tmp_path / "cut.gpkg") == rows(tmp_path / "whole.gpkg")


def rows(path: Path):
    import geopandas as gpd

    tables = [gpd.read_file(path, layer=layer) for layer in ("detections", "coverage")]
    assert len(tables[0]) > 0
    return [table.to_json() for table in tables]


@pytest.mark.slow
def test_told_to_stop_it_says_how_to_go_on(tmp_path, weights):
    town(tmp_path / "town.tif")
    spool = tmp_path / ".out.gpkg.parts"
    words = command(tmp_path, weights, "out.gpkg", "--quiet")
    with subprocess.Popen(
        words, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        while not list(spool.glob("*.arrow")):
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        told = last_words(process)
    assert process.returncode == 130
    assert told == (
        "babelrs-geo: error: stopped, and what is done is kept: run the same with --resume, and it goes on\n"
    )
    assert not (tmp_path / "out.gpkg").exists() and list(spool.glob("*.arrow"))
    refused = subprocess.run(
        command(tmp_path, weights, "out.gpkg", "--quiet"), env=ENVIRONMENT, capture_output=True, text=True
    )
    assert refused.returncode == 1 and "pass --resume to go on, or --overwrite" in refused.stderr
    subprocess.run(command(tmp_path, weights, "out.gpkg", "--quiet", "--resume"), env=ENVIRONMENT, check=True)
    assert (tmp_path / "out.gpkg").exists() and not spool.exists()


def interrupted(step: list[str]) -> None:
    """Ctrl+C in the middle of a step that is then ended."""
    signal.raise_signal(signal.SIGINT)
    step.append("ended")


def test_an_interrupt_waits_for_the_end_of_a_step():
    step: list[str] = []
    with held_back() as answer:
        answer()
        interrupted(step)
        with held_back() as inner, pytest.raises(KeyboardInterrupt):
            assert step.pop() == "ended"
            inner()
        answer()  # it was answered
        interrupted(step)
        with pytest.raises(KeyboardInterrupt):  # a second does not wait
            interrupted(step)
        assert step == ["ended"]
    with pytest.raises(KeyboardInterrupt), held_back():
        interrupted(step)
    assert step == ["ended", "ended"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_an_interrupt_of_a_run_waits_for_the_end_of_a_step(tmp_path):
    with open_scene(town(tmp_path / "town.tif"), sensor="sar") as scene:
        look, step = look_at(scene), list[str]()
        with pytest.raises(KeyboardInterrupt):
            run(scene, bright_detector, look.grid, progress=lambda *_: interrupted(step))
        assert step == ["ended"]


_SLEEPERS = """
import os, time
from babelrs_geo.cluster import pool

if __name__ == "__main__":
    with pool(2) as workers:
        for _ in range(2):
            workers.submit(time.sleep, 600)
        print(*workers._processes, flush=True)
"""


def test_local_processes_end_with_the_one_that_started_them(tmp_path):
    script = tmp_path / "sleepers.py"
    script.write_text(_SLEEPERS)
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as parent:
        assert parent.stdout is not None
        workers = parent.stdout.readline().split()
        assert len(workers) == 2 and all(map(runs, workers))
        parent.kill()
    end = time.monotonic() + 30
    while any(map(runs, workers)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(runs, workers))


def test_a_schedulers_file_is_waited_for_and_an_interrupt_meanwhile_is_answered(tmp_path):
    """A batch job starts the scheduler and what connects to it at once."""
    path = tmp_path / "scheduler.json"

    def refused(patience, told):
        with (
            pytest.raises(ParameterError, match=told),
            connect(Workers(scheduler=str(path), patience=patience)),
        ):
            pass

    refused(0.1, r"scheduler\.json is not there after 0\.1 s; start dask scheduler --scheduler-file ")
    path.touch()
    writer = threading.Timer(0.2, path.write_text, ['{"address": "tcp://127.0.0.1:9"}'])
    writer.start()
    refused(1, r"no Dask scheduler answers at .*scheduler\.json")
    writer.join()
    path.write_text("{}")
    refused(60, r"is not what a Dask scheduler writes \(KeyError")
    path.unlink()
    threading.Timer(0.2, signal.raise_signal, [signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt), held_back(), connect(Workers(scheduler=str(path), patience=60)):
        pass


def test_a_lost_connection_ends_in_one_line_that_says_how_to_go_on(tmp_path):
    (tmp_path / "seen").mkdir()
    with open_scene(town(tmp_path / "town.tif"), "sar") as scene:
        look, told = look_at(scene), []

        def drop(done, total):
            if not told:
                told.append(done)
                comm = client.scheduler_comm.comm
                client.loop.add_callback(comm.abort)
                while not comm.closed():
                    time.sleep(0.01)

        with (
            pytest.raises(SchedulerError, match=r"no longer answers .*; what is done is kept: .* --resume"),
            connect(Workers()) as client,
        ):
            gather(look, over_dask.crew(client, look, Bright(str(tmp_path / "seen"))), progress=drop)
    assert told


def test_a_scheduler_without_workers_is_told_of_and_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "IDLE", 0.5)
    (tmp_path / "seen").mkdir()
    with (
        open_scene(town(tmp_path / "town.tif"), "sar") as scene,
        LocalCluster(n_workers=0, threads_per_worker=1, dashboard_address=":0") as theirs,
        connect(Workers(scheduler=theirs.scheduler_address)) as client,
    ):
        look = look_at(scene)
        later = threading.Timer(2, theirs.scale, [1])
        later.start()
        with pytest.warns(UserWarning, match="has no workers: waiting for some"):
            found = gather(look, over_dask.crew(client, look, Bright(str(tmp_path / "seen"))))
        later.join()
        assert same(found, alone(look))


def test_threads_of_a_schedulers_workers_are_their_own():
    assert _shared_threads(Workers(scheduler="tcp://host:8786")) is None
    assert _shared_threads(Workers(processes=2)) == max(1, torch.get_num_threads() // 2)


def test_a_process_that_its_nanny_has_given_up_is_replaced(monkeypatch):
    """As it does where a process dies again and again within its first second: nobody would be left to do the work."""
    monkeypatch.setattr(cluster, "REPLACED", 0.2)
    with dask.config.set({"distributed.deploy.lost-worker-timeout": "1s"}), connect(Workers()) as client:
        (nanny,) = client.cluster.workers.values()
        client.cluster.sync(nanny.close)
        assert client.submit(os.getpid).result(30) != os.getpid()


def runs(pid: str) -> bool:
    """False also for one that has ended, but that nobody has asked yet how."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_with_workers_it_stops_as_cleanly(tmp_path, weights, stop):
    """Ctrl+C in a shell reaches the workers as well."""
    town(tmp_path / "town.tif")
    spool = tmp_path / ".out.gpkg.parts"
    words = command(tmp_path, weights, "out.gpkg", "--quiet", "--workers", "2")
    with subprocess.Popen(
        words, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        while len(list(spool.glob("*.arrow"))) < 3:
            assert process.poll() is None
        os.killpg(process.pid, stop)
        told = last_words(process)
    assert process.returncode == 130
    assert told == (
        "babelrs-geo: error: stopped, and what is done is kept: run the same with --resume, and it goes on\n"
    )
    assert not (tmp_path / "out.gpkg").exists() and not drafts(spool)
