"""Files that appear whole or not at all, and folders for them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from babelrs_geo.errors import BabelError, OutputError


@contextmanager
def draft(
    path: Path,
    advice: str = "check the disk's space and permissions",
    failures: tuple[type[Exception], ...] = (),
) -> Iterator[Path]:
    """A hidden name beside `path` to write to: in the end it replaces `path`, or is removed where that was not reached.

    A process that is killed leaves it, under its own number. Raises OutputError with `advice` in place of an OSError
    or one of `failures`; what the library raises on purpose goes through.
    """
    hidden = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield hidden
        hidden.replace(path)
    except Exception as error:
        if isinstance(error, BabelError) or not isinstance(error, (OSError, *failures)):
            raise
        why = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise OutputError(f"{path} cannot be written ({why}); {advice}") from error
    finally:
        with suppress(OSError):
            hidden.unlink(missing_ok=True)


def is_draft(name: str) -> bool:
    """Whether a file's name is one that `draft` writes to."""
    return re.fullmatch(r"\..+\.[0-9]+", name) is not None


def make_folder(path: Path, advice: str = "write elsewhere with -o") -> None:
    """A folder and those above it, if they are not there. Raises OutputError with `advice`."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path} cannot be created ({error.strerror or error}); {advice}") from error
