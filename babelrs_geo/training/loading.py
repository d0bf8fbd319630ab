"""Batches of a run, drawn from loaders whose workers may be lost: the time they take, and what ends them."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader

from babelrs_geo.errors import BabelError, TrainingError

_GRACE = 2.0  # seconds between the processes of a run that are told to stop one by one


def begin_work(worker: int) -> None:
    """`worker_init_fn`: an interrupt from the terminal, which reaches all, is outlived.

    The parent has a step in hand to end. It ends its workers by SIGTERM, to which they are therefore open.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Batches:
    """The batches of loaders, one loader after the other; `waited` adds up seconds of waiting.

    A worker that is lost ends them where the run was told to stop: a cluster ends all processes of a run at once, and
    the step in hand can still be done and saved. Otherwise it is a TrainingError.
    """

    def __init__(self, loaders: Callable[[], Iterable[DataLoader[Any]]]) -> None:
        self._loaders = loaders
        self.waited = 0.0
        self.stopping: Callable[[], bool] = lambda: False
        """Whether the run was told to stop."""

    def __iter__(self) -> Iterator[Any]:
        for loader in self._loaders():
            batches = iter(loader)
            with _losses_noted() as lost:
                while True:
                    asked = time.perf_counter()
                    try:
                        batch = _next(batches, lost)
                    finally:
                        self.waited += time.perf_counter() - asked
                    if lost and self._told_to_stop():
                        return
                    if lost:
                        raise TrainingError(
                            f"a process that reads data was lost ({' '.join(lost[0].split())}); where memory is short "
                            "take fewer: --set run.workers=1, and go on from the last checkpoint: --resume auto"
                        )
                    if batch is None:
                        break
                    yield batch

    def _told_to_stop(self) -> bool:
        """Also where the worker was told a moment before its parent."""
        end = time.monotonic() + _GRACE
        while not self.stopping() and time.monotonic() < end:
            time.sleep(0.02)
        return self.stopping()


def _next(batches: Iterator[Any], lost: list[str]) -> Any:
    """The next batch, None after the last. An error of a worker comes without its traceback."""
    try:
        return next(batches, None)
    except BabelError as error:
        raise type(error)(str(error).rpartition(f"{type(error).__name__}: ")[2].strip()) from None
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        lost.append(str(error))
        return None


class _Noting:
    """Torch's handler, which raises where a worker was lost, made to note it: the step in hand is not broken off."""

    def __init__(self, theirs: Callable[..., Any]) -> None:
        self.theirs = theirs
        self.lost: list[str] = []

    def __call__(self, number: int, frame: Any) -> None:
        try:
            self.theirs(number, frame)
        except RuntimeError as error:
            self.lost.append(str(error))


@contextmanager
def _losses_noted() -> Iterator[list[str]]:
    """Lost workers as they are noted within the block."""
    now: Any = signal.getsignal(signal.SIGCHLD)
    if not callable(now) or threading.current_thread() is not threading.main_thread():
        yield []
        return
    # one that is there already is of batches that nobody took to their end
    noting = _Noting(now.theirs if isinstance(now, _Noting) else now)
    signal.signal(signal.SIGCHLD, noting)
    try:
        yield noting.lost
    finally:
        if threading.current_thread() is threading.main_thread():  # not where another collects the generator
            current: Any = signal.getsignal(signal.SIGCHLD)
            if current is noting:
                signal.signal(signal.SIGCHLD, noting.theirs)
