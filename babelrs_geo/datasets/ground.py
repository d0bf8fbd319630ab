"""Pictures on the ground as a TorchGeo `GeoDataset`: how they are indexed, and how a query becomes a window.

The index is TorchGeo's: a row a picture, its footprint in the dataset's CRS, its interval of time. What differs
from TorchGeo's `RasterDataset`: pictures are never warped or merged. A query is answered from one picture, the one
that a sampler drew it from or that shares most ground with it, in that picture's own pixels: the window of as many
pixels as the query is large, centred where the query is. On the dataset's own CRS and grid that is the query's ground
to the pixel; elsewhere (rotated pictures, control points, RPCs, another CRS) the window is centred right and turned
as the picture is. Pixels of another size are read at the scale that brings them to the dataset's resolution.

Pictures without georeference are laid out side by side in an engineering CRS of their own, `PIXELS`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any, Self

import geopandas as gpd
import numpy as np
import pandas as pd
import pyproj
import shapely
from affine import Affine
from numpy.typing import NDArray

from babelrs_geo.boxes import areas, intersection_pairs
from babelrs_geo.datasets.combine import Combining
from babelrs_geo.datasets.samples import Sample, make_sample, scale_boxes
from babelrs_geo.datasets.times import bounds_of, intervals, microseconds, moments
from babelrs_geo.errors import GeorefError, ParameterError, SceneError
from babelrs_geo.georef import Georef
from babelrs_geo.scenes import Scene
from babelrs_geo.sensors import Sensor

PIXELS = pyproj.CRS.from_wkt(
    'ENGCRS["Pixels of images without georeference",EDATUM["first image"],CS[Cartesian,2],'
    'AXIS["x",east,ORDER[1]],AXIS["y",north,ORDER[2]],LENGTHUNIT["pixel",1]]'
)
"""CRS of images that have no place on the ground: units are pixels, y up."""

_PIECES = 8  # of a footprint's side: a row of pixels is no straight line in another CRS
_SAME_SIZE = 0.02  # pixels within this share of the dataset's resolution are read as they are
_SAME_SHAPE = 0.05  # a window that is longer along one axis by no more is still the ground that was asked for


@dataclass(frozen=True)
class Picture:
    """What is indexed: one scene or chip."""

    name: str
    width: int
    height: int
    georef: Georef
    acquired: datetime | None = None

    @property
    def crs(self) -> pyproj.CRS:
        """Of the georeference; `PIXELS` where there is none, or none that names a CRS."""
        return PIXELS if self.georef.kind == "none" else self.georef.crs or PIXELS

    @property
    def mapped(self) -> bool:
        """True where pixels have a place in a known CRS."""
        return self.georef.kind != "none" and self.georef.crs is not None


@dataclass(frozen=True, kw_only=True)
class GroundOptions:
    """How pictures are indexed and served; the same for scenes and chips."""

    crs: object = None
    """CRS of index and queries, anything pyproj takes; the first picture's if None."""
    res: float | tuple[float, float] | None = None
    """Size of a pixel (x, y) in units of the CRS; the first picture's if None. Where it is given, whole pictures
    are brought to it too."""
    least: int = 0
    """Pictures with a shorter side are padded to it, at the right and the bottom, in pixels of the dataset's
    resolution: give it the size of the windows, and TorchGeo's samplers draw from small pictures too. In degrees
    give it one more, since those compare sizes to the last bit."""
    visible: float = 0.4
    """A box cut by a window's edge is kept, whole, from this share of its area inside the window on."""
    tolerance: timedelta | None = None
    """`&` pairs scenes taken at most this long apart; None: however long."""
    transforms: Callable[[Sample], Sample] | None = field(default=None, compare=False)
    """Applied to every sample."""

    def __post_init__(self) -> None:
        if self.least < 0 or not 0 < self.visible <= 1:
            raise ParameterError(
                f"least is {self.least} and visible {self.visible}; expected pixels and a share in (0, 1]"
            )


