"""`Scene`: one raster, its sensor, radiometry, georeference and validity; `Scene.read` is how pixels come in."""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from babelrs_geo.errors import ParameterError, SensorError
from babelrs_geo.georef import Georef
from babelrs_geo.scenes.acquired import acquired
from babelrs_geo.scenes.blocks import STORE
from babelrs_geo.scenes.border import Border
from babelrs_geo.scenes.develop import Shown, develop, develop_mosaic
from babelrs_geo.scenes.facts import Facts, file_state
from babelrs_geo.scenes.memory import MEMORY
from babelrs_geo.scenes.reader import Reader
from babelrs_geo.scenes.resample import Source
from babelrs_geo.sensors import Radiometry, Sensor, choose_bands, choose_kind, estimate, infer, magnitude

if TYPE_CHECKING:
    import xarray as xr

Window = tuple[int, int, int, int]
"""`(x, y, width, height)` in pixels; a `tiling.Rect` is one."""

_SURVEY_PIXELS = 1 << 22  # what is looked at once a scene to set ranges and the valid share
_SURVEY_SIDE = 8  # spread windows a side, where no overview serves


@dataclass(frozen=True, kw_only=True)
class SceneOptions:
    """How to read a scene where its metadata is silent or wrong. Everything is optional."""

    bands: tuple[int, ...] | None = None
    """1-based bands: one for SAR and infrared, red, green and blue for RGB."""
    polarisation: str | None = None
    """SAR: `VV`, `VH`, `HH` or `HV`; found by the bands' descriptions."""
    units: str | None = None
    """`amplitude`, `intensity`, `db`, `kelvin`, `centikelvin`, `celsius`, `counts`, `reflectance` or
    `uint8`."""
    limits: tuple[float, float] | None = None
    """What becomes 0 and 1, in the unit of the numbers, instead of the estimate (or of 0 and 255 for 8-bit
    data)."""
    collar: bool = True
    """Treat black pixels connected to the border as not valid."""
    height: float | None = None
    """RPC scenes: metres above the ellipsoid (above the elevation model where there is one) of what is seen; if
    None, the RPCs' own mean height (the elevation model's ground)."""
    dem: str | None = None
    """RPC scenes: path of an elevation model."""
    radiometry: Radiometry | None = None
    """How raw numbers become model input, known beforehand (from an index of chips): bands and ranges are taken
    from it, and nothing is estimated."""


@dataclass(frozen=True)
class Pixels:
    """A window as the model sees it."""

    image: NDArray[Any]
    """(3, h, w) float32 in [0, 1], 0 where not valid; grey is copied to the three channels."""
    valid: NDArray[np.bool_]
    """(h, w), True where the scene was really seen."""


@dataclass(frozen=True)
class _Survey:
    """What was looked at once to know the scene."""

    sample: NDArray[Any] = field(repr=False)
    """(band, n) valid raw numbers spread over the scene."""
    share: float
    """Valid pixels among those looked at."""


def open_scene(
    path: str | os.PathLike[str], sensor: str | Sensor | None = None, options: SceneOptions | None = None
) -> Scene:
    """Open a raster: any file, URL or virtual path GDAL reads (GeoTIFF, COG, VRT, JPEG 2000, PNG, `s3://`,
    `https://`, ...).

    `sensor` may be left out where the metadata settles it. Raises SceneError where the file cannot be opened,
    SensorError where the sensor is unclear or does not fit the bands, GeorefError where the georeference is
    degenerate.
    """
    return Scene(path, sensor, options)


