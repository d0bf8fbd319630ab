"""`babelrs-geo instruct`."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from babelrs_geo.cli.options import SENSORS, Command, Listed, Named, Splits, apply, split
from babelrs_geo.cli.program import EXIT_INTERRUPTED, tell
from babelrs_geo.cli.progress import duration, progress_bar

if TYPE_CHECKING:
    from babelrs_geo.datasets.instruct import InstructOptions, Written

# As `questions.TASKS` lists them.
TASKS = ("classes", "count", "presence", "refer", "ground", "caption", "sensor")


@dataclass(frozen=True, kw_only=True)
class _Arguments:
    """What is asked of which images, and where it goes, as typed."""

    data: tuple[str, ...]
    output: str
    splits: str | dict[str, str]
    tasks: tuple[str, ...]
    per_image: int
    turns: int
    crop: int | None
    crops: int
    boxes: int
    rename: tuple[tuple[str, str], ...]
    seed: int
    sheet: str | None
    samples: int
    overwrite: bool
    quiet: bool
    as_json: bool

    def options(self) -> InstructOptions:
        from babelrs_geo.datasets.instruct import InstructOptions

        return InstructOptions(
            tasks=self.tasks,
            per_image=self.per_image,
            turns=self.turns,
            crop=self.crop,
            crops=self.crops,
            seed=self.seed,
            most_boxes=self.boxes,
            split=self.splits,
            renamed=dict(self.rename),
        )


def _options(command: Command) -> Command:
    """What the verb takes, in the order `--help` shows it."""
    positive = click.IntRange(min=1)
    return apply(
        [
            click.option("-o", "--output", required=True, metavar="FILE.jsonl", help="Where the records go."),
            click.option(
                "--split",
                "splits",
                type=Splits(),
                default="train",
                show_default=True,
                help="Of the data; one name, or one for each sensor.",
            ),
            click.option(
                "--tasks",
                type=Listed("task", str),
                default=TASKS,
                metavar="A,B",
                help=f"What is asked: {', '.join(TASKS)}; all unless given.",
            ),
            click.option(
                "--per-image",
                type=positive,
                default=4,
                show_default=True,
                metavar="N",
                help="Questions about an image.",
            ),
            click.option(
                "--turns",
                type=positive,
                default=1,
                show_default=True,
                metavar="N",
                help="Questions of a record, which looks at its image once for all of them.",
            ),
            click.option(
                "--crop",
                type=click.IntRange(min=16),
                metavar="PIXELS",
                help="Ask about squares of this side, cut from the images as they are, in place of whole images.",
            ),
            click.option(
                "--crops",
                type=positive,
                default=4,
                show_default=True,
                metavar="N",
                help="Squares of an image.",
            ),
            click.option(
                "--boxes",
                type=click.IntRange(min=2),
                default=20,
                show_default=True,
                metavar="N",
                help="Boxes of an answer; where there are more objects, the N largest are asked for.",
            ),
            click.option(
                "--rename",
                type=Named(),
                multiple=True,
                help="What to call a class of the labels, in place of its usual name.",
            ),
            click.option("--seed", type=int, default=0, show_default=True, help="Of all that is drawn."),
            click.option(
                "--sheet",
                metavar="FILE.png",
                help="Also draw samples with their boxes, for a person to check.",
            ),
            click.option(
                "--samples",
                type=positive,
                default=24,
                show_default=True,
                metavar="N",
                help="Samples on the sheet.",
            ),
            click.option("--overwrite", is_flag=True, help="Replace an existing output."),
            click.option("--quiet", is_flag=True, help="Say nothing but warnings and errors."),
            click.option("--json", "as_json", is_flag=True, help="Print a summary as JSON."),
        ],
        command,
    )


@click.command("instruct")
@click.argument("data", nargs=-1, required=True)
@_options
def instruct_verb(**given: Any) -> int:
    """Ask questions about labelled images and answer them by the labels: data for pretraining with language.

    DATA are folders in SOI-Det's layout, or of chips (tile). FILE.jsonl gets a question and its answer a line;
    beside it FILE.meta.json names it for training, and FILE_images/ holds pictures of chips. The same seed asks the
    same of an image, whatever other images there are.
    """
    (arguments,) = split(given, _Arguments)
    output, sheet = Path(arguments.output), None if arguments.sheet is None else Path(arguments.sheet)
    from babelrs_geo.datasets.instruct import Corpus, write_corpus
    from babelrs_geo.datasets.instruct.writing import check_output

    options = arguments.options()
    check_output(output, overwrite=arguments.overwrite)
    if sheet is not None:
        from babelrs_geo.datasets.instruct.sheet import check_sheet, write_sheet

        check_sheet(sheet, overwrite=arguments.overwrite)
    begun = time.perf_counter()
    hidden = arguments.quiet or arguments.as_json
    try:
        with progress_bar("asking", hidden=hidden, what="images") as progress:
            written = write_corpus([Path(path) for path in arguments.data], output, options, progress)
        if sheet is not None:
            write_sheet(Corpus(written.meta), sheet, arguments.samples)
    except KeyboardInterrupt:
        tell("error", f"interrupted: run the same again ({output} is whole or as it was before)")
        return EXIT_INTERRUPTED
    _report(written, arguments, time.perf_counter() - begun)
    return 0


def _report(written: Written, arguments: _Arguments, seconds: float) -> None:
    if arguments.as_json:
        told = {
            "output": arguments.output,
            "meta": str(written.meta),
            "records": written.records.total(),
            "images": dict(written.images),
            "by_sensor_and_task": {
                sensor: {task: written.records[sensor, task] for task in arguments.tasks}
                for sensor in SENSORS
                if written.images[sensor]
            },
            "incomplete": written.incomplete,
            "seconds": round(seconds, 3),
        }
        click.echo(json.dumps(told, indent=2))
    elif not arguments.quiet:
        tasks = [task for task in TASKS if task in arguments.tasks]
        width = max(len(task) for task in tasks) + 2
        click.echo(
            "".join(f"{word:>{width}}" for word in ("images", *tasks)).rjust(width * (len(tasks) + 1) + 4)
        )
        for sensor in SENSORS:
            if written.images[sensor]:
                counts = (written.images[sensor], *(written.records[sensor, task] for task in tasks))
                click.echo(f"{sensor:<4}" + "".join(f"{count:>{width},}" for count in counts))
        if written.incomplete:
            click.echo(
                f"{written.incomplete:,} images show objects that are cut off and not labelled: only single objects "
                "and the sensor are asked for."
            )
        sheet = "" if arguments.sheet is None else f"; {arguments.sheet} shows some of them"
        click.echo(
            f"Asked {written.records.total():,} questions of {written.images.total():,} images in "
            f"{duration(seconds)}.\n"
            f"Written to {arguments.output}: {written.meta.name} names it for training{sheet}"
        )
