"""Who does the work: a pair of cells here, or pairs on the workers of a Dask cluster, each taking whole scenes."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol

from babelrs_geo.archive.cell import Cell, Limits, LostError, Work
from babelrs_geo.archive.ledger import FAILED
from babelrs_geo.archive.turns import Rota
from babelrs_geo.archive.work import SHARED, Outcome, Task
from babelrs_geo.cluster import Workers, connect

Answer = tuple[Task, Outcome | BaseException]
"""A task and how it ended; an error is the run's, not the scene's."""

PAIR = 2
"""Processes that share the turn to compute."""

_BATCH_SECONDS = (
    2.0  # a batch for Dask should take so long: its overhead is then nothing, and little is lost with it
)
_BATCH_MOST = 32
_PARTS = 3  # of a shared scene, for each worker: the last to end is then not long alone
_GROUPS_MOST = 8  # of a part, which is to end well within its time limit
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


class _Pair:
    """Two cells that compute in turn: while one does, the other opens the next scene or writes the last one's result.

    Each has one scene at a time, so that it is plain which is to blame. The second starts with the second scene.
    """

    def __init__(self, work: Work, limits: Limits) -> None:
        self._rota = Rota()
        self._cells = [Cell(work, limits, self._rota) for _ in range(PAIR)]

    def start(
        self, take: Callable[[], Task | None], give: Callable[[Task, Outcome | BaseException], None]
    ) -> list[threading.Thread]:
        """Threads that take tasks and give their outcomes until there is none to take."""

        def serve(cell: Cell) -> None:
            while (task := take()) is not None:
                try:
                    outcome: Outcome | BaseException = attempt(cell, task)
                except BaseException as error:
                    outcome = error
                give(task, outcome)

        threads = [threading.Thread(target=serve, args=(cell,), daemon=True) for cell in self._cells]
        for thread in threads:
            thread.start()
        return threads

    def kill(self) -> None:
        """End the processes; the threads then see that."""
        for cell in self._cells:
            cell.kill()

    def close(self) -> None:
        """End the processes, where no thread talks with them any more."""
        for cell in self._cells:
            cell.close()
        self._rota.close()


class _One:
    """A pair beside this process."""

    def __init__(self, work: Work, limits: Limits, stack: ExitStack) -> None:
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._ended: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self._out = 0
        self._pair = _Pair(work, limits)
        self._threads = self._pair.start(self._tasks.get, lambda *answer: self._ended.put(answer))
        stack.callback(self._stop)

    def room(self) -> int:
        return max(0, 6 - self._out)

    def submit(self, tasks: Sequence[Task]) -> None:
        self._out += len(tasks)
        for task in tasks:
            self._tasks.put(task)

    def finished(self, seconds: float) -> list[Answer]:
        found = _drained(self._ended, seconds)
        self._out -= len(found)
        return found

    def _stop(self) -> None:
        with suppress(queue.Empty):
            while True:
                self._tasks.get_nowait()
        for _ in self._threads:
            self._tasks.put(None)
        self._pair.kill()  # the threads then see their cells' end, and their own
        for thread in self._threads:
            thread.join()
        self._pair.close()


@dataclass
class _Shared:
    """A scene of many tiles that several workers do in parts."""

    task: Task
    left: int
    failed: Outcome | None = None


class _Many:
    """Tasks in batches for the workers of a Dask cluster. A scene of many tiles goes to all of them in parts."""

    def __init__(self, client: Any, work: Work, limits: Limits) -> None:
        self._client, self._limits = client, limits
        self._work = client.scatter(work, broadcast=True, hash=False)
        self._ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._futures: dict[Any, Sequence[Task]] = {}
        self._shared: dict[int, _Shared] = {}
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
                    found += self._told(task, outcome)
            elif len(tasks) > 1:  # a worker was lost: each alone, so that the one to blame is found
                for task in tasks:
                    self._send([task])
            else:
                reason = f"the worker that had it was lost ({type(future.exception()).__name__})"
                found += self._told(tasks[0], Outcome(FAILED, reason, again=True))
            future.release()
        return found

    def _told(self, task: Task, outcome: Outcome | BaseException) -> list[Answer]:
        """The answer that this is, if it is one: parts of a scene are none."""
        if isinstance(outcome, BaseException):
            return [(task, outcome)]
        if task.groups is not None:
            return self._one_part(self._shared[task.id], outcome)
        if outcome.state == SHARED:
            self._share(task, int(outcome.values["groups"]))
            return []
        self._shared.pop(task.id, None)
        took = float(outcome.values.get("seconds", _BATCH_SECONDS))
        self._pace += 0.1 * (took - self._pace)
        return [(task, outcome)]

    def _share(self, task: Task, groups: int) -> None:
        """Hand out the parts: neighbouring groups of tiles, several for each worker, so that all end together."""
        size = max(1, min(_GROUPS_MOST, groups // (_PARTS * self._threads)))
        parts = [tuple(range(start, min(start + size, groups))) for start in range(0, groups, size)]
        self._shared[task.id] = _Shared(task, len(parts))
        for part in parts:
            self._send([replace(task, groups=part)])

    def _one_part(self, shared: _Shared, outcome: Outcome) -> list[Answer]:
        """After the last part, the result is made; or the scene has failed as one of them did."""
        shared.left -= 1
        if outcome.state != SHARED:
            shared.failed = shared.failed or outcome
        if shared.left:
            return []
        if shared.failed is None:
            self._send([replace(shared.task, gather=True)])
            return []
        del self._shared[shared.task.id]
        return [(shared.task, shared.failed)]

    def end(self) -> None:
        self._client.cancel(list(self._futures), force=True)
        with suppress(OSError, RuntimeError, TimeoutError):  # workers that are gone have no cells left
            self._client.run(_close_pairs)


def _drained(ended: queue.SimpleQueue[Any], seconds: float) -> list[Any]:
    """All that is in a queue, after waiting so long for the first."""
    found: list[Any] = []
    try:
        found.append(ended.get(timeout=seconds))
        while True:
            found.append(ended.get_nowait())
    except queue.Empty:
        return found


_pairs: dict[int, tuple[Work, _Pair]] = {}
"""On a worker: by thread, the work and its cells."""


def _work_off(work: Work, limits: Limits, tasks: Sequence[Task]) -> list[Outcome | BaseException]:
    """On a worker: tasks in their order, in cells that outlive this call."""
    thread = threading.get_ident()
    if thread in _pairs and _pairs[thread][0] is not work:
        _pairs.pop(thread)[1].close()
    if thread not in _pairs:
        _pairs[thread] = work, _Pair(work, limits)
    waiting: queue.SimpleQueue[Task] = queue.SimpleQueue()
    for task in tasks:
        waiting.put(task)
    ended: dict[int, Outcome | BaseException] = {}
    broken: list[BaseException] = []

    def take() -> Task | None:
        with suppress(queue.Empty):
            return None if broken else waiting.get_nowait()
        return None

    def give(task: Task, outcome: Outcome | BaseException) -> None:
        ended[task.id] = outcome
        if isinstance(outcome, BaseException):
            broken.append(outcome)

    for each in _pairs[thread][1].start(take, give):
        each.join()
    return [ended[task.id] if task.id in ended else broken[0] for task in tasks]


def _close_pairs() -> None:
    while _pairs:
        _pairs.popitem()[1][1].kill()
