"""`babelrs-geo train`."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from babelrs_geo.cli.options import Command, apply, split
from babelrs_geo.cli.program import EXIT_INTERRUPTED, tell
from babelrs_geo.cli.progress import duration, progress_bar

RECIPES = ("compact", "soi-det")


@dataclass(frozen=True, kw_only=True)
class _Arguments:
    """The run, as typed."""

    recipe: str | None
    config: str | None
    changes: tuple[str, ...]
    data: tuple[str, ...]
    output: str
    start: str | None
    resume: str
    device: str
    devices: int
    nodes: int
    workers: int | None
    quiet: bool

    def all_changes(self) -> list[str]:
        """Those by --set, and what has an option of its own."""
        own = {"model.start": self.start, "run.workers": self.workers}
        return [*self.changes, *(f"{key}={value}" for key, value in own.items() if value is not None)]


def _options(command: Command) -> Command:
    """What the verb takes, in the order `--help` shows it."""
    return apply(
        [
            click.option("--recipe", type=click.Choice(RECIPES), help="A run that comes with the package."),
            click.option("--config", metavar="FILE.yaml", help="A recipe of your own, in place of --recipe."),
            click.option(
                "--set",
                "changes",
                multiple=True,
                metavar="KEY=VALUE",
                help="Change a number of the recipe, such as phases.*.lr=1e-4 or data.sensors=[rgb].",
            ),
            click.option(
                "--data",
                multiple=True,
                required=True,
                metavar="PATH",
                help="A folder of chips (tile), one in SOI-Det's layout, or a YAML file that names scenes.",
            ),
            click.option(
                "-o",
                "--output",
                required=True,
                metavar="FOLDER",
                help="Where the run's files go, such as runs/x.",
            ),
            click.option(
                "--start",
                metavar="NAME|FILE|imagenet",
                help="Weights to begin from, in place of the recipe's (model.start).",
            ),
            click.option(
                "--resume",
                type=click.Choice(["auto", "never"]),
                default="never",
                show_default=True,
                help="Go on from the last checkpoint in FOLDER, where there is one.",
            ),
            click.option(
                "--device",
                type=click.Choice(["auto", "cpu", "cuda"]),
                default="auto",
                show_default=True,
                help="Where to compute.",
            ),
            click.option(
                "--devices",
                type=click.IntRange(min=1),
                default=1,
                show_default=True,
                metavar="N",
                help="Processes on this machine, one a GPU.",
            ),
            click.option(
                "--nodes",
                type=click.IntRange(min=1),
                default=1,
                show_default=True,
                metavar="N",
                help="Machines; start the same on each, as by torchrun or Slurm.",
            ),
            click.option(
                "--workers",
                type=click.IntRange(min=0),
                metavar="N",
                help="Processes that read and augment, for each that trains; the recipe's unless given.",
            ),
            click.option("--quiet", is_flag=True, help="Say nothing but warnings and errors."),
        ],
        command,
    )


@click.command("train")
@_options
def train_verb(**given: Any) -> int:
    """Train a detector on labelled images of one sensor or more.

    FOLDER gets log.csv and curves for TensorBoard, last.ckpt to go on from, and weights with thresholds chosen on
    the validation split: best.safetensors by H-mAP, final.safetensors of the last step. A run that was stopped or
    killed goes on with --resume auto as if nothing had happened.
    """
    (arguments,) = split(given, _Arguments)
    if (arguments.recipe is None) == (arguments.config is None):
        raise click.UsageError("pass one of --recipe and --config")
    from babelrs_geo.training.recipe import read

    recipe = read(arguments.recipe or str(arguments.config), arguments.all_changes())
    from babelrs_geo.training.run import Place, fit

    begun = time.perf_counter()
    hidden = arguments.quiet or int(os.environ.get("LOCAL_RANK", "0")) > 0
    with progress_bar("training", hidden=hidden, what="steps") as progress:
        place = Place(
            folder=Path(arguments.output),
            device=arguments.device,
            devices=arguments.devices,
            nodes=arguments.nodes,
            resume=arguments.resume == "auto",
            progress=progress,
        )
        done = fit(recipe, [Path(path) for path in arguments.data], place)
    if done.stopped:
        tell("error", f"stopped after step {done.step}: run the same with --resume auto, and it goes on")
        return EXIT_INTERRUPTED
    if not hidden:
        click.echo(
            f"Trained {done.step} steps in {duration(time.perf_counter() - begun)}: H-mAP {done.best:.3f} after step "
            f"{done.best_step}, {done.final or 0.0:.3f} at the end.\n"
            f"Written to {arguments.output}: babelrs-geo detect scene.tif --weights {arguments.output}/best.safetensors"
        )
    return 0
