"""Who does the work: one cell here, or cells on the workers of a Dask cluster, each taking whole scenes."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Protocol

from babelrs_geo.archive.cell import Cell, Limits, LostError, Work
from babelrs_geo.archive.ledger import FAILED
from babelrs_geo.archive.work import Outcome, Task
from babelrs_geo.cluster import Workers, connect

Answer = tuple[Task, Outcome | BaseException]
"""A task and how it ended; an error is the run's, not the scene's."""

_BATCH_SECONDS = (
    2.0  # a batch for Dask should take so long: its overhead is then nothing, and little is lost with it
)
_BATCH_MOST = 32
_COUNT_SECONDS = 1.0  # between two looks at how many workers there are


class Crew(Protocol):
    """What a run asks of those who work."""

    def room(self) -> int:
        """How many more tasks are wanted now."""

    def submit(self, tasks: Sequence[Task]) -> None:
        """Hand out tasks."""

    def finished(self, seconds: float) -> list[Answer]:
        """What has ended; waits so long for the first."""


@contextmanager
def hired(work: Work, limits: Limits, workers: Workers) -> Iterator[Crew]:
    """The crew, which starts while the caller still plans and ends with the block, whatever it is at.

    Raises ParameterError where no scheduler answers.
    """
    if workers.alone:
        with ExitStack() as stack:
            yield _One(work, limits, stack)
        return
    with connect(workers) as client:
        crew = _Many(client, work, limits)
        try:
            yield crew
        finally:
            crew.end()


def attempt(cell: Cell, task: Task) -> Outcome:
    """How a task ends in a cell. Raises what is the run's fault, not the scene's."""
    try:
        outcome: Outcome = cell.ask(task)
    except LostError as error:
        text = str(error)
        # A scene that hangs or is too large would do so again; what killed a process may have been another's hunger.
        return Outcome(FAILED, text, again=not text.startswith(("took longer", "needed more")))
    if outcome.state == FAILED and "out of memory" in (outcome.reason or ""):
        cell.close()  # memory comes back with the process
    return outcome


class _One:
    """A cell and a thread that talks with it."""

    def __init__(self, work: Work, limits: Limits, stack: ExitStack) -> None:
        self._cell = stack.enter_context(Cell(work, limits))
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._ended: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self._out = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        stack.callback(self._stop)

    def room(self) -> int:
        return max(0, 4 - self._out)

    def submit(self, tasks: Sequence[Task]) -> None:
        self._out += len(tasks)
        for task in tasks:
            self._tasks.put(task)

    def finished(self, seconds: float) -> list[Answer]:
        found = _drained(self._ended, seconds)
        self._out -= len(found)
        return found

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                self._ended.put((task, attempt(self._cell, task)))
            except BaseException as error:
                self._ended.put((task, error))

    def _stop(self) -> None:
        while not self._tasks.empty():
            self._tasks.get()
        self._tasks.put(None)
        self._cell.kill()  # the thread then sees its cell's end, and its own
        self._thread.join()


class _Many:
    """Tasks in batches for the workers of a Dask cluster."""

    def __init__(self, client: Any, work: Work, limits: Limits) -> None:
        self._client, self._limits = client, limits
        self._work = client.scatter(work, broadcast=True, hash=False)
        self._ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._futures: dict[Any, Sequence[Task]] = {}
        self._threads, self._counted = 1, float("-inf")
        self._pace = (
            _BATCH_SECONDS  # seconds a task, a moving mean; a guess at first, so that batches start small
        )

    def room(self) -> int:
        if time.monotonic() > self._counted + _COUNT_SECONDS:
            self._threads = max(1, sum(self._client.nthreads().values()))
            self._counted = time.monotonic()
        batches = 2 * self._threads - len(self._futures)
        return max(0, batches) * self._size()

    def _size(self) -> int:
        return max(1, min(_BATCH_MOST, int(_BATCH_SECONDS / max(self._pace, 1e-3))))

    def submit(self, tasks: Sequence[Task]) -> None:
        size = self._size()
        for start in range(0, len(tasks), size):
            self._send(tasks[start : start + size])

    def _send(self, tasks: Sequence[Task]) -> None:
        future = self._client.submit(_work_off, self._work, self._limits, tuple(tasks), pure=False)
        self._futures[future] = tasks
        future.add_done_callback(self._ended.put)

    def finished(self, seconds: float) -> list[Answer]:
        found: list[Answer] = []
        for future in _drained(self._ended, seconds):
            tasks = self._futures.pop(future)
            if future.status == "finished":
                for task, outcome in zip(tasks, future.result(), strict=True):
                    found.append((task, outcome))
                    if isinstance(outcome, Outcome):
                        took = float(outcome.values.get("seconds", _BATCH_SECONDS))
                        self._pace += 0.1 * (took - self._pace)
            elif len(tasks) > 1:  # a worker was lost: each alone, so that the one to blame is found
                for task in tasks:
                    self._send([task])
            else:
                reason = f"the worker that had it was lost ({type(future.exception()).__name__})"
                found.append((tasks[0], Outcome(FAILED, reason, again=True)))
            future.release()
        return found

    def end(self) -> None:
        self._client.cancel(list(self._futures), force=True)
        with suppress(OSError, RuntimeError, TimeoutError):  # workers that are gone have no cells left
            self._client.run(_close_cells)


def _drained(ended: queue.SimpleQueue[Any], seconds: float) -> list[Any]:
    """All that is in a queue, after waiting so long for the first."""
    found: list[Any] = []
    try:
        found.append(ended.get(timeout=seconds))
        while True:
            found.append(ended.get_nowait())
    except queue.Empty:
        return found


_cells: dict[int, tuple[Work, Cell]] = {}
"""On a worker: by thread, the work and its cell."""


def _work_off(work: Work, limits: Limits, tasks: Sequence[Task]) -> list[Outcome | BaseException]:
    """On a worker: tasks one after the other, in a cell that outlives this call."""
    thread = threading.get_ident()
    if thread in _cells and _cells[thread][0] is not work:
        _cells.pop(thread)[1].close()
    if thread not in _cells:
        _cells[thread] = work, Cell(work, limits)
    ended: list[Outcome | BaseException] = []
    for task in tasks:
        try:
            ended.append(attempt(_cells[thread][1], task))
        except Exception as error:
            ended += [error] * (len(tasks) - len(ended))
            break
    return ended


def _close_cells() -> None:
    while _cells:
        _cells.popitem()[1][1].kill()
