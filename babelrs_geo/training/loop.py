"""The plain loop that made the bundled weights: batches of mixed sensors, schedule, checkpoints.

A batch holds a fixed quota of each sensor (BabelRS section 4). The learning rate warms up, stays, and falls
linearly to zero over the last steps, so that a run can be prolonged from its checkpoint before it cools down.
The weights that are kept are a running mean of the trained ones.
"""

from __future__ import annotations

import copy
import json
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from babelrs_geo.boxes import to_le90
from babelrs_geo.datasets.augment import Augment, augment, load_image
from babelrs_geo.datasets.soi import Record
from babelrs_geo.models.detector import Detector, HorizontalTarget, OrientedTarget
from babelrs_geo.training.schedules import parameter_groups, schedule

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainOptions:
    """One training run."""

    steps: int = 2000
    warmup: int = 100
    cooldown: int = 500
    """Steps at the end over which the learning rate falls to zero."""
    quota: Mapping[str, int] = field(default_factory=lambda: {"sar": 2, "rgb": 3, "ir": 3})
    """Images of each sensor in a batch."""
    augment: Mapping[str, Augment] = field(default_factory=dict)
    lr: float = 5e-4
    prior_lr: float = 1e-4
    """Learning rate of the ImageNet-trained convolutions."""
    weight_decay: float = 0.05
    clip: float = 10.0
    mean_decay: float = 0.998
    seed: int = 0
    checkpoint_seconds: float = 180.0
    bf16: bool = True


def batches(
    records: Mapping[str, list[Record]], options: TrainOptions, labels: Mapping[str, int], start: int = 0
) -> Iterator[dict[str, tuple[Tensor, list[Any]]]]:
    """Endless batches: images (n, 3, size, size) and targets by sensor, each a function of its step alone.

    Each sensor's records are visited in random permutations, one after another. `labels` are the offsets of
    the sensors' classes in the shared label space.
    """
    step = start
    while True:
        batch = {}
        for sensor, count in options.quota.items():
            pool = records[sensor]
            crops, targets = [], []
            for k in range(count):
                turn, place = divmod(step * count + k, len(pool))
                key = [options.seed, sum(map(ord, sensor))]
                order = np.random.default_rng([*key, turn]).permutation(len(pool))
                record = pool[order[place]]
                rng = np.random.default_rng([*key, step, k])
                crop, boxes, own = augment(load_image(record), record, options.augment[sensor], rng)
                crops.append(crop)
                targets.append(_target(sensor, boxes, torch.from_numpy(own) + labels[sensor], crop.shape[1]))
            batch[sensor] = (torch.stack(crops), targets)
        yield batch
        step += 1


def _target(sensor: str, boxes: Any, labels: Tensor, size: int) -> HorizontalTarget | OrientedTarget:
    if sensor == "sar":
        half = boxes[:, 2:4] / 2
        xyxy = np.concatenate([boxes[:, :2] - half, boxes[:, :2] + half], 1)
        return HorizontalTarget(torch.from_numpy(xyxy).float(), labels, (size, size))
    return OrientedTarget(torch.from_numpy(to_le90(boxes)).float(), labels, (size, size))


def train(
    model: Detector,
    records: Mapping[str, list[Record]],
    options: TrainOptions,
    folder: Path,
    device: str = "cpu",
) -> Detector:
    """Train, or go on from `folder/last.pt`, until `options.steps`; returns the running mean of the weights.

    Progress goes to `folder/log.jsonl`, one object a line.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = model.to(device).to(memory_format=torch.channels_last).train()
    mean = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(parameter_groups(model, options), lr=options.lr)
    step, spent = _resume(folder, model, mean, optimizer)
    offsets = {s: model.config.labels(s).start for s in options.quota}
    started = saved = reported = time.monotonic()
    sums: dict[str, float] = {}
    done = 0
    for batch in batches(records, options, offsets, step):
        if step >= options.steps:
            break
        torch.manual_seed(options.seed * 1_000_003 + step)
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * schedule(step, options)
        with torch.autocast(device.split(":")[0], dtype=torch.bfloat16, enabled=options.bf16):
            losses = model.losses(
                {s: (x.to(device), [_move(t, device) for t in ts]) for s, (x, ts) in batch.items()}
            )
        total = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        norm = clip_grad_norm_(model.parameters(), options.clip)
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"step {step}: the gradient is {norm}; the run stops at its last checkpoint"
            )
        optimizer.step()
        step, done = step + 1, done + 1
        decay = min(options.mean_decay, step / (step + 10))
        for kept, new in zip(mean.parameters(), model.parameters(), strict=True):
            kept.lerp_(new.detach(), 1 - decay)
        for name, value in {**losses, "norm": norm}.items():
            sums[name] = sums.get(name, 0.0) + float(value.detach())
        now = time.monotonic()
        if now - reported > 20:
            line = {
                "step": step,
                "minutes": (spent + now - started) / 60,
                "seconds_a_step": (now - reported) / done,
            }
            line |= {name: round(value / done, 4) for name, value in sums.items()}
            with (folder / "log.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            log.info("step %d: %.2f s a step, loss %.3f", step, line["seconds_a_step"], float(total.detach()))
            reported, sums, done = now, {}, 0
        if now - saved > options.checkpoint_seconds or step == options.steps:
            _save(folder, model, mean, optimizer, step, spent + now - started)
            saved = now
    return mean.eval()


def _move(target: HorizontalTarget | OrientedTarget, device: str) -> HorizontalTarget | OrientedTarget:
    return type(target)(target.boxes.to(device), target.labels.to(device), target.size)


def _save(folder: Path, model: nn.Module, mean: nn.Module, optimizer: Any, step: int, seconds: float) -> None:
    state = {
        "model": model.state_dict(),
        "mean": mean.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "seconds": seconds,
    }
    temporary = folder / "last.pt.part"
    torch.save(state, temporary)
    temporary.replace(folder / "last.pt")


def _resume(folder: Path, model: nn.Module, mean: nn.Module, optimizer: Any) -> tuple[int, float]:
    path = folder / "last.pt"
    if not path.is_file():
        return 0, 0.0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    mean.load_state_dict(state["mean"])
    bases = [group["base"] for group in optimizer.param_groups]
    optimizer.load_state_dict(state["optimizer"])
    for group, base in zip(optimizer.param_groups, bases, strict=True):
        group["base"] = base
    log.info("going on from step %d", state["step"])
    return state["step"], state["seconds"]
