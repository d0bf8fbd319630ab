"""Tiles of a scene through any callable detector, to merged detections and to an account of every tile.

Reading, computing and bookkeeping overlap but never mix: reader threads deliver tiles in row-major order, the
main thread packs the valid ones into batches in that order, and one thread per detector computes them.
Nothing depends on which thread finishes first, so the same grid gives the same batches and the same content
(see `run`).

What is in memory at any moment is bounded by `InferenceOptions`, never by the scene: tiles read ahead, plus
two batches per detector, plus what was found so far.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from babelrs_geo.detections import Detections
from babelrs_geo.errors import ParameterError, SceneError
from babelrs_geo.merging import MergeOptions, merge
from babelrs_geo.scenes import Pixels, Scene
from babelrs_geo.tiling import Grid, Tile

DETECTED = (
    "detected"  # looked at, and the centre of at least one detection lies in the tile's inner rectangle
)
EMPTY = "empty"  # looked at, nothing there
INVALID = "invalid"  # not one valid pixel: nodata, collar, masked
FAILED = "failed"  # its pixels could not be read
OUTSIDE = "outside"  # outside the area asked for
STATES = (DETECTED, EMPTY, INVALID, FAILED, OUTSIDE)

Detector = Callable[[NDArray[np.float32]], list[Detections]]
"""float32 (B, 3, h, w) in [0, 1] to one `Detections` per image, boxes in that image's pixels."""

Progress = Callable[[int, int], None]
"""Called in the caller's thread with (tiles done, tiles in all) each time a tile has ended."""


