"""How much a class should borrow of the others for its score threshold: judged on images it was not chosen on.

    python benchmarks/thresholds.py ../shared/data/soi_mini --json out.json

The bundled detector predicts the val frames once. Then they are halved by chance, again and again: thresholds are
chosen on one half, by each number of borrowed objects (`metrics.best_f1_thresholds`) and not under the floor that
weights have. On the other, F1 at IoU .5 is counted: the mean over the classes that the weights are judged by and that
both halves have. All numbers are tried on the same halves.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from babelrs_geo.detections import Detections
from babelrs_geo.evaluation import evaluate, find_frames
from babelrs_geo.metrics import best_f1_thresholds, precision_recall
from babelrs_geo.models import zoo
from babelrs_geo.training.validation import LEAST_SCORE


def f1(thresholds: dict[str, float], found: Sequence[Detections], truths: Sequence[Detections]) -> float:
    """Mean F1 over the classes that have a threshold and objects."""
    least = np.array([max(thresholds.get(name, np.inf), LEAST_SCORE) for name in truths[0].classes])
    rates = precision_recall([each[each.scores >= least[each.labels]] for each in found], truths)
    judged = [(p, r) for name, (p, r) in rates.items() if name in thresholds and not np.isnan(r)]
    return float(np.mean([0.0 if r == 0 else 2 * p * r / (p + r) for p, r in judged]))


def compare(
    found: Sequence[Detections],
    truths: Sequence[Detections],
    classes: Sequence[str],
    borrowed: Sequence[float],
    times: int,
) -> dict[float, float]:
    """F1 of `classes` in the other half, by objects borrowed; mean of `times` halvings and of both ways."""
    rng = np.random.default_rng(0)
    told: dict[float, list[float]] = {number: [] for number in borrowed}
    for _ in range(times):
        drawn = rng.permutation(len(truths))
        halves = drawn[: len(drawn) // 2], drawn[len(drawn) // 2 :]
        for chosen, judged in (halves, halves[::-1]):
            own = [found[i] for i in chosen], [truths[i] for i in chosen]
            there = {name for truth in own[1] for name in truth.class_names} & set(classes)
            for number in borrowed:
                best = best_f1_thresholds(*own, borrowed=number)
                best = {name: value for name, value in best.items() if name in there}
                told[number].append(f1(best, [found[i] for i in judged], [truths[i] for i in judged]))
    return {number: float(np.mean(values)) for number, values in told.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, and write JSON where asked."""
    parser = argparse.ArgumentParser(description="How much a class should borrow for its score threshold.")
    parser.add_argument("data", type=Path, help="folder in SOI-Det's layout")
    parser.add_argument("--weights", default="compact", help="bundled name or file")
    parser.add_argument("--borrowed", default="0,10,30,100,1000", help="numbers of objects to try")
    parser.add_argument("--times", type=int, default=50, help="halvings")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    options = parser.parse_args(arguments)
    borrowed = [float(number) for number in options.borrowed.split(",")]
    weights = zoo.load(options.weights)
    frames, _ = find_frames(options.data, weights.header)
    print(f"| sensor | images | {' | '.join(f'{number:g}' for number in borrowed)} |")
    print("|---" * (2 + len(borrowed)) + "|")
    told = {}
    for sensor, own in frames.items():
        judged = evaluate(weights.model, own)
        classes = weights.header.metrics[sensor]["classes_in_mean"]
        told[sensor] = compare(judged.predictions, judged.truths, classes, borrowed, options.times)
        cells = " | ".join(f"{value:.4f}" for value in told[sensor].values())
        print(f"| {sensor} | {len(judged.truths)} | {cells} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(told) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
