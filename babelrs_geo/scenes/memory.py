"""Arrays whose memory is used again: pages that are fresh from the system cost more than the pixels written to them."""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections import deque
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

LIMIT = 64 << 20
"""Bytes that are kept for the next array at most."""
_SMALL = 1 << 16  # bytes; below, the allocator is as good


class _Loan(weakref.ref[NDArray[Any]]):
    """A reference to an array that does not keep it, with the memory below it."""

    __slots__ = ("memory",)
    memory: NDArray[np.uint8]


class Memory:
    """Gives arrays, and takes their memory back once neither they nor any view of them are left."""

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit
        self.renew()

    def renew(self) -> None:
        """Forget everything; in a forked child also the lock, which a thread of the parent may have held."""
        self._lock = threading.Lock()
        self._free: dict[int, list[NDArray[np.uint8]]] = {}  # by bytes; the size that came back last is last
        self._bytes = 0
        self._back: deque[NDArray[np.uint8]] = deque()
        self._lent: dict[int, _Loan] = {}

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """What `numpy.empty` gives: the caller's own, with anything in it."""
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        if nbytes < _SMALL:
            return np.empty(shape, dtype)
        with self._lock:
            self._sort()
            memory = self._take(nbytes) if nbytes in self._free else np.empty(nbytes, np.uint8)
        # through a memoryview: a view's base is then this array, not the memory below it, which would never come back
        array = np.frombuffer(memory.data, dtype)
        loan = _Loan(array, self._returned)
        loan.memory = memory
        self._lent[id(loan)] = loan
        return array.reshape(shape)

    def _returned(self, loan: weakref.ref[NDArray[Any]]) -> None:
        """Called wherever the last reference goes, perhaps by a thread that holds the lock: must not wait for it."""
        known = self._lent.pop(id(loan), None)
        if known is None:  # lent before a fork
            return
        self._back.append(known.memory)
        if self._lock.acquire(blocking=False):
            try:
                self._sort()
            finally:
                self._lock.release()

    def _sort(self) -> None:
        while self._back:
            memory = self._back.popleft()
            self._free[memory.nbytes] = [*self._free.pop(memory.nbytes, []), memory]
            self._bytes += memory.nbytes
        while self._bytes > self.limit:
            self._take(next(iter(self._free)))

    def _take(self, nbytes: int) -> NDArray[np.uint8]:
        held = self._free[nbytes]
        memory = held.pop()
        self._bytes -= nbytes
        if not held:
            del self._free[nbytes]
        return memory


MEMORY = Memory()
os.register_at_fork(after_in_child=MEMORY.renew)
