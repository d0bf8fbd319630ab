"""Training in parts on a lent machine, and the release of what a run left."""

from __future__ import annotations

import csv
import shutil
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_datasets import write_soi
from test_training_runs import assert_same
from tiny_recipe import tiny_recipe, write_recipe

from babelrs_geo.datasets.soi import fingerprint, read_split
from babelrs_geo.errors import OutputError, ParameterError
from babelrs_geo.evaluation import without_transformer
from babelrs_geo.models import checkpoints, zoo
from babelrs_geo.models.detector import COMPACT
from babelrs_geo.training.recipe import read as read_recipe

sys.path.insert(0, str(Path(__file__).parents[1] / "pipelines"))

import release_compact
import train_compact


@pytest.fixture(scope="module")
def soi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("soi")
    write_soi(root, images=3)
    return root


@pytest.fixture(scope="module")
def runs(soi: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run at a stretch, and one that was stopped and went on elsewhere from what was carried."""
    folder = tmp_path_factory.mktemp("runs")
    config = str(write_recipe(folder / "tiny.yaml", steps=4))
    train_compact.main(["pack", str(soi), str(folder / "parts"), "--limit", "0.002"])
    given = ["train", str(folder / "parts")]
    more = ["--recipe", config, "--device", "cpu"]
    train_compact.main([*given, str(folder / "whole"), *more])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_compact, "PIECE", 100_000)
        patch.setattr(train_compact.split, "__defaults__", (100_000,))
        train_compact.main([*given, str(folder / "there"), *more, "--minutes", "0"])
    pieces = folder / "there" / "pieces"
    (folder / "there" / "last.ckpt").unlink()
    train_compact.main([*given, str(folder / "here"), *more, "--pieces", str(pieces)])
    return folder


def test_archives_hold_the_data_and_keep_to_the_limit(soi: Path, tmp_path: Path) -> None:
    parts = train_compact.pack(soi, tmp_path / "parts", 2000)
    assert len(parts) > 1
    for path in parts:
        assert path.stat().st_size < 2000
        with zipfile.ZipFile(path) as archive:
            archive.extractall(tmp_path / "data")
    files = {p.relative_to(soi): p.read_bytes() for p in soi.rglob("*") if p.is_file()}
    there = tmp_path / "data"
    assert {p.relative_to(there): p.read_bytes() for p in there.rglob("*") if p.is_file()} == files
    with pytest.raises(OutputError, match="is not empty"):
        train_compact.pack(soi, tmp_path / "parts", 2000)
    with pytest.raises(ParameterError, match="exceeds the limit"):
        train_compact.pack(soi, tmp_path / "less", 300)
    with pytest.raises(ParameterError, match="give SOI-Det's layout"):
        train_compact.pack(tmp_path / "parts", tmp_path / "none", 2000)


def test_pieces_make_the_file_again_and_a_missing_one_is_told(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    content = bytes(range(256)) * 5
    (tmp_path / "run" / "last.ckpt").write_bytes(content)
    train_compact.split(tmp_path / "run", tmp_path / "pieces", 500)
    assert [p.stat().st_size for p in sorted((tmp_path / "pieces").iterdir())] == [500, 500, 280]
    assert train_compact.join(tmp_path / "pieces", tmp_path / "new") == ["last.ckpt"]
    assert (tmp_path / "new" / "last.ckpt").read_bytes() == content
    assert train_compact.join(tmp_path / "pieces", tmp_path / "new") == []
    (tmp_path / "pieces" / "last.ckpt.001").unlink()
    with pytest.raises(ParameterError, match=r"lacks a piece of last\.ckpt"):
        train_compact.join(tmp_path / "pieces", tmp_path / "other")


def test_a_run_that_was_carried_in_pieces_is_the_run(runs: Path) -> None:
    pieces = sorted(p.name for p in (runs / "there" / "pieces").iterdir())
    ended = {p.name.partition(".0")[0] for p in (runs / "here" / "pieces").iterdir()}
    assert ended == {"recipe.yaml", "log.csv", "best.safetensors", "final.safetensors"}
    assert sum(name.startswith("last.ckpt") for name in pieces) > 1
    assert "recipe.yaml.000" in pieces
    assert all(p.stat().st_size <= 100_000 for p in (runs / "there" / "pieces").iterdir())
    assert_same(runs / "whole", runs / "here")
    with (runs / "here" / "log.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["loss"]]
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    minutes = [float(row["minutes"]) for row in rows]
    assert all(a < b for a, b in zip(minutes, minutes[1:], strict=False))  # counted on


def test_a_run_is_fitted_to_the_minutes_there_are_and_goes_home_unjudged(
    runs: Path, soi: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(write_recipe(tmp_path / "tiny.yaml", steps=100_000))
    given = ["train", str(runs / "parts"), str(tmp_path / "run"), "--recipe", config, "--device", "cpu"]
    begun = time.monotonic()
    train_compact.main([*given, "--minutes", "0.15", "--whole", "--set", "run.judge=false"])
    assert time.monotonic() - begun < 60
    assert "steps in 0." in capsys.readouterr().out
    kept = read_recipe(tmp_path / "run" / "recipe.yaml")
    assert 2 <= kept.steps < 100_000
    assert kept.phases[0].steps == pytest.approx(kept.steps / 2, abs=1 + 0.3 * kept.steps)
    # nothing is left of it
    train_compact.main([*given, "--minutes", "0.15", "--whole", "--set", "run.judge=false"])
    here = tmp_path / "here"
    assert train_compact.join(tmp_path / "run" / "pieces", here) == [
        "recipe.yaml",
        "log.csv",
        "final.safetensors",
    ]
    header = checkpoints.read_header(here / "final.safetensors")
    assert (header.training["steps"], header.metrics) == (kept.steps, {})
    assert {v for own in header.thresholds.values() for v in own.values()} == {0.5}
    release_compact.main([str(soi), str(here / "final.safetensors"), str(tmp_path / "out")])
    assert set(checkpoints.read_header(tmp_path / "out" / "compact.safetensors").metrics) >= {"sar", "h_map"}


def test_phases_keep_their_proportions_when_a_recipe_is_fitted(tmp_path: Path) -> None:
    recipe = read_recipe("compact")
    took = [0.5] * len(recipe.phases)
    same = train_compact.fitted(recipe, took, 0.5 * recipe.steps)
    assert [p.steps for p in same.phases] == [p.steps for p in recipe.phases]
    assert [p.cooldown for p in same.phases] == [p.cooldown for p in recipe.phases]
    half = train_compact.fitted(recipe, took, 0.25 * recipe.steps)
    assert half.steps == pytest.approx(recipe.steps / 2, abs=len(took))
    assert half.phases[-1].cooldown == recipe.phases[-1].cooldown // 2
    slow = [0.5] * (len(took) - 1) + [5.0]
    ends = [p.steps for p in train_compact.fitted(recipe, slow, 600).phases]
    spent = sum((b - a) * t for a, b, t in zip([0, *ends], ends, slow, strict=False))
    assert 590 < spent <= 600
    with pytest.raises(ParameterError, match="give more --minutes"):
        train_compact.fitted(recipe, took, 1)


def test_archives_are_taken_all_or_none(runs: Path, tmp_path: Path) -> None:
    parts = sorted((runs / "parts").iterdir())
    assert len(parts) > 1
    assert all(path.name.endswith(f"of{len(parts)}.zip") for path in parts)
    some = tmp_path / "some"
    some.mkdir()
    for path in parts[1:]:
        shutil.copy(path, some)
    with pytest.raises(ParameterError, match=f"lacks {parts[0].name}; carry all {len(parts)} archives"):
        train_compact.unpack(some, tmp_path / "data")
    shutil.copy(parts[0], some)
    shutil.copy(parts[0], some / "part1of1.zip")
    with pytest.raises(ParameterError, match="more than one packing"):
        train_compact.unpack(some, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_what_cannot_be_done_is_told_in_one_line(soi: Path, tmp_path: Path) -> None:
    for words, told in (
        (["pack", tmp_path, tmp_path / "x"], "give SOI-Det's layout"),
        (["train", tmp_path, tmp_path / "x"], "holds no archive; make them by: train_compact.py pack"),
        (["train", tmp_path, tmp_path / "x", "--whole"], "is told by --minutes"),
    ):
        with pytest.raises(SystemExit, match=told) as caught:
            train_compact.main([str(word) for word in words])
        assert "\n" not in str(caught.value)


def test_a_header_says_what_the_weights_come_of(runs: Path, soi: Path) -> None:
    training = checkpoints.read_header(runs / "here" / "final.safetensors").training
    records = [r for s, names in COMPACT.classes.items() for r in read_split(soi, s, "train", names)]
    assert training["data_sha256"] == fingerprint(records)
    assert training["minutes"] > 0
    assert sum(training["minutes_by_machine"].values()) == pytest.approx(training["minutes"])
    assert "before" not in training


def test_a_release_measures_and_its_card_says_what_came_before(runs: Path, soi: Path, tmp_path: Path) -> None:
    first = runs / "here" / "final.safetensors"
    going_on = {**tiny_recipe()["model"], "start": str(first)}
    config = write_recipe(tmp_path / "second.yaml", steps=2, model=going_on)
    second = tmp_path / "run"
    train_compact.main(
        ["train", str(runs / "parts"), str(second), "--recipe", str(config), "--device", "cpu"]
    )
    release_compact.main(
        [str(soi), str(second / "final.safetensors"), str(tmp_path / "out"), "--name", "second"]
    )
    model, header = checkpoints.load(tmp_path / "out" / "second.safetensors")
    assert header.name == "second"
    trained = checkpoints.read_header(second / "final.safetensors")
    assert header.metrics["sar"] == trained.metrics["sar"]  # the run measured the same
    assert header.thresholds == trained.thresholds
    with without_transformer(model):
        assert header.metrics["h_map_without_transformer"] <= 1
    again = [str(tmp_path / "out" / "second.safetensors"), str(tmp_path / "again"), "--nms", "0.3"]
    release_compact.main([str(soi), *again])  # what ships may be measured anew
    assert checkpoints.read_header(tmp_path / "again" / "compact.safetensors").config.roi.nms_iou == 0.3
    stored, kept = load_file(tmp_path / "out" / "second.safetensors"), load_file(second / "final.safetensors")
    assert all(torch.equal(value, kept[name]) for name, value in stored.items())
    release_compact.main(
        [str(soi), str(second / "final.safetensors"), str(tmp_path / "mean"), "--mean", str(first)]
    )
    began, half = load_file(first), load_file(tmp_path / "mean" / "compact.safetensors")
    for name, value in half.items():
        torch.testing.assert_close(
            value.float(), (began[name].float() + kept[name].float()) / 2, atol=1e-3, rtol=1e-3
        )
    assert any(not torch.equal(value, kept[name]) for name, value in half.items())
    assert (
        "is the mean of the run's weights and of its start" in (tmp_path / "mean" / "compact.md").read_text()
    )
    assert "stored is the mean of" not in (tmp_path / "out" / "second.md").read_text()
    with pytest.raises(SystemExit, match="is not what the run started from"):
        release_compact.main([str(soi), str(first), str(tmp_path / "none"), "--mean", str(first)])
    before = header.training["before"]
    assert (before["name"], before["steps"]) == ("tiny", 4)
    assert before["sha256"] == checkpoints.sha256(first)
    text = (tmp_path / "out" / "second.md").read_text()
    assert "{{" not in text
    assert "1 steps of 64 px crops (1 sar, 1 rgb, 1 ir), then 1 steps" in text.replace(" a step", "")
    assert f"the weights tiny (SHA-256 `{before['sha256']}`), which came of 4 steps" in text
    assert "the same images, from at random" in text


def test_the_bundled_weights_are_a_start_that_is_told() -> None:
    header = checkpoints.read_header(zoo.find("compact"))
    assert release_compact.minutes({"minutes": 10, "before": header.training}) == pytest.approx(
        10 + release_compact.minutes(header.training)
    )
    began = {"name": "compact", "sha256": "0", **header.training}
    told = release_compact.start({"before": began, "data_sha256": began["data_sha256"]})
    assert told.startswith("the weights compact (SHA-256 `0`), which came of ")
    assert "ImageNet" in told
