"""How good the weights of a run are so far: average precision a sensor, their harmonic mean, thresholds."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from lightning.pytorch import Trainer

from babelrs_geo.boxes import bounds, clip, from_xyxy
from babelrs_geo.datasets.published import Published, prepare
from babelrs_geo.datasets.samples import Sample
from babelrs_geo.detections import Detections
from babelrs_geo.evaluation import Evaluation, Frame, Frames, evaluate
from babelrs_geo.models import checkpoints
from babelrs_geo.models.checkpoints import Header
from babelrs_geo.models.detector import Detector
from babelrs_geo.training.data import Source, TrainingData, as_bytes
from babelrs_geo.training.keeping import Keeper
from babelrs_geo.training.measured import Measured
from babelrs_geo.training.module import DetectorTraining
from babelrs_geo.training.recipe import Recipe

BEST, FINAL = "best.safetensors", "final.safetensors"
"""The weights of the best validation; those of the last step."""

LEAST_SCORE = 0.1
"""Floor of the score thresholds: below it a class with few objects would let anything through."""

UNJUDGED_SCORE = 0.5
"""Threshold of weights that nobody judged yet."""


@dataclass(frozen=True)
class Verdict:
    """Figures of one validation."""

    step: int
    h_map: float
    """Harmonic mean of the sensors' mAP .5:.95 (BabelRS's H-mAP where there are three)."""
    reports: Mapping[str, Mapping[str, Any]]
    """`Evaluation.report` by sensor."""
    thresholds: Mapping[str, Mapping[str, float]]
    """Scores to report from, by sensor and class."""

    @classmethod
    def none(cls, step: int, classes: Mapping[str, Sequence[str]]) -> Verdict:
        """Of weights that are not judged: no figures, and thresholds that are a guess."""
        return cls(step, -1.0, {}, {s: dict.fromkeys(names, UNJUDGED_SCORE) for s, names in classes.items()})

    def metrics(self) -> dict[str, Any]:
        """For the header; empty where nothing was judged."""
        return {**self.reports, "h_map": self.h_map} if self.reports else {}

    def figures(self) -> dict[str, float]:
        """For the log."""
        told = {"h_map": self.h_map}
        for sensor, report in self.reports.items():
            told |= {f"{sensor}_map": report["map"], f"{sensor}_ap50": report["ap50"]}
        return told


Describe = Callable[[Verdict, Mapping[str, float]], Header]
"""A verdict and the seconds that were spent, by machine, to the header of the weights that are written."""


class DetectorKeeper(Keeper):
    """Judges a detector by what it finds, and keeps the weights that did best."""

    def __init__(self, folder: Path, recipe: Recipe, data: TrainingData, describe: Describe) -> None:
        super().__init__(folder, recipe.steps, recipe.run, data)
        self.recipe, self.data, self.describe = recipe, data, describe
        self.best = -1.0
        self.best_step = 0
        self.last: float | None = None

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return super().state_dict() | {"best": self.best, "best_step": self.best_step, "last": self.last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From the checkpoint."""
        super().load_state_dict(state_dict)
        self.best, self.best_step = state_dict["best"], state_dict["best_step"]
        self.last = state_dict["last"]

    def judge(self, trainer: Trainer, module: Measured, step: int) -> None:
        """Judge the weights as they would be stored: in half precision."""
        assert isinstance(module, DetectorTraining)
        rank, world = trainer.global_rank, trainer.world_size
        if not self.recipe.run.judge:
            if rank == 0 and step == self.recipe.steps:
                own = {s: module.kept.config.classes[s] for s in self.recipe.data.sensors}
                header = self.describe(Verdict.none(step, own), self.spent)
                checkpoints.save(self.folder / FINAL, as_stored(module.kept), header)
            return
        model = as_stored(module.kept)
        verdict = judge(model, self.data.judge, self.recipe, step, rank=rank, world=world)
        if verdict is not None:
            self.tell(trainer, {f"val_{k}": v for k, v in verdict.figures().items()}, step)
            header = self.describe(verdict, self.spent)
            if verdict.h_map > self.best:
                checkpoints.save(self.folder / BEST, model, header)
            if step == self.recipe.steps:
                checkpoints.save(self.folder / FINAL, model, header)
        told = [None if verdict is None else verdict.h_map]
        if world > 1:
            torch.distributed.broadcast_object_list(told, src=0)
        assert told[0] is not None
        self.last = told[0]
        if self.last > self.best:
            self.best, self.best_step = self.last, step


