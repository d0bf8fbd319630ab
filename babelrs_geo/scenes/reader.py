"""A raster file through GDAL: facts once, then windows of raw numbers and declared validity, from any thread.

One dataset handle a thread and overview level, since GDAL's handles must not be shared; reopened after a fork
or a pickle. GDAL's block cache belongs to a handle, so it cannot let threads share what they decoded: windows are
put together from pieces of whole blocks that `blocks.STORE` holds, and GDAL's own cache is small, except where a
file's blocks are not what is stored (a VRT) or too large to be pieces.
"""

from __future__ import annotations

import itertools
import os
import threading
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio._env import set_gdal_config
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.session import DummySession
from rasterio.windows import Window

from babelrs_geo.errors import SceneError
from babelrs_geo.scenes.blocks import LIMIT, STORE, Key, Mosaic, Patch, Piece
from babelrs_geo.scenes.facts import Facts, exists, facts_of, gdal_path
from babelrs_geo.scenes.memory import MEMORY

CACHE_MB = 8
"""GDAL's block cache where pieces are whole blocks of the file."""
LARGE_CACHE_MB = 256
"""GDAL's block cache once a file was opened whose pieces are not."""
_PIECE = 512  # pixels a side of a piece, in whole blocks
_STRIP_PIECE = 1 << 20  # pixels of a piece of a file stored in strips, which has whole rows
_LARGEST_BLOCK = 32 << 20  # bytes; parts of larger blocks are read, which GDAL then caches
_PARTS = (
    128 << 20
)  # bytes of the rows that a row of tiles needs, up to which strips are kept in their whole width
_TILE_ROWS = 768  # rows that a row of tiles needs, for that bound
_ROW = 70 << 20  # bytes of a row of pieces that are always in order
_STRIP = 32_000  # columns that a strip has in any case, if a row of pieces is no more than half the store
_COLUMNS = 20  # pieces that a strip has in any case: one in 20 is in two strips
_ALONG = 8  # pieces of a row that a remote file is asked for at once: their ranges follow one another
_tokens = itertools.count()  # names readers for as long as the process lives
_OPTIONS = {  # an environment variable of the same name wins
    "GDAL_ERROR_ON_LIBJPEG_WARNING": True,  # a JPEG cut short is otherwise filled with grey
    "GDAL_PNG_WHOLE_IMAGE_OPTIM": False,  # a PNG cut short otherwise reads as noise, without an error
    "GDAL_HTTP_MAX_RETRY": 4,
    "GDAL_HTTP_RETRY_DELAY": 1,
    "GDAL_HTTP_CONNECTTIMEOUT": 30,
    "GDAL_HTTP_LOW_SPEED_TIME": 60,  # a server that has stopped talking is an error after a minute
    "GDAL_HTTP_LOW_SPEED_LIMIT": 1,
    "GDAL_INGESTED_BYTES_AT_OPEN": 1 << 16,  # the header of most remote files in one request
}
_SIDECARS = ".tif,.tiff,.aux.xml,.msk,.ovr,.tfw,.rpb,_rpc.txt"  # what a remote GeoTIFF is asked for
_opening = threading.Lock()  # warnings.catch_warnings is not thread-safe, and opening is rare: queue for it
_cache_mb = 0


def _bound_cache(megabytes: int) -> None:
    """Bound GDAL's block cache: its default is a share of the machine, whatever else runs there. It only grows.

    Not an option of `gdal()`: rasterio takes that in bytes and undoes it at the end of every block.
    """
    global _cache_mb
    if "GDAL_CACHEMAX" not in os.environ and megabytes > _cache_mb:
        set_gdal_config("GDAL_CACHEMAX", megabytes << 20)
        _cache_mb = megabytes


def _remote(path: str) -> dict[str, Any]:
    """Options that spare a remote GeoTIFF dozens of requests for files beside it that hardly ever are there. One whose
    URL has a query, such as a signature, cannot have any.
    """
    name, _, query = path.lower().partition("?")
    if not name.startswith("/vsi") or not name.endswith((".tif", ".tiff")):
        return {}
    if query:
        return {"GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR"}
    return {"CPL_VSIL_CURL_ALLOWED_EXTENSIONS": _SIDECARS}


@contextmanager
def gdal(**more: Any) -> Iterator[None]:
    """GDAL as this library configures it, for as long as the block lasts, in this thread."""
    options: dict[str, Any] = {k: v for k, v in (_OPTIONS | more).items() if k not in os.environ}
    with rasterio.Env(session=DummySession(), **options):
        yield


