"""Decoded pieces of rasters, shared by the threads of a process, so that what many windows need is decoded once.

A *piece* is some whole blocks of a file, raw numbers and declared validity. `Store` hands each piece to one
thread to decode while the others that need it wait, keeps at most `limit` bytes (least recently used pieces go
first), and drops a piece at once when all windows that were announced (`expect`) have had it: a walk over a
scene then holds one row of blocks and a little more, whatever the scene's height.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from babelrs_geo.scenes.memory import MEMORY

LIMIT = 256 << 20
"""Bytes of pieces held at most, and twice that while threads still use what was dropped."""


class Key(NamedTuple):
    """Names a piece within a process."""

    owner: int
    """The reader that decodes it."""
    level: int | None
    """Overview level, None for the full resolution."""
    bands: tuple[int, ...]
    judged: tuple[int, ...] | None
    """The bands that decide what is valid; None for all of `bands`."""
    row: int
    column: int


@dataclass(frozen=True)
class Piece:
    """Some whole blocks of a file, decoded."""

    raw: NDArray[Any]
    """(band, y, x) in the file's type."""
    valid: NDArray[np.bool_] | None
    """(y, x) declared validity; None where every pixel is valid."""

    @cached_property
    def darkest(self) -> Any:
        """The least of what is the largest magnitude among a pixel's bands; NaN where a number is NaN."""
        if len(self.raw) == 1 and self.raw.dtype.kind != "c" and (least := self.raw.min()) > 0:
            return least  # nothing is negative: no magnitudes are needed, whose pages would be new
        dark = self.raw if self.raw.dtype.kind == "u" else np.abs(self.raw)
        return (dark[0] if len(dark) == 1 else dark.max(axis=0)).min()

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self.raw.nbytes + (0 if self.valid is None else self.valid.nbytes)


@dataclass(frozen=True)
class Patch:
    """A part of a piece and where it lies in a window; places and sizes are `(y, x)`."""

    piece: Piece
    there: tuple[int, int]
    """Its upper left corner in the piece."""
    here: tuple[int, int]
    """The same in the window."""
    size: tuple[int, int]

    @property
    def slices(self) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """In the piece, and in the window."""
        rows, columns = self.size
        there, here = ((slice(y, y + rows), slice(x, x + columns)) for y, x in (self.there, self.here))
        return there, here


@dataclass(frozen=True)
class Mosaic:
    """A window as the patches that cover it, not yet put together."""

    height: int
    width: int
    patches: tuple[Patch, ...]
    shared: bool = True
    """False where the window is one piece that nobody else has."""

    def whole(self) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Raw numbers `(band, y, x)` and validity `(y, x)`: the caller's own."""
        first = self.patches[0].piece.raw
        if not self.shared:
            return first, self.valid()
        raw = np.empty((len(first), self.height, self.width), first.dtype)
        for patch in self.patches:
            there, here = patch.slices
            raw[:, *here] = patch.piece.raw[:, *there]
        return raw, self.valid()

    def valid(self) -> NDArray[np.bool_]:
        """Validity `(y, x)`: the caller's own."""
        valid = MEMORY.empty((self.height, self.width), bool)
        valid[:] = True
        for patch in self.patches:
            if patch.piece.valid is not None:
                there, here = patch.slices
                valid[here] = patch.piece.valid[there]
        return valid


Decode = Callable[[Sequence[Key]], Sequence[Piece]]


