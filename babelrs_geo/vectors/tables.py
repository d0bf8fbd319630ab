"""Detections and tiles as tables with geometry: features and coverage."""

from __future__ import annotations

import datetime as dt
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import pyproj
import shapely
from numpy.typing import ArrayLike, NDArray

from babelrs_geo import boxes, qgis
from babelrs_geo.detections import Detections
from babelrs_geo.errors import GeorefError
from babelrs_geo.georef import Georef, on_earth

Floats = NDArray[np.float64]

_GEOD = pyproj.Geod(ellps="WGS84")
_CURVE_PX = 64  # where the map curves (GCPs, RPCs), edges of the coverage have a vertex at least so often


@dataclass(frozen=True)
class Origin:
    """Where features come from: what the columns need beside boxes and georeference."""

    scene: str
    """Name of the scene, without folders."""
    sensor: str
    """`sar`, `ir` or `rgb`."""
    acquired: dt.datetime | None = None
    """UTC; None where unknown."""


def features(found: Detections, georef: Georef, origin: Origin) -> gpd.GeoDataFrame:
    """Detections (scene pixels) on the map: the columns of this module's docstring, polygons in the CRS of
    `georef`.

    Rows keep the order of `found`. Exteriors run counter-clockwise and start with the box's width. Boxes that
    the georeference cannot place have null geometry. Warns (UserWarning) where they have no place on Earth.
    """
    count = len(found)
    quads = boxes.corners(found.boxes)  # (N, 4, 2) px
    acquired = None if origin.acquired is None else pd.Timestamp(origin.acquired)
    columns: dict[str, Any] = {
        "class": _text(np.array(found.classes, object)[found.labels]),
        "score": np.round(found.scores.astype(np.float64), 6),
        "sensor": _text([str(origin.sensor)] * count),
        "box": _text(["oriented" if found.oriented else "horizontal"] * count),
        **_on_the_ground(quads, found.boxes[:, :2], georef, found.oriented, origin.scene),
        "px_x": np.round(found.boxes[:, 0], 3),
        "px_y": np.round(found.boxes[:, 1], 3),
        "scene": _text([origin.scene] * count),
        "acquired": pd.Series([acquired] * count, dtype="datetime64[ms, UTC]"),
    }
    return gpd.GeoDataFrame(columns, geometry=_polygons(quads, georef), crs=georef.crs)


def _text(values: ArrayLike | Sequence[str]) -> pd.Series:
    return pd.Series(np.asarray(values, object), dtype=str)


def _on_the_ground(
    quads: Floats, centres: Floats, georef: Georef, oriented: bool, scene: str
) -> dict[str, Floats]:
    """The geodesic columns of boxes: corners (N, 4, 2) and centres (N, 2) in pixels. NaN unless on Earth."""
    count = len(quads)
    if not georef.on_earth:
        units = "pixels (x right, y down)" if georef.kind == "none" else "the units of its transform"
        warnings.warn(
            f"{scene} has {georef.lack}: its features are in {units}; metres, heading, longitude and latitude "
            "are empty; assign one with gdal_edit.py to have them",
            stacklevel=3,
        )
        names = ("length_m", "width_m", "area_m2", "heading_deg", "lon", "lat")
        return {name: np.full(count, np.nan) for name in names}
    middles = (quads + np.roll(quads, -1, axis=1)) / 2  # (N, 4, 2): of the width, height, width, height sides
    points = np.concatenate([quads, middles, centres[:, None]], 1)  # (N, 9, 2)
    lon, lat = georef.to_lonlat(points[..., 0], points[..., 1])
    middle_lon, middle_lat = lon[:, 8], lat[:, 8]
    _, _, along = _GEOD.inv(lon[:, 7], lat[:, 7], lon[:, 5], lat[:, 5])  # the width's axis, end to end
    _, _, across = _GEOD.inv(lon[:, 4], lat[:, 4], lon[:, 6], lat[:, 6])
    # The ground decides which side is the length: pixels need not be square.
    end = np.where(along >= across, 5, 6)
    rows = np.arange(count)
    heading, _, reach = _GEOD.inv(middle_lon, middle_lat, lon[rows, end], lat[rows, end])
    heading = np.round(np.asarray(heading) % 180.0, 2) % 180.0
    heading = np.where((reach > 0) & oriented, heading, np.nan)
    return {
        "length_m": np.round(np.maximum(along, across), 3),
        "width_m": np.round(np.minimum(along, across), 3),
        "area_m2": np.round(_quad_areas(lon[:, :4], lat[:, :4], middle_lon, middle_lat), 3),
        "heading_deg": heading,
        "lon": np.round(middle_lon, 8),
        "lat": np.round(middle_lat, 8),
    }