class Scene:
    """An open raster: picklable (it reopens on the other side), readable from many threads at once, a context
    manager.
    """

    path: str
    """As GDAL opens it."""
    name: str
    """File name without folders."""
    sensor: Sensor
    sensor_reason: str
    """Why this sensor: as asked, or what in the metadata says so."""
    radiometry: Radiometry
    """How raw numbers become model input, the same for every window."""
    georef: Georef
    options: SceneOptions

    def __init__(
        self,
        path: str | os.PathLike[str],
        sensor: str | Sensor | None = None,
        options: SceneOptions | None = None,
    ) -> None:
        self.options = options or SceneOptions()
        self._reader = Reader(path, height=self.options.height, dem=self.options.dem)
        facts = self._reader.facts
        self.path, self.name = self._reader.path, facts.bands.name
        self.georef = replace(facts.georef, size=(facts.width, facts.height))
        self.georef.to_map(0.0, 0.0)  # control points or RPCs that GDAL cannot use are told at once
        if sensor is None:
            self.sensor, self.sensor_reason = infer(facts.bands)
        else:
            self.sensor, self.sensor_reason = Sensor.parse(sensor), "as asked"
        self._bands = self._choose_bands()
        self._border = Border(self._reader, self._bands)
        self._share: float | None = None
        self._lock = threading.RLock()
        if self.options.radiometry is None:
            self._check_grey()
        self.radiometry = self.options.radiometry or self._radiometry()

    @property
    def width(self) -> int:
        """Columns."""
        return self._reader.facts.width

    @property
    def height(self) -> int:
        """Rows."""
        return self._reader.facts.height

    @property
    def count(self) -> int:
        """Bands in the file, alpha included."""
        return len(self._reader.facts.bands.interpretations)

    @property
    def dtype(self) -> str:
        """NumPy name of the file's data type."""
        return self._reader.facts.bands.dtype

    @property
    def holds_bytes(self) -> bool:
        """Whether model input is the file's own bytes over 255."""
        return self.radiometry.is_exact and self.dtype == "uint8"

    @property
    def driver(self) -> str:
        """GDAL driver: `GTiff`, `JP2OpenJPEG`, `PNG`, ..."""
        return self._reader.facts.driver

    @property
    def nodata(self) -> float | None:
        """Declared nodata value of the first band that is read."""
        return self._reader.facts.nodata[self._bands[0] - 1]

    @property
    def gsd(self) -> float | None:
        """Metres on the ground per pixel at the scene's centre, None without a place on Earth."""
        return self.georef.ground_sampling_distance(self.width / 2, self.height / 2)

    @property
    def acquired(self) -> datetime | None:
        """When the picture was taken, UTC, None where neither metadata nor file name tells."""
        return acquired(dict(self._reader.facts.tags), self.name)

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides what is read and where it lies, as JSON values: the same for what is made of the same."""
        return file_state(self.path) | {
            "radiometry": json.loads(self.radiometry.to_json()),
            "collar": self.options.collar,
            "georef": hashlib.sha256(repr(self.georef).encode()).hexdigest(),
        }

    @property
    def valid_share(self) -> float:
        """Share of valid pixels, from an overview or spread windows: 0 means that there is nothing to see."""
        with self._lock:
            if self._share is None:
                self._share = self._survey(self._bands).share
            return self._share

    def shape_at(self, scale: float) -> tuple[int, int]:
        """Rows and columns, rounded and at least 1, of the scene read at `scale` model pixels per scene pixel."""
        if not (math.isfinite(scale) and scale > 0):
            raise ParameterError(f"scale is {scale}, but must be above 0: model pixels per scene pixel")
        return max(1, round(self.height * scale)), max(1, round(self.width * scale))

    def read(self, window: Window, scale: float = 1.0, out: Shown | None = None) -> Pixels:
        """Model input of a window `(x, y, w, h)`, in pixels of the whole scene read at `scale`; the image in `out`
        `(3, h, w)` where given. There the bytes of a file, at scale 1, may stay bytes: model input is then `x / 255`.

        Raw numbers are resampled, then brought to [0, 1]. A pixel depends on its place in the scene alone:
        windows that overlap agree bit for bit, at any scale. At a scale below 1 overviews are used where
        there are some. Raises ParameterError where the window leaves the scene, SceneError where the file
        cannot be read there.
        """
        rows, columns = self.shape_at(scale)
        _check(window, rows, columns)
        level, source, parts = self._parts(window, rows, columns)
        if out is None:
            out = MEMORY.empty((3, window[3], window[2]), np.float32)
        if source is None:
            mosaic = self._reader.mosaic(self._bands, window)
            bare = not self.options.collar or self._border.is_beyond(window, mosaic)
            if bare and develop_mosaic(self.radiometry, mosaic, out):
                return Pixels(out, mosaic.valid())
            raw, valid = self._uncollared(*mosaic.whole(), *_lattice(window))
        else:
            raw, valid = source.resample(self._level(part, level) for part in parts)
        return Pixels(develop(self.radiometry, raw, valid, out), valid)

    @contextmanager
    def expecting(self, windows: Iterable[Window], scale: float = 1.0) -> Iterator[None]:
        """Announce the windows that will be read at `scale`, each once and about in this order, by whatever threads:
        what several of them need is decoded once and let go after the last, and a remote file is asked for more at a
        time.

        The best order is `Grid.order(scene.strip(scale), paired=scene.is_tiled)`: row by row, in vertical strips where
        the scene is wide. Then every block is decoded once (in strips, one block column in 20 at most twice), and
        what is held is a row of blocks and a little more. Any other order gives the same pixels, at the cost of memory
        (256 MB at most) and, beyond that, of decoding. Who reads n rows of tiles alone decodes n + 1 rows of blocks.
        """
        rows, columns = self.shape_at(scale)
        keys = (
            key
            for level, _, parts in (self._parts(window, rows, columns) for window in windows)
            for part in parts
            for key in self._reader.pieces(self._bands, part, level)
        )
        level = None if (rows, columns) == (self.height, self.width) else self._finer(rows, columns)
        announced = STORE.expect(keys, self._reader.piece_bytes(level, len(self._bands)))
        try:
            yield
        finally:
            STORE.unexpect(announced)

    def strip(self, scale: float = 1.0) -> int:
        """How many pixels wide a vertical strip of the scene, read at `scale`, may be so that the rows of blocks
        that a row of tiles needs are held in memory; the scene's width where it is no wider.
        """
        rows, columns = self.shape_at(scale)
        level = self._finer(rows, columns)
        wide = self._reader.strip(level, len(self._bands))
        return max(1, wide * columns // self._reader.shape(level)[1])

    @property
    def is_tiled(self) -> bool:
        """Whether the file is stored in tiles, not in whole rows: a window then needs few blocks of a row."""
        return self._reader.facts.is_tiled

    def read_raw(self, window: Window) -> NDArray[Any]:
        """The file's own numbers in a window of scene pixels, all bands: `(band, y, x)`."""
        _check(window, self.height, self.width)
        return self._reader.read(tuple(range(1, self.count + 1)), window)[0]

    def valid(self, window: Window) -> NDArray[np.bool_]:
        """Validity `(y, x)` of a window of scene pixels: nodata, masks, alpha, NaN and the collar."""
        _check(window, self.height, self.width)
        return self._level(window, None)[1]

    def read_both(self, window: Window, *, once: bool = False) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """What `read_raw` and `valid` give, from one look at the file; `once` where no other window will need the same
        blocks, which are then not kept.
        """
        _check(window, self.height, self.width)
        every = tuple(range(1, self.count + 1))
        read = self._reader.look if once else self._reader.read
        raw, valid = read(every, window, judged=self._bands)
        return raw, self._uncollared(raw[[b - 1 for b in self._bands]], valid, *_lattice(window))[1]

    def find_collar(self) -> None:
        """Look for the collar now, where it is asked for, so that copies sent to other processes know it."""
        if self.options.collar:
            self._border.collar()

    @property
    def facts(self) -> Facts:
        """What the file says of itself."""
        return self._reader.facts

    @property
    def data(self) -> xr.DataArray:
        """All bands as a lazy, chunked `(band, y, x)` xarray view in the file's numbers; each chunk is read
        when asked for.

        `x` and `y` are centres in map units where the georeference is a north-up affine, else in pixels. The
        CRS is in the `spatial_ref` coordinate as CF and rioxarray have it.
        """
        from babelrs_geo.scenes.view import view

        return view(self, self._reader.facts.block)

    def describe(self) -> dict[str, str]:
        """What the scene is and how it will be read, a line each, for people."""
        from babelrs_geo.scenes.view import describe

        return describe(self)

    def close(self) -> None:
        """Close the file in every thread; a later read opens it again."""
        self._reader.close()

    def __enter__(self) -> Scene:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()

    def __repr__(self) -> str:
        return f"<Scene {self.name}: {self.width} x {self.height}, {self.sensor}, {self.radiometry.kind}>"

    def _check_grey(self) -> None:
        """SensorError where SAR or infrared was asked of a colour picture; grey copied thrice passes."""
        about = self._reader.facts.bands
        names = [about.interpretations[b - 1] for b in about.colours]
        if self.sensor is Sensor.RGB or self.options.bands or not {"red", "green", "blue"} <= set(names):
            return
        sample = self._survey(about.colours[:3]).sample.astype(np.float64)
        if sample.size and np.abs(sample - sample[:1]).mean() > 3.0:  # lossy chroma moves grey by a little
            raise SensorError(
                f"{self.sensor} takes 1 band, but {self.name} has red, green and blue that differ; "
                "pass --sensor rgb, or the band"
            )

    def _choose_bands(self) -> tuple[int, ...]:
        """The bands to read; those of a given radiometry must fit the sensor and the file."""
        given, about = self.options.radiometry, self._reader.facts.bands
        if given is None:
            return choose_bands(self.sensor, about, self.options.bands, self.options.polarisation)
        if given.sensor is not self.sensor:
            raise SensorError(
                f"a radiometry of {given.sensor} was given for a scene of {self.sensor}; pass one sensor"
            )
        return choose_bands(self.sensor, about, given.bands)

    def _radiometry(self) -> Radiometry:
        """Fixed for 8-bit data and where limits are given, else estimated from the survey."""
        about, options = self._reader.facts.bands, self.options
        sample: NDArray[Any] = np.zeros((len(self._bands), 0))
        if about.dtype != "uint8" or options.units not in (None, "uint8"):
            survey = self._survey(self._bands)
            sample, self._share = survey.sample, survey.share
        kind = choose_kind(self.sensor, about, self._bands, sample, options.units)
        found = estimate(self.sensor, kind, self._bands, sample, about)
        if options.limits is None:
            return found
        low, high = (float(v) for v in options.limits)
        return replace(found, low=(low,) * len(self._bands), high=(high,) * len(self._bands))

    def _survey(self, bands: tuple[int, ...]) -> _Survey:
        """Look once over the scene: all of it if small, else its overview, else windows spread over it.

        SAR is never judged by an overview: averaging removes the speckle that its range is measured by.
        """
        level, shape = None, (self.height, self.width)
        decimation = self._reader.facts.overviews
        small = [i for i, d in enumerate(decimation) if shape[0] * shape[1] <= _SURVEY_PIXELS * d * d]
        if shape[0] * shape[1] > _SURVEY_PIXELS and small and self.sensor is not Sensor.SAR:
            level = min(small, key=decimation.__getitem__)
            shape = self._reader.shape(level)
        if shape[0] * shape[1] <= _SURVEY_PIXELS or level is not None:
            windows = [(0, 0, shape[1], shape[0])]
        else:
            windows = [(x, y, w, h) for y, h in _spread(shape[0]) for x, w in _spread(shape[1])]
        taken, seen = [], 0
        for window in windows:
            raw, valid = self._level(window, level, bands, once=True)
            seen += valid.size
            taken.append(raw[:, valid])
        if len(windows) > 1 and seen > 100 * sum(part.shape[1] for part in taken):  # a small island of data
            step = math.isqrt(shape[0] * shape[1] // _SURVEY_PIXELS) + 1
            raw, valid = self._decimated(step, bands)
            seen, taken = valid.size, [raw[:, valid]]
        sample = np.concatenate(taken, axis=1)
        taken.clear()
        return _Survey(sample, sample.shape[1] / seen)

    def _level(
        self, window: Window, level: int | None, bands: tuple[int, ...] | None = None, *, once: bool = False
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Raw numbers and validity, the collar included, of a window in pixels of an overview level; `once` where
        no other window will need the same blocks.
        """
        read = self._reader.look if once else self._reader.read
        raw, valid = read(bands or self._bands, window, level)
        rows, columns = self._reader.shape(level)
        r = (np.arange(window[1], window[1] + window[3]) * 2 + 1) * self.height // (2 * rows)
        c = (np.arange(window[0], window[0] + window[2]) * 2 + 1) * self.width // (2 * columns)
        return self._uncollared(raw, valid, r, c)

    def _decimated(self, step: int, bands: tuple[int, ...]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Raw numbers and validity of one pixel in `step` along each axis: reads all of the file."""
        shape = (-(-self.height // step), -(-self.width // step))
        raw, valid = self._reader.look(bands, (0, 0, self.width, self.height), shape=shape)
        r, c = (
            (2 * np.arange(n) + 1) * size // (2 * n)
            for n, size in zip(shape, (self.height, self.width), strict=True)
        )
        return self._uncollared(raw, valid, r, c)

    def _uncollared(
        self, raw: NDArray[Any], valid: NDArray[np.bool_], rows: NDArray[np.int64], columns: NDArray[np.int64]
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """The same, collar not valid; complex numbers as magnitudes. Rows (h,), columns (w,): places in the
        scene.
        """
        if self.options.collar and valid.any():
            return self._border.without(raw, valid, rows, columns)
        return magnitude(raw), valid

    def _finer(self, rows: int, columns: int) -> int | None:
        """The overview level that is just finer than the scene at `rows` by `columns`; None for the scene itself."""
        factor = min(self.height / rows, self.width / columns)
        decimation = self._reader.facts.overviews
        finer = [i for i, d in enumerate(decimation) if d <= factor]
        return max(finer, key=decimation.__getitem__, default=None)

    def _parts(
        self, window: Window, rows: int, columns: int
    ) -> tuple[int | None, Source | None, list[Window]]:
        """What a window of the scene at `rows` by `columns` is read from: the overview level, how it is resampled
        (None: not at all), and windows of the level.
        """
        if (rows, columns) == (self.height, self.width):
            return None, None, [window]
        level = self._finer(rows, columns)
        source = Source.of(window, (rows, columns), self._reader.shape(level))
        return level, source, list(source.parts)


def _check(window: Window, rows: int, columns: int) -> None:
    """ParameterError unless the window is a non-empty part of the scene."""
    x, y, w, h = window
    if min(x, y) < 0 or min(w, h) < 1 or x + w > columns or y + h > rows:
        raise ParameterError(
            f"window x, y, width, height {tuple(window)} is no part of a scene of {columns} by {rows} pixels"
        )


def _lattice(window: Window) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and columns of a window."""
    x, y, w, h = window
    return np.arange(y, y + h), np.arange(x, x + w)


def _spread(size: int) -> list[tuple[int, int]]:
    """Starts and lengths of up to eight stretches spread evenly along an axis; all of it if they would
    meet.
    """
    length = math.isqrt(_SURVEY_PIXELS) // _SURVEY_SIDE
    if size <= length * _SURVEY_SIDE:
        return [(start, min(length, size - start)) for start in range(0, size, length)]
    return [(round(i * (size - length) / (_SURVEY_SIDE - 1)), length) for i in range(_SURVEY_SIDE)]
