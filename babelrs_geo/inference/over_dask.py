"""Groups of tiles by the workers of a Dask cluster: the caller's scheduler, or processes on this machine.

No more groups are under way than the workers need, and results come back one by one. What a lost worker had is done
again by another; a group that keeps failing becomes failed tiles of the coverage. Each process loads the detector once,
and computes one group at a time, whatever threads Dask gives it.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import islice
from queue import SimpleQueue
from typing import Any, Protocol

import numpy as np

from babelrs_geo.cluster import first
from babelrs_geo.errors import BabelError
from babelrs_geo.inference.coverage import FAILED
from babelrs_geo.inference.look import Detector, Group, Look, Part, Tick
from babelrs_geo.inference.run import Crew

AHEAD = 2
"""Groups for each worker's thread that are computed or wait beside it."""
RETRIES = 2
"""Times that a group is tried again where it fails for a reason that is not the user's to mend."""


class Loader(Hashable, Protocol):
    """Makes detectors where they are needed. Picklable; equal loaders make the same."""

    def __call__(self) -> Sequence[Detector]:
        """The detectors, in the process that calls."""


def crew(client: Any, look: Look, load: Loader) -> Crew:
    """The workers of `client`, a `distributed.Client` that may belong to somebody else, who may use it meanwhile.

    Raises, while computing, what `load` raises and the `BatchError` of a worker whose memory did not suffice.
    """

    def compute(groups: Sequence[Group], tick: Tick) -> Iterator[tuple[Group, Part]]:
        left = iter(groups)
        doubtful: list[Group] = []
        under_way: dict[Any, Group] = {}
        ended: SimpleQueue[Any] = SimpleQueue()

        def send() -> None:
            room = AHEAD * max(1, sum(client.nthreads().values())) - len(under_way)
            for group in islice(left, max(0, room)):
                future = client.submit(_compute, look, load, group, pure=False, retries=RETRIES)
                under_way[future] = group
                future.add_done_callback(ended.put)

        def deserted() -> None:
            if not client.nthreads():
                told = "the Dask scheduler has no workers: waiting for some; Ctrl+C ends it and keeps what is done"
                warnings.warn(told, UserWarning, stacklevel=2)

        send()
        try:
            while under_way:
                future = first(ended, deserted)
                group = under_way.pop(future)
                send()
                if _lost(future):
                    doubtful.append(group)
                    continue
                part = _part(future, group)
                tick(len(group.tiles))
                yield group, part
            for group in doubtful:  # each alone, so that none is blamed for what another does to a worker
                future = client.submit(_compute, look, load, group, pure=False)
                under_way[future] = group
                part = _part(future, group)
                tick(len(group.tiles))
                yield group, part
        finally:
            if client.status == "running":
                client.cancel(list(under_way))

    return compute


def _lost(future: Any) -> bool:
    """Whether several workers in turn died with a group, or with one that waited beside it."""
    from distributed.scheduler import KilledWorker

    return isinstance(future.exception(), KilledWorker)


def _part(future: Any, group: Group) -> Part:
    """What a group came to."""
    error = future.exception()
    if error is None:
        part: Part = future.result()
        return part
    if isinstance(error, BabelError):
        raise error
    reason = f"its worker failed ({type(error).__name__}: {' '.join(str(error).split())})"
    return Part(None, np.zeros(0, np.int64), tuple((i, FAILED, reason) for i in group.tiles))


_held: dict[Loader, Sequence[Detector]] = {}
"""On a worker: the detectors of the run before, since the next is likely to want the same."""
_busy = threading.Lock()


def _compute(look: Look, load: Callable[[], Sequence[Detector]], group: Group) -> Part:
    """On a worker: one group."""
    with _busy:
        if load not in _held:
            _held.clear()
            _held[load] = load()
        try:
            ((_, part),) = look.parts(_held[load], [group])
        finally:
            look.scene.close()
    return part
