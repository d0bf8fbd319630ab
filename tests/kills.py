"""Programs that are ended at random moments, as a cluster, a full disk or a person does."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Course:
    """How long a program took that nobody ended, in seconds."""

    until_work: float
    """From its start to the first trace of its work."""
    in_all: float


def run_whole(
    command: Sequence[str], begun: Callable[[], bool], environment: Mapping[str, str] | None = None
) -> Course:
    """Run a program to its end; `begun` tells its first trace."""
    start = time.monotonic()
    with subprocess.Popen(command, env=environment) as process:
        while process.poll() is None and not begun():
            time.sleep(0.01)
        first = time.monotonic() - start
    assert process.returncode == 0
    return Course(first, time.monotonic() - start)


def end_at_random(
    command: Sequence[str],
    course: Course,
    draw: random.Random,
    kills: int,
    environment: Mapping[str, str] | None = None,
    signals: Sequence[signal.Signals] = (signal.SIGKILL,),
) -> int:
    """Start a program again and again, and end it with all its children at moments drawn over its working time.

    Until it was ended so often or came to its end before; returns how often it was ended.
    """
    for done in range(kills):
        with subprocess.Popen(
            command, env=environment, stderr=subprocess.DEVNULL, start_new_session=True
        ) as process:
            try:
                process.wait(draw.uniform(0.9 * course.until_work, course.in_all))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, draw.choice(signals))
        if process.returncode == 0:
            return done
    return kills


def drafts(folder: Path) -> list[Path]:
    """Files that are not whole."""
    return [p for p in folder.rglob(".*") if p.is_file()]