class Reader:
    """Windows of one raster. Picklable; safe to call from many threads at once.

    Raises SceneError, one line naming file, window and cause, where the file cannot be opened or a window
    cannot be read.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, height: float | None = None, dem: str | None = None
    ) -> None:
        self.given = os.fspath(path)
        self.path = gdal_path(path)
        self._reset()
        with gdal(**_remote(self.path)):
            self.facts = facts_of(self._dataset(None), self.given, height, dem)
        if self.facts.driver == "VRT" or _bytes_of(self.facts, *self.facts.block) > _LARGEST_BLOCK:
            _bound_cache(LARGE_CACHE_MB)

    def _reset(self) -> None:
        self._token = next(_tokens)
        weakref.finalize(self, STORE.leave, self._token).atexit = False
        self._levels: dict[int | None, tuple[tuple[int, int], tuple[int, int]]] = {}
        self._local = threading.local()
        self._lock = threading.Lock()
        self._held: weakref.WeakSet[Any] = weakref.WeakSet()  # a thread that ends closes its own
        self._pid = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {"given": self.given, "path": self.path, "facts": self.facts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def close(self) -> None:
        """Close the handles of all threads; a later read opens new ones."""
        with self._lock:
            held, self._held = list(self._held), weakref.WeakSet()
            self._local = threading.local()
        for dataset in held:
            dataset.close()
        STORE.forget(self._token)

    def _dataset(self, level: int | None) -> Any:
        """The calling thread's handle on an overview level, or on the full resolution where `level` is
        None.
        """
        if self._pid != os.getpid():  # after a fork: these handles share file positions with the parent's
            self._reset()
        handles: dict[int | None, Any] = self._local.__dict__.setdefault("handles", {})
        if level not in handles:
            handles[level] = _open(self.path, self.given, level)
            with self._lock:
                self._held.add(handles[level])
        return handles[level]

    def shape(self, level: int | None) -> tuple[int, int]:
        """Rows and columns of an overview level; of the scene where `level` is None."""
        return self._level(level)[0]

    def piece_bytes(self, level: int | None, bands: int) -> int:
        """Bytes of a piece: what is decoded and kept at once, in whole blocks of the level."""
        return _bytes_of(self.facts, *self._level(level)[1], bands)

    def _level(self, level: int | None) -> tuple[tuple[int, int], tuple[int, int]]:
        if level not in self._levels:
            shape, block = (self.facts.height, self.facts.width), self.facts.block
            if level is not None:
                with gdal(**_remote(self.path)):
                    dataset = self._dataset(level)
                    shape, block = (dataset.height, dataset.width), tuple(dataset.block_shapes[0])
            self._levels[level] = shape, _piece(self.facts, shape, block)
        return self._levels[level]

    def strip(self, level: int | None, bands: int) -> int:
        """Columns of a level, so many that a row of pieces fits in memory and that few columns are in two strips."""
        (_, wide), (rows, columns) = self._level(level)
        if not self.facts.is_tiled:
            return columns
        row = _bytes_of(self.facts, rows, 1, bands)
        return min(wide, max(_ROW // row, min(_STRIP, LIMIT // 2 // row), _COLUMNS * columns))

    def pieces(
        self,
        bands: tuple[int, ...],
        window: tuple[int, int, int, int],
        level: int | None = None,
        judged: tuple[int, ...] | None = None,
    ) -> list[Key]:
        """The pieces that a window lies on; none where they would fill the store: it is then read as it is."""
        if self._pid != os.getpid():
            self._reset()
        x, y, w, h = window
        rows, columns = self._level(level)[1]
        across, down = range(x // columns, -(-(x + w) // columns)), range(y // rows, -(-(y + h) // rows))
        if len(across) * len(down) * _bytes_of(self.facts, rows, columns, len(bands)) > LIMIT // 2:
            return []
        return [Key(self._token, level, bands, judged, row, column) for row in down for column in across]

    def read(
        self,
        bands: tuple[int, ...],
        window: tuple[int, int, int, int],
        level: int | None = None,
        judged: tuple[int, ...] | None = None,
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Raw numbers `(band, y, x)` in the file's type and declared validity `(y, x)` of a window, put together
        from pieces; both are the caller's own.

        The window is `(x, y, w, h)` in pixels of the level. Valid is a pixel that is finite in every band,
        differs from nodata in at least one (a colour may well hold the number that means nodata in another
        band), and is not masked or transparent; with `judged`, some of `bands`, these alone decide.
        """
        return self.mosaic(bands, window, level, judged).whole()

    def mosaic(
        self,
        bands: tuple[int, ...],
        window: tuple[int, int, int, int],
        level: int | None = None,
        judged: tuple[int, ...] | None = None,
        *,
        announced: bool = True,
    ) -> Mosaic:
        """What `read` gives, as the parts of pieces that the window lies on. A read that is none of those that were
        `announced` takes nothing from them.
        """
        keys = self.pieces(bands, window, level, judged)
        found: list[Piece] = []
        try:
            found = STORE.fetch(keys, self._decode, self._along(keys), at_once=self._is_remote)
        except SceneError:  # of a piece; the window may be whole, or else is what the message has to name
            pass
        finally:
            if announced:
                STORE.had(keys)
        x, y, w, h = window
        if not found:
            whole = Piece(*self._raw(bands, window, level, None, judged))
            return Mosaic(h, w, (Patch(whole, (0, 0), (0, 0), (h, w)),), shared=False)
        rows, columns = self._level(level)[1]
        patches = []
        for key, piece in zip(keys, found, strict=True):
            left, top = key.column * columns, key.row * rows
            x0, x1 = max(x, left), min(x + w, left + piece.raw.shape[2])
            y0, y1 = max(y, top), min(y + h, top + piece.raw.shape[1])
            patches.append(Patch(piece, (y0 - top, x0 - left), (y0 - y, x0 - x), (y1 - y0, x1 - x0)))
        return Mosaic(h, w, tuple(patches))

    def _configured(self, level: int | None) -> AbstractContextManager[None]:
        """`gdal`, unless what it sets is of no use once this thread has the file open: it costs a tenth of a block."""
        plain = self.facts.driver == "GTiff" and not self.facts.lossy and not self._is_remote
        if plain and level in self._local.__dict__.get("handles", {}) and self._pid == os.getpid():
            return nullcontext()
        return gdal(**_remote(self.path))

    @property
    def _is_remote(self) -> bool:
        return self.path.startswith("/vsi")

    def _along(self, keys: list[Key]) -> list[Key]:
        """The pieces that follow in the rows of `keys`, of a remote file: one request brings them along."""
        if not self._is_remote:
            return []
        last = max((key.column for key in keys), default=0)
        return [
            key._replace(column=key.column + step)
            for key in keys
            if key.column == last
            for step in range(1, _ALONG)
        ]

    def _decode(self, keys: Sequence[Key]) -> list[Piece]:
        """Pieces of one level; of a remote file, those that follow one another in a row are read at once."""
        made: dict[Key, Piece] = {}
        for key in sorted(keys, key=lambda key: (key.row, key.column)):
            if key in made:
                continue
            run = 1
            while self._is_remote and key._replace(column=key.column + run) in keys:
                run += 1
            (high, wide), (rows, columns) = self._level(key.level)
            x, y = key.column * columns, key.row * rows
            window = (x, y, min(run * columns, wide - x), min(rows, high - y))
            raw, valid = self._raw(key.bands, window, key.level, None, key.judged)
            for step in range(run):
                part = slice(step * columns, (step + 1) * columns)
                mine = raw if run == 1 else raw[:, :, part].copy()
                seen = None if valid is None or valid[:, part].all() else valid[:, part].copy()
                made[key._replace(column=key.column + step)] = Piece(mine, seen)
        return [made[key] for key in keys]

    def look(
        self,
        bands: tuple[int, ...],
        window: tuple[int, int, int, int],
        level: int | None = None,
        shape: tuple[int, int] | None = None,
        judged: tuple[int, ...] | None = None,
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """What `read` gives, from the file and past the store: for a window that is needed once.

        With `shape` the window is decimated to it by nearest neighbour.
        """
        raw, valid = self._raw(bands, window, level, shape, judged)
        return raw, np.ones(raw.shape[1:], bool) if valid is None else valid

    def _raw(
        self,
        bands: tuple[int, ...],
        window: tuple[int, int, int, int],
        level: int | None,
        shape: tuple[int, int] | None,
        judged: tuple[int, ...] | None,
    ) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
        """What `look` gives; None where the file declares nothing, so that all is valid."""
        where, seen = Window(*window), judged or bands
        valid: NDArray[np.bool_] | None = None
        size = (len(bands), *(shape or (window[3], window[2])))
        with self._configured(level):
            try:
                dataset = self._dataset(level)
                if all(dataset.dtypes[b - 1] == self.facts.bands.dtype for b in bands):
                    raw = MEMORY.empty(size, self.facts.bands.dtype)
                    dataset.read(list(bands), window=where, out=raw)
                else:  # one by one: rasterio does not mix types
                    raw = np.stack([dataset.read(b, window=where, out_shape=size[1:]) for b in bands])
                valid = self._masked(dataset, seen, where, shape)
            except (RasterioError, OSError, ValueError) as error:
                place = f"x {window[0]}, y {window[1]}, {window[2]} by {window[3]} pixels"
                raise SceneError(
                    f"{self.given} cannot be read at {place} ({cause(error)}); "
                    "the file may be cut short or damaged: copy or download it again"
                ) from error
        nodata = [self.facts.nodata[b - 1] for b in seen]
        if None in nodata and (raw.dtype.kind in "ui" or _all_finite(raw)):
            return raw, valid
        declared = _declared(raw if judged is None else raw[[bands.index(b) for b in judged]], nodata)
        return raw, declared if valid is None else valid & declared

    def _masked(
        self, dataset: Any, bands: tuple[int, ...], where: Window, shape: tuple[int, int] | None
    ) -> NDArray[np.bool_] | None:
        """Where masks show one of the bands and alpha is not transparent; None where the file has neither."""
        valid: NDArray[np.bool_] | None = None
        if self.facts.mask == "shared":
            valid = dataset.read_masks(bands[0], window=where, out_shape=shape) > 0
        elif self.facts.mask == "by band":
            valid = np.any([dataset.read_masks(b, window=where, out_shape=shape) > 0 for b in bands], axis=0)
        if self.facts.alpha is not None:
            opaque = dataset.read(self.facts.alpha, window=where, out_shape=shape) > 0
            valid = opaque if valid is None else valid & opaque
        return valid


def _bytes_of(facts: Facts, rows: int, columns: int, bands: int | None = None) -> int:
    """Bytes of so many pixels of some bands; of all bands by default."""
    return rows * columns * np.dtype(facts.bands.dtype).itemsize * (bands or len(facts.bands.interpretations))


def _piece(facts: Facts, shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the pieces of a level of this shape, stored in these blocks.

    Files in tiles: about `_PIECE` a side. Files in strips: whole rows, or parts of them where what a row of tiles
    needs would not fit.
    """
    (high, wide), (rows, columns) = shape, block
    if columns < wide:
        rows, columns = (max(1, _PIECE // side) * side for side in block)
    else:
        parts = -(-_bytes_of(facts, _TILE_ROWS, wide) // _PARTS)
        columns = -(-wide // parts)
        rows *= max(1, round(_STRIP_PIECE / columns / rows))
    if _bytes_of(facts, rows, columns) > _LARGEST_BLOCK:
        rows, columns = min(rows, _PIECE), min(columns, wide if block[1] >= wide else _PIECE)
    return min(rows, high), min(columns, wide)


def _all_finite(raw: NDArray[Any]) -> bool:
    """Whether all numbers are finite; perhaps False, too, where huge ones are: a look without temporaries."""
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(raw.sum()))


def _declared(raw: NDArray[Any], nodata: list[float | None]) -> NDArray[np.bool_]:
    """Validity `(y, x)` by nodata values and finiteness."""
    valid = np.ones(raw.shape[1:], bool)
    if all(value is not None for value in nodata):
        valid[:] = False
        for band, value in zip(raw, nodata, strict=True):
            number = np.float64(value)
            if np.issubdtype(raw.dtype, np.floating):
                number = raw.dtype.type(value)  # the value was rounded to the type when it was written
            valid |= band != number
    if not np.issubdtype(raw.dtype, np.integer):
        valid &= np.isfinite(raw).all(axis=0)
    return valid


def _open(path: str, given: str, level: int | None) -> Any:
    """A new handle. SceneError, one line, where the file is missing or no raster."""
    if not path.startswith("/vsi") and ":" not in path and not exists(path):
        raise SceneError(f"{given} does not exist; check the path")
    _bound_cache(CACHE_MB)
    options = {} if level is None else {"overview_level": level}
    with _opening, warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        try:
            return rasterio.open(path, **options)
        except (RasterioError, OSError, ValueError, TypeError) as error:
            if exists(path) and Path(path).is_dir():  # some are rasters
                raise SceneError(
                    f"{given} is a folder: name a raster in it, or use babelrs-geo archive run {quote(given)} "
                    "-o RESULTS"
                ) from error
            raise SceneError(
                f"{given} cannot be opened as a raster ({cause(error)}); gdalinfo tells more"
            ) from error


def cause(error: BaseException) -> str:
    """The innermost reason of an error, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__
