"""Average precision for what it costs: the bundled detector with fewer proposals, and shown images at other scales.

    python benchmarks/operating_point.py ../shared/data/soi_mini --every 2 --json out.json

Each val frame (or every n-th, `--every`) goes through the network once a scale; the box heads then take the best 50,
100, ... of the same 300 proposals. SAR's head has no proposals. The cost is processor time of all threads, which other
work on the machine disturbs less than a clock's; scales take turns frame by frame. What a choice loses stands beside
what it saves: both are against the first row of a sensor, which is how the weights are used.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from babelrs_geo.detections import Detections
from babelrs_geo.evaluation import Evaluation, Frame, find_frames
from babelrs_geo.models import zoo
from babelrs_geo.models.detector import Detector, Prediction

SENSORS = ("sar", "rgb", "ir")


@dataclass
class Choice:
    """What came of one way to use the detector, image by image."""

    found: list[Detections] = field(default_factory=list)
    truths: list[Detections] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def shown(frame: Frame, scale: float) -> Tensor:
    """The frame's image (1, 3, h, w), resampled as `detect --gsd` would have it."""
    image = frame.image.unsqueeze(0)
    if scale == 1:
        return image
    size = [max(1, round(side * scale)) for side in image.shape[2:]]
    return torch.nn.functional.interpolate(
        image, size=size, mode="bilinear", antialias=True, align_corners=False
    )


def ways(
    model: Detector, image: Tensor, sensor: str, proposals: Sequence[int]
) -> Iterator[tuple[int | None, Prediction, float]]:
    """Each number of proposals with what is found and the processor seconds of all that it takes."""
    size = [(image.shape[2], image.shape[3])]
    began = time.process_time()
    levels, outputs = model.dense(image, sensor)
    trunk = time.process_time() - began
    labels = model.config.labels(sensor)
    if sensor == "sar":
        began = time.process_time()
        found = model.sar_bbox_head.boxes(outputs, size, labels)[0]
        yield None, found, trunk + time.process_time() - began
        return
    rpn, roi = model.oriented_heads(sensor)
    began = time.process_time()
    best = rpn.proposals(levels, outputs)[0]
    trunk += time.process_time() - began
    for number in proposals:
        began = time.process_time()
        found = roi.predict(levels, [best[:number]], size, labels)[0]
        yield number, found, trunk + time.process_time() - began


def measure(
    model: Detector, frames: Iterator[Frame], sensor: str, scales: Sequence[float], proposals: Sequence[int]
) -> dict[tuple[float, int | None], Choice]:
    """All choices on all frames."""
    names = tuple(model.config.classes[sensor])
    first, least = model.config.labels(sensor).start, np.zeros(len(names))
    choices: dict[tuple[float, int | None], Choice] = defaultdict(Choice)
    for frame in frames:
        height, width = frame.image.shape[1:]
        for scale in scales:
            image = shown(frame, scale)
            back = width / image.shape[3], height / image.shape[2]
            for number, prediction, seconds in ways(model, image, sensor, proposals):
                found = zoo.to_detections(prediction, first, names, sensor != "sar", least)
                choice = choices[scale, number]
                choice.found.append(found.scale(*back))
                choice.truths.append(frame.truth)
                choice.seconds.append(seconds)
    return choices


def rows(
    sensor: str, choices: Mapping[tuple[float, int | None], Choice], judged: Sequence[str] | None
) -> list[dict[str, Any]]:
    """A row a choice: AP50, mAP, median cost, and AP50 points lost and cost saved against the first."""
    told: list[dict[str, Any]] = []
    for (scale, number), choice in choices.items():
        measured = Evaluation(sensor, choice.found, choice.truths).measured(replicates=2)
        report = measured.report(judged or measured.classes())
        cost = statistics.median(choice.seconds)
        told.append(
            {
                "sensor": sensor,
                "scale": scale,
                "proposals": number,
                "ap50": report["ap50"],
                "map": report["map"],
                "seconds": cost,
                "images": len(choice.seconds),
            }
        )
    for row in told:
        row["points"] = 100 * (row["ap50"] - told[0]["ap50"])
        row["share"] = row["seconds"] / told[0]["seconds"]
    return told


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, and write JSON where asked."""
    parser = argparse.ArgumentParser(description="Average precision for what it costs.")
    parser.add_argument("data", type=Path, help="folder in SOI-Det's layout")
    parser.add_argument("--weights", default="compact", help="bundled name or file")
    parser.add_argument("--sensors", default=",".join(SENSORS))
    parser.add_argument("--scales", default="1,0.75,1.25", help="pixels shown a pixel of the frame")
    parser.add_argument("--proposals", default="300,200,100,50")
    parser.add_argument("--every", type=int, default=1, help="take every n-th frame")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    options = parser.parse_args(arguments)
    weights = zoo.load(options.weights)
    frames, _ = find_frames(options.data, weights.header)
    told: list[dict[str, Any]] = []
    print(
        "| sensor | images | scale | proposals | AP50 | mAP | points | processor s | share |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    for sensor in options.sensors.split(","):
        mine = frames[sensor]
        chosen = (mine.load(i) for i in range(0, len(mine), options.every))
        scales = [float(value) for value in options.scales.split(",")]
        numbers = [int(value) for value in options.proposals.split(",")]
        with torch.inference_mode():
            choices = measure(weights.model, chosen, sensor, scales, numbers)
        judged = weights.header.metrics.get(sensor, {}).get("classes_in_mean")
        for row in rows(sensor, choices, judged):
            told.append(row)
            print(
                f"| {sensor} | {row['images']} | {row['scale']:g} | {row['proposals'] or '–'} | {row['ap50']:.3f} | "
                f"{row['map']:.3f} | {row['points']:+.1f} | {row['seconds']:.2f} | {row['share']:.2f} |",
                flush=True,
            )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        about = {"threads": torch.get_num_threads(), "torch": torch.__version__, "weights": weights.sha256}
        options.json.write_text(json.dumps({**about, "rows": told}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
