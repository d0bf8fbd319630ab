"""Processes that share the work: on this machine, or those of the user's own Dask scheduler."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from queue import Empty, SimpleQueue
from shlex import quote
from types import FrameType
from typing import Any, TypeVar

from babelrs_geo import allocation
from babelrs_geo.errors import BabelError, ParameterError, SchedulerError

CUTTING = ("babelrs_geo.chips.cut", "dask.multiprocessing")
"""What those who cut chips import."""


REPLACED = 5.0
"""Seconds between looks at whether a local cluster has all its processes."""
HEEDED = 0.1
"""Seconds between answers to an interrupt while results are waited for."""
IDLE = 60.0
"""Seconds without a result after which it is asked why."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Who does the work; no choice here changes a result."""

    processes: int = 1
    """1: this process alone; more: so many processes on this machine."""
    scheduler: str | None = None
    """A running Dask scheduler, by address (`tcp://host:8786`) or by the file that it wrote (`scheduler.json`); scenes,
    weights and folders are where its workers see them under the same paths."""
    patience: float = 20.0
    """Seconds to wait for the scheduler's file, and then for the scheduler to answer."""

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        if self.processes < 1:
            raise ParameterError(f"workers is {self.processes}, expected at least 1")

    @property
    def alone(self) -> bool:
        """Whether there is nobody but this process."""
        return self.scheduler is None and self.processes == 1

    def prepare(self, modules: Sequence[str]) -> None:
        """Where several processes of this machine will work: start the one that `pool` forks them from, which imports
        `modules` for all of them while the caller does something else.
        """
        if self.scheduler is None and self.processes > 1:
            from multiprocessing import forkserver

            multiprocessing.get_context("forkserver").set_forkserver_preload(list(modules))
            forkserver.ensure_running()


@contextmanager
def pool(processes: int) -> Iterator[ProcessPoolExecutor]:
    """Processes of this machine, for `dask.multiprocessing.get`: sooner there than a cluster is. What they have in hand
    when the block ends, they end; they do not outlive this process.
    """
    workers = ProcessPoolExecutor(
        processes, mp_context=multiprocessing.get_context("forkserver"), initializer=_begin
    )
    try:
        yield workers
    finally:
        workers.shutdown(cancel_futures=True)


def _begin() -> None:
    """An interrupt from the terminal reaches all and is the parent's to answer; who is killed tells nobody."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextmanager
def connect(workers: Workers) -> Iterator[Any]:
    """A `distributed.Client` of the user's scheduler, or of processes that end with the block.

    Raises ParameterError where no scheduler answers, or processes cannot be started; SchedulerError, within the block,
    where one no longer does.
    """
    stack = ExitStack()
    try:
        with held_back():
            client = _client(workers, stack)
        yield client
    except (CancelledError, OSError) as error:
        # what was under way is cancelled where the connection is lost, if for a moment
        if isinstance(error, BabelError) or (isinstance(error, OSError) and client.status == "running"):
            raise
        raise SchedulerError(
            f"the Dask scheduler no longer answers ({type(error).__name__}: {' '.join(str(error).split())}); what is "
            "done is kept: run the same again, detect with --resume"
        ) from error
    finally:
        with held_back():
            stack.close()


def _client(workers: Workers, stack: ExitStack) -> Any:
    """A client, closed with the stack, as is what it needs."""
    import dask
    from distributed import Client, LocalCluster, WorkerPlugin

    class Deaf(WorkerPlugin):
        """An interrupt from the terminal reaches all and is this process's to answer."""

        def setup(self, worker: Any) -> None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    if workers.scheduler is not None:
        address = _address(workers.scheduler, workers.patience)
        try:
            theirs = Client(address, timeout=workers.patience, set_as_default=False)
        except (OSError, ValueError) as error:
            raise ParameterError(
                f"no Dask scheduler answers at {workers.scheduler} ({' '.join(str(error).split())}); check --dask"
            ) from error
        return stack.enter_context(theirs)
    # distributed makes its workers give every large array back to the kernel at once, and the pages are asked for anew
    environ = dask.config.get("distributed.nanny.pre-spawn-environ") | allocation.environment()
    stack.enter_context(dask.config.set({"distributed.nanny.pre-spawn-environ": environ}))
    try:
        cluster = stack.enter_context(
            LocalCluster(
                n_workers=workers.processes,
                threads_per_worker=1,
                processes=True,
                dashboard_address=":0",  # None is a fixed port, which a second run finds taken
                memory_limit=0,
                silence_logs=50,
            )
        )
    except RuntimeError as error:
        raise ParameterError(
            f"{workers.processes} processes cannot be started ({' '.join(str(error).split())}); a script "
            'starts some under `if __name__ == "__main__":`, since each of them imports it'
        ) from error
    client = stack.enter_context(Client(cluster, set_as_default=False))
    stack.enter_context(_kept(cluster, workers.processes))
    client.register_plugin(Deaf())
    return client