def as_stored(model: Detector) -> Detector:
    """A copy in the half precision of a file."""
    model = copy.deepcopy(model).requires_grad_(False)
    model.load_state_dict({k: v.half().float() for k, v in model.state_dict().items()})
    return model


def judge(
    model: Detector, judged: Mapping[str, Source], recipe: Recipe, step: int, *, rank: int = 0, world: int = 1
) -> Verdict | None:
    """Predict every image that is judged on and count; processes share the images, and the first one counts.

    Images come as they are, or as the published pipeline shows them where the recipe's last phase learns so. The
    model is left as it was. None on other processes than the first.
    """
    learning = model.training
    model.eval()
    mine = {}
    for sensor, source in judged.items():
        shown = recipe.phases[-1].views[sensor].published
        found = evaluate(model, _frames(source, model.config.classes[sensor], shown, sensor, rank, world))
        mine[sensor] = (found.predictions, found.truths)
    model.train(learning)
    shares = [mine]
    if world > 1:
        gathered: list[Any] = [None] * world
        torch.distributed.all_gather_object(gathered, mine)
        shares = gathered
    if rank:
        return None
    reports, thresholds = {}, {}
    for sensor in judged:
        predictions, truths = (_in_turn([share[sensor][k] for share in shares]) for k in (0, 1))
        all_of = Evaluation(sensor, predictions, truths)
        there = sorted({int(label) for truth in truths for label in truth.labels})
        names = truths[0].classes
        reports[sensor] = all_of.report(recipe.header.means.get(sensor, [names[i] for i in there]))
        thresholds[sensor] = {k: round(max(v, LEAST_SCORE), 3) for k, v in all_of.thresholds().items()}
    return Verdict(step, harmonic([r["map"] for r in reports.values()]), reports, thresholds)


def _in_turn(shares: list[list[Detections]]) -> list[Detections]:
    """Shares of every `world`-th image, put together again."""
    return [shares[k % len(shares)][k // len(shares)] for k in range(sum(map(len, shares)))]


def harmonic(values: list[float]) -> float:
    """Harmonic mean; 0 where one is 0 or no number."""
    return len(values) / sum(1 / v for v in values) if all(v > 0 for v in values) else 0.0


def _frames(
    source: Source, classes: Sequence[str], shown: Published | None, sensor: str, rank: int, world: int
) -> Frames:
    """Every `world`-th sample as a frame."""
    mine = range(rank, len(source.samples), world)
    return Frames(sensor, len(mine), lambda i: frame(source.samples[mine[i]], classes, shown))


def frame(sample: Sample, classes: Sequence[str], shown: Published | None) -> Frame:
    """A sample as the detector is shown it: as it is, or as the published pipeline does; what is there, as far as it
    can be seen.
    """
    sensor, image, valid = sample["sensor"], sample["image"], sample["valid"].numpy()
    height, width = image.shape[1:]
    boxes, labels = np.asarray(sample["boxes"], np.float64), sample["labels"].numpy()
    if sensor == "sar":
        boxes = from_xyxy(bounds(boxes))
    boxes = clip(boxes, (0.0, 0.0, float(width), float(height)))
    seen = (boxes[:, 2] > 0) & (boxes[:, 3] > 0)
    boxes, labels = boxes[seen], labels[seen]
    truth = Detections(boxes, np.ones(len(boxes), np.float32), labels, tuple(classes), sensor != "sar")
    size = (height, width)
    if shown is not None:
        image, size = prepare(as_bytes(image), shown)
        valid = None  # it is of the image's own pixels
    return Frame(sample["name"], image, size, (width / size[1], height / size[0]), truth, valid)
