"""Turns at what only one process may use at a time: the model, while its neighbour reads and writes.

The lock is the kernel's: whatever ends a process, its turn ends too, and nothing of it stays on the disk.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Sequence


class Rota:
    """What the processes share; they inherit the two open files that `handles` names."""

    def __init__(self) -> None:
        self._files = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115 - live as long as this
        self.handles = tuple(file.fileno() for file in self._files)

    def close(self) -> None:
        """No process started from now on can have it."""
        for file in self._files:
            file.close()


class Turns:
    """In a process that inherited a rota: a context manager, used again and again, inside which is one process at a
    time, first come first served.
    """

    def __init__(self, handles: Sequence[int]) -> None:
        # Opened anew: processes that inherit the same open file would all hold its lock. Who waits holds the first, so
        # that a process which is done cannot take the next turn before it.
        self._next, self._now = (
            os.open(f"/proc/self/fd/{handle}", os.O_RDWR | os.O_CLOEXEC) for handle in handles
        )

    def __enter__(self) -> None:
        fcntl.flock(self._next, fcntl.LOCK_EX)
        try:
            fcntl.flock(self._now, fcntl.LOCK_EX)
        finally:
            fcntl.flock(self._next, fcntl.LOCK_UN)

    def __exit__(self, *_: object) -> None:
        fcntl.flock(self._now, fcntl.LOCK_UN)
