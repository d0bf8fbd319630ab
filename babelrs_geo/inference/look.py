"""Tiles of a scene through detectors, group by group, in one process.

Reading, computing and bookkeeping overlap but never mix: reader threads deliver tiles in the order asked, the caller's
thread packs the valid ones into batches in that order, and one thread per detector computes them. Nothing depends on
which thread finishes first.

A group is a run of neighbouring tiles, and no batch holds tiles of two: so a group's batches, and what is found in
them, are the same whoever computes it and whatever else is computed.

What is in memory at any moment is bounded by `InferenceOptions`, never by the scene: tiles read ahead, plus two batches
per detector, plus what was found so far.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from babelrs_geo.detections import Detections
from babelrs_geo.errors import ParameterError
from babelrs_geo.inference.coverage import EMPTY, FAILED, INVALID
from babelrs_geo.merging import MergeOptions
from babelrs_geo.scenes import Pixels, Scene
from babelrs_geo.scenes.memory import MEMORY
from babelrs_geo.tiling import Grid, Tile

GROUP = 8
"""Batches of a group: a lost worker loses no more, and a spool keeps no less."""

Detector = Callable[[NDArray[np.float32]], list[Detections]]
"""float32 (B, 3, h, w) in [0, 1] to one `Detections` per image, boxes in that image's pixels."""

Tick = Callable[[int], None]
"""Called in the caller's thread with how many more tiles have ended."""


@dataclass(frozen=True)
class InferenceOptions:
    """How a scene's tiles are read, computed and merged.

    Raises `ParameterError` where a number is below 1.
    """

    batch: int = 4
    """Tiles computed at once; the last batch is padded with zeros to this many."""
    readers: int = 1
    """Threads that read tiles. One reader decodes each block of the file once."""
    ahead: int = 4
    """Tiles that may be read and not yet computed: the bound on memory."""
    merging: MergeOptions = field(default_factory=MergeOptions)
    """How the detections of overlapping tiles become one per object."""

    def __post_init__(self) -> None:
        """Refuse numbers that cannot work."""
        for name in ("batch", "readers", "ahead"):
            value = getattr(self, name)
            if value < 1:
                raise ParameterError(f"{name} is {value}, expected a whole number of at least 1")


@dataclass(frozen=True)
class Group:
    """Tiles that are computed together."""

    number: int
    """Place in the order of work, from 0."""
    tiles: tuple[int, ...]
    """Indices in the grid."""


@dataclass(frozen=True)
class Part:
    """What came of a group."""

    found: Detections | None
    """In grid pixels, tile after tile in the group's order; None where no tile was computed."""
    tiles: NDArray[np.int64]
    """(N,) the tile that each was found in."""
    ended: tuple[tuple[int, str, str], ...]
    """Each tile of the group with its state and, if it failed, the reason; in the group's order."""


