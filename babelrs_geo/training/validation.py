"""How good the weights of a run are so far: average precision a sensor, their harmonic mean, thresholds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed

from babelrs_geo.boxes import bounds, clip, from_xyxy
from babelrs_geo.datasets.published import Published, prepare
from babelrs_geo.datasets.samples import Sample
from babelrs_geo.detections import Detections
from babelrs_geo.evaluation import Evaluation, Frame, Frames, evaluate
from babelrs_geo.models.detector import Detector
from babelrs_geo.training.data import Source, as_bytes
from babelrs_geo.training.recipe import Recipe

LEAST_SCORE = 0.1
"""Floor of the score thresholds: below it a class with few objects would let anything through."""


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

    def figures(self) -> dict[str, float]:
        """For the log."""
        told = {"h_map": self.h_map}
        for sensor, report in self.reports.items():
            told |= {f"{sensor}_map": report["map"], f"{sensor}_ap50": report["ap50"]}
        return told


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
