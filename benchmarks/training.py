"""What a training step costs, and how much of it is spent waiting for data.

    python benchmarks/training.py ../shared/data/soi_mini --json runs/training.json
    python benchmarks/training.py ../shared/data/soi_mini --set precision=32    # on a processor without bf16

The recipe's phase of the smallest crops, of which most are needed a second, on a machine that does nothing else: three
minutes on two cores. Without workers all loading is waiting, which says what it costs; with them it runs beside the
steps. The first steps, in which workers start and their queue fills, are not counted. Exit status 1 where the share
with the most workers is not under 5 %.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from babelrs_geo.training.recipe import read
from babelrs_geo.training.run import Place, fit

FIRST = 4  # steps that are not counted: as many as a worker prepares ahead
AIM = 0.05


def measure(data: Path, options: argparse.Namespace, workers: int) -> dict[str, float]:
    """Mean seconds a step, images in one, and the share of the time that was spent waiting for them."""
    given = [f"run.workers={workers}", "run.log_every=1", "run.gradients_every=0", "run.tensorboard=false"]
    recipe, steps = read(options.recipe, [*given, *options.set]), options.steps
    busiest = min(recipe.phases, key=lambda p: p.views[recipe.data.sensors[0]].chosen.size)
    only = replace(busiest, steps=10**9)
    recipe = replace(recipe, phases=(only,), run=replace(recipe.run, checkpoint_minutes=60.0))

    def stop(done: int, total: int) -> None:
        if done == steps + FIRST:
            signal.raise_signal(signal.SIGINT)  # ends the run before anything is judged

    with tempfile.TemporaryDirectory() as folder:
        fit(recipe, [data], Place(folder=Path(folder), device="cpu", progress=stop))
        with (Path(folder) / "log.csv").open(newline="") as file:
            rows = [r for r in csv.DictReader(file) if int(r["step"]) > FIRST]
    seconds = [float(r["seconds_a_step"]) for r in rows]
    waited = [float(r["data_wait"]) * float(r["seconds_a_step"]) for r in rows]
    return {
        "images_a_step": sum(recipe.quota(only).values()),
        "seconds_a_step": sum(seconds) / len(seconds),
        "data_wait": sum(waited) / sum(seconds),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, and write JSON where asked."""
    parser = argparse.ArgumentParser(
        description="Seconds a training step, and the share spent waiting for data."
    )
    parser.add_argument("data", type=Path, help="folder in SOI-Det's layout, or of chips")
    parser.add_argument("--recipe", default="compact")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipe")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    options = parser.parse_args(arguments)
    found = {}
    print("| workers | images a step | s a step | waiting for data |\n|---|---|---|---|")
    for workers in options.workers:
        found[workers] = measure(options.data, options, workers)
        own = found[workers]
        print(
            f"| {workers} | {own['images_a_step']} | {own['seconds_a_step']:.3f} | {100 * own['data_wait']:.1f} % |",
            flush=True,
        )
    if options.json:
        about = {"machine": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**about, "workers": found}, indent=1) + "\n", encoding="utf-8")
    share = found[max(found)]["data_wait"]
    if share >= AIM:
        sys.exit(f"waiting takes {100 * share:.1f} % of the time, where under {100 * AIM:g} % is the aim")


if __name__ == "__main__":
    main()