class Store:
    """Pieces by key, for all threads. `decoded` counts pieces, for tests and benchmarks."""

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit
        self.decoded = 0
        self.renew()

    def renew(self) -> None:
        """Forget everything; in a forked child also the locks, which a thread of the parent may have held."""
        self._lock = threading.Lock()
        self._held: OrderedDict[Key, Future[Piece]] = OrderedDict()
        self._expected: dict[Key, deque[int]] = {}
        self._bytes = 0
        self._gone: deque[int] = deque()

    def fetch(
        self, keys: Sequence[Key], decode: Decode, more: Sequence[Key] = (), *, at_once: bool = False
    ) -> list[Piece]:
        """The pieces of `keys`: held ones, those that other threads are decoding, and the rest by `decode`: one by one,
        so that threads which need the same ones share the work, or all `at_once`.

        `more` are pieces to decode along with missing ones, where they are expected and missing too.
        Raises what `decode` raised, in every thread that needs one of its pieces.
        """
        while self._gone:
            self.forget(self._gone.popleft())
        found: dict[Key, Future[Piece]] = {}
        while len(found) < len(keys):
            with self._lock:
                for key in keys:
                    if key not in found and key in self._held:
                        self._held.move_to_end(key)
                        found[key] = self._held[key]
                missing = [key for key in keys if key not in found]
                if at_once and missing:
                    missing += [key for key in more if key in self._expected and key not in self._held]
                claimed = {key: Future[Piece]() for key in (missing if at_once else missing[:1])}
                self._held.update(claimed)
            found.update((key, future) for key, future in claimed.items() if key in keys)
            if claimed:
                self._decode(claimed, decode)
        return [found[key].result() for key in keys]

    def _decode(self, claimed: dict[Key, Future[Piece]], decode: Decode) -> None:
        try:
            pieces = decode(list(claimed))
        except BaseException as error:
            with self._lock:
                for key, future in claimed.items():
                    if self._held.get(key) is future:
                        del self._held[key]
            for future in claimed.values():
                future.set_exception(error)
            raise
        with self._lock:
            self.decoded += len(pieces)
            for (key, future), piece in zip(claimed.items(), pieces, strict=True):
                future.set_result(piece)
                if self._held.get(key) is future:
                    self._bytes += piece.nbytes
            if self._bytes > self.limit:
                for key in [key for key, future in self._held.items() if future.done()]:
                    self._drop(key)
                    if self._bytes <= self.limit:
                        break

    def expect(self, keys: Iterable[Key], nbytes: int) -> set[Key]:
        """Announce reads of pieces of about `nbytes`, in the order in which they will be: one for each time a key is
        given. Returns the keys, for `unexpect`.

        A piece is kept from one read to the next unless so much is decoded in between that it would have to go
        anyway, as for what two vertical strips of a scene share.
        """
        turns: dict[Key, list[int]] = {}  # reads before the piece is let go, then after it came again, ...
        last: dict[Key, int] = {}
        decoded = 0
        for key in keys:
            if key not in last or decoded - last[key] > self.limit:
                turns.setdefault(key, []).append(0)
                decoded += nbytes
            turns[key][-1] += 1
            last[key] = decoded
        with self._lock:
            for key, counts in turns.items():
                self._expected.setdefault(key, deque()).extend(counts)
        return set(turns)

    def unexpect(self, keys: Iterable[Key]) -> None:
        """The announced reads end here, whether they took place or not."""
        with self._lock:
            for key in keys:
                self._expected.pop(key, None)
                self._drop(key)

    def had(self, keys: Iterable[Key]) -> None:
        """A read of these pieces has ended: those that no other announced read needs soon are dropped."""
        with self._lock:
            for key in keys:
                turns = self._expected.get(key)
                if turns is None:
                    continue
                turns[0] -= 1
                if turns[0] == 0:
                    turns.popleft()
                    self._drop(key)
                if not turns:
                    del self._expected[key]

    def forget(self, owner: int) -> None:
        """Drop all pieces of a reader."""
        with self._lock:
            for key in [key for key in self._held if key.owner == owner]:
                self._drop(key)

    def leave(self, owner: int) -> None:
        """Drop all pieces of a reader with the next `fetch`: for finalizers, which must not wait for a lock."""
        self._gone.append(owner)

    def _drop(self, key: Key) -> None:
        """Let go of a piece; one that is being decoded is left to those who wait for it."""
        future = self._held.get(key)
        if future is not None and future.done():
            del self._held[key]
            self._bytes -= future.result().nbytes


STORE = Store()
os.register_at_fork(after_in_child=STORE.renew)
