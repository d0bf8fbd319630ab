"""Weights against a benchmark: predictions on whole images, average precision with intervals, best
thresholds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from babelrs_geo.datasets.augment import load_image
from babelrs_geo.datasets.soi import Record
from babelrs_geo.detections import Detections
from babelrs_geo.metrics import Interpolation, average_precision, best_f1_thresholds, bootstrap
from babelrs_geo.models.detector import Detector
from babelrs_geo.models.zoo import to_detections


@dataclass(frozen=True)
class Evaluation:
    """Predictions and truth of one sensor, image by image."""

    sensor: str
    predictions: list[Detections]
    truths: list[Detections]

    @property
    def counting(self) -> Interpolation:
        """SAR is counted as COCO does, oriented boxes as the rotated VOC benchmarks do (BabelRS section 4)."""
        return "coco" if self.sensor == "sar" else "voc"

    def report(self, classes: Sequence[str], replicates: int = 1000) -> dict[str, Any]:
        """AP50 and mAP .5:.95, the mean of `classes`, with 95 % bootstrap intervals over images, and AP50 a
        class.
        """
        found = average_precision(self.predictions, self.truths, interpolation=self.counting)
        spread = bootstrap(self.predictions, self.truths, n=replicates, interpolation=self.counting)
        rows = [found.classes.index(c) for c in classes]
        each = spread.by_class(0.5)
        return {
            "images": len(self.truths),
            "classes_in_mean": list(classes),
            "ap50": float(np.nanmean(found.ap[rows, 0])),
            "ap50_interval": list(spread.ap50(classes)),
            "map": float(np.nanmean(found.ap[rows])),
            "map_interval": list(spread.map(classes)),
            "by_class": {
                name: {"ap50": value, "interval": list(each[name]), "objects": int(count)}
                for (name, value), count in zip(found.by_class(0.5).items(), found.truths, strict=True)
            },
        }

    def thresholds(self, otherwise: float = 0.5) -> dict[str, float]:
        """Score by class in the middle of those with nearly the best F1 at IoU .5; `otherwise` without any."""
        best = best_f1_thresholds(self.predictions, self.truths)
        return {name: best.get(name, otherwise) for name in self.truths[0].classes}


def truth_of(record: Record, classes: Sequence[str]) -> Detections:
    """A record's boxes as Detections with score 1."""
    ones = np.ones(len(record.boxes), np.float32)
    return Detections(record.boxes, ones, record.labels, tuple(classes), record.sensor != "sar")


def evaluate(
    model: Detector, records: Sequence[Record], progress: Callable[[int, int], None] | None = None
) -> Evaluation:
    """Predictions of a model on whole images of one sensor, in their own pixels, with all scores it gives.

    Images are shown at their own size; nothing is tiled or resampled.
    """
    sensor = records[0].sensor
    classes = model.config.classes[sensor]
    first = model.config.labels(sensor).start
    least = np.zeros(len(classes))
    predictions, truths = [], []
    device = next(model.parameters()).device
    for i, record in enumerate(records):
        image = load_image(record).unsqueeze(0).to(device)
        with torch.inference_mode():
            found = model.predict(image, sensor)[0]
        predictions.append(to_detections(found, first, classes, sensor != "sar", least))
        truths.append(truth_of(record, classes))
        if progress:
            progress(i + 1, len(records))
    return Evaluation(sensor, predictions, truths)


@contextmanager
def without_transformer(model: Detector) -> Iterator[None]:
    """The model with its vision transformer silenced: each stage gives zeros, so only the pyramid speaks.

    What average precision loses under it is what the transformer carries.
    """
    last = np.cumsum(model.config.backbone.stages) - 1
    hooks = [
        model.backbone.layers[i].register_forward_hook(lambda m, x, y: torch.zeros_like(y)) for i in last
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
