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
from typing import Any

import numpy as np
from numpy.typing import NDArray

from babelrs_geo.detections import Detections
from babelrs_geo.errors import BatchError, ParameterError
from babelrs_geo.inference.coverage import EMPTY, FAILED, INVALID
from babelrs_geo.merging import MergeOptions
from babelrs_geo.scenes import Pixels, Scene
from babelrs_geo.scenes.develop import sheet
from babelrs_geo.tiling import Grid, Tile

GROUP = 8
"""Batches of a group at most: a lost worker loses no more."""
GROUPS = 32
"""Groups that a scene has at least, if it has so many batches: enough to share among workers."""

Detector = Callable[[Any], list[Detections]]
"""float32 (B, 3, h, w) in [0, 1] to one `Detections` per image, boxes in that image's pixels. The images are only lent,
not to be written to: channels of grey ones are one plane. A detector whose `takes_bytes` is true gets the bytes of an
8-bit file as uint8, a quarter to write and to send to a device, and divides by 255 itself.
"""

Tick = Callable[[int], None]
"""Called in the caller's thread with how many more tiles have ended."""


@dataclass(frozen=True)
class InferenceOptions:
    """How a scene's tiles are read, computed and merged.

    Raises `ParameterError` where a number is below 1.
    """

    batch: int = 4
    """Tiles computed at once; fewer where a group ends."""
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
    """Indices in the grid of its pass."""
    level: int = 0
    """The pass that they belong to, as in `Look.passes`."""


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
    coarser: tuple[tuple[Grid, float], ...] = ()
    """Further passes for what is larger than a tile, each coarser than the one before, with grids of their own."""
    large: tuple[str, ...] | None = None
    """The classes that further passes look for; None for all."""

    def __post_init__(self) -> None:
        """Hold the grids to the scene."""
        for grid, scale in self.passes:
            height, width = self.scene.shape_at(scale)
            if (grid.height, grid.width) != (height, width):
                raise ParameterError(
                    f"the grid spans {grid.width} x {grid.height} px, but the scene read at scale {scale:g} "
                    f"has {width} x {height}: make the grid from scene.shape_at(scale)"
                )

    @property
    def passes(self) -> tuple[tuple[Grid, float], ...]:
        """Each walk over the scene, finest first: its grid, and the scale that it is read at."""
        return (self.grid, self.scale), *self.coarser

    def groups(self, *wanted: NDArray[np.bool_]) -> list[Group]:
        """The wanted tiles (by index, for each pass) in the order that reads each block of the file once, a few batches
        a group.
        """
        batch, out = self.options.batch, list[Group]()
        for level, ((grid, scale), chosen) in enumerate(zip(self.passes, wanted, strict=True)):
            order = [i for i in grid.order(self.scene.strip(scale), paired=self.scene.is_tiled) if chosen[i]]
            size = batch * min(max(-(-len(order) // batch) // GROUPS, 1), GROUP)
            out += [
                Group(len(out) + n, tuple(order[i : i + size]), level)
                for n, i in enumerate(range(0, len(order), size))
            ]
        return out

    def parts(
        self, detectors: Sequence[Detector], groups: Sequence[Group], tick: Tick | None = None
    ) -> Iterator[tuple[Group, Part]]:
        """What comes of the groups, in their order. Batch k goes to detector k modulo their number.

        Raises BatchError where the memory did not suffice.
        """
        books, told = _Books(groups), 0
        try:
            with ExitStack() as stack:
                for level, (grid, scale) in enumerate(self.passes):
                    here = [grid[i].outer for group in groups if group.level == level for i in group.tiles]
                    stack.enter_context(self.scene.expecting(here, scale))
                readers = stack.enter_context(_pool(self.options.readers, "babelrs-geo-read"))
                threads = [
                    stack.enter_context(_pool(1, f"babelrs-geo-detect-{k}")) for k in range(len(detectors))
                ]
                plain = all(getattr(each, "takes_bytes", False) for each in detectors)
                batches = self._packed(self._read_ahead(readers, groups, plain=plain), books)
                for batch, found in _computed(batches, detectors, threads):
                    for read, boxes in zip(batch.reads, found, strict=True):
                        if read.pixels is not None:
                            books.end(read, EMPTY, found=_placed(boxes, read.tile, read.pixels.valid))
                    if tick is not None:
                        tick(books.ended - told)
                        told = books.ended
                    yield from books.closed()
                if tick is not None and books.ended > told:
                    tick(books.ended - told)
                yield from books.closed()
        except (MemoryError, RuntimeError) as error:
            if _is_out_of_memory(error):
                raise BatchError(
                    f"out of memory with a batch of {self.options.batch} tiles of {self.grid.tile} px: "
                    "pass a smaller batch (or auto) or a smaller tile"
                ) from error
            raise

    def seconds_per_tile(self, detector: Detector) -> float:
        """What one tile costs here, measured: one batch from the middle of the grid, computed twice, the second
        time counted (the first pays for memory and kernels that later ones reuse). Reading is counted where it is
        slower than computing, since the two overlap.
        """
        middle, batch = self.grid[len(self.grid) // 2], min(self.options.batch, len(self.grid))
        before = perf_counter()
        pixels = self.scene.read(middle.outer, self.scale)
        reading = perf_counter() - before
        images = _batch([_Read(0, middle, pixels)] * batch).images
        detector(images)
        before = perf_counter()
        detector(images)
        return max(reading, (perf_counter() - before) / batch)

    def _read_ahead(
        self, pool: ThreadPoolExecutor, groups: Sequence[Group], *, plain: bool
    ) -> Iterator[_Read]:
        """The groups' tiles with their pixels, in order, at most `ahead` of them read before they are asked for; bytes
        as they are if `plain`.
        """

        def read(group: int, tile: Tile, scale: float, room: NDArray[Any], place: int) -> _Read:
            try:
                return _Read(group, tile, self.scene.read(tile.outer, scale, room[place]), room=room)
            except OSError as error:  # SceneError and rasterio's own: this tile is lost, not the run
                return _Read(group, tile, None, " ".join(str(error).split()) or type(error).__name__)

        waiting: deque[Future[_Read]] = deque()
        for group in groups:
            grid, scale = self.passes[group.level]
            own = self.scene.shape_at(scale) == (self.scene.height, self.scene.width)
            shown = np.uint8 if plain and own and self.scene.holds_bytes else np.float32
            for number, index in enumerate(group.tiles):
                if len(waiting) >= self.options.ahead:
                    yield waiting.popleft().result()
                place = number % self.options.batch
                if place == 0:  # tiles are read to where their batch will be
                    room = sheet(self.scene.radiometry, self.options.batch, *_input_size(grid), shown)
                waiting.append(pool.submit(read, group.number, grid[index], scale, room, place))
        while waiting:
            yield waiting.popleft().result()

    def _packed(self, reads: Iterable[_Read], books: _Books) -> Iterator[_Batch]:
        """The reads that have a valid pixel, `batch` of one group at a time; the others end here."""
        slots: list[_Read] = []
        for read in reads:
            if slots and (len(slots) == self.options.batch or slots[0].group != read.group):
                if any(slot.pixels is not None for slot in slots):
                    yield _batch(slots)
                slots = []
            if read.pixels is None:
                books.end(read, FAILED, read.reason)
            elif not read.pixels.valid.any():
                books.end(read, INVALID)
                continue
            slots.append(read)
        if any(slot.pixels is not None for slot in slots):
            yield _batch(slots)


@dataclass(frozen=True)
class _Read:
    """A tile with its pixels, or with the reason why there are none."""

    group: int
    tile: Tile
    pixels: Pixels | None
    reason: str = ""
    room: NDArray[Any] | None = None  # what it was read into: a place for each tile of a batch


@dataclass(frozen=True)
class _Batch:
    """Images that are computed together. A tile that could not be read keeps its slot, as zeros: what else is
    in the batch, and so the last bit of every score, does not depend on a disk's bad day.
    """

    images: NDArray[Any]  # (slots, 3, h, w)
    reads: tuple[_Read, ...]  # by slot


class _Books:
    """What has come of the groups so far."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self.ended = 0
        self._open = deque(groups)
        self._left = {group.number: len(group.tiles) for group in groups}
        self._states: dict[tuple[int, int], tuple[str, str]] = {}
        self._found: dict[tuple[int, int], Detections] = {}

    def end(self, read: _Read, state: str, reason: str = "", found: Detections | None = None) -> None:
        """A tile has ended."""
        self.ended += 1
        self._left[read.group] -= 1
        self._states[read.group, read.tile.index] = state, reason
        if found is not None:
            self._found[read.group, read.tile.index] = found

    def closed(self) -> Iterator[tuple[Group, Part]]:
        """The groups that are whole, in their order; what was found in them is then no longer here."""
        while self._open and self._left[self._open[0].number] == 0:
            group = self._open.popleft()
            order = [i for i in group.tiles if (group.number, i) in self._found]
            found = [self._found.pop((group.number, i)) for i in order]
            tiles = np.repeat(np.array(order, np.int64), [len(each) for each in found])
            ended = tuple((i, *self._states.pop((group.number, i))) for i in group.tiles)
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


def _batch(slots: list[_Read]) -> _Batch:
    """Images side by side: where they were read to, if that is one batch, else a copy. One at least was read."""
    shown = [None if read.pixels is None else read.pixels.image for read in slots]
    room = slots[0].room
    if room is not None:
        placed = (one is not None and np.may_share_memory(one, room[n]) for n, one in enumerate(shown))
        if all(placed):
            return _Batch(room[: len(slots)], tuple(slots))
    like = next(one for one in shown if one is not None)
    images = np.zeros((len(slots), *like.shape), like.dtype)
    for image, one in zip(images, shown, strict=True):
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
    """Whether NumPy, torch on the CPU or torch on a GPU ran out of memory; torch has a class for the last alone."""
    text = str(error).lower()
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "out of memory" in text or "allocate memory" in text
