"""A detector's findings on labelled images against the truth: average precision with intervals, best thresholds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from babelrs_geo.datasets.soi import Record
from babelrs_geo.detections import Detections
from babelrs_geo.evaluation.frames import Frame, Frames, on_valid, record_frames
from babelrs_geo.metrics import (
    SIZES,
    Curve,
    Interpolation,
    Intervals,
    Metrics,
    average_precision,
    best_f1_thresholds,
    bootstrap,
    curves,
)
from babelrs_geo.models.detector import Detector
from babelrs_geo.models.zoo import to_detections


@dataclass(frozen=True)
class Measured:
    """Average precision of one sensor, and its bootstrap replicates."""

    images: int
    metrics: Metrics
    intervals: Intervals

    def classes(self) -> tuple[str, ...]:
        """Those that have truth: the mean is over them."""
        counts = zip(self.metrics.classes, self.metrics.truths, strict=True)
        return tuple(name for name, count in counts if count)

    def report(self, classes: Sequence[str]) -> dict[str, Any]:
        """AP50 and mAP .5:.95, the mean of `classes`, with 95 % bootstrap intervals over images, and both a class."""
        found, spread = self.metrics, self.intervals
        rows = [found.classes.index(c) for c in classes]
        each = spread.by_class(0.5)
        mean = dict(zip(found.classes, found.ap.mean(1).tolist(), strict=True))
        return {
            "images": self.images,
            "classes_in_mean": list(classes),
            "ap50": _mean(found.ap[rows, 0]),
            "ap50_interval": list(spread.ap50(classes)),
            "map": _mean(found.ap[rows]),
            "map_interval": list(spread.map(classes)),
            "by_class": {
                name: {
                    "ap50": value,
                    "interval": list(each[name]),
                    "map": mean[name],
                    "map_interval": list(spread.map([name])),
                    "objects": int(count),
                }
                for (name, value), count in zip(found.by_class(0.5).items(), found.truths, strict=True)
            },
        }


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

    def measured(self, replicates: int = 1000, size: str | None = None) -> Measured:
        """Average precision and its replicates, of all objects or of one of `metrics.SIZES`."""
        span = None if size is None else SIZES[size]
        given = (self.predictions, self.truths)
        return Measured(
            len(self.truths),
            average_precision(*given, interpolation=self.counting, span=span),
            bootstrap(*given, n=replicates, interpolation=self.counting, span=span),
        )

    def report(self, classes: Sequence[str], replicates: int = 1000) -> dict[str, Any]:
        """`Measured.report` of all objects."""
        return self.measured(replicates).report(classes)

    def by_size(self, replicates: int = 1000) -> dict[str, dict[str, Any]]:
        """Objects, AP50 and mAP with intervals by size: the mean over the classes that have objects of it."""
        found = {}
        for size, span in SIZES.items():
            measured = self.measured(replicates, size)
            found[size] = {
                "area_px": [span[0], None if np.isinf(span[1]) else span[1]],
                "objects": int(measured.metrics.truths.sum()),
                "ap50": measured.metrics.ap50,
                "ap50_interval": list(measured.intervals.ap50()),
                "map": measured.metrics.map,
                "map_interval": list(measured.intervals.map()),
            }
        return found

    def curves(self, iou: float = 0.5) -> dict[str, Curve]:
        """Precision against recall of each class that has truth."""
        return curves(self.predictions, self.truths, iou, self.counting)

    def thresholds(self, otherwise: float = 0.5) -> dict[str, float]:
        """Score by class in the middle of those with nearly the best F1 at IoU .5; `otherwise` without any."""
        best = best_f1_thresholds(self.predictions, self.truths)
        return {name: best.get(name, otherwise) for name in self.truths[0].classes}


def _mean(values: NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def evaluate(
    model: Detector,
    images: Sequence[Record] | Frames,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """What a model finds on labelled images of one sensor, with all scores it gives, beside the truth.

    Records are shown in their own pixels, their labels being positions in the model's classes.
    """
    frames = images if isinstance(images, Frames) else _of_records(model, images)
    sensor = frames.sensor
    classes = model.config.classes[sensor]
    first = model.config.labels(sensor).start
    least = np.zeros(len(classes))
    device = next(model.parameters()).device
    predictions, truths = [], []
    for i, frame in enumerate(frames):
        with torch.inference_mode():
            found = model.predict(frame.image.unsqueeze(0).to(device), sensor, [frame.size])[0]
        predictions.append(_placed(to_detections(found, first, classes, sensor != "sar", least), frame))
        truths.append(frame.truth)
        if progress:
            progress(i + 1, len(frames))
    return Evaluation(sensor, predictions, truths)


def _of_records(model: Detector, records: Sequence[Record]) -> Frames:
    return record_frames(records, model.config.classes[records[0].sensor])


def _placed(found: Detections, frame: Frame) -> Detections:
    """What was found, in pixels of the labels, without what is centred where nothing was seen."""
    if frame.valid is not None:
        found = found[on_valid(found, frame.valid)]
    return found if frame.back == (1.0, 1.0) else found.scale(*frame.back)


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
