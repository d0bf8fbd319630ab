"""`Georef`: where a pixel lies on the ground, whichever way the scene says so.

Four kinds answer the same calls: `affine` (north-up or rotated), `gcps` (ground control points, joined by a
thin-plate spline), `rpcs` (rational polynomials at a stated height or over an elevation model), `none`. A
`Georef` holds plain numbers, so it can be hashed, compared, pickled and sent to a worker; GDAL's transformers
are made where they are used, once per thread.

Pixel coordinates are continuous, `(0, 0)` the outer corner of the first pixel; map coordinates are in
traditional GIS order (x or longitude first), whatever the CRS's own axis order says.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np
import pyproj
import rasterio
from affine import Affine
from numpy.typing import ArrayLike, NDArray
from rasterio._err import CPLE_BaseError  # transformers let GDAL's own errors through
from rasterio.control import GroundControlPoint
from rasterio.enums import TransformDirection
from rasterio.errors import RasterioError
from rasterio.rpc import RPC
from rasterio.session import DummySession
from rasterio.transform import GCPTransformer, RPCTransformer

from babelrs_geo.errors import GeorefError

Kind = Literal["affine", "gcps", "rpcs", "none"]
Points = tuple[NDArray[np.float64], NDArray[np.float64]]
Mapping = Callable[[NDArray[np.float64], NDArray[np.float64]], Points]

_NEWTON_STEPS = 40
_NEWTON_PIXELS = (
    1e-8  # the step that ends the search; what is left after it is far smaller, the promise is 1e-6 px
)
_EDGE = 1e-9  # degrees, a tenth of a millimetre: what rounding may put beyond a scene's edge
_RPC_PIXELS = "0.0001"  # GDAL's own default, .1 px, is above the promised .05 px
_local = threading.local()


@dataclass(frozen=True)
class Georef:
    """A scene's georeference as plain numbers. Make one with `from_affine`, `from_gcps`, `from_rpcs` or
    `Georef()`.

    All methods take scalars or arrays that broadcast together, and return float64 arrays of the broadcast
    shape. Points that cannot be placed (beyond the horizon of an RPC, outside a projection) come back as NaN.
    Raises GeorefError where a place is asked of pixels that have none, or where the numbers are degenerate.
    """

    kind: Kind = "none"
    """Which of the fields below holds."""
    crs_text: str | None = None
    """CRS of the map coordinates, as an authority code (`EPSG:32611`) or WKT; None if unknown."""
    transform: tuple[float, float, float, float, float, float] = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    """Kind affine: a, b, c, d, e, f of `x = a px + b py + c`, `y = d px + e py + f`."""
    size: tuple[int, int] | None = None
    """Width and height of the scene, from the origin of the numbers above, where known: an affine in degrees learns
    from them in which turn of the globe to look for a longitude."""
    gcps: tuple[tuple[float, float, float, float], ...] = ()
    """Ground control points `(px, py, x, y)`, in pixels and in map coordinates."""
    rpcs: tuple[tuple[str, str], ...] = ()
    """Rational polynomial coefficients under GDAL's names."""
    height: float = 0.0
    """RPCs: metres above the ellipsoid (or above the elevation model, where there is one) at which pixels are
    placed."""
    dem: str | None = None
    """RPCs: path of an elevation model, if any."""
    origin: tuple[float, float] = (0.0, 0.0)
    """Where this georeference's pixel (0, 0) lies in the pixels the numbers above speak of: what `window`
    moves."""

    def __post_init__(self) -> None:
        held = {
            "affine": True,
            "gcps": bool(self.gcps),
            "rpcs": bool(self.rpcs),
            "none": True,
        }
        if not held.get(self.kind):
            raise GeorefError(f"a georeference of kind {self.kind!r} lacks its numbers")
        flat = not np.isfinite(self.transform).all() or Affine(*self.transform).is_degenerate
        if self.kind == "affine" and flat:
            raise GeorefError(f"the affine transform {self.transform} is degenerate: pixels have no extent")
        if self.kind == "gcps":
            _check_gcps(self.gcps)

    @classmethod
    def from_affine(
        cls, transform: Sequence[float], crs: object = None, size: tuple[int, int] | None = None
    ) -> Georef:
        """From the first six numbers of an affine, a CRS (anything pyproj takes), and the scene's width and height.

        In degrees, the grid goes on beyond 180: `to_map` may give 181 there, `to_lonlat` gives -179, and `to_pixel`
        takes both to the same pixel.
        """
        a, b, c, d, e, f = (float(v) for v in tuple(transform)[:6])
        return cls("affine", _crs_text(crs), (a, b, c, d, e, f), size)

    @classmethod
    def from_gcps(cls, points: Sequence[tuple[float, float, float, float]], crs: object = None) -> Georef:
        """From control points `(px, py, x, y)`: at least three, not on one line, no pixel at two places.

        Points repeated word for word count once. Longitudes are unrolled next to the first one, so that a
        scene across the antimeridian stays in one piece: `to_map` may give 181 degrees there, `to_lonlat`
        gives -179.
        """
        text = _crs_text(crs)
        table = np.array(list(dict.fromkeys(tuple(map(float, p)) for p in points)), np.float64).reshape(-1, 4)
        if text is not None and len(table) and pyproj.CRS.from_user_input(text).is_geographic:
            table[:, 2] = _near(table[:, 2], float(table[0, 2]))
        return cls("gcps", text, gcps=tuple((p, q, x, y) for p, q, x, y in table.tolist()))

    @classmethod
    def from_rpcs(cls, rpcs: dict[str, str], height: float | None = None, dem: str | None = None) -> Georef:
        """From RPCs under GDAL's names; map coordinates are EPSG:4326, longitude first.

        Without a height the ground is that of the elevation model, or, without one either, the RPCs' own
        `HEIGHT_OFF`: the middle of the heights they were fitted to, which is near the scene's mean ground.
        """
        if height is None:
            height = 0.0 if dem is not None else float(rpcs["HEIGHT_OFF"].split()[0])
        return cls("rpcs", "EPSG:4326", rpcs=tuple(sorted(rpcs.items())), height=float(height), dem=dem)

    @cached_property
    def crs(self) -> pyproj.CRS | None:
        """CRS of the map coordinates; None for kind none and where the file names none."""
        return None if self.crs_text is None else pyproj.CRS.from_user_input(self.crs_text)

    @cached_property
    def on_earth(self) -> bool:
        """Whether pixels have a longitude and a latitude: neither a site's own axes nor another planet's do."""
        return self.kind != "none" and on_earth(self.crs_text)

    @cached_property
    def in_degrees(self) -> bool:
        """Whether x of the map is a longitude, which comes back to itself after a turn."""
        return self.crs is not None and bool(self.crs.is_geographic)

    @cached_property
    def affine(self) -> Affine | None:
        """Pixel to map for kind affine, `origin` included; None for the others."""
        return Affine(*self.transform) @ Affine.translation(*self.origin) if self.kind == "affine" else None

    @property
    def lack(self) -> str:
        """In words, what there is in place of a CRS that leads to longitude and latitude."""
        if self.kind == "none":
            return "no georeference"
        return "no CRS" if self.crs is None else f"a CRS that is not of the Earth ({self.crs.name})"

    def to_map(self, px: ArrayLike, py: ArrayLike) -> Points:
        """Pixels to map coordinates `(x, y)`; pixels themselves where there is no georeference."""
        px, py, shape = _flat(px, py)
        x, y = self._forward(px + self.origin[0], py + self.origin[1])
        return x.reshape(shape), y.reshape(shape)

    def to_pixel(self, x: ArrayLike, y: ArrayLike) -> Points:
        """Map coordinates to pixels: the inverse of `to_map`, to 1e-6 px (affine, GCPs) or .05 px (RPCs)."""
        x, y, shape = _flat(x, y)
        px, py = self._backward(x, y)
        return (px - self.origin[0]).reshape(shape), (py - self.origin[1]).reshape(shape)

    def to_lonlat(self, px: ArrayLike, py: ArrayLike) -> Points:
        """Pixels to longitude and latitude, EPSG:4326 in degrees. GeorefError unless `on_earth`."""
        if not self.on_earth or self.crs_text is None:
            raise GeorefError(
                f"longitude and latitude were asked of a scene with {self.lack}; assign one: gdal_edit.py -a_srs"
            )
        x, y = self.to_map(px, py)
        if self.crs_text == "EPSG:4326":
            return _wrap(x), y
        lon, lat = _to_wgs84(self.crs_text).transform(x.ravel(), y.ravel())
        lon, lat = _wrap(np.asarray(lon, np.float64)), np.asarray(lat, np.float64)
        bad = ~(np.isfinite(lon) & np.isfinite(lat))
        lon[bad] = lat[bad] = np.nan
        return lon.reshape(x.shape), lat.reshape(x.shape)

    def ground_sampling_distance(self, px: float, py: float) -> float | None:
        """Metres on the ground per pixel at one place, None unless `on_earth`: geometric mean of the pixel's sides."""
        sides = self.pixel_sides(px, py)
        return None if sides is None else math.sqrt(sides[0] * sides[1])

    def pixel_sides(self, px: float, py: float) -> tuple[float, float] | None:
        """Metres on the ground across one pixel along x and along y at one place, None unless `on_earth`.

        Geodesics on the WGS 84 ellipsoid, so that a projection whose metres are not true ones (EPSG:3395, EPSG:3857)
        gives the true answer.
        """
        if not self.on_earth:
            return None
        lon, lat = self.to_lonlat(
            np.array([px - 0.5, px + 0.5, px, px]), np.array([py, py, py - 0.5, py + 0.5])
        )
        if not np.isfinite(lon + lat).all():
            return None
        _, _, metres = _GEOD.inv(lon[[0, 2]], lat[[0, 2]], lon[[1, 3]], lat[[1, 3]])
        return float(metres[0]), float(metres[1])

    def window(self, rect: tuple[int, int, int, int]) -> Georef:
        """The georeference of a window `(x, y, width, height)`: its pixel (0, 0) is the window's corner."""
        return replace(self, origin=(self.origin[0] + rect[0], self.origin[1] + rect[1]))

    def gcp_residuals(self) -> NDArray[np.float64]:
        """How far, in pixels, each control point's place on the map falls from its pixel: (N,), empty without
        GCPs.
        """
        if self.kind != "gcps":
            return np.zeros(0)
        points = np.array(self.gcps)
        px, py = self._backward(points[:, 2], points[:, 3])
        return np.hypot(px - points[:, 0], py - points[:, 1])

    def _turned(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Kind affine: longitudes moved by whole turns to where the scene shows them, or else next to its middle; those
        that it shows stay. A scene of unknown size may reach half a turn to either side of its middle.
        """
        a, b, corner = self.transform[:3]
        if self.size is None:
            half = float(np.copysign(180.0, a))
            return _near(x, np.clip(x, min(corner, corner + half), max(corner, corner + half)))
        sides = a * self.size[0], b * self.size[1]
        west = corner + sum(min(0.0, side) for side in sides)
        east = corner + sum(max(0.0, side) for side in sides)
        first = x - 360.0 * np.floor((x - west) / 360.0)
        shown = (west - _EDGE <= x) & (x <= east + _EDGE)
        return np.where(shown, x, np.where(first <= east, first, _near(x, (west + east) / 2)))

    def _forward(self, px: NDArray[np.float64], py: NDArray[np.float64]) -> Points:
        """File pixels to map, without `origin`."""
        if self.kind == "affine":
            a, b, c, d, e, f = self.transform
            return a * px + b * py + c, d * px + e * py + f
        if self.kind == "gcps":
            return _call(_spline(self.gcps), px, py, TransformDirection.forward)
        if self.kind == "rpcs":
            return _call(_rational(self.rpcs, self.height, self.dem), px, py, TransformDirection.forward)
        return px.copy(), py.copy()

    def _backward(self, x: NDArray[np.float64], y: NDArray[np.float64]) -> Points:
        """Map to file pixels, without `origin`."""
        if self.kind == "affine":
            a, b, c, d, e, f = self.transform
            det = a * e - b * d
            if self.in_degrees:
                x = self._turned(x)
            x, y = x - c, y - f  # first, so that large false eastings cancel before anything is multiplied
            return (e * x - b * y) / det, (a * y - d * x) / det
        if self.kind == "gcps":
            if self.in_degrees:
                x = _near(x, self.gcps[0][2])
            start = _call(_spline(self.gcps), x, y, TransformDirection.reverse)
            return _newton(self._forward, (x, y), start)
        if self.kind == "rpcs":
            return _call(_rational(self.rpcs, self.height, self.dem), x, y, TransformDirection.reverse)
        return x.copy(), y.copy()


_GEOD = pyproj.Geod(ellps="WGS84")


def _newton(forward: Mapping, target: Points, start: Points) -> Points:
    """Solve `forward(p) = target` for each point, from `start`; NaN where it does not converge.

    Needed because GDAL's reverse spline is a second spline through the same points, not the inverse of the
    first: between the points they can differ by pixels (recent GDAL iterates too, older ones do not). The
    Jacobian is by central differences of .5 px, which a thin-plate spline, smooth away from its nodes,
    follows closely enough for each step to gain at least two digits.
    """
    px, py = start[0].copy(), start[1].copy()
    live = np.flatnonzero(np.isfinite(px + py + target[0] + target[1]))
    done = np.zeros(px.shape, bool)
    for _ in range(_NEWTON_STEPS):
        if not live.size:
            break
        p, q = px[live], py[live]
        n = live.size
        x, y = forward(
            np.concatenate([p, p - 0.5, p + 0.5, p, p]), np.concatenate([q, q, q, q - 0.5, q + 0.5])
        )
        ex, ey = target[0][live] - x[:n], target[1][live] - y[:n]
        xp, yp = x[2 * n : 3 * n] - x[n : 2 * n], y[2 * n : 3 * n] - y[n : 2 * n]
        xq, yq = x[4 * n :] - x[3 * n : 4 * n], y[4 * n :] - y[3 * n : 4 * n]
        with np.errstate(divide="ignore", invalid="ignore"):
            det = xp * yq - xq * yp
            dp, dq = (yq * ex - xq * ey) / det, (xp * ey - yp * ex) / det
        px[live], py[live] = p + dp, q + dq
        size = np.hypot(dp, dq)
        done[live] = size < _NEWTON_PIXELS * np.maximum(1.0, np.hypot(p, q) * 1e-3)
        live = live[~done[live] & np.isfinite(size)]
    px[~done] = py[~done] = np.nan
    return px, py


def _check_gcps(points: tuple[tuple[float, float, float, float], ...]) -> None:
    """Raise GeorefError where no spline goes through the points."""
    table = np.array(points)
    if len(table) < 3:
        raise GeorefError(f"{len(table)} ground control points were given, but a spline takes at least 3")
    if not np.isfinite(table).all():
        raise GeorefError("a ground control point is not finite; remove it from the file")
    if len(np.unique(table[:, :2], axis=0)) < len(table):
        raise GeorefError("two ground control points share one pixel; remove one of them")
    for side, name in ((table[:, :2], "pixels"), (table[:, 2:], "map positions")):
        spread = np.linalg.svd(side - side.mean(axis=0), compute_uv=False)
        if spread[1] <= 1e-9 * spread[0]:
            raise GeorefError(
                f"the {name} of the ground control points lie on one line; no place follows from them"
            )


def _cached(key: object, make: Callable[[], Any]) -> Any:
    """One GDAL transformer a thread and georeference: they hold a handle, and are not for sharing. Keeps the
    last eight.
    """
    held: dict[object, Any] = _local.__dict__.setdefault("held", {})
    if key not in held:
        while len(held) >= 8:
            held.pop(next(iter(held))).close()
        try:
            with rasterio.Env(session=DummySession()):  # GDAL's complaints become exceptions, not stderr
                held[key] = make()
        except (RasterioError, CPLE_BaseError, ValueError) as error:
            raise GeorefError(f"GDAL cannot use this georeference: {_line(error)}") from error
    return held[key]


def _spline(gcps: tuple[tuple[float, float, float, float], ...]) -> GCPTransformer:
    points = [
        GroundControlPoint(row=q, col=p, x=x, y=y, z=0.0, id=str(i)) for i, (p, q, x, y) in enumerate(gcps)
    ]
    return _cached(gcps, lambda: GCPTransformer(points, tps=True))


def _rational(rpcs: tuple[tuple[str, str], ...], height: float, dem: str | None) -> RPCTransformer:
    options: dict[str, str | float] = {
        "RPC_HEIGHT": height,
        "RPC_PIXEL_ERROR_THRESHOLD": _RPC_PIXELS,
        "RPC_MAX_ITERATIONS": 50,
    }
    if dem is not None:
        options["RPC_DEM"] = dem
    return _cached((rpcs, height, dem), lambda: RPCTransformer(RPC.from_gdal(dict(rpcs)), **options))


def _call(
    transformer: Any, a: NDArray[np.float64], b: NDArray[np.float64], direction: TransformDirection
) -> Points:
    """Run a GDAL transformer over points; those it refuses become NaN."""
    if not a.size:
        return a.copy(), b.copy()
    try:
        with rasterio.Env(session=DummySession()):
            u, v = transformer._transform(a, b, np.zeros(a.size), direction)
    except (RasterioError, CPLE_BaseError) as error:
        raise GeorefError(f"GDAL cannot place these pixels: {_line(error)}") from error
    u, v = np.array(u, np.float64), np.array(v, np.float64)
    bad = ~(np.isfinite(u) & np.isfinite(v))
    u[bad] = v[bad] = np.nan
    return u, v


def _flat(a: ArrayLike, b: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64], tuple[int, ...]]:
    first, second = np.broadcast_arrays(np.asarray(a, np.float64), np.asarray(b, np.float64))
    return first.ravel(), second.ravel(), first.shape


def _wrap(lon: NDArray[np.float64]) -> NDArray[np.float64]:
    """Longitudes into [-180, 180]; those already there stay bit for bit."""
    return np.where(np.abs(lon) > 180.0, (lon + 180.0) % 360.0 - 180.0, lon)


def _near(lon: NDArray[np.float64], reference: float | NDArray[np.float64]) -> NDArray[np.float64]:
    """Longitudes moved by whole turns to within half a turn of the reference; those already there stay bit
    for bit.
    """
    return lon - 360.0 * np.round((lon - reference) / 360.0)


def _crs_text(crs: object) -> str | None:
    if crs is None or crs == "":
        return None
    try:
        parsed = pyproj.CRS.from_user_input(crs)
    except pyproj.exceptions.CRSError as error:
        raise GeorefError(f"the CRS {str(crs)[:80]!r} is not understood: {_line(error)}") from error
    authority = parsed.to_authority(min_confidence=100)
    return ":".join(authority) if authority else parsed.to_wkt()


def on_earth(crs: pyproj.CRS | str | None) -> bool:
    """Whether a transformation leads from a CRS to longitude and latitude."""
    if crs is None:
        return False
    try:
        _to_wgs84(crs if isinstance(crs, str) else crs.to_wkt())
    except pyproj.exceptions.ProjError:
        return False
    return True


@lru_cache(maxsize=64)
def _to_wgs84(crs_text: str) -> pyproj.Transformer:
    return pyproj.Transformer.from_crs(crs_text, "EPSG:4326", always_xy=True)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
