"""`babelrs-geo pretrain`."""

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

RECIPES = ("compact", "internvl2_5-1b")


def _options(command: Command) -> Command:
    data = "A corpus: its meta JSON, or the JSONL file that instruct wrote."
    start = "A pivot to begin from, encoder, projector and language model, in place of the recipe's (model.start)."
    held_out = click.option(
        "--held-out",
        multiple=True,
        metavar="PATH",
        help="A corpus about images that are not learnt from: what the run is asked at times.",
    )
    options = run_options(RECIPES, data, start)
    return apply([*options[:4], held_out, *options[4:]], command)


@click.command("pretrain")
@_options
@needing("pretrain")
def pretrain_verb(held_out: tuple[str, ...], **given: Any) -> int:
    """Pretrain an encoder by questions and answers about images of every sensor.

    FOLDER gets log.csv and curves for TensorBoard, last.ckpt to go on from, encoder.safetensors from which a detector
    starts (train --start), pivot.safetensors with all that was trained, and answers.jsonl with the last answers about
    images that were held out. A run that was stopped or killed goes on with --resume auto as if nothing had happened.
    """
    allocation.keep()
    (arguments,) = split(given, RunArguments)
    from babelrs_geo.training.pretrain.recipe import read

    recipe = arguments.read(read)
    from babelrs_geo.training.pretrain.run import ENCODER, fit

    begun = time.perf_counter()
    with progress_bar("pretraining", hidden=arguments.hidden, what="steps") as progress:
        place = arguments.place(progress)
        done = fit(recipe, [Path(path) for path in arguments.data], place, [Path(path) for path in held_out])
    if done.stopped:
        return stopped(done.step)
    if not arguments.hidden:
        rates = [done.figures.get(name) for name in ("all", "all_blank", "all_shuffled")]
        told = [f"{rate:.3f}" for rate in rates if rate is not None]
        right = f": right answers {told[0]}, of grey images {told[1]}, of others {told[2]}" if told else ""
        click.echo(
            f"Pretrained {done.step} steps in {duration(time.perf_counter() - begun)}{right}.\n"
            f"Written to {arguments.output}: babelrs-geo train --recipe compact --data chips -o runs/x --start "
            f"{quote(f'{arguments.output}/{ENCODER}')}"
        )
    return 0