class GroundDataset(Combining):
    """Pictures of one sensor on the ground; scenes and chips say how one is opened and which boxes it has.

    `dataset[query]` takes TorchGeo's slices of x, y and time, or the number of a row for that picture as a whole.
    Raises IndexError where the query meets no picture (TorchGeo's way to say so), and SceneError, with its name,
    for a file that cannot be read.
    """

    sensor: Sensor
    classes: tuple[str, ...]
    """What labels are indices into."""

    def __init__(
        self,
        pictures: Sequence[Picture],
        sensor: str | Sensor,
        classes: Sequence[str],
        options: GroundOptions,
    ) -> None:
        if not pictures:
            raise ParameterError(f"no pictures of {sensor} were given; pass at least one")
        self.sensor, self.classes, self.options = Sensor.parse(sensor), tuple(classes), options
        self.pictures = tuple(pictures)
        self._cache: dict[str, Any] = {}
        mapped = {p.mapped: p.name for p in pictures}
        if len(mapped) == 2:
            raise GeorefError(
                f"{mapped[True]} has a georeference and {mapped[False]} has none; make a dataset of each kind"
            )
        crs = pictures[0].crs
        if options.crs is not None:
            asked = pyproj.CRS.from_user_input(options.crs)
            if False in mapped and asked != PIXELS:
                raise GeorefError(f"{mapped[False]} has no georeference: its pixels have no place in a CRS")
            crs = asked
        res = options.res
        self._res = (
            self._native(0, crs) if res is None else (res, res) if isinstance(res, int | float) else res
        )
        self._padded = [self._covering(number, crs) for number in range(len(pictures))]
        shapes = self._footprints(crs)
        corner = shapely.bounds(shapes)[:, [0, 3]]
        self._index: gpd.GeoDataFrame | None = None
        self.index = gpd.GeoDataFrame(
            {
                "name": [p.name for p in pictures],
                "picture": np.arange(len(pictures)),
                "whole": True,
                "left": corner[:, 0],
                "top": corner[:, 1],
            },
            geometry=shapes,
            index=intervals(*moments([p.acquired for p in pictures])),
            crs=crs,
        )

    # What a dataset of scenes or of chips adds.

    def _open(self, picture: int) -> AbstractContextManager[Scene]:
        """The picture, open for as long as the block lasts."""
        raise NotImplementedError

    def _labelled(self, picture: int, scene: Scene) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Boxes (N, 5) in the picture's own pixels and labels (N,)."""
        raise NotImplementedError

    # TorchGeo's contract.

    @property
    def index(self) -> gpd.GeoDataFrame:
        """A row a picture, or a part of one that TorchGeo's splitters made: what it is, its ground and its time.

        `left` and `top` say where a picture without georeference is laid out; a part of it begins elsewhere.
        """
        assert self._index is not None
        return self._index

    @index.setter
    def index(self, new: gpd.GeoDataFrame) -> None:
        """Take another index. What `torchgeo.datasets.random_grid_cell_assignment` loses is put back: the names of
        the columns, of which it makes numbers, and the CRS.
        """
        old = self._index
        if old is not None:
            if "picture" not in new:
                kept = [c for c in new.columns if c != "geometry"]
                values = new[kept].set_axis(old.columns[: len(kept)], axis=1).drop(columns="geometry")
                values = values.astype({c: old[c].dtype for c in values})
                new = gpd.GeoDataFrame(values, geometry=new.geometry.to_numpy(), crs=old.crs)
            if new.crs is None:
                new = new.set_crs(old.crs)
        self._index = new

    def __getitem__(self, query: Any) -> Sample:
        """The sample at a query: `(x, y, time)` slices in units of `crs`, or a row's number."""
        if isinstance(query, int | np.integer):
            row, x, y, t = int(query), *self._extent(int(query))
        else:
            x, y, t = self._disambiguate_slice(query)
            given = query[2] if isinstance(query, tuple) and len(query) > 2 else slice(None)
            row = self._row(x, y, t, None not in (given.start, given.stop))
        picture = int(self.index["picture"].iloc[row])
        try:
            with self._open(picture) as scene:
                sample = self._read(row, scene, x, y)
            sample |= {"crs": self.crs, "bounds": (x, y, t)}
            return sample if self.options.transforms is None else self.options.transforms(sample)
        except IndexError as error:  # means "no such place" to TorchGeo, which would pass over it
            name = self.pictures[picture].name
            raise SceneError(f"{name} cannot be made a sample: {type(error).__name__} {error}") from error

    @property
    def crs(self) -> pyproj.CRS:
        """CRS of the index and of queries."""
        return self.index.crs

    @crs.setter
    def crs(self, new_crs: pyproj.CRS) -> None:
        """Bring the index to another CRS. GeorefError where the footprints cannot be expressed in it."""
        if new_crs == self.crs:
            return
        if PIXELS in (new_crs, self.crs):
            raise GeorefError(
                f"the images of {self.sensor} and those they are combined with do not both have a georeference; "
                "combine mapped images with mapped ones"
            )
        index, number = self.index.copy(), self.index["picture"].to_numpy()
        before, own = (np.array(self._footprints(crs), object)[number] for crs in (self.crs, new_crs))
        # TorchGeo's splitters leave parts of pictures, which stay parts
        index["whole"] &= shapely.equals_exact(index.geometry.to_numpy(), before, min(self.res) * 1e-3)
        shapes = np.where(index["whole"], own, index.geometry.to_crs(new_crs).to_numpy())
        self.index = gpd.GeoDataFrame(index.drop(columns="geometry"), geometry=shapes, crs=new_crs)
        self._cache = {}

    @property
    def res(self) -> tuple[float, float]:
        """Size of a pixel (x, y) in units of the CRS."""
        return self._res

    @res.setter
    def res(self, new_res: float | tuple[float, float]) -> None:
        """Read windows at another resolution; whole pictures still come in their own pixels."""
        self._res = (new_res, new_res) if isinstance(new_res, int | float) else new_res

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": {}}

    def __str__(self) -> str:
        return f"{type(self).__name__}: {len(self)} of {self.sensor}, {self.crs.name}, pixels of {self.res}"

    # Combination.

    @property
    def tolerance(self) -> timedelta | None:  # type: ignore[override]
        """As the options state it."""
        return self.options.tolerance

    def view(
        self,
        rows: NDArray[np.int64],
        shapes: NDArray[np.object_] | None = None,
        times: pd.IntervalIndex | None = None,
        whole: bool = True,
    ) -> Self:
        """A copy that indexes `rows` of this one; the pictures and the open files are shared."""
        index = self.index.iloc[rows].copy()
        if shapes is not None:
            if self.crs == PIXELS:  # laid out elsewhere
                moved = shapely.bounds(shapes)[:, [0, 3]] - index.geometry.bounds[["minx", "maxy"]].to_numpy()
                index[["left", "top"]] += moved
            index["geometry"] = gpd.array.from_shapely(shapes, crs=self.crs)
        if times is not None:
            index.index = times
        index["whole"] &= whole
        made = copy.copy(self)
        made._index, made._cache = index, {}
        return made

    # From a query to a window.

    def _extent(self, row: int) -> tuple[slice, slice, slice]:
        left, bottom, right, top = self.index.geometry.iloc[row].bounds
        interval = self.index.index[row]
        return (
            slice(left, right, self.res[0]),
            slice(bottom, top, self.res[1]),
            slice(interval.left, interval.right, 1),
        )

    def _row(self, x: slice, y: slice, t: slice, timed: bool) -> int:
        """The row that answers a query: where the query names a time, as a sampler's does, the row of that very
        interval, unless it saw nothing there; else that of its very bounds, else the one whose footprint shares most
        ground with it, else the first.
        """
        box, since, until = self._tables()
        first, last = microseconds(t.start), microseconds(t.stop)
        asked = np.array([x.start, y.start, x.stop, y.stop], np.float64)
        size = np.minimum(box[:, 2:], asked[2:]) - np.maximum(box[:, :2], asked[:2])
        met = np.flatnonzero((size > 0).all(axis=1) & (since <= last) & (until >= first))
        if not len(met):
            raise IndexError(f"query {(x, y, t)} meets no picture of {self.sensor} within {self.bounds}")
        others = (since[met] != first) | (until[met] != last) | (not timed)
        for rows in (met[~others], met[np.argsort(others, kind="stable")]):
            shared = self._shared(rows, asked)
            if shared.any():
                break
        other_place = ~(np.abs(box[rows] - asked) <= self._slack()).all(axis=1)
        return int(rows[np.lexsort((-shared, other_place))[0]])

    def _shared(self, rows: NDArray[np.int64], asked: NDArray[np.float64]) -> NDArray[np.float64]:
        """The share of a query's ground (x, y, x, y) that the footprints of rows cover, to a millionth."""
        ground = shapely.box(*asked)
        common = shapely.intersection(self.index.geometry.to_numpy()[rows], ground)
        return np.asarray(shapely.area(common) / ground.area).round(6)

    def _slack(self) -> NDArray[np.float64]:
        """A thousandth of a pixel, as x, y, x, y."""
        return np.array([*self.res, *self.res]) * 1e-3

    def _tables(self) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
        """Bounds (N, 4) and first and last microsecond (N,) of the rows."""
        if self._cache.get("of") is not self.index:
            tables = (self.index.geometry.bounds.to_numpy(), *bounds_of(self.index.index))
            self._cache = {"of": self.index, "tables": tables}
        return self._cache["tables"]

    def _read(self, row: int, scene: Scene, x: slice, y: slice) -> Sample:
        """The sample of one picture."""
        number = int(self.index["picture"].iloc[row])
        window, scale, whole = self._window(row, number, x, y)
        rows, columns = scene.shape_at(scale)
        left, top, width, height = window
        x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + width, columns), min(top + height, rows)
        if (x0, y0, x1 - x0, y1 - y0) == window:
            pixels = scene.read(window, scale)
            image, valid = pixels.image, pixels.valid
        else:
            image, valid = np.zeros((3, height, width), np.float32), np.zeros((height, width), bool)
            if x0 < x1 and y0 < y1:
                pixels = scene.read((x0, y0, x1 - x0, y1 - y0), scale)
                place = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
                image[:, *place], valid[place] = pixels.image, pixels.valid
        boxes, labels = self._labelled(number, scene)
        boxes = scale_boxes(boxes, columns / scene.width, rows / scene.height)
        boxes[:, :2] -= (left, top)
        if not whole and len(boxes):
            frame = np.tile([width / 2, height / 2, width, height, 0.0], (len(boxes), 1))
            kept = intersection_pairs(boxes, frame) >= self.options.visible * areas(boxes)
            boxes, labels = boxes[kept], labels[kept]
        sample = make_sample(image, valid, boxes, labels, sensor=self.sensor, name=self.pictures[number].name)
        sample |= {
            "transform": self._transform(row, number, window, scale, scene),
            "window": window,
            "scale": scale,
        }
        return sample

    def _window(
        self, row: int, number: int, x: slice, y: slice
    ) -> tuple[tuple[int, int, int, int], float, bool]:
        """Window `(x, y, width, height)` in pixels of the picture read at a scale, that scale, and whether it is
        the picture as a whole.
        """
        picture = self.pictures[number]
        asked = np.array([x.start, y.start, x.stop, y.stop], np.float64)
        step, native = np.abs([x.step, y.step]), np.array(self._native(number, self.crs))
        ratio = native / step
        if self.options.res is None and self.index["whole"].iloc[row]:
            wholes = [(picture.width, picture.height)]
            if (np.abs(ratio - 1) <= _SAME_SIZE).all():  # else its padding counts other pixels than its own
                wholes.append(self._padded[number])
            for width, height in wholes:
                own = self._bounds_of(row, number, width, height)
                if (np.abs(own - asked) <= self._slack()).all():
                    return (0, 0, width, height), 1.0, True
        columns, rows = (max(1, round(float(v))) for v in (asked[2:] - asked[:2]) / step)
        if ratio.max() > (1 + _SAME_SHAPE) * ratio.min():
            raise GeorefError(
                f"{picture.name} has pixels of {native[0]:.4g} by {native[1]:.4g} in {self.crs.name}, and a window was "
                f"asked for in pixels of {step[0]:.4g} by {step[1]:.4g}: no one scale brings them together; bring the "
                "scenes to one grid (babelrs-geo tile --coregister), or all to a projected CRS (gdalwarp -t_srs)"
            )
        scale = float(np.sqrt(np.prod(ratio)))
        if abs(scale - 1) <= _SAME_SIZE:
            scale = 1.0
        px, py = self._to_pixel(row, number, (asked[0] + asked[2]) / 2, (asked[1] + asked[3]) / 2)
        if not np.isfinite(px + py):
            raise GeorefError(f"{picture.name}: the middle of {x}, {y} has no place in its pixels")
        wide, high = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
        left = round(px * wide / picture.width - columns / 2)
        top = round(py * high / picture.height - rows / 2)
        return (left, top, columns, rows), scale, False

    def _covering(self, number: int, crs: pyproj.CRS) -> tuple[int, int]:
        """Width and height of a picture, in its own pixels, that cover the least that windows need."""
        picture, least = self.pictures[number], self.options.least
        if not least:
            return picture.width, picture.height
        wide, high = (
            math.ceil(least * r / n) for r, n in zip(self.res, self._native(number, crs), strict=True)
        )
        return max(picture.width, wide), max(picture.height, high)

    def _to_pixel(self, row: int, number: int, x: float, y: float) -> tuple[float, float]:
        """A place in the dataset's CRS to pixels of a picture."""
        picture = self.pictures[number]
        if not picture.mapped:
            left, top = self._corner(row)
            return x - left, top - y
        x, y = _moved(self.crs, picture.crs, x, y)
        px, py = picture.georef.to_pixel(x, y)
        return float(px), float(py)

    def _bounds_of(self, row: int, number: int, width: int, height: int) -> NDArray[np.float64]:
        """Bounds in the dataset's CRS of the first `width` by `height` pixels of a picture."""
        picture = self.pictures[number]
        if picture.mapped:
            return np.array(footprint(picture, width, height, self.crs).bounds)
        left, top = self._corner(row)
        return np.array([left, top - height, left + width, top])

    def _corner(self, row: int) -> tuple[float, float]:
        """Where a picture without georeference begins in `PIXELS`."""
        index = self.index
        return float(index["left"].iloc[row]), float(index["top"].iloc[row])

    def _footprints(self, crs: pyproj.CRS) -> list[Any]:
        """Of every picture, padded; those without georeference side by side, as far apart as the largest."""
        if crs != PIXELS:
            return [footprint(p, *s, crs) for p, s in zip(self.pictures, self._padded, strict=True)]
        sizes = self._padded
        starts = np.cumsum([0, *(w for w, _ in sizes)]) + np.arange(len(sizes) + 1) * max(map(max, sizes))
        return [shapely.box(s, 0, s + w, h) for s, (w, h) in zip(starts.tolist(), sizes, strict=False)]

    def _native(self, number: int, crs: pyproj.CRS) -> tuple[float, float]:
        """How far x and y run, in a CRS, over one pixel at the middle of a picture."""
        picture = self.pictures[number]
        if not picture.mapped:
            return 1.0, 1.0
        affine = picture.georef.affine
        if affine is not None and picture.crs == crs:
            return float(np.hypot(affine.a, affine.b)), float(np.hypot(affine.d, affine.e))
        cx, cy = picture.width / 2, picture.height / 2
        x, y = picture.georef.to_map([cx - 0.5, cx + 0.5, cx, cx], [cy, cy, cy - 0.5, cy + 0.5])
        x, y = _moved(picture.crs, crs, x, y)
        return float(np.hypot(x[1] - x[0], x[3] - x[2])), float(np.hypot(y[1] - y[0], y[3] - y[2]))

    def _transform(
        self, row: int, number: int, window: tuple[int, int, int, int], scale: float, scene: Scene
    ) -> Affine | None:
        """From pixels of the sample to the dataset's CRS, where that is an affine."""
        picture = self.pictures[number]
        rows, columns = scene.shape_at(scale)
        move = Affine.scale(picture.width / columns, picture.height / rows) @ Affine.translation(*window[:2])
        if not picture.mapped:
            left, top = self._corner(row)
            return Affine(1.0, 0.0, left, 0.0, -1.0, top) @ move
        if picture.georef.affine is None or picture.crs != self.crs:
            return None
        return picture.georef.affine @ move


