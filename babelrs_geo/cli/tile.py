"""`babelrs-geo tile`."""

from __future__ import annotations

import json
import os
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from babelrs_geo.cli.options import Command, Listed, SceneArguments, apply, reading_options, split
from babelrs_geo.cli.program import EXIT_INTERRUPTED, stoppable, tell
from babelrs_geo.cli.progress import duration, progress_bar

if TYPE_CHECKING:
    from babelrs_geo.chips import ChipOptions, Cut
    from babelrs_geo.cluster import Workers
    from babelrs_geo.scenes import Scene
    from babelrs_geo.vectors import Labels

EXPORTS = ("coco", "dota")


class Shares(click.ParamType):
    """Shares of train, val and test."""

    name = "TRAIN/VAL/TEST"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        """Three numbers; that they are shares is seen later."""
        if isinstance(value, tuple):
            return value
        try:
            first, second, third = (float(part) for part in str(value).split("/"))
        except ValueError:
            self.fail(f'"{value}" is no split; expected TRAIN/VAL/TEST such as 0.8/0.1/0.1', param, ctx)
        return first, second, third


@dataclass(frozen=True, kw_only=True)
class _LabelArguments:
    """The labels, as typed."""

    labels: tuple[str, ...]
    class_column: str
    boxes: str

    def read(self) -> list[Labels]:
        from babelrs_geo.vectors import read_labels

        return [read_labels(path, self.class_column, self.boxes) for path in self.labels]  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class _ChipArguments:
    """What chips are cut, as typed."""

    size: int
    overlap: int
    split: tuple[float, float, float]
    block: int
    background: float
    keep_truncated: float
    seed: int
    compress: str

    def options(self) -> ChipOptions:
        from babelrs_geo.chips import ChipOptions

        return ChipOptions(**vars(self))


@dataclass(frozen=True, kw_only=True)
class _RunArguments:
    """Where to and by whom, as typed."""

    output: str
    workers: int | None
    dask: str | None
    export: tuple[str, ...]
    coregister: bool
    reference: str | None
    correct_shift: bool
    quiet: bool
    as_json: bool

    def crew(self) -> Workers:
        from babelrs_geo.cluster import CUTTING, Workers

        here = len(os.sched_getaffinity(0)) if self.workers is None else self.workers
        crew = Workers(processes=here, scheduler=self.dask)
        crew.prepare(CUTTING)
        return crew


def _chip_options(command: Command) -> Command:
    """Labels and chips, in the order `--help` shows them."""
    return apply(
        [
            click.option(
                "--labels",
                multiple=True,
                metavar="FILE",
                help="Polygons with a class column in any CRS, COCO JSON, or DOTA text (a file or a folder).",
            ),
            click.option(
                "--class-column",
                default="class",
                show_default=True,
                metavar="NAME",
                help="Column of the class.",
            ),
            click.option(
                "--boxes",
                type=click.Choice(["auto", "oriented", "horizontal"]),
                default="auto",
                show_default=True,
                help="What labels become; by itself, what the file says or its polygons show.",
            ),
            click.option(
                "--size", type=int, default=800, show_default=True, metavar="PX", help="Side of a chip."
            ),
            click.option(
                "--overlap",
                type=int,
                default=200,
                show_default=True,
                metavar="PX",
                help="Shared by neighbours.",
            ),
            click.option(
                "--split",
                type=Shares(),
                default=(0.8, 0.1, 0.1),
                help="Shares of the ground.  [default: 0.8/0.1/0.1]",
            ),
            click.option(
                "--block",
                type=int,
                default=4,
                show_default=True,
                metavar="CHIPS",
                help="Side of the blocks of ground that go to a split as a whole.",
            ),
            click.option(
                "--background",
                type=float,
                default=1.0,
                show_default=True,
                metavar="0..1",
                help="Share of the chips without an object that is kept.",
            ),
            click.option(
                "--keep-truncated",
                type=float,
                default=0.3,
                show_default=True,
                metavar="0..1",
                help="Objects with more of their area than this outside a chip, or not valid, are dropped from it.",
            ),
            click.option(
                "--seed", type=int, default=0, show_default=True, help="Of the splits and the background."
            ),
            click.option(
                "--compress",
                type=click.Choice(["zstd", "deflate", "lzw", "none"]),
                default="zstd",
                show_default=True,
                help="Compression of the chips, all lossless.",
            ),
        ],
        command,
    )


