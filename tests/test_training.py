"""A run learns; rates and groups; what an evaluation reports."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_datasets import write_soi
from tiny_model import TINY
from tiny_recipe import write_recipe

from babelrs_geo.datasets.soi import Record, read_split
from babelrs_geo.evaluation import evaluate, without_transformer
from babelrs_geo.models.detector import Detector
from babelrs_geo.training import parameter_groups, schedule
from babelrs_geo.training.module import DetectorTraining
from babelrs_geo.training.recipe import Phase, read
from babelrs_geo.training.run import Place, fit

PHASE = Phase(steps=100, warmup=10, cooldown=20, quota={}, views={})


@pytest.fixture
def records(tmp_path: Path) -> dict[str, list[Record]]:
    write_soi(tmp_path / "soi")
    return {s: read_split(tmp_path / "soi", s, "train", names) for s, names in TINY.classes.items()}


def start() -> Detector:
    torch.manual_seed(0)
    return Detector(TINY)


def test_losses_fall(tmp_path: Path) -> None:
    write_soi(tmp_path / "soi")
    quick = ["run.gradients_every=0", "run.checkpoint_minutes=60"]
    recipe = read(write_recipe(tmp_path / "tiny.yaml", steps=25), quick)
    fit(recipe, [tmp_path / "soi"], Place(folder=tmp_path / "run", device="cpu"))
    with (tmp_path / "run" / "log.csv").open(newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]
    assert len(losses) == 25
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])


def test_the_schedule_warms_up_stays_and_falls() -> None:
    factors = [schedule(k, PHASE) for k in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[10:80] == [1.0] * 70
    assert np.all(np.diff(factors[80:]) < 0)
    assert factors[-1] == pytest.approx(0.05)
    bare = replace(PHASE, warmup=0, cooldown=0)
    assert [schedule(k, bare) for k in range(100)] == [1.0] * 100


def test_each_phase_has_its_weight_decay(tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "tiny.yaml", steps=6)
    recipe = read(path, ["phases.0.weight_decay=0", "phases.1.weight_decay=.5"])
    module = DetectorTraining(start(), recipe)
    optimizer = module.configure_optimizers()
    for step, decay in ((0, 0.0), (2, 0.0), (3, 0.5), (5, 0.5)):
        module.set_rates(optimizer, step)
        for group in optimizer.param_groups:
            assert {decay if p.ndim > 1 else 0.0 for p in group["params"]} == {group["weight_decay"]}


def test_every_trained_parameter_is_in_one_group() -> None:
    model = start()
    grouped = [p for group in parameter_groups(model, PHASE) for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == sum(p.requires_grad for p in model.parameters())
    assert all(p.ndim > 1 for g in parameter_groups(model, PHASE) if g["weight_decay"] for p in g["params"])


def test_an_evaluation_reports_intervals_and_thresholds(records: dict[str, list[Record]]) -> None:
    model = start().eval()
    done: list[int] = []
    found = evaluate(model, records["ir"], lambda k, n: done.append(k))
    assert done == [1, 2]
    report = found.report(("car",), replicates=20)
    assert 0 <= report["ap50_interval"][0] <= report["ap50_interval"][1] <= 1
    assert report["by_class"]["car"]["objects"] == 2
    assert set(found.thresholds()) == set(TINY.classes["ir"])
    json.dumps(report)
    perfect = type(found)("ir", found.truths, found.truths)
    assert perfect.report(("car",), replicates=2)["ap50"] == 1.0


def test_silencing_the_transformer_lasts_only_so_long() -> None:
    model = start().eval()
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        before = model.features(image)[0]
        with without_transformer(model):
            silent = model.features(image)[0]
        after = model.features(image)[0]
    assert torch.equal(before, after)
    assert not torch.equal(before, silent)
