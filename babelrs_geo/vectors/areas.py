"""Areas of interest in."""

from __future__ import annotations

import os

import geopandas as gpd
import numpy as np
import pyarrow as pa
import pyogrio
import pyproj
import shapely

from babelrs_geo.errors import GeorefError, LabelError
from babelrs_geo.vectors.antimeridian import to_crs

_PIECES = 256  # edges longer than this share of the area are bent in a new CRS
_MARGIN = 6.0  # degrees around a CRS's area of use within which its coordinates can still be trusted


def read_area(path: str | os.PathLike[str], crs: pyproj.CRS | str | None) -> shapely.Geometry:
    """The area in a vector file: its polygons dissolved, in `crs` (None: a scene whose CRS is unknown).

    Any format GDAL reads, and GeoParquet; a file of several layers is asked for as QGIS writes it,
    `area.gpkg|layername=fields`. Long edges are bent as the new CRS bends them.

    Raises LabelError where the file cannot be read, holds no polygons, lacks a CRS, or has one though `crs`
    is None.
    """
    name, _, layer = str(path).partition("|layername=")
    frame = _read_polygons(name, layer or None)
    parts = shapely.get_parts(shapely.make_valid(shapely.force_2d(frame.geometry.dropna().to_numpy())))
    parts = shapely.get_parts(parts)  # of collections that make_valid left
    parts = parts[(shapely.get_dimensions(parts) == 2) & (shapely.area(parts) > 0)]
    if not len(parts):
        raise LabelError(f"{name} holds no polygons; an area of interest needs at least one")
    if (frame.crs is None) != (crs is None):
        lacking = f"{name} has no CRS" if frame.crs is None else f"{name} has a CRS, the scene has none"
        raise LabelError(
            f"{lacking}; the area of interest cannot be placed on the scene: assign the missing CRS"
        )
    if crs is None:
        return shapely.union_all(parts)
    area = gpd.GeoSeries([shapely.union_all(parts)], crs=frame.crs)
    target = pyproj.CRS.from_user_input(crs)
    if area.crs != target:
        west, south, east, north = area.total_bounds
        bent = area.segmentize(max(east - west, north - south) / _PIECES)
        try:
            area = to_crs(_near(bent, target), target)
        except GeorefError as error:
            raise LabelError(f"{name} cannot be laid over the scene: {error}") from error
    if not np.isfinite(area.total_bounds).all():
        raise LabelError(
            f"{name} lies beyond the ground that the scene's CRS can express; draw it over the scene"
        )
    return shapely.make_valid(area.iloc[0])


def _near(area: gpd.GeoSeries, target: pyproj.CRS) -> gpd.GeoSeries:
    """The area without what lies far outside the ground a CRS is made for: projections fold that back in.

    So the whole world is as good an area of interest as any other.
    """
    use = target.area_of_use
    if use is None or use.west > use.east:
        return area
    south, north = use.south - _MARGIN, use.north + _MARGIN
    near = shapely.union_all(
        [
            shapely.box(use.west - _MARGIN + turn, south, use.east + _MARGIN + turn, north)
            for turn in (-360.0, 0.0, 360.0)  # what lies on both sides of the antimeridian is near as well
        ]
    )
    lonlat = to_crs(area, "EPSG:4326")
    return area if near.covers(shapely.box(*lonlat.total_bounds)) else lonlat.make_valid().intersection(near)


def _read_polygons(name: str, layer: str | None) -> gpd.GeoDataFrame:
    try:
        if name.lower().endswith((".parquet", ".geoparquet")):
            return gpd.read_parquet(name)
        layers = [str(found) for found, kind in pyogrio.list_layers(name) if kind is not None]
        if layer is None and len(layers) > 1:
            raise LabelError(
                f"{name} has {len(layers)} layers ({', '.join(layers[:5])}); choose one:"
                f" {name}|layername={layers[0]}"
            )
        if layer is None and not layers:
            raise LabelError(f"{name} holds no geometry; an area of interest needs polygons")
        frame = pyogrio.read_dataframe(name, layer=layer or layers[0], columns=[])
    except LabelError:
        raise
    except (OSError, RuntimeError, ValueError, pa.ArrowException) as error:
        cause = " ".join(str(error).split())
        raise LabelError(f"{name} cannot be read as vectors ({cause}); pass a file of polygons") from error
    if not isinstance(frame, gpd.GeoDataFrame):
        raise LabelError(f"{name} holds no geometry in layer {layer}; an area of interest needs polygons")
    return frame
