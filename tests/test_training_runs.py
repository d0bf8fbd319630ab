"""Runs on Lightning: killed or resumed they are the same run; what they log, refuse and leave."""

from __future__ import annotations

import csv
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pytest
import shapely
import torch
import yaml
from conftest import NORTH_UP, UTM, Raster, write_raster
from kills import drafts, end_at_random
from safetensors.torch import load_file
from test_datasets import write_soi
from tiny_model import TINY
from tiny_recipe import tiny_recipe, write_recipe

from babelrs_geo import open_scene
from babelrs_geo.chips import ChipOptions, cut_chips, read_index
from babelrs_geo.datasets.published import Published
from babelrs_geo.datasets.seeding import generator
from babelrs_geo.errors import LabelError, ParameterError, SceneError, TrainingError, WeightsError
from babelrs_geo.models import checkpoints
from babelrs_geo.models.plain import from_plain, to_plain
from babelrs_geo.training import step_schedule, validation
from babelrs_geo.training.data import Look, TrainingData
from babelrs_geo.training.loading import Batches
from babelrs_geo.training.recipe import Recipe, read
from babelrs_geo.training.run import Place, Trained, build, configuration, fit
from babelrs_geo.training.trainer import Course, begin
from babelrs_geo.vectors.labels import read_labels

# Python 3.12 warns where a loader's workers are forked from a process with threads
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

STEPS = 5
CLOCKS = {"seconds_a_step", "data_wait", "minutes"}
"""Columns of the log that no two runs share."""


@pytest.fixture(scope="module")
def soi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("soi")
    write_soi(root, images=4)
    return root


def recipe(steps: int = STEPS, **changes: Any) -> Recipe:
    made: Recipe = from_plain(Recipe, tiny_recipe(steps, **changes))
    return made


def run_part(**changes: Any) -> dict[str, Any]:
    return {**tiny_recipe()["run"], **changes}


def run(folder: Path, soi: Path, how: Recipe | None = None, **place: Any) -> Trained:
    return fit(how or recipe(), [soi], Place(folder=folder, device="cpu", **place))


def final(folder: Path) -> dict[str, torch.Tensor]:
    """All that a run ends with: weights, running mean and what the optimizer remembers."""
    state = torch.load(folder / "last.ckpt", weights_only=True)
    held = state["optimizer_states"][0]["state"]
    moments = {f"{k}.{name}": v for k, own in held.items() for name, v in own.items()}
    return {**state["state_dict"], **moments}


