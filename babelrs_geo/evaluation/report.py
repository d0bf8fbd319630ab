"""The report on weights: figures by sensor, class and size, and the paper's figures over all sensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from babelrs_geo import __version__
from babelrs_geo.evaluation.frames import DataOptions, Frames, find_frames
from babelrs_geo.evaluation.judging import Measured, evaluate
from babelrs_geo.metrics import Curve, class_weighted, h_mean
from babelrs_geo.models.zoo import Weights

HEADLINES = ("map", "ap50")


@dataclass(frozen=True)
class Report:
    """What is written: figures as JSON values, and the curves of the picture by panel and class."""

    figures: dict[str, Any]
    curves: dict[str, dict[str, Curve]]


def judge(
    weights: Weights,
    data: Path,
    options: DataOptions | None = None,
    replicates: int = 1000,
    progress: Callable[[str, int, int], None] | None = None,
) -> Report:
    """Weights on the labelled images of a folder; `progress` is called with (sensor, images done, images in all).

    Raises as `find_frames` does, and SceneError for an image that cannot be read.
    """
    options = options or DataOptions()
    found, left_out = find_frames(data, weights.header, options)
    sensors: dict[str, Any] = {}
    measured: dict[str, Measured] = {}
    drawn: dict[str, dict[str, Curve]] = {}
    for sensor, frames in found.items():
        told = None if progress is None else _of_sensor(progress, sensor)
        evaluation = evaluate(weights.model, frames, told)
        measured[sensor] = evaluation.measured(replicates)
        drawn[sensor] = evaluation.curves()
        sensors[sensor] = _sensor(frames, options, measured[sensor])
        sensors[sensor]["by_size"] = evaluation.by_size(replicates)
        sensors[sensor]["counting"] = evaluation.counting
    figures = {
        "software": f"babelrs-geo {__version__}",
        "kind": "images",
        "weights": {"name": weights.name, "sha256": weights.sha256},
        "data": data.name,
        "options": {
            "rename": dict(options.rename),
            "background": options.background,
            "fit": options.fit,
            "gsd": options.gsd,
            "replicates": replicates,
        },
        "overall": overall(measured),
        "sensors": sensors,
        "sensors_left_out": left_out,
    }
    return Report(figures, drawn)


def _of_sensor(progress: Callable[[str, int, int], None], sensor: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(sensor, done, total)


def _sensor(frames: Frames, options: DataOptions, measured: Measured) -> dict[str, Any]:
    return {
        "split": options.split_of(frames.sensor),
        **measured.report(measured.classes()),
        "left_out": {"unknown_to_the_weights": dict(frames.unknown), "not_labelled": list(frames.unlabelled)},
    }


def overall(measured: Mapping[str, Measured]) -> dict[str, Any]:
    """Means of mAP and AP50 weighted by the sensors' numbers of classes, and H-mAP where all three sensors are there.

    Intervals come from the sensors' replicates, drawn independently.
    """
    counts = {sensor: len(each.classes()) for sensor, each in measured.items() if each.classes()}
    told: dict[str, Any] = {"classes": sum(counts.values())}
    for name in HEADLINES:
        points = {sensor: getattr(measured[sensor].metrics, name) for sensor in counts}
        draws = {sensor: getattr(measured[sensor].intervals, f"{name}_replicates")() for sensor in counts}
        told[name] = class_weighted(points, counts) if counts else float("nan")
        told[f"{name}_interval"] = _range(class_weighted(draws, counts) if counts else np.zeros(0))
        if name == "map" and set(counts) == {"sar", "rgb", "ir"}:
            three = np.stack([draws[sensor] for sensor in ("sar", "rgb", "ir")], 1)
            told["h_map"] = h_mean(*(points[sensor] for sensor in ("sar", "rgb", "ir")))
            told["h_map_interval"] = _range(np.array([h_mean(*row) for row in three]))
    return told


def _range(values: Any) -> list[float]:
    known = values[~np.isnan(values)]
    return [float(v) for v in np.quantile(known, [0.025, 0.975])] if len(known) else [float("nan")] * 2