def _quad_areas(lon: Floats, lat: Floats, middle_lon: Floats, middle_lat: Floats) -> Floats:
    """Square metres of quadrilaterals (N, 4) about their centres (N,), degrees in.

    Each is drawn in Lambert's azimuthal equal-area projection about its own centre, in geodesic polar
    coordinates: rho = 2 R sin(s / 2R), with R the ellipsoid's Gaussian radius of curvature there (Snyder
    1987, eq. 24-1 and 3-19).
    """
    a, e2 = _GEOD.a, _GEOD.es
    radius = (a * np.sqrt(1 - e2) / (1 - e2 * np.sin(np.radians(middle_lat)) ** 2))[:, None]
    start_lon, start_lat = np.repeat(middle_lon[:, None], 4, 1), np.repeat(middle_lat[:, None], 4, 1)
    azimuth, _, distance = _GEOD.inv(start_lon, start_lat, lon, lat)
    rho = 2 * radius * np.sin(np.asarray(distance) / (2 * radius))
    x, y = rho * np.sin(np.radians(azimuth)), rho * np.cos(np.radians(azimuth))
    twice = (x * np.roll(y, -1, 1) - y * np.roll(x, -1, 1)).sum(1)
    areas: Floats = np.abs(twice) / 2
    return areas


def _polygons(quads: Floats, georef: Georef) -> NDArray[np.object_]:
    """Map polygons of pixel quadrilaterals (N, 4, 2), counter-clockwise; None where there is no place."""
    placed = np.stack(georef.to_map(quads[..., 0], quads[..., 1]), -1)
    relative = placed - placed[:, :1]
    x, y = relative[..., 0], relative[..., 1]
    clockwise = (x * np.roll(y, -1, 1) - y * np.roll(x, -1, 1)).sum(1) < 0
    placed[clockwise] = placed[clockwise][:, [1, 0, 3, 2]]
    polygons = np.full(len(quads), None, object)
    finite = np.isfinite(placed).all((1, 2))
    if finite.any():
        polygons[finite] = shapely.polygons(placed[finite])
    return polygons


def coverage(
    inners: ArrayLike, states: Sequence[str], reasons: Sequence[str], georef: Georef
) -> gpd.GeoDataFrame:
    """The ground that was looked at: tiles' inner areas dissolved by how they ended.

    Args:
        inners: (N, 4) `x, y, width, height` in scene pixels, not overlapping.
        states: (N,) how each tile ended, one of `qgis.STATES`.
        reasons: (N,) why, where there is something to say.
        georef: the scene's; the polygons are in its CRS, or in pixels (y down) where there is none.

    Returns:
        A row per state and reason, states in the order of `qgis.STATES`, with columns `state`, `reason`,
        `tiles` (how many), `area_km2` (geodesic; null without a place on Earth) and MultiPolygons. The union is
        made in pixels, where it is exact, and neighbours get the same vertices along their border (tile corners, and
        on curved georeferences a point at least every 64 px), so the rows partition the scene on the map as
        well: no gap, no overlap. Tiles that the georeference cannot place are counted, but not drawn.
    """
    rects = np.asarray(inners, np.int64).reshape(-1, 4)
    tiles = pd.DataFrame({"state": _text(states), "reason": _text(reasons)})
    tiles["order"] = [
        qgis.STATES.index(state) if state in qgis.STATES else len(qgis.STATES) for state in states
    ]
    x0, y0, x1, y1 = rects[:, 0], rects[:, 1], rects[:, 0] + rects[:, 2], rects[:, 1] + rects[:, 3]
    squares = shapely.box(x0, y0, x1, y1)
    # Fifteen times as fast, and right where whole edges coincide, which tiles in rows and columns see to.
    union = shapely.coverage_union_all if _in_columns(x0, x1) and _in_columns(y0, y1) else shapely.union_all
    curved = georef.kind in ("gcps", "rpcs")
    corner_x, corner_y = georef.to_map(np.stack([x0, x1, x1, x0], 1), np.stack([y0, y0, y1, y1], 1))
    squares[~np.isfinite(corner_x + corner_y).all(1)] = shapely.Polygon()
    xs, ys = (_lattice(np.concatenate(ends), curved) for ends in ((x0, x1), (y0, y1)))
    rows: list[tuple[str, str, int]] = []
    shapes: list[shapely.Geometry] = []
    for (_, state, reason), members in tiles.groupby(["order", "state", "reason"], sort=True).indices.items():
        rows.append((state, reason, len(members)))
        shapes.append(_mapped(union(squares[members]), xs, ys, georef))
    table = pd.DataFrame(rows, columns=["state", "reason", "tiles"])
    table = table.astype({"state": str, "reason": str, "tiles": np.int64})
    table["area_km2"] = 0.0
    ground = gpd.GeoDataFrame(table, geometry=np.array(shapes, object), crs=georef.crs)
    ground["area_km2"] = area_km2(ground.geometry)
    return ground


