"""A raster file through GDAL: facts once, then windows of raw numbers and declared validity, from any thread.

One dataset handle a thread and overview level, since GDAL's handles must not be shared; reopened after a fork
or a pickle. GDAL's block cache (bounded, `CACHE_MB`) is what lets overlapping tiles decode a block once.
"""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio._env import set_gdal_config
from rasterio.enums import MaskFlags
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.session import DummySession
from rasterio.windows import Window

from babelrs_geo.errors import SceneError
from babelrs_geo.georef import Georef
from babelrs_geo.sensors import Bands

CACHE_MB = 256
_OPTIONS = {  # an environment variable of the same name wins
    "GDAL_ERROR_ON_LIBJPEG_WARNING": True,  # a JPEG cut short is otherwise filled with grey
    "GDAL_PNG_WHOLE_IMAGE_OPTIM": False,  # a PNG cut short otherwise reads as noise, without an error
    "GDAL_HTTP_MAX_RETRY": 4,
    "GDAL_HTTP_RETRY_DELAY": 1,
    "GDAL_HTTP_CONNECTTIMEOUT": 30,
    "GDAL_HTTP_LOW_SPEED_TIME": 60,  # a server that has stopped talking is an error after a minute
    "GDAL_HTTP_LOW_SPEED_LIMIT": 1,
}
_SCHEMES = {  # how GDAL names what a browser or a cloud client names by URL
    "http://": "/vsicurl/http://",
    "https://": "/vsicurl/https://",
    "ftp://": "/vsicurl/ftp://",
    "s3://": "/vsis3/",
    "gs://": "/vsigs/",
    "az://": "/vsiaz/",
    "file://": "",
}
_LOSSY = {"JPEG", "YCbCr JPEG", "WEBP", "JXL", "JPEG2000"}
_opening = threading.Lock()  # warnings.catch_warnings is not thread-safe, and opening is rare: queue for it


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a raster says of itself, as plain values."""

    width: int
    height: int
    driver: str
    nodata: tuple[float | None, ...]
    """Declared nodata value of each band."""
    masked: bool
    """True where a mask band or an alpha band declares validity."""
    overviews: tuple[int, ...]
    """Decimation of each overview, ascending."""
    block: tuple[int, int]
    """Rows and columns of a block."""
    lossy: bool
    """True where the stored bytes went through a lossy compression: black is then only nearly black."""
    tags: tuple[tuple[str, str], ...]
    """Metadata items of the default domain."""
    bands: Bands
    georef: Georef

    def tag(self, name: str) -> str | None:
        """The value of a metadata item, None where it is absent."""
        return dict(self.tags).get(name)


def gdal_path(path: str | os.PathLike[str]) -> str:
    """The name GDAL opens: URLs become its virtual file systems, files on disk absolute paths."""
    text = os.fspath(path)
    for scheme, prefix in _SCHEMES.items():
        if text.lower().startswith(scheme):
            return prefix + text[len(scheme) :]
    on_disk = not text.startswith("/vsi") and _exists(text)  # else a GDAL connection string, or a mistake
    return str(Path(text).absolute()) if on_disk else text


def _exists(text: str) -> bool:
    try:
        return Path(text).exists()
    except OSError:  # longer than a file name may be: inline XML of a VRT, say
        return False


@cache
def _bound_cache() -> None:
    """Bound GDAL's block cache, once a process: its default is a share of the machine, whatever else runs there.

    Not an option of `gdal()`: rasterio takes that in bytes and undoes it at the end of every block.
    """
    if "GDAL_CACHEMAX" not in os.environ:
        set_gdal_config("GDAL_CACHEMAX", CACHE_MB << 20)


@contextmanager
def gdal() -> Iterator[None]:
    """GDAL as this library configures it, for as long as the block lasts, in this thread."""
    options: dict[str, Any] = {k: v for k, v in _OPTIONS.items() if k not in os.environ}
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
        with gdal():
            self.facts = _facts(self._dataset(None), self.given, height, dem)

    def _reset(self) -> None:
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
        if level is None:
            return self.facts.height, self.facts.width
        with gdal():
            dataset = self._dataset(level)
            return dataset.height, dataset.width

    def read(
        self,
        bands: tuple[int, ...],
        window: tuple[int, int, int, int],
        level: int | None = None,
        shape: tuple[int, int] | None = None,
        judged: tuple[int, ...] | None = None,
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Raw numbers `(band, y, x)` in the file's type and declared validity `(y, x)` of a window.

        The window is `(x, y, w, h)` in pixels of the level. Valid is a pixel that is finite in every band,
        differs from nodata in at least one (a colour may well hold the number that means nodata in another
        band), and is not masked or transparent. With `shape` the window is decimated to it by nearest
        neighbour; with `judged`, some of `bands`, these alone decide what is valid.
        """
        where, seen = Window(*window), judged or bands
        with gdal():
            try:
                dataset = self._dataset(level)
                raw = dataset.read(list(bands), window=where, out_shape=shape and (len(bands), *shape))
                valid = np.ones(raw.shape[1:], bool)
                if self.facts.masked:
                    valid = dataset.read_masks(seen[0], window=where, out_shape=shape) > 0
            except (RasterioError, OSError, ValueError) as error:
                place = f"x {window[0]}, y {window[1]}, {window[2]} by {window[3]} pixels"
                raise SceneError(
                    f"{self.given} cannot be read at {place} ({cause(error)}); "
                    "the file may be cut short or damaged: copy or download it again"
                ) from error
        values = raw if judged is None else raw[[bands.index(b) for b in judged]]
        return raw, valid & _declared(values, [self.facts.nodata[b - 1] for b in seen])


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
    if not path.startswith("/vsi") and ":" not in path and not _exists(path):
        raise SceneError(f"{given} does not exist; check the path")
    _bound_cache()
    options = {} if level is None else {"overview_level": level}
    with _opening, warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        try:
            return rasterio.open(path, **options)
        except (RasterioError, OSError, ValueError, TypeError) as error:
            raise SceneError(
                f"{given} cannot be opened as a raster ({cause(error)}); gdalinfo tells more"
            ) from error