def footprint(picture: Picture, width: int, height: int, crs: pyproj.CRS) -> Any:
    """Outline of the first `width` by `height` pixels in a CRS. GeorefError where it has no place there."""
    straight = picture.georef.kind == "affine" and picture.crs == crs
    run = np.linspace(0.0, 1.0, 1 if straight else _PIECES, endpoint=False)
    one, zero = np.ones_like(run), np.zeros_like(run)
    px = np.concatenate([run, one, 1 - run, zero]) * width
    py = np.concatenate([zero, run, one, 1 - run]) * height
    x, y = _moved(picture.crs, crs, *picture.georef.to_map(px, py))
    if not np.isfinite(x + y).all():
        raise GeorefError(f"{picture.name} has no place in {crs.name}; choose a CRS that reaches its ground")
    shape = shapely.Polygon(np.column_stack([x, y]))
    return shape if shape.is_valid else shapely.make_valid(shape)


def _moved(source: pyproj.CRS, target: pyproj.CRS, x: Any, y: Any) -> tuple[Any, Any]:
    if source == target:
        return x, y
    return _transformer(source.to_wkt(), target.to_wkt()).transform(x, y)


@lru_cache(maxsize=64)
def _transformer(source: str, target: str) -> pyproj.Transformer:
    return pyproj.Transformer.from_crs(source, target, always_xy=True)