def assert_same(one: Path, other: Path) -> None:
    first, second = final(one), final(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def whole(soi: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    done = run(folder, soi)
    assert (done.step, done.stopped, done.best_step) == (STEPS, False, STEPS)
    return folder


def test_workers_and_measurements_change_nothing(whole: Path, soi: Path, tmp_path: Path) -> None:
    how = recipe(run=run_part(workers=2, gradients_every=0, checkpoint_minutes=60))
    run(tmp_path, soi, how)
    assert_same(whole, tmp_path)


def test_a_run_stopped_at_random_steps_goes_on_as_if_nothing_had_happened(
    whole: Path, soi: Path, tmp_path: Path
) -> None:
    stops = sorted(random.Random(3).sample(range(1, STEPS), 2))

    def interrupt(done: int, total: int) -> None:
        if done in stops:
            for worker in multiprocessing.active_children():
                os.kill(
                    int(worker.pid or 0), signal.SIGINT
                )  # as a terminal does, which tells the whole group
            signal.raise_signal(signal.SIGINT)

    seen = recipe(run=run_part(tensorboard=True, workers=1))
    stopped = run(tmp_path, soi, seen, progress=interrupt)
    assert (stopped.step, stopped.stopped) == (stops[0], True)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with pytest.raises(ParameterError, match="holds a run already; go on with it by --resume auto"):
        run(tmp_path, soi)
    with pytest.raises(ParameterError, match=r"differs from the recipe in clip; go on with its own"):
        run(tmp_path, soi, recipe(clip=1.0), resume=True)
    again = run(tmp_path, soi, recipe(run=run_part(checkpoint_minutes=60)), resume=True, progress=interrupt)
    assert (again.step, again.stopped) == (stops[1], True)
    done = run(tmp_path, soi, recipe(run=run_part(tensorboard=True)), resume=True)
    assert len(list((tmp_path / "tensorboard").glob("events.*"))) == 2
    assert (done.step, done.stopped) == (STEPS, False)
    assert_same(whole, tmp_path)
    for mine, theirs in zip(rows(whole), rows(tmp_path), strict=True):
        for name in mine.keys() - CLOCKS:
            assert mine[name] == theirs[name], name
    after = run(tmp_path, soi, resume=True)
    assert (after.step, after.best) == (STEPS, done.best)


def test_a_run_of_so_many_minutes_stops_by_itself(soi: Path, tmp_path: Path) -> None:
    stopped = run(tmp_path, soi, minutes=0.0)
    assert (stopped.step, stopped.stopped) == (1, True)
    assert (tmp_path / "last.ckpt").is_file()


def test_a_lost_worker_ends_the_batches_of_a_run_that_was_told_to_stop(
    whole: Path, soi: Path, tmp_path: Path
) -> None:
    """As where a cluster ends all processes of a run at once: the step in hand is done and saved."""

    def end_all(done: int, total: int) -> None:
        if done == 2:
            for worker in multiprocessing.active_children():
                os.kill(int(worker.pid or 0), signal.SIGTERM)
                worker.join()
            signal.raise_signal(signal.SIGTERM)

    how = recipe(run=run_part(workers=2, checkpoint_minutes=60))
    stopped = run(tmp_path, soi, how, progress=end_all)
    assert (stopped.step, stopped.stopped) == (2, True)
    assert run(tmp_path, soi, how, resume=True).step == STEPS
    assert_same(whole, tmp_path)


def test_a_lost_worker_ends_a_run_that_nobody_stopped_in_one_line(soi: Path, tmp_path: Path) -> None:
    def lose(done: int, total: int) -> None:
        if done == 2:
            os.kill(int(multiprocessing.active_children()[0].pid or 0), signal.SIGKILL)

    how = recipe(40, run=run_part(workers=2))
    with pytest.raises(TrainingError, match=r"^a process that reads data was lost \(DataLoader worker "):
        run(tmp_path, soi, how, progress=lose)
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"]
    assert kept >= 2
    run(tmp_path, soi, how, resume=True, progress=lambda done, total: signal.raise_signal(signal.SIGINT))


@pytest.mark.slow
def test_a_signal_to_the_whole_group_stops_after_the_step_in_hand(soi: Path, tmp_path: Path) -> None:
    how = {"run": run_part(workers=2, checkpoint_minutes=60)}
    config, folder = write_recipe(tmp_path / "tiny.yaml", steps=4000, **how), tmp_path / "run"
    with subprocess.Popen(
        command(folder, soi, config),
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        while process.poll() is None and not (folder / "log.csv").exists():
            time.sleep(0.05)
        time.sleep(random.Random().uniform(0, 1))
        os.killpg(process.pid, signal.SIGTERM)
        told = process.communicate(timeout=60)[1]
    assert process.returncode == 130, told
    step = int(torch.load(folder / "last.ckpt", weights_only=True)["global_step"])
    assert told.splitlines() == [
        f"babelrs-geo: error: stopped after step {step}: run the same with --resume auto, and it goes on"
    ]
    assert rows(folder)[-1]["step"] == str(step)
    assert not drafts(folder)


def command(folder: Path, soi: Path, config: Path, *more: str) -> list[str]:
    given = ["--config", str(config), "--data", str(soi), "-o", str(folder), "--device", "cpu"]
    return [sys.executable, "-m", "babelrs_geo", "train", *given, *more]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


@pytest.mark.slow
def test_ended_at_random_moments_a_run_goes_on_as_if_nothing_had_happened(soi: Path, tmp_path: Path) -> None:
    """Killed or told to stop, soon after steps that are drawn, and once before it has begun."""
    steps = 30
    config, folder, other = (
        write_recipe(tmp_path / "tiny.yaml", steps=steps),
        tmp_path / "ended",
        tmp_path / "whole",
    )
    subprocess.run(command(other, soi, config), env=environment(), check=True)
    again = command(folder, soi, config, "--resume", "auto")

    def logged() -> int:
        return len((folder / "log.csv").read_text().splitlines()) if (folder / "log.csv").exists() else 0

    draw, reached = random.Random(4), [0]
    for until in [0, *sorted(draw.sample(range(2, steps * 2 // 3), 3))]:
        assert end_at_random(again, logged, until, draw, environment(), (signal.SIGKILL, signal.SIGTERM))
        if (folder / "last.ckpt").exists():
            reached.append(int(torch.load(folder / "last.ckpt", weights_only=True)["global_step"]))
    assert reached == sorted(reached) and 0 < reached[-1] < steps
    subprocess.run(again, env=environment(), check=True)
    assert_same(other, folder)
    for name in ("best.safetensors", "final.safetensors"):
        mine, theirs = load_file(folder / name), load_file(other / name)
        assert mine.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in mine.items())
    one, two = (checkpoints.read_header(each / "final.safetensors") for each in (folder, other))
    assert (one.metrics, one.thresholds) == (two.metrics, two.thresholds)
    assert one.training["data_sha256"] == two.training["data_sha256"]
    for mine, theirs in zip(rows(folder), rows(other), strict=True):
        assert all(mine[name] == theirs[name] for name in mine.keys() - CLOCKS)
    assert not drafts(folder)


@pytest.mark.slow
def test_two_processes_see_other_images_and_learn_as_one_that_takes_two_turns(
    soi: Path, tmp_path: Path
) -> None:
    script = tmp_path / "two.py"
    script.write_text(_TWO)
    plain = tiny_recipe(4)
    first = from_plain(Recipe, {**plain, "phases": plain["phases"][:1], "processes": 2})
    run(tmp_path / "alone", soi, first)
    here = str(Path(__file__).parent)
    subprocess.run(
        [sys.executable, str(script), here, str(soi), str(tmp_path / "run")],
        env=environment(),
        check=True,
        timeout=400,
    )
    seen = [np.load(tmp_path / f"run/rank{rank}.npz") for rank in (0, 1)]
    for name in seen[0].files:
        assert name == "draws" or np.array_equal(seen[0][name], seen[1][name]), name
    assert_alike(tmp_path / "run", tmp_path / "alone")
    # two steps of two processes with one image a sensor: each of the four images once
    assert sorted(np.concatenate([each["draws"] for each in seen])) == [
        100 * sensor + k for sensor in range(3) for k in range(4)
    ]
    assert len(rows(tmp_path / "run")) == 3  # two steps and a validation, written once
    assert checkpoints.read_header(tmp_path / "run" / "final.safetensors").metrics["sar"]["images"] == 4


_TWO = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import numpy as np
from tiny_model import TINY
from tiny_recipe import tiny_recipe
from babelrs_geo.datasets.samplers import Mixture
from babelrs_geo.training.module import DetectorTraining
from babelrs_geo.training import step_schedule
from babelrs_geo.training.recipe import Recipe, read
from babelrs_geo.training.run import Place, fit
from babelrs_geo.models.plain import from_plain, to_plain

folder, draws = Path(sys.argv[3]), []
read = Mixture.__getitem__

def noted(self, draw):
    draws.append(("sar", "rgb", "ir").index(draw.source) * 100 + draw.number)
    return read(self, draw)

def end(self):
    weights = {k: v.numpy() for k, v in self.state_dict().items()}
    np.savez(folder / f"rank{self.global_rank}.npz", draws=np.array(draws), **weights)

Mixture.__getitem__, DetectorTraining.on_train_end = noted, end
plain = tiny_recipe(4)
recipe = from_plain(Recipe, {**plain, "phases": plain["phases"][:1], "processes": 2})
fit(recipe, [Path(sys.argv[2])], Place(folder=folder, device="cpu", devices=2))
"""


def assert_alike(one: Path, other: Path) -> None:
    """The same run but for the order of sums."""
    first, second = final(one), final(other)
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-2, atol=1e-3, msg=name)
    for mine, theirs in zip(rows(one), rows(other), strict=True):
        for name in ("loss", "sar_loss", "gradient", "lr", "cosine_sar_ir"):
            assert bool(mine[name]) == bool(theirs[name])
            if mine[name]:
                assert float(mine[name]) == pytest.approx(float(theirs[name]), rel=1e-3, abs=1e-3), name


def test_a_process_takes_the_turns_of_those_that_it_stands_in_for(soi: Path, tmp_path: Path) -> None:
    how = recipe(3, processes=4)
    data = TrainingData(how, configuration(how.model), [soi])

    def parts(rank: int, world: int) -> list[list[Any]]:
        return list(Batches(lambda: data.loaders(1, rank, world)))

    alone = parts(0, 1)
    assert [len(step) for step in alone] == [4, 4]
    for world in (2, 4):
        for rank in range(world):
            for mine, theirs in zip(parts(rank, world), alone, strict=True):
                for one, other in zip(mine, theirs[rank::world], strict=True):
                    assert one.keys() == other.keys()
                    assert all(torch.equal(one[s]["image"], other[s]["image"]) for s in one)
    with pytest.warns(UserWarning, match="written for 4 processes, which this run's 3 cannot share"):
        begin(Course(**course(how, 3)), Place(folder=tmp_path, device="cpu", devices=3))


def test_a_run_goes_on_with_the_data_it_began_with_alone(whole: Path, soi: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "run")
    moved = shutil.copytree(soi, tmp_path / "soi")
    assert run(folder, moved, resume=True).step == STEPS
    assert run(folder, moved, recipe(run=run_part(judge=False)), resume=True).step == STEPS
    label = moved / "DOTA_800pix" / "train" / "annfiles" / "0.txt"
    for text in ("", "30 20 60 20 60 33 30 33 plane 0\n"):
        label.write_text(text)
        with pytest.raises(
            ParameterError, match=r"began with 4 images \(\w+\) as rgb to learn, and --data has 4 "
        ):
            run(folder, moved, resume=True)


def course(how: Recipe, world: int) -> dict[str, Any]:
    return {"settings": how, "turns": how.turns(world)}


def test_a_run_in_turns_that_is_stopped_goes_on_as_if_nothing_had_happened(soi: Path, tmp_path: Path) -> None:
    """Also from a checkpoint of before, in which Lightning itself had counted the steps, and no data were told."""
    how = recipe(3, processes=2, run=run_part(workers=1))
    run(tmp_path / "whole", soi, how)
    stopped = run(tmp_path / "two", soi, how, progress=lambda *_: signal.raise_signal(signal.SIGINT))
    assert stopped.step == 1
    last = tmp_path / "two" / "last.ckpt"
    state = torch.load(last, weights_only=True)
    for counts in state["loops"]["fit_loop"]["epoch_loop.manual_optimization.optim_step_progress"].values():
        counts.update(dict.fromkeys(counts, 0))
    del state["TrainingData"]
    torch.save(state, last)
    assert run(tmp_path / "two", soi, how, resume=True).step == 3
    assert_same(tmp_path / "whole", tmp_path / "two")


def test_the_log_has_each_sensors_losses_gradients_and_their_cosines(whole: Path) -> None:
    train = [row for row in rows(whole) if row["loss"]]
    assert [int(row["step"]) for row in train] == list(range(1, STEPS + 1))
    for row in train:
        parts = [float(row[f"{sensor}_loss"]) for sensor in ("sar", "rgb", "ir")]
        assert sum(parts) == pytest.approx(float(row["loss"]), rel=1e-4)
        assert float(row["gradient"]) > 0
        assert 0 <= float(row["data_wait"]) <= 1
    measured = [row for row in train if row["cosine_rgb_ir"]]
    assert [int(row["step"]) for row in measured] == [1, 3, 5]
    for row in measured:
        for pair in ("sar_rgb", "sar_ir", "rgb_ir"):
            assert -1 <= float(row[f"cosine_{pair}"]) <= 1
        assert all(float(row[f"{sensor}_gradient"]) > 0 for sensor in ("sar", "rgb", "ir"))
    assert [row["step"] for row in rows(whole) if row["val_h_map"]] == [str(STEPS)]


def test_weights_are_of_the_running_mean_with_a_header_that_detect_takes(whole: Path) -> None:
    model, header = checkpoints.load(whole / "final.safetensors")
    assert header.classes["sar"] == ("ship",)
    assert header.gsd["rgb"] == (0.1, 1.0)
    assert all(value >= 0.1 for own in header.thresholds.values() for value in own.values())
    assert header.metrics["h_map"] == 0.0 or header.metrics["sar"]["map"] > 0
    assert header.training["steps"] == STEPS
    state = final(whole)
    stored = load_file(whole / "final.safetensors")
    assert all(torch.equal(v, state[f"mean.{k}"].half()) for k, v in stored.items())
    assert any(not torch.equal(v, state[f"model.{k}"].half()) for k, v in stored.items())
    found = model.predict(torch.rand(1, 3, 64, 64), "rgb")
    assert len(found) == 1


def test_the_weights_of_the_best_validation_are_kept(
    soi: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge, marks = validation.judge, {1: 0.1, 2: 0.3, 3: 0.2}

    def marked(*args: Any, **more: Any) -> validation.Verdict:
        verdict = judge(*args, **more)
        assert verdict is not None
        return replace(verdict, h_map=marks[verdict.step])

    monkeypatch.setattr(validation, "judge", marked)
    how = recipe(3, run=run_part(validate_every=1))
    done = run(tmp_path, soi, how)
    assert (done.best, done.best_step, done.final) == (0.3, 2, 0.2)
    for name, step in (("best", 2), ("final", 3)):
        header = checkpoints.read_header(tmp_path / f"{name}.safetensors")
        assert (header.training["steps"], header.metrics["h_map"]) == (step, marks[step])
    best, last = (load_file(tmp_path / f"{name}.safetensors") for name in ("best", "final"))
    assert any(not torch.equal(value, last[name]) for name, value in best.items())


def test_a_loss_that_is_no_number_stops_with_the_files(
    soi: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from babelrs_geo.models.detector import Detector

    losses = Detector.losses

    def broken(self: Detector, batch: Any) -> dict[str, torch.Tensor]:
        return {k: v * float("nan") if k.startswith("ir") else v for k, v in losses(self, batch).items()}

    monkeypatch.setattr(Detector, "losses", broken)
    with pytest.raises(TrainingError, match=r"step 0: the loss is nan.* ir nan \(\d\.png\)"):
        run(tmp_path, soi)
    assert not (tmp_path / "last.ckpt").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_one_sensor_alone_learns_and_leaves_the_others_heads(soi: Path, tmp_path: Path) -> None:
    how = recipe(2, data={"sensors": ["rgb"], "val": {"rgb": "train"}}, precision="bf16")
    done = run(tmp_path, soi, how)
    assert done.step == 2
    header = checkpoints.read_header(tmp_path / "final.safetensors")
    assert list(header.classes) == ["rgb"]


def test_a_frozen_encoder_stays_as_it_starts_and_the_rest_learns(soi: Path, tmp_path: Path) -> None:
    how = recipe(2)
    how = replace(how, model=replace(how.model, freeze_encoder=True))
    begun = build(how).state_dict()
    run(tmp_path, soi, how)
    learnt = final(tmp_path)
    encoder = build(how).backbone
    reached = {f"backbone.{name}" for name in encoder.reached(encoder.config.vit.depth)}
    same = {name for name, value in begun.items() if torch.equal(value, learnt[f"model.{name}"])}
    assert reached <= same and "backbone.layers.0.attn.qkv.weight" in reached
    assert {
        "backbone.up.weight",
        "neck.lateral_convs.0.conv.weight",
        "ifr_rpn_head.rpn_cls.weight",
    } <= begun.keys() - same


def test_what_a_run_lacks_is_told_before_it_begins(soi: Path, tmp_path: Path) -> None:
    def told(how: Recipe, data: Sequence[Path] = (soi,)) -> str:
        with pytest.raises((LabelError, ParameterError)) as caught:
            fit(how, data, Place(folder=tmp_path / "run", device="cpu"))
        return str(caught.value)

    no_val = told(recipe(data={}))
    assert "after_merge_val.json is missing" in no_val
    assert "is no source of samples" in told(recipe(), [tmp_path])
    assert "do not say how many metres" in told(recipe(header={}))
    (tmp_path / "half").mkdir()
    write_soi(tmp_path / "half")
    for name in ("SARDet_50K", "DroneVehicle"):
        (tmp_path / "half" / name).rename(tmp_path / name)
    lacking = told(recipe(), [tmp_path / "half"])
    assert "nothing to learn from of sar, ir in split train" in lacking
    assert "--set data.sensors=[rgb]" in lacking


def test_a_file_that_cannot_be_read_is_told_by_name_from_a_worker_too(soi: Path, tmp_path: Path) -> None:
    shutil.copytree(soi, tmp_path / "soi")
    for path in (tmp_path / "soi").rglob("images/*.png"):
        path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(SceneError, match=r"^\S+\.png cannot be read as an image .*copy it again$"):
        run(tmp_path / "run", tmp_path / "soi", recipe(run=run_part(workers=1)))


@pytest.mark.parametrize("damage", ["cut", "no archive", "empty", "of others"])
def test_a_checkpoint_that_is_none_is_told(whole: Path, soi: Path, tmp_path: Path, damage: str) -> None:
    last = tmp_path / "last.ckpt"
    if damage == "of others":
        torch.save({"state_dict": {}, "global_step": 3}, last)
    else:
        content = (whole / "last.ckpt").read_bytes()
        last.write_bytes({"cut": content[:5000], "no archive": b"not at all", "empty": b""}[damage])
    with pytest.raises(
        WeightsError, match=r"last\.ckpt (cannot be read|is no checkpoint of a run)"
    ) as caught:
        run(tmp_path, soi, resume=True)
    assert "\n" not in str(caught.value)


def test_a_run_of_an_earlier_version_goes_on_where_its_recipe_says_less(
    whole: Path, soi: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(whole, tmp_path / "run")
    state = torch.load(folder / "last.ckpt", weights_only=True)
    plain = yaml.safe_load(state["recipe"])
    for key, value, odd in (("every", None, ""), ("every", 2, "data.every"), ("of_old", 1, "data.of_old")):
        data = {k: v for k, v in plain["data"].items() if k != "every"} | ({key: value} if value else {})
        torch.save({**state, "recipe": yaml.safe_dump({**plain, "data": data})}, folder / "last.ckpt")
        if odd:
            with pytest.raises(ParameterError, match=f"differs from the recipe in .*{odd}"):
                run(folder, soi, resume=True)
        else:
            assert run(folder, soi, resume=True).step == STEPS


def test_scenes_that_a_file_names_badly_are_told(soi: Path, tmp_path: Path) -> None:
    how, path = recipe(data={"sensors": ["rgb"]}), tmp_path / "scenes.yaml"
    good = {
        "sensor": "rgb",
        "scenes": ["a.tif"],
        "labels": "l.gpkg",
        "split": "train",
        "size": 64,
        "stride": 64,
    }
    for text, told in (
        ("scenes: [a.tif", "does not name scenes"),
        (yaml.safe_dump(good | {"size": "big"}), "size is 'big'; expected a whole number"),
        (yaml.safe_dump(good | {"stride": 0}), "stride is 0; expected 1 or more"),
        (yaml.safe_dump(good | {"sensor": "thermal"}), "sensor is 'thermal'; expected one of sar, rgb, ir"),
        ("sensor: rgb", "scenes is missing"),
    ):
        path.write_text(text)
        with pytest.raises(LabelError, match=told):
            TrainingData(how, configuration(how.model), [path])


def test_half_precision_on_a_cpu_is_refused(soi: Path, tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="precision 16 needs a GPU"):
        run(tmp_path, soi, recipe(precision="16"))


def test_chips_and_scenes_are_learnt_from_too(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(20, 60, (3, 256, 256), dtype=np.uint8)
    corners = [(20 + 64 * i, 30 + 64 * j) for i in range(4) for j in range(4)]
    shapes = []
    for x, y in corners:
        picture[:, y : y + 12, x : x + 24] = 240
        places = [(x, y), (x + 24, y), (x + 24, y + 12), (x, y + 12)]
        shapes.append(shapely.Polygon([NORTH_UP @ place for place in places]))
    write_raster(tmp_path / "scene", Raster(picture))
    gpd.GeoDataFrame({"class": ["plane"] * len(shapes)}, geometry=shapes, crs=UTM).to_file(
        tmp_path / "labels.gpkg"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a split that stays empty is told
        cut_chips(
            [open_scene(tmp_path / "scene.tif", "rgb")],
            tmp_path / "chips",
            [read_labels(tmp_path / "labels.gpkg")],
            ChipOptions(size=64, overlap=0, split=(0.5, 0.5, 0), block=1),
        )
    scenes = {"sensor": "rgb", "scenes": ["scene.tif"], "labels": "labels.gpkg", "split": "train"}
    (tmp_path / "scenes.yaml").write_text(yaml.safe_dump({**scenes, "size": 128, "stride": 128}))
    how = recipe(2, data={"sensors": ["rgb"], "background": False}, header={})
    data = TrainingData(how, configuration(how.model), [tmp_path / "chips", tmp_path / "scenes.yaml"])
    chips = read_index(tmp_path / "chips")
    learnt, judged = ((chips["split"] == split).sum() for split in ("train", "val"))
    assert len(data.learn["rgb"].samples) == learnt + 4
    assert len(data.judge["rgb"].samples) == judged > 0
    names = {data.learn["rgb"].samples[i]["name"] for i in range(learnt + 4)}
    assert len(names) == learnt + 1  # four windows of one scene
    some = recipe(2, data={"sensors": ["rgb"], "background": False, "every": 3}, header={})
    thinned = TrainingData(some, data.config, [tmp_path / "chips", tmp_path / "scenes.yaml"])
    shown = [thinned.learn["rgb"].samples[i]["name"] for i in range(len(thinned.learn["rgb"].samples))]
    every = [data.learn["rgb"].samples[i]["name"] for i in range(learnt + 4)]
    assert shown == [*every[:learnt:3], *every[learnt::3]]  # of each source
    assert len(thinned.judge["rgb"].samples) == judged
    fit(how, [tmp_path / "chips", tmp_path / "scenes.yaml"], Place(folder=tmp_path / "run", device="cpu"))
    header = checkpoints.read_header(tmp_path / "run" / "best.safetensors")
    assert data.contents["rgb to learn"].startswith(f"{learnt + 4} images (")
    with next((tmp_path / "chips").rglob("*.tif")).open("ab") as file:
        file.write(b" ")
    other = TrainingData(how, data.config, [tmp_path / "chips", tmp_path / "scenes.yaml"])
    assert other.contents != data.contents
    metre = abs(NORTH_UP.a)
    assert header.gsd["rgb"] == pytest.approx((metre / 1.25, metre * 1.25), rel=0.02)
    assert header.metrics["rgb"]["images"] == judged


def test_the_published_pipeline_runs_and_draws_again_where_nothing_is_left(soi: Path) -> None:
    views = {sensor: {"published": {"size": 96}} for sensor in ("sar", "rgb", "ir")}
    quota = {"sar": 2, "rgb": 1, "ir": 1}
    how = recipe(3, phases=[{"steps": 3, "quota": quota, "views": views}])
    data = TrainingData(how, configuration(how.model), [soi])
    batches = [part for (part,) in Batches(lambda: data.loaders(0))]
    batch = batches[0]
    assert len(batches) == 3
    assert [len(batch[s]["targets"]) for s in quota] == [2, 1, 1]
    assert batch["rgb"]["image"].shape == (1, 3, 96, 96)
    (target,) = batch["ir"]["targets"]
    assert target.labels.tolist() == [data.config.labels("ir").start + 1]
    assert target.size == (75, 96)
    (later,) = next(iter(Batches(lambda: data.loaders(2))))
    assert all(torch.equal(later[s]["image"], batches[2][s]["image"]) for s in quota)
    nothing = Look(Published(size=96, smallest=1000), data.learn["rgb"].samples, 0)
    with pytest.raises(LabelError, match="show no object"):
        nothing(data.learn["rgb"].samples[0], generator(0))


def test_soi_det_runs_on_a_smaller_network(soi: Path, tmp_path: Path) -> None:
    plain = to_plain(read("soi-det"))
    plain["model"] = tiny_recipe()["model"] | {"checkpoint_gradients": True}
    plain["data"]["val"] = plain["data"]["train"]
    (phase,) = plain["phases"]
    phase["steps"] = 2
    for view in phase["views"].values():
        view["published"]["size"] = 64
    plain["run"] |= {"workers": 0, "log_every": 1, "tensorboard": False}
    how: Recipe = from_plain(Recipe, plain)
    data = TrainingData(how, configuration(how.model), [soi])
    step = next(iter(Batches(lambda: data.loaders(0))))
    assert [{s: len(own["names"]) for s, own in part.items()} for part in step] == 8 * [
        {"sar": 2, "rgb": 1, "ir": 1}
    ]
    run(tmp_path, soi, how)  # alone, and with the batch of eight processes
    train = [row for row in rows(tmp_path) if row["loss"]]
    rates = [float(row["lr"]) for row in train]
    assert rates == pytest.approx([5e-5 * step_schedule(step) for step in range(2)], rel=1e-5)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    groups = state["optimizer_states"][0]["param_groups"]
    lowest = min(group["base"] for group in groups)
    assert lowest == pytest.approx(5e-5 * 0.95 ** (TINY.backbone.vit.depth + 1))
    assert not [k for k in state["state_dict"] if k.startswith("mean.")]


def test_a_detector_with_other_classes_is_a_start(whole: Path, soi: Path) -> None:
    model = build(recipe(model={**tiny_recipe()["model"], "start": str(whole / "final.safetensors")}))
    state = {k: v.float() for k, v in load_file(whole / "final.safetensors").items()}
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    fewer = {
        **tiny_recipe()["model"],
        "start": str(whole / "final.safetensors"),
        "classes": {"rgb": ["plane"]},
    }
    other = build(recipe(model=fewer)).state_dict()
    new = [k for k in other if other[k].shape != state[k].shape]
    assert new and all("_cls" in k for k in new)
    assert torch.equal(other["neck.lateral_convs.0.conv.weight"], state["neck.lateral_convs.0.conv.weight"])
    wider = {**fewer, "architecture": {**fewer["architecture"], "neck_channels": 64}}
    with pytest.raises(WeightsError, match="does not fit the recipe's architecture"):
        build(recipe(model=wider))