@dataclass(frozen=True)
class Look:
    """A scene and how its tiles are read and computed: all that a process needs to know of a run. Picklable.

    `grid` spans `scene.shape_at(scale)`: its tiles are in model pixels, `scale` of them to a scene pixel. Raises
    ParameterError where it does not.
    """

    scene: Scene
    grid: Grid
    scale: float = 1.0
    options: InferenceOptions = field(default_factory=InferenceOptions)

    def __post_init__(self) -> None:
        """Hold the grid to the scene."""
        height, width = self.scene.shape_at(self.scale)
        if (self.grid.height, self.grid.width) != (height, width):
            raise ParameterError(
                f"the grid spans {self.grid.width} x {self.grid.height} px, but the scene read at scale {self.scale:g} "
                f"has {width} x {height}: make the grid from scene.shape_at(scale)"
            )

    def groups(self, wanted: NDArray[np.bool_]) -> list[Group]:
        """The wanted tiles (by index) in the order that reads each block of the file once, a few batches a group."""
        order = [i for i in self.grid.order(self.scene.strip(self.scale)) if wanted[i]]
        size = GROUP * self.options.batch
        return [Group(n, tuple(order[i : i + size])) for n, i in enumerate(range(0, len(order), size))]

    def parts(
        self, detectors: Sequence[Detector], groups: Sequence[Group], tick: Tick | None = None
    ) -> Iterator[tuple[Group, Part]]:
        """What comes of the groups, in their order. Batch k goes to detector k modulo their number.

        Raises ParameterError where the memory did not suffice.
        """
        tiles = (self.grid[i] for group in groups for i in group.tiles)
        expected = [self.grid[i].outer for group in groups for i in group.tiles]
        books, told = _Books(groups), 0
        try:
            with ExitStack() as stack:
                stack.enter_context(self.scene.expecting(expected, self.scale))
                readers = stack.enter_context(_pool(self.options.readers, "babelrs-geo-read"))
                threads = [
                    stack.enter_context(_pool(1, f"babelrs-geo-detect-{k}")) for k in range(len(detectors))
                ]
                batches = self._packed(self._read_ahead(readers, tiles), books)
                for batch, found in _computed(batches, detectors, threads):
                    for read, here in zip(batch.reads, found, strict=False):
                        if read.pixels is not None:
                            books.end(read.tile, EMPTY, found=_placed(here, read.tile, read.pixels.valid))
                    if tick is not None:
                        tick(books.ended - told)
                        told = books.ended
                    yield from books.closed()
                if tick is not None and books.ended > told:
                    tick(books.ended - told)
                yield from books.closed()
        except (MemoryError, RuntimeError) as error:
            if _is_out_of_memory(error):
                raise ParameterError(
                    f"out of memory with a batch of {self.options.batch} tiles of {self.grid.tile} px: "
                    "pass a smaller batch or a smaller tile"
                ) from error
            raise

    def seconds_per_tile(self, detector: Detector) -> float:
        """What one tile costs here, measured: one batch from the middle of the grid, computed twice, the second
        time counted (the first pays for memory and kernels that later ones reuse). Reading is counted where it is
        slower than computing, since the two overlap.
        """
        middle, batch = self.grid[len(self.grid) // 2], self.options.batch
        before = perf_counter()
        pixels = self.scene.read(middle.outer, self.scale)
        reading = perf_counter() - before
        images = _batch([_Read(middle, pixels)] * batch, _input_size(self.grid), batch).images
        detector(images)
        before = perf_counter()
        detector(images)
        return max(reading, (perf_counter() - before) / batch)

    def _read_ahead(self, pool: ThreadPoolExecutor, tiles: Iterator[Tile]) -> Iterator[_Read]:
        """The tiles with their pixels, in the order given, at most `ahead` of them read before they are asked for."""

        def read(tile: Tile, sheet: NDArray[np.float32], place: int) -> _Read:
            try:
                return _Read(tile, self.scene.read(tile.outer, self.scale, sheet[place]), sheet=sheet)
            except OSError as error:  # SceneError and rasterio's own: this tile is lost, not the run
                return _Read(tile, None, " ".join(str(error).split()) or type(error).__name__)

        waiting: deque[Future[_Read]] = deque()
        for number, tile in enumerate(tiles):
            if len(waiting) >= self.options.ahead:
                yield waiting.popleft().result()
            place = number % self.options.batch
            if place == 0:  # tiles are read to where their batch will be
                sheet = MEMORY.empty((self.options.batch, 3, *_input_size(self.grid)), np.float32)
            waiting.append(pool.submit(read, tile, sheet, place))
        while waiting:
            yield waiting.popleft().result()

    def _packed(self, reads: Iterable[_Read], books: _Books) -> Iterator[_Batch]:
        """The reads that have a valid pixel, `batch` of one group at a time; the others end here."""
        size, batch = _input_size(self.grid), self.options.batch
        slots: list[_Read] = []
        for read in reads:
            if slots and (len(slots) == batch or not books.together(slots[0].tile, read.tile)):
                if any(slot.pixels is not None for slot in slots):
                    yield _batch(slots, size, batch)
                slots = []
            if read.pixels is None:
                books.end(read.tile, FAILED, read.reason)
            elif not read.pixels.valid.any():
                books.end(read.tile, INVALID)
                continue
            slots.append(read)
        if any(slot.pixels is not None for slot in slots):
            yield _batch(slots, size, batch)


@dataclass(frozen=True)
class _Read:
    """A tile with its pixels, or with the reason why there are none."""

    tile: Tile
    pixels: Pixels | None
    reason: str = ""
    sheet: NDArray[np.float32] | None = None  # what it was read into: a place for each tile of a batch


@dataclass(frozen=True)
class _Batch:
    """Images that are computed together. A tile that could not be read keeps its slot, as zeros: what else is
    in the batch, and so the last bit of every score, does not depend on a disk's bad day.
    """

    images: NDArray[np.float32]  # (batch, 3, h, w)
    reads: tuple[_Read, ...]  # by slot; shorter than the batch where it is padded


class _Books:
    """What has come of the groups so far."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self.ended = 0
        self._owner = {i: group.number for group in groups for i in group.tiles}
        self._open = deque(groups)
        self._left = {group.number: len(group.tiles) for group in groups}
        self._states: dict[int, tuple[str, str]] = {}
        self._found: dict[int, Detections] = {}

    def together(self, one: Tile, other: Tile) -> bool:
        """Whether two tiles are of one group."""
        return self._owner[one.index] == self._owner[other.index]

    def end(self, tile: Tile, state: str, reason: str = "", found: Detections | None = None) -> None:
        """A tile has ended."""
        self.ended += 1
        self._left[self._owner[tile.index]] -= 1
        self._states[tile.index] = state, reason
        if found is not None:
            self._found[tile.index] = found

    def closed(self) -> Iterator[tuple[Group, Part]]:
        """The groups that are whole, in their order; what was found in them is then no longer here."""
        while self._open and self._left[self._open[0].number] == 0:
            group = self._open.popleft()
            order = [i for i in group.tiles if i in self._found]
            found = [self._found.pop(i) for i in order]
            tiles = np.repeat(np.array(order, np.int64), [len(each) for each in found])
            ended = tuple((i, *self._states.pop(i)) for i in group.tiles)
            yield group, Part(Detections.concatenate(found) if found else None, tiles, ended)


@contextmanager
def _pool(threads: int, name: str) -> Iterator[ThreadPoolExecutor]:
    """A thread pool that, left by an exception (Ctrl-C too), starts nothing more and waits only for what is
    running.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _batch(slots: list[_Read], size: tuple[int, int], batch: int) -> _Batch:
    """Images side by side: where they were read to, if that is one batch, else a copy."""
    shown = [None if read.pixels is None else read.pixels.image for read in slots]
    sheet = slots[0].sheet
    if sheet is not None and len(slots) == batch:
        placed = (one is not None and np.may_share_memory(one, sheet[n]) for n, one in enumerate(shown))
        if all(placed):
            return _Batch(sheet, tuple(slots))
    images = np.zeros((batch, 3, *size), np.float32)
    for image, one in zip(images, shown, strict=False):
        if one is not None:
            image[:] = one
    return _Batch(images, tuple(slots))


def _computed(
    batches: Iterable[_Batch], detectors: Sequence[Detector], workers: list[ThreadPoolExecutor]
) -> Iterator[tuple[_Batch, list[Detections]]]:
    """The batches with what was found in them, in order, two per detector at most under way."""
    running: deque[tuple[_Batch, Future[list[Detections]]]] = deque()

    def oldest() -> tuple[_Batch, list[Detections]]:
        batch, future = running.popleft()
        found = future.result()
        if len(found) != len(batch.images):
            raise ValueError(f"the detector gave {len(found)} results for {len(batch.images)} images")
        return batch, found

    for number, batch in enumerate(batches):
        which = number % len(detectors)
        running.append((batch, workers[which].submit(detectors[which], batch.images)))
        if len(running) >= 2 * len(detectors):
            yield oldest()
    while running:
        yield oldest()


def _placed(found: Detections, tile: Tile, valid: NDArray[np.bool_]) -> Detections:
    """What was found in a tile, in grid pixels, without what is centred outside it or on invalid pixels."""
    height, width = valid.shape
    column = np.floor(found.boxes[:, 0]).astype(np.int64)
    row = np.floor(found.boxes[:, 1]).astype(np.int64)
    keep = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    keep[keep] = valid[row[keep], column[keep]]
    return found[keep].shift(tile.outer.x, tile.outer.y)


def _input_size(grid: Grid) -> tuple[int, int]:
    """(height, width) of every image of a grid: the tile, or the scene's side where that is smaller.

    All outer rectangles of a grid have this size. What a model needs beyond it, such as whole cells of its
    coarsest stride, it pads itself, after normalising, as it did in training.
    """
    return min(grid.tile, grid.height), min(grid.tile, grid.width)


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether NumPy, torch on the CPU or torch on a GPU ran out of memory; torch names only the last by a
    class.
    """
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text
