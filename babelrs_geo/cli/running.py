"""What the verbs that train ask for in common."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from babelrs_geo.cli.options import Command
from babelrs_geo.cli.program import EXIT_INTERRUPTED, tell
from babelrs_geo.errors import ParameterError

if TYPE_CHECKING:
    from babelrs_geo.training.trainer import Place


@dataclass(frozen=True, kw_only=True)
class RunArguments:
    """A run, as typed."""

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

    @property
    def hidden(self) -> bool:
        """Whether this process says nothing: of several, only the first does."""
        return self.quiet or int(os.environ.get("LOCAL_RANK", "0")) > 0

    def read(self, read: Callable[[str, Sequence[str], Mapping[str, Any]], Any]) -> Any:
        """The recipe, with changes by --set and by what has an option of its own."""
        if (self.recipe is None) == (self.config is None):
            raise click.UsageError("pass one of --recipe and --config")
        own = {"model.start": self.start, "run.workers": self.workers}
        given = {key: value for key, value in own.items() if value is not None}
        return read(self.recipe or str(self.config), self.changes, given)

    def place(self, progress: Callable[[int, int], None] | None) -> Place:
        """Where and on what."""
        from babelrs_geo.training.trainer import Place

        return Place(
            folder=Path(self.output),
            device=self.device,
            devices=self.devices,
            nodes=self.nodes,
            resume=self.resume == "auto",
            progress=progress,
        )


@contextmanager
def needing(extra: str) -> Iterator[None]:
    """Say how to install what the block imports and is not there. Raises ParameterError."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", "babelrs_geo"):
            raise
        raise ParameterError(
            f'training needs packages that are not installed ({missing}): pip install "babelrs-geo[{extra}]"'
        ) from error


def stopped(step: int) -> int:
    """Say that a run was told to stop, and give the exit code."""
    tell("error", f"stopped after step {step}: run the same with --resume auto, and it goes on")
    return EXIT_INTERRUPTED


def run_options(recipes: Sequence[str], data: str, start: str) -> list[Callable[[Command], Command]]:
    """What `RunArguments` holds, in the order `--help` shows it; `data` and `start` are the help of theirs."""
    return [
        click.option("--recipe", type=click.Choice(recipes), help="A run that comes with the package."),
        click.option("--config", metavar="FILE.yaml", help="A recipe of your own, in place of --recipe."),
        click.option(
            "--set",
            "changes",
            multiple=True,
            metavar="KEY=VALUE",
            help="Change a number of the recipe, such as clip=1 or run.validate_every=100.",
        ),
        click.option("--data", multiple=True, required=True, metavar="PATH", help=data),
        click.option(
            "-o",
            "--output",
            required=True,
            metavar="FOLDER",
            help="Where the run's files go, such as runs/x.",
        ),
        click.option("--start", metavar="NAME|FILE", help=start),
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
            help="Processes that read and prepare, for each that trains; the recipe's unless given.",
        ),
        click.option("--quiet", is_flag=True, help="Say nothing but warnings and errors."),
    ]
