"""The group of verbs: every failure ends in one line on stderr and an exit code."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TextIO

import click

from babelrs_geo.errors import BabelError

PROGRAM = "babelrs-geo"
EXIT_ERROR, EXIT_INCOMPLETE, EXIT_INTERRUPTED = 1, 3, 130

# With this set in the environment, an error nobody foresaw shows its traceback.
DEBUG_VARIABLE = "BABELRS_GEO_DEBUG"


class Program(click.Group):
    """The group of verbs, which ends every failure in one line on stderr and an exit code."""

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Run, and leave with an exit code whatever happens."""
        kwargs["standalone_mode"] = False
        kwargs.setdefault("prog_name", PROGRAM)
        try:
            with own_warnings():
                code = super().main(*args, **kwargs)
        except click.UsageError as error:
            path = error.ctx.command_path if error.ctx else PROGRAM
            fail(f"{error.format_message()} (see '{path} --help')", error.exit_code)
        except click.ClickException as error:
            fail(error.format_message(), error.exit_code)
        except (click.Abort, KeyboardInterrupt):
            fail("interrupted, nothing was written", EXIT_INTERRUPTED)
        except BabelError as error:
            fail(str(error), EXIT_ERROR)
        except Exception as error:
            if os.environ.get(DEBUG_VARIABLE):
                raise
            fail(
                f"unexpected {type(error).__name__}: {error} (a fault of the program: set {DEBUG_VARIABLE}=1 "
                "for the traceback and report it)",
                EXIT_ERROR,
            )
        sys.exit(code if isinstance(code, int) else 0)


def fail(message: str, code: int) -> NoReturn:
    """Say what went wrong and leave."""
    tell("error", message)
    sys.exit(code)


def tell(kind: str, message: str) -> None:
    """One line on stderr, whatever breaks the message holds."""
    click.echo(f"{PROGRAM}: {kind}: {' '.join(message.split())}", err=True)


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM, as a cluster sends it, is heard as Ctrl+C is, for as long as the block lasts."""

    def stop(number: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def own_warnings() -> Iterator[None]:
    """The package's own warnings in one line on stderr, each once; others are for developers."""
    here = str(Path(__file__).parents[1])
    told: set[str] = set()

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        ours = filename.startswith(here) and issubclass(category, UserWarning)
        if (
            ours
            and category.__module__.partition(".")[0] in ("builtins", "babelrs_geo")
            and str(message) not in told
        ):
            told.add(str(message))
            tell("warning", str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        yield