def cut(ground: gpd.GeoDataFrame, area: shapely.Geometry) -> gpd.GeoDataFrame:
    """A coverage with all ground beyond `area` (in its CRS) moved to one row of state `outside`.

    Tiles are still all counted: those that keep some ground in the area where they were, the others as outside.
    """
    shapes = ground.geometry.to_numpy()
    looked = (ground["state"] != "outside").to_numpy()
    within = np.array([_surfaces(shape) for shape in shapely.intersection(shapes, area)], object)
    kept = looked & ~shapely.is_empty(within)
    beyond = _surfaces(
        shapely.union_all([shapely.difference(shapely.union_all(shapes), area), *shapes[~kept]])
    )
    outside = int(ground.loc[~kept, "tiles"].sum())
    table = ground.drop(columns="geometry")[kept]
    drawn = within[kept]
    if outside or not beyond.is_empty:
        row = {"state": ["outside"], "reason": [""], "tiles": [outside], "area_km2": [0.0]}
        place = int((table["state"].map(qgis.STATES.index) < qgis.STATES.index("outside")).sum())
        table = pd.concat([table[:place], pd.DataFrame(row), table[place:]], ignore_index=True)
        drawn = np.insert(drawn, place, beyond)
    result = gpd.GeoDataFrame(table.reset_index(drop=True), geometry=drawn, crs=ground.crs)
    result["area_km2"] = area_km2(result.geometry)
    return result


def _surfaces(shape: shapely.Geometry) -> shapely.MultiPolygon:
    """The polygons of a geometry, without the lines and points that intersections leave where edges touch."""
    parts = shapely.get_parts(shapely.get_parts(shape))
    return shapely.multipolygons(parts[shapely.get_dimensions(parts) == 2])


def area_km2(geometry: gpd.GeoSeries) -> Floats:
    """Geodesic area in square kilometres of a few (multi)polygons in any CRS, (N,); NaN without one of the Earth."""
    if not on_earth(geometry.crs):
        return np.full(len(geometry), np.nan)
    parts, shape_of = shapely.get_parts(geometry.to_crs("EPSG:4326").to_numpy(), return_index=True)
    rings, part_of = shapely.get_rings(parts, return_index=True)
    # Each by itself: which way round a ring runs is not to be seen in degrees that come back at -180.
    areas = np.array([abs(_GEOD.geometry_area_perimeter(shapely.Polygon(ring))[0]) for ring in rings])
    hole = np.diff(part_of, prepend=-1) == 0
    metres = np.bincount(shape_of[part_of], np.where(hole, -areas, areas), len(geometry))
    return np.round(metres / 1e6, 6)


def _in_columns(start: NDArray[np.int64], end: NDArray[np.int64]) -> bool:
    """Whether intervals on one axis, (N,) each, are the same or apart."""
    bands = np.unique(np.stack([start, end], 1), axis=0)
    return bool((bands[1:, 0] >= bands[:-1, 1]).all())


def _lattice(ends: NDArray[np.int64], curved: bool) -> Floats:
    """Where edges get vertices along one axis: where tiles end, and where the map curves also in between."""
    lines = np.unique(ends).astype(np.float64)
    if not curved or len(lines) < 2:
        return lines
    pieces = np.ceil(np.diff(lines) / _CURVE_PX).astype(int)
    spans = [
        np.linspace(a, b, n, endpoint=False) for a, b, n in zip(lines[:-1], lines[1:], pieces, strict=True)
    ]
    return np.concatenate([*spans, lines[-1:]])


def _mapped(shape: shapely.Geometry, xs: Floats, ys: Floats, georef: Georef) -> shapely.MultiPolygon:
    """A rectilinear pixel shape on the map, with a vertex wherever an edge crosses the lattice."""
    parts = shapely.get_parts(shape)
    parts = parts[~shapely.is_empty(parts)]
    if not len(parts):
        return shapely.MultiPolygon()
    rings, part_of = shapely.get_rings(parts, return_index=True)
    points, ring_of = shapely.get_coordinates(rings, return_index=True)
    inside = np.flatnonzero(ring_of[1:] == ring_of[:-1])  # edges: from point i to i + 1 of one ring
    start, end = points[inside], points[inside + 1]
    level = start[:, 1] == end[:, 1]
    # Every edge runs between two lines of the lattice: walk it line by line.
    first, last = (
        np.where(level, np.searchsorted(xs, p[:, 0]), np.searchsorted(ys, p[:, 1])) for p in (start, end)
    )
    steps = np.abs(last - first)
    edge = np.repeat(np.arange(len(steps)), steps)
    walked = np.arange(len(edge)) - np.repeat(np.cumsum(steps) - steps, steps)
    line = first[edge] + np.sign(last - first)[edge] * walked
    x = np.where(level[edge], xs[np.minimum(line, len(xs) - 1)], start[edge, 0])
    y = np.where(level[edge], start[edge, 1], ys[np.minimum(line, len(ys) - 1)])
    placed = np.stack(georef.to_map(x, y), -1)
    if not np.isfinite(placed).all():
        raise GeorefError(
            "pixels between tiles that lie on the map cannot be placed on it; check the scene's RPCs"
        )
    drawn = shapely.linearrings(placed, indices=ring_of[inside][edge])  # closes each ring
    return shapely.multipolygons(shapely.polygons(drawn, indices=part_of))
