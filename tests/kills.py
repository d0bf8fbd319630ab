"""Programs that are ended at random moments, as a cluster, a full disk or a person does."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


def end_at_random(
    command: Sequence[str],
    progress: Callable[[], int],
    until: int,
    draw: random.Random,
    environment: Mapping[str, str] | None = None,
    signals: Sequence[signal.Signals] = (signal.SIGKILL,),
) -> bool:
    """Start a program and end it, with all its children, a random while after its `progress` has come so far.

    Progress and not the clock, for machines are fast at one time and slow at another. False where it came to its
    end before.
    """
    with subprocess.Popen(
        command, env=environment, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        while process.poll() is None and progress() < until:
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.1))
        ended = process.poll() is None
        if ended:
            os.killpg(process.pid, draw.choice(signals))
    return ended


def last_words(process: subprocess.Popen[str], seconds: float = 120) -> str:
    """What a program that leads a session says on stderr until its end; where that does not come, it and its children
    are killed.
    """
    try:
        return process.communicate(timeout=seconds)[1]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def drafts(folder: Path) -> list[Path]:
    """Files that are not whole."""
    return [p for p in folder.rglob(".*") if p.is_file()]


def children(pid: int) -> list[int]:
    """Processes that a process started, as Linux knows them."""
    lists = (path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children"))
    return [int(child) for each in lists for child in each]