def _facts(dataset: Any, given: str, height: float | None, dem: str | None) -> Facts:
    if dataset.count == 0:
        inside = dataset.subdatasets
        remedy = (
            f"pass one of its {len(inside)} subdatasets, such as {inside[0]}"
            if inside
            else "pass another file"
        )
        raise SceneError(f"{given} holds no band; {remedy}")
    flags = dataset.mask_flag_enums
    tags = dataset.tags()
    structure = dataset.tags(ns="IMAGE_STRUCTURE")
    dtypes = {
        d for d, c in zip(dataset.dtypes, dataset.colorinterp, strict=True) if c.name != "alpha"
    } or set(dataset.dtypes)
    every = [*tags.items(), *(item for b in dataset.indexes for item in dataset.tags(b).items())]
    for domain in ("IMAGERY", "EXIF"):
        every += dataset.tags(ns=domain).items()
    reversible = structure.get("COMPRESSION_REVERSIBILITY", "")  # JPEG 2000 and WebP say so themselves
    compression = structure.get("COMPRESSION", "JPEG" if dataset.driver == "JPEG" else "")
    lossy = reversible == "LOSSY" or (compression in _LOSSY and not reversible.startswith("LOSSLESS"))
    return Facts(
        width=dataset.width,
        height=dataset.height,
        driver=dataset.driver,
        nodata=tuple(dataset.nodatavals),
        masked=any(MaskFlags.per_dataset in f or MaskFlags.alpha in f for f in flags),
        overviews=tuple(dataset.overviews(1)),
        block=tuple(dataset.block_shapes[0]),
        lossy=lossy,
        tags=tuple((str(k), str(v)) for k, v in dict(every).items()),
        bands=Bands(
            dtype=str(np.result_type(*("complex64" if d == "complex_int16" else d for d in dtypes))),
            interpretations=tuple(c.name for c in dataset.colorinterp),
            descriptions=tuple(_description(dataset, b) for b in dataset.indexes),
            units=tuple(u or "" for u in dataset.units),
            tags="\n".join(f"{k}={v}" for k, v in every),
            name=Path(given.partition("?")[0] if "://" in given else given).name,
            scale=tuple(dataset.scales),
            offset=tuple(dataset.offsets),
        ),
        georef=_georef(dataset, height, dem),
    )


def _description(dataset: Any, band: int) -> str:
    """What the file calls a band; GDAL's Sentinel-1 driver has the polarisation in a metadata item."""
    tags = dataset.tags(band)
    return dataset.descriptions[band - 1] or tags.get("POLARISATION") or tags.get("POLARIZATION") or ""


def _georef(dataset: Any, height: float | None, dem: str | None) -> Georef:
    """The best georeference the file has: an affine, many GCPs, RPCs, few GCPs (mere corners), none, in this
    order.
    """
    crs = dataset.crs.to_wkt() if dataset.crs else None
    if not dataset.transform.is_identity:  # GDAL's way to say that there is none, whatever the CRS
        return Georef.from_affine(dataset.transform, crs)
    points, gcp_crs = dataset.gcps
    if len(points) > 4 or (points and not dataset.rpcs):
        return Georef.from_gcps(
            [(p.col, p.row, p.x, p.y) for p in points], gcp_crs.to_wkt() if gcp_crs else None
        )
    if dataset.rpcs:
        return Georef.from_rpcs(dataset.rpcs.to_gdal(), height, dem and gdal_path(dem))
    return Georef()


def cause(error: BaseException) -> str:
    """The innermost reason of an error, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__