def _address(scheduler: str, patience: float) -> str:
    """Of a scheduler, named by it or by its file, for which distributed would wait for ever where it is not there."""
    path = Path(scheduler)
    if path.suffix != ".json":
        return scheduler
    began = time.monotonic()
    with held_back() as answer:
        # a file of nothing was opened, and is not written yet
        while not path.exists() or (path.is_file() and path.stat().st_size == 0):
            answer()
            if time.monotonic() - began > patience:
                raise ParameterError(
                    f"{scheduler} is not there after {patience:g} s; start dask scheduler --scheduler-file "
                    f"{quote(scheduler)}, or pass an address such as tcp://host:8786"
                )
            time.sleep(HEEDED)
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["address"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ParameterError(
            f"{scheduler} is not what a Dask scheduler writes ({type(error).__name__}: {error}); pass the file of "
            "dask scheduler --scheduler-file, or an address such as tcp://host:8786"
        ) from error


@contextmanager
def _kept(cluster: Any, processes: int) -> Iterator[None]:
    """A cluster of this machine whose processes are replaced. A nanny starts its own again, but gives up one that is
    killed before it has begun, and work would wait for it for ever.
    """
    ended = threading.Event()

    def replace() -> None:
        while not ended.wait(REPLACED):
            cluster.scale(processes)  # which starts those that the cluster has struck off

    thread = threading.Thread(target=replace, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


_holds: list[Callable[[], None]] = []
"""How to answer what is held back; one at most."""


@contextmanager
def held_back() -> Iterator[Callable[[], None]]:
    """Ctrl+C and SIGTERM wait until what this yields is called, between two steps, or the block ends; who heard them
    before then hears them. A second does not wait. In a block within a block it is the outer one that ends the wait,
    and in a thread that is not the main one, which hears no signals, nothing is held back.

    An exception that a handler raises anywhere may come between the taking of a lock and its guard, which leaves it
    taken for ever, or in a finaliser, which swallows it. Dask's client and pools share such locks with their threads,
    which would never end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    if _holds:
        yield _holds[0]
        return
    told: list[int] = []
    before: dict[int, Any] = {}

    def hear(number: int, frame: FrameType | None) -> None:
        told.append(number)
        if len(told) > 1:
            answer()

    def answer() -> None:
        if not told:
            return
        heard = told[-1]
        told.clear()
        if callable(before[heard]):
            before[heard](heard, None)
        else:  # as the system does, which ends the process
            signal.signal(heard, before[heard])
            signal.raise_signal(heard)

    for each in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(each) not in (signal.SIG_IGN, None):
            before[each] = signal.signal(each, hear)
    _holds.append(answer)
    try:
        yield answer
    finally:
        _holds.clear()
        for number, handler in before.items():
            signal.signal(number, handler)
        answer()


def first(ended: SimpleQueue[T], idle: Callable[[], None] | None = None) -> T:
    """What is put there next; an interrupt is answered meanwhile, and `idle` called after each minute of waiting."""
    began = time.monotonic()
    with held_back() as answer:
        while True:
            answer()
            try:
                return ended.get(timeout=HEEDED)
            except Empty:
                if idle is not None and time.monotonic() - began > IDLE:
                    idle()
                    began = time.monotonic()


def dashboard(client: Any) -> str | None:
    """Where the cluster's dashboard is seen; None where it has none, as without bokeh."""
    here = client.cluster is None or find_spec("bokeh") is not None
    served = client.scheduler_info(n_workers=0).get("services", {}).get("dashboard")
    return client.dashboard_link if here and served else None