class Area(Protocol):
    """The part of a scene that was asked for."""

    def touches(self, rects: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which rectangles (N, 4) `x, y, width, height` in scene pixels share ground with the area."""

    def holds(self, px: NDArray[np.float64], py: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Which points, in scene pixels, lie in the area."""


@dataclass(frozen=True)
class InferenceOptions:
    """How a scene's tiles are read, computed and merged.

    Raises `ParameterError` where a number is below 1.
    """

    batch: int = 4
    """Tiles computed at once; the last batch is padded with zeros to this many."""
    readers: int = 1
    """Threads that read tiles. One reader decodes each block of the file once."""
    ahead: int = 8
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
class Coverage:
    """How each tile of the grid ended: every tile is here exactly once, in the grid's row-major order."""

    inners: NDArray[np.int64]
    """(N, 4) `x, y, width, height` in scene pixels: the tiles' own ground, a partition of the scene."""
    states: tuple[str, ...]
    """(N,) one of `STATES`."""
    reasons: tuple[str, ...]
    """(N,) why a tile failed, in one line; empty for all others."""

    def __len__(self) -> int:
        """Tiles in the grid."""
        return len(self.states)

    def counts(self) -> dict[str, int]:
        """Tiles by state, every state named, in the order of `STATES`."""
        found = Counter(self.states)
        return {state: found[state] for state in STATES}

    @property
    def looked_at(self) -> int:
        """Tiles that went through the detector."""
        return sum(state in (DETECTED, EMPTY) for state in self.states)


@dataclass(frozen=True)
class _Read:
    """A tile with its pixels, or with the reason why there are none."""

    tile: Tile
    pixels: Pixels | None
    reason: str = ""


@dataclass(frozen=True)
class _Batch:
    """Images that are computed together. A tile that could not be read keeps its slot, as zeros: what else is
    in the batch, and so the last bit of every score, does not depend on a disk's bad day.
    """

    images: NDArray[np.float32]  # (batch, 3, h, w)
    reads: tuple[_Read, ...]  # by slot; shorter than the batch where it is padded


class _Ledger:
    """The states of all tiles while they run, and the one place that tells the progress."""

    def __init__(self, count: int, wanted: NDArray[np.bool_], progress: Progress | None) -> None:
        self.states = [OUTSIDE] * count
        self.reasons = [""] * count
        self.done = 0
        self.total = int(wanted.sum())
        self._progress = progress

    def end(self, tile: Tile, state: str, reason: str = "") -> None:
        self.states[tile.index] = state
        self.reasons[tile.index] = reason
        self.done += 1
        if self._progress is not None:
            self._progress(self.done, self.total)


def run(
    scene: Scene,
    detector: Detector | Sequence[Detector],
    grid: Grid,
    scale: float = 1.0,
    options: InferenceOptions | None = None,
    area: Area | None = None,
    progress: Progress | None = None,
) -> tuple[Detections, Coverage]:
    """Look at every tile of `grid` once and merge what was found.

    `grid` spans `scene.shape_at(scale)`: its tiles are in model pixels, `scale` of them to a scene pixel.
    `detector` is one callable, or several that compute batches in turn (batch k goes to detector k modulo
    their number): one for each device. `area` limits the work to the tiles whose inner rectangle touches it
    and the result to the detections centred in it.

    Batches are a function of the grid, the area and the valid mask alone: tiles with a valid pixel, in
    row-major order, `options.batch` at a time. Detections centred outside
    their tile or on invalid pixels are dropped
    before merging.

    Returns the merged detections in scene pixels, and the coverage. Where no tile held a valid pixel the
    detections are empty and know no classes.

    Raises `SceneError` where every tile with pixels to read failed, and `ParameterError` where the grid is
    not the scene's or the memory did not suffice. One unreadable tile is not fatal: `Coverage` tells which
    and why.
    """
    options = options or InferenceOptions()
    if (grid.height, grid.width) != tuple(scene.shape_at(scale)):
        height, width = scene.shape_at(scale)
        raise ParameterError(
            f"the grid spans {grid.width} x {grid.height} px, but the scene read at scale {scale:g} "
            f"has {width} x {height}: make the grid from scene.shape_at(scale)"
        )
    detectors = [detector] if callable(detector) else list(detector)
    tiles = list(grid)
    stretch = (scene.width / grid.width, scene.height / grid.height)
    inners = _scene_rects(tiles, stretch)
    wanted = np.ones(len(tiles), bool) if area is None else area.touches(inners)
    ledger = _Ledger(len(tiles), wanted, progress)
    parts: list[Detections] = []
    outers: list[NDArray[np.int64]] = []
    try:
        with ExitStack() as stack:
            readers = stack.enter_context(_pool(options.readers, "babelrs-geo-read"))
            workers = [
                stack.enter_context(_pool(1, f"babelrs-geo-detect-{k}")) for k in range(len(detectors))
            ]
            reads = _read_ahead(readers, scene, scale, (t for t in tiles if wanted[t.index]), options.ahead)
            batches = _packed(reads, _input_size(grid), options.batch, ledger)
            for batch, found in _computed(batches, detectors, workers):
                for read, here in zip(batch.reads, found, strict=False):
                    if read.pixels is None:
                        continue
                    here = _placed(here, read.tile, read.pixels.valid)
                    parts.append(here)
                    outers.append(np.tile(np.array(read.tile.outer, np.int64), (len(here), 1)))
                    ledger.end(read.tile, EMPTY)
    except (MemoryError, RuntimeError) as error:
        if _is_out_of_memory(error):
            raise ParameterError(
                f"out of memory with a batch of {options.batch} tiles of {grid.tile} px: "
                "pass a smaller batch or a smaller tile"
            ) from error
        raise
    _refuse_total_failure(scene, ledger)
    if not parts:
        return Detections.empty((), False), Coverage(inners, tuple(ledger.states), tuple(ledger.reasons))

    merged = merge(
        Detections.concatenate(parts), np.concatenate(outers), (grid.height, grid.width), options.merging
    )
    found_at = merged.scale(*stretch)
    if area is not None:
        inside = area.holds(found_at.boxes[:, 0], found_at.boxes[:, 1])
        merged, found_at = merged[inside], found_at[inside]
    for index in np.unique(_owners(tiles, merged)):
        if ledger.states[index] == EMPTY:
            ledger.states[index] = DETECTED
    return found_at, Coverage(inners, tuple(ledger.states), tuple(ledger.reasons))


def seconds_per_tile(scene: Scene, detector: Detector, grid: Grid, scale: float, batch: int) -> float:
    """What one tile costs here, measured: one batch from the middle of the grid, computed twice, the second
    time counted (the first pays for memory and kernels that later ones reuse). Reading is counted where it is
    slower than computing, since the two overlap.
    """
    size = _input_size(grid)
    middle = grid[len(grid) // 2]
    before = perf_counter()
    pixels = scene.read(middle.outer, scale)
    reading = perf_counter() - before
    images = _batch([_Read(middle, pixels)] * batch, size, batch).images
    detector(images)
    before = perf_counter()
    detector(images)
    return max(reading, (perf_counter() - before) / batch)


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


def _read_ahead(
    pool: ThreadPoolExecutor, scene: Scene, scale: float, tiles: Iterator[Tile], ahead: int
) -> Iterator[_Read]:
    """The tiles with their pixels, in the order given, at most `ahead` of them read before they are asked
    for.
    """

    def read(tile: Tile) -> _Read:
        try:
            return _Read(tile, scene.read(tile.outer, scale))
        except (
            OSError
        ) as error:  # SceneError and rasterio's own are both OSError: this tile is lost, not the run
            return _Read(tile, None, " ".join(str(error).split()) or type(error).__name__)

    waiting: deque[Future[_Read]] = deque()
    for tile in tiles:
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
        waiting.append(pool.submit(read, tile))
    while waiting:
        yield waiting.popleft().result()


def _packed(reads: Iterable[_Read], size: tuple[int, int], batch: int, ledger: _Ledger) -> Iterator[_Batch]:
    """The reads that have a valid pixel, `batch` at a time; the others end here."""
    slots: list[_Read] = []
    for read in reads:
        if read.pixels is None:
            ledger.end(read.tile, FAILED, read.reason)
        elif not read.pixels.valid.any():
            ledger.end(read.tile, INVALID)
            continue
        slots.append(read)
        if len(slots) == batch:
            yield _batch(slots, size, batch)
            slots = []
    if any(read.pixels is not None for read in slots):
        yield _batch(slots, size, batch)


def _batch(slots: list[_Read], size: tuple[int, int], batch: int) -> _Batch:
    images = np.zeros((batch, 3, *size), np.float32)
    for image, read in zip(images, slots, strict=False):
        if read.pixels is not None:
            image[:] = read.pixels.image
    return _Batch(images, tuple(slots))


def _computed(
    batches: Iterable[_Batch], detectors: list[Detector], workers: list[ThreadPoolExecutor]
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


def _scene_rects(tiles: list[Tile], stretch: tuple[float, float]) -> NDArray[np.int64]:
    """Inner rectangles (N, 4) in whole scene pixels. Their edges, not their sizes, are rounded, so that
    neighbours still meet exactly and the rectangles still partition the scene.
    """
    inners = np.array([tile.inner for tile in tiles], np.int64)
    start = np.rint(inners[:, :2] * stretch).astype(np.int64)
    end = np.rint((inners[:, :2] + inners[:, 2:]) * stretch).astype(np.int64)
    return np.concatenate([start, end - start], axis=1)


def _owners(tiles: list[Tile], found: Detections) -> NDArray[np.int64]:
    """The index of the tile whose inner rectangle holds each centre; `found` in grid pixels."""
    inners = np.array([tile.inner for tile in tiles], np.int64)
    columns, rows = np.unique(inners[:, 0]), np.unique(inners[:, 1])
    column = np.clip(np.searchsorted(columns, found.boxes[:, 0], side="right") - 1, 0, None)
    row = np.clip(np.searchsorted(rows, found.boxes[:, 1], side="right") - 1, 0, None)
    return row * len(columns) + column


def _refuse_total_failure(scene: Scene, ledger: _Ledger) -> None:
    failed = [index for index, state in enumerate(ledger.states) if state == FAILED]
    if failed and not any(state == EMPTY for state in ledger.states):
        raise SceneError(
            f"{scene.name}: none of the {len(failed)} tiles to look at could be read, the first because: "
            f"{ledger.reasons[failed[0]]}; the file may be truncated or damaged: check it, or fetch it again"
        )


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether NumPy, torch on the CPU or torch on a GPU ran out of memory; torch names only the last by a
    class.
    """
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text
