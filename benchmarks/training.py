"""What a training step costs, and how much of it is spent waiting for data.

    python benchmarks/training.py ../shared/data/soi_mini --steps 40 --workers 1 --json runs/training.json

The recipe's second phase (the small crops, of which most are needed a second) on a machine that does nothing else. The
first steps, in which workers start and kernels are compiled, are not counted. The aim is a share of waiting under 5 %.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import signal
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from babelrs_geo.training.recipe import read
from babelrs_geo.training.run import Place, fit

FIRST = 5  # steps that are not counted


def measure(data: Path, name: str, steps: int, workers: int, phase: int) -> dict[str, float]:
    """Mean seconds a step and share of them spent waiting."""
    recipe = read(
        name, [f"run.workers={workers}", "run.log_every=1", "run.gradients_every=0", "run.tensorboard=false"]
    )
    only = replace(recipe.phases[phase], steps=10**9)
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
    return {"seconds_a_step": sum(seconds) / len(seconds), "data_wait": sum(waited) / sum(seconds)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, and write JSON where asked."""
    parser = argparse.ArgumentParser(
        description="Seconds a training step, and the share spent waiting for data."
    )
    parser.add_argument("data", type=Path, help="folder in SOI-Det's layout, or of chips")
    parser.add_argument("--recipe", default="compact")
    parser.add_argument("--phase", type=int, default=1)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    options = parser.parse_args(arguments)
    found = {}
    print("| workers | s a step | waiting for data |\n|---|---|---|")
    for workers in options.workers:
        found[workers] = measure(options.data, options.recipe, options.steps, workers, options.phase)
        own = found[workers]
        print(f"| {workers} | {own['seconds_a_step']:.3f} | {100 * own['data_wait']:.1f} % |", flush=True)
    if options.json:
        about = {"machine": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**about, "workers": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
