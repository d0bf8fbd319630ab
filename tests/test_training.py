"""A run learns, and stopped and resumed it is the same run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_datasets import write_soi
from tiny_model import TINY

from babelrs_geo.datasets.augment import Augment
from babelrs_geo.datasets.soi import Record, read_split
from babelrs_geo.evaluation import evaluate, without_transformer
from babelrs_geo.models.detector import Detector
from babelrs_geo.training import TrainOptions, batches, parameter_groups, schedule, train

AUGMENT = {s: Augment(size=64, scale=(0.8, 1.1), turn=s != "sar") for s in ("sar", "rgb", "ir")}


def options(steps: int, lr: float = 2e-3) -> TrainOptions:
    quota = {"sar": 1, "rgb": 1, "ir": 1}
    return TrainOptions(steps, warmup=2, cooldown=2, quota=quota, augment=AUGMENT, lr=lr, bf16=False)


@pytest.fixture
def records(tmp_path: Path) -> dict[str, list[Record]]:
    write_soi(tmp_path / "soi")
    return {s: read_split(tmp_path / "soi", s, "train", names) for s, names in TINY.classes.items()}


def total(losses: dict[str, torch.Tensor]) -> float:
    return torch.stack(list(losses.values())).sum().item()


def start() -> Detector:
    torch.manual_seed(0)
    return Detector(TINY)


def test_a_resumed_run_is_the_run(records: dict[str, list[Record]], tmp_path: Path) -> None:
    through = train(start(), records, options(4), tmp_path / "through")
    # Stopped after two steps of the same schedule: the plateau is long enough not to tell.
    early = TrainOptions(
        2, warmup=2, cooldown=1, quota=options(4).quota, augment=AUGMENT, lr=2e-3, bf16=False
    )
    late = TrainOptions(4, warmup=2, cooldown=1, quota=options(4).quota, augment=AUGMENT, lr=2e-3, bf16=False)
    whole = train(start(), records, late, tmp_path / "whole")
    train(start(), records, early, tmp_path / "halves")
    halves = train(start(), records, late, tmp_path / "halves")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, halves.state_dict()[name]), name
    assert any(not torch.equal(v, through.state_dict()[k]) for k, v in whole.state_dict().items())
    assert not list(tmp_path.glob("*/*.part"))


def test_losses_fall(records: dict[str, list[Record]], tmp_path: Path) -> None:
    model = start()
    plan = options(1)
    offsets = {s: TINY.labels(s).start for s in plan.quota}
    first = next(batches(records, plan, offsets))
    torch.manual_seed(1)
    before = total(model.losses(first))
    trained = train(model, records, options(25, lr=3e-3), tmp_path / "run").train()
    torch.manual_seed(1)
    assert total(trained.losses(first)) < 0.8 * before


def test_batches_are_a_function_of_the_step(records: dict[str, list[Record]]) -> None:
    offsets = {s: TINY.labels(s).start for s in AUGMENT}
    stream = batches(records, options(9), offsets)
    taken = [next(stream) for _ in range(3)]
    again = next(batches(records, options(9), offsets, start=2))
    for sensor, (images, targets) in again.items():
        assert torch.equal(images, taken[2][sensor][0])
        assert torch.equal(targets[0].boxes, taken[2][sensor][1][0].boxes)
    assert taken[0]["ir"][1][0].labels.tolist() in ([], [TINY.labels("ir").start + 1])


def test_the_schedule_warms_up_stays_and_falls() -> None:
    plan = TrainOptions(steps=100, warmup=10, cooldown=20)
    factors = [schedule(k, plan) for k in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[10:80] == [1.0] * 70
    assert np.all(np.diff(factors[80:]) < 0)
    assert factors[-1] == pytest.approx(0.05)


def test_every_trained_parameter_is_in_one_group() -> None:
    model = start()
    grouped = [p for group in parameter_groups(model, options(1)) for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == sum(p.requires_grad for p in model.parameters())
    assert all(
        p.ndim > 1 for g in parameter_groups(model, options(1)) if g["weight_decay"] for p in g["params"]
    )


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
