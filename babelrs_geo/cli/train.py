"""`babelrs-geo train`."""

from __future__ import annotations

import time
from pathlib import Path
from shlex import quote
from typing import Any

import click

from babelrs_geo import allocation
from babelrs_geo.cli.options import Command, apply, split
from babelrs_geo.cli.progress import duration, progress_bar
from babelrs_geo.cli.running import RunArguments, needing, run_options, stopped

RECIPES = ("compact", "soi-det")


def _options(command: Command) -> Command:
    data = "A folder of chips (tile), one in SOI-Det's layout, or a YAML file that names scenes."
    start = "Weights to begin from, or imagenet, in place of the recipe's (model.start)."
    return apply(run_options(RECIPES, data, start), command)


@click.command("train")
@_options
@needing("train")
def train_verb(**given: Any) -> int:
    """Train a detector on labelled images of one sensor or more.

    FOLDER gets log.csv and curves for TensorBoard, last.ckpt to go on from, and weights with thresholds chosen on
    the validation split: best.safetensors by H-mAP, final.safetensors of the last step. A run that was stopped or
    killed goes on with --resume auto as if nothing had happened.
    """
    allocation.keep()
    (arguments,) = split(given, RunArguments)
    from babelrs_geo.training.recipe import read

    recipe = arguments.read(read)
    from babelrs_geo.training.run import fit

    begun = time.perf_counter()
    with progress_bar("training", hidden=arguments.hidden, what="steps") as progress:
        done = fit(recipe, [Path(path) for path in arguments.data], arguments.place(progress))
    if done.stopped:
        return stopped(done.step)
    if not arguments.hidden:
        kept = "final" if done.final is None else "best"
        weights = quote(f"{arguments.output}/{kept}.safetensors")
        click.echo(
            f"Trained {done.step} steps in {duration(time.perf_counter() - begun)}: {done.judged}.\n"
            f"Written to {arguments.output}: babelrs-geo detect scene.tif --weights {weights}"
        )
    return 0