def _run_options(command: Command) -> Command:
    """Where to, by whom, and what else."""
    return apply(
        [
            click.option("-o", "--output", required=True, metavar="FOLDER", help="Where the chips go."),
            click.option(
                "--workers", type=int, metavar="N", help="Processes on this machine; one a core unless given."
            ),
            click.option(
                "--dask",
                metavar="tcp://HOST:PORT",
                help="A running Dask scheduler, in place of processes here.",
            ),
            click.option(
                "--to",
                "export",
                type=Listed("format", str),
                default=(),
                metavar="coco,dota",
                help="Also write pictures and labels for other tools.",
            ),
            click.option(
                "--coregister",
                is_flag=True,
                help="SCENES are sensor=FILE of one ground: bring them to one grid, and cut them alike.",
            ),
            click.option(
                "--reference",
                type=click.Choice(["sar", "ir", "rgb"]),
                help="Whose grid the others are brought to; the finest unless given.",
            ),
            click.option(
                "--correct-shift", is_flag=True, help="Take out the shift measured between the sensors."
            ),
            click.option("--quiet", is_flag=True, help="Say nothing but warnings and errors."),
            click.option("--json", "as_json", is_flag=True, help="Print a summary as JSON."),
        ],
        command,
    )


@click.command("tile")
@click.argument("scenes", nargs=-1, required=True)
@_run_options
@_chip_options
@reading_options
def tile_verb(**given: Any) -> int:
    """Cut SCENES and their labels into chips for training, with an index and splits that share no ground.

    A run that was stopped goes on when the same is run again; the files are the same, whoever works and however
    often. Ends with 0 when done, 1 on an error, 2 on wrong usage, 130 when interrupted.
    """
    run, labels, chips = split(given, _RunArguments, _LabelArguments, _ChipArguments)
    if unknown := set(run.export) - set(EXPORTS):
        raise click.UsageError(f"--to knows no {', '.join(sorted(unknown))}; expected {', '.join(EXPORTS)}")
    if not run.coregister and (run.reference or run.correct_shift):
        raise click.UsageError("--reference and --correct-shift go with --coregister")
    start = time.perf_counter()
    crew = run.crew()  # first, so that its processes import while this one does
    options, read = chips.options(), labels.read()
    with stoppable(), ExitStack() as stack:
        hidden = run.quiet or run.as_json
        try:
            if run.coregister:
                cut = _coregistered(given, run, read, options, crew, stack, hidden=hidden)
            else:
                from babelrs_geo.chips import cut_chips

                scenes = [_open(given, path, given["sensor"], stack) for path in given["scenes"]]
                with progress_bar("tiling", hidden=hidden, what="blocks") as progress:
                    cut = cut_chips(scenes, run.output, read, options, crew, progress)
            if run.export:
                from babelrs_geo.chips.export import export

                for kind in run.export:
                    export(run.output, kind)
        except KeyboardInterrupt:
            tell("error", f"interrupted: run the same again, and it goes on where it stopped ({run.output})")
            return EXIT_INTERRUPTED
    _report(cut, run, time.perf_counter() - start)
    return 0


def _open(given: dict[str, Any], path: str, sensor: str | None, stack: ExitStack) -> Scene:
    """A scene opened as asked, which a read opens again until the stack ends: there may be more scenes than a process
    may have files open.
    """
    (arguments,) = split(given | {"scene": path, "sensor": sensor}, SceneArguments)
    scene: Scene = stack.enter_context(arguments.open(among_others=len(given["scenes"]) > 1))
    scene.close()
    return scene


def _coregistered(
    given: dict[str, Any],
    run: _RunArguments,
    labels: list[Labels],
    options: ChipOptions,
    crew: Workers,
    stack: ExitStack,
    *,
    hidden: bool,
) -> Cut:
    """Bring scenes given as sensor=FILE to one grid, tell their shifts, and cut them."""
    from babelrs_geo.chips.registered import cut_registered

    scenes: dict[str, Scene] = {}
    for word in given["scenes"]:
        sensor, equals, path = word.partition("=")
        if not equals or sensor not in ("sar", "ir", "rgb") or sensor in scenes:
            raise click.UsageError(
                f'"{word}" is not sensor=FILE, each sensor once; expected such as sar=a.tif rgb=b.tif ir=c.tif'
            )
        scenes[sensor] = _open(given, path, sensor, stack)
    with progress_bar("tiling", hidden=hidden, what="blocks") as progress:
        cut, shifts = cut_registered(
            scenes,
            run.output,
            labels,
            options,
            crew,
            reference=run.reference,
            correct=run.correct_shift,
            progress=progress,
        )
    if not hidden:
        for shift in shifts:
            click.echo(shift.sentence())
    return cut


def _report(cut: Cut, run: _RunArguments, seconds: float) -> None:
    if run.as_json:
        told = {
            "output": run.output,
            "chips": cut.chips,
            "objects": cut.objects,
            "left_out_for_other_splits": cut.conflicts,
            "seconds": round(seconds, 3),
        }
        click.echo(json.dumps(told, indent=2))
    elif not run.quiet:
        parts = ", ".join(f"{count} {name}" for name, count in cut.chips.items())
        left = f" {cut.conflicts} left out, on the ground of another split." if cut.conflicts else ""
        click.echo(
            f"Cut {sum(cut.chips.values())} chips ({parts}) with {cut.objects} objects in {duration(seconds)}."
            f"{left}\nWritten to {run.output}: index.parquet lists the chips, labels.parquet their objects"
        )
