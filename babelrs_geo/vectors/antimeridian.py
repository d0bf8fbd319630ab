"""Shapes in longitude and latitude, cut where they cross the antimeridian, as GeoJSON has them (RFC 7946, 3.1.9).

A ring runs on beyond 180 degrees, or it comes back at -180: either way its pieces lie within -180 to 180. One around a
pole is closed along the pole.
"""

from __future__ import annotations

import geopandas as gpd
import numpy as np
import pyproj
import shapely
from numpy.typing import NDArray

from babelrs_geo.errors import GeorefError

Floats = NDArray[np.float64]


def to_crs(shapes: gpd.GeoSeries, crs: pyproj.CRS | str) -> gpd.GeoSeries:
    """Polygons in another CRS, cut at the antimeridian where that one is in degrees.

    Points beyond what it can show become infinite. Raises GeorefError where no transformation leads there.
    """
    target = pyproj.CRS.from_user_input(crs)
    assert shapes.crs is not None
    if target.is_geographic and shapes.crs.is_geographic:
        # Longitudes of one scene run on, an edge of more than half a turn is meant.
        shapes = gpd.GeoSeries(_cut(shapes.to_numpy(), wrapped=False), index=shapes.index, crs=shapes.crs)
    if shapes.crs == target:
        return shapes
    try:
        moved = shapes.to_crs(target)
    except pyproj.exceptions.ProjError as error:
        raise GeorefError(
            f"no transformation leads from {shapes.crs.name} to {target.name}: leave the CRS as it is, or assign the "
            "scene the CRS of its ground"
        ) from error
    if not target.is_geographic:
        return moved
    return gpd.GeoSeries(_cut(moved.to_numpy(), wrapped=True), index=moved.index, crs=target)


def polygons(lon: Floats, lat: Floats) -> NDArray[np.object_]:
    """Polygons (N,) through points (N, K) in degrees, cut at the antimeridian; None where a point is not finite."""
    shapes = np.full(len(lon), None, object)
    finite = np.isfinite(lon + lat).all(1)
    if finite.any():
        rings = _cut(shapely.polygons(np.stack([lon, lat], -1)[finite]), wrapped=True)
        shapes[finite] = shapely.make_valid(rings)
    return shapes


def _cut(shapes: NDArray[np.object_], *, wrapped: bool) -> NDArray[np.object_]:
    """(Multi)polygons (N,) in degrees, those that cross the antimeridian in pieces; `wrapped` says that an edge of more
    than half a turn is one that comes back at the other side.
    """
    parts, shape_of = shapely.get_parts(shapes, return_index=True)
    rings, part_of = shapely.get_rings(parts, return_index=True)
    points, ring_of = shapely.get_coordinates(rings, return_index=True)
    lon = points[:, 0]
    across = np.abs(lon) > 180.0
    if wrapped:
        across[1:] |= (np.abs(np.diff(lon)) > 180.0) & (np.diff(ring_of) == 0)
    out = shapes.copy()
    for i in np.unique(shape_of[part_of[ring_of[across & np.isfinite(lon)]]]):
        if np.isfinite(shapely.get_coordinates(shapes[i])).all():
            pieces = [_polygon(part, wrapped) for part in shapely.get_parts(shapes[i])]
            surfaces = shapely.get_parts(shapely.get_parts(pieces))
            out[i] = shapely.multipolygons(surfaces[shapely.get_dimensions(surfaces) == 2])
    return out


def _polygon(polygon: shapely.Polygon, wrapped: bool) -> shapely.Geometry:
    """What one polygon covers within -180 to 180: its shell without its holes, each cut by itself."""
    shell, *holes = (_ring(shapely.get_coordinates(ring), wrapped) for ring in shapely.get_rings(polygon))
    return shapely.difference(shell, shapely.union_all(holes)) if holes else shell


def _ring(points: Floats, wrapped: bool) -> shapely.Geometry:
    """What a closed ring (K, 2) encloses, within -180 to 180."""
    lon, lat = points.T.copy()
    if wrapped:
        lon[1:] -= 360.0 * np.cumsum(np.round(np.diff(lon) / 360.0))
    if abs(lon[-1] - lon[0]) > 180.0:
        lon = np.append(lon, lon[[-1, 0]])
        lat = np.append(lat, np.full(2, np.copysign(90.0, lat.mean())))
    unrolled = shapely.make_valid(shapely.Polygon(np.stack([lon, lat], 1)))
    first, last = (int(np.round(end / 360.0)) for end in (lon.min(), lon.max()))
    turns = [
        shapely.transform(
            shapely.intersection(unrolled, shapely.box(360.0 * k - 180.0, -90.0, 360.0 * k + 180.0, 90.0)),
            lambda p, k=k: p - np.array([360.0 * k, 0.0]),
        )
        for k in range(first, last + 1)
    ]
    return shapely.union_all(turns)
