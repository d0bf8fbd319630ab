"""Outlines of pixel rectangles on the ground, in EPSG:4326, and which of them share ground."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import shapely
from numpy.typing import NDArray

from babelrs_geo.georef import Georef
from babelrs_geo.tiling import Rect
from babelrs_geo.vectors.antimeridian import polygons

PIECES = 8  # parts of each side: a straight row of pixels is no straight line in longitude and latitude
_SLIVER = 1e-6  # shares of area below this are rounding, where neighbours touch


def outlines(rects: Sequence[Rect], georef: Georef) -> NDArray[np.object_]:
    """Polygons (N,) in longitude and latitude; None where there is no place on Earth.

    One that crosses the antimeridian is a MultiPolygon, cut there.
    """
    shapes = np.full(len(rects), None, object)
    if not georef.on_earth or not len(rects):
        return shapes
    numbers = np.array(rects, np.float64)
    run = np.linspace(0, 1, PIECES + 1)[:-1]
    one, zero = np.ones_like(run), np.zeros_like(run)
    px = numbers[:, :1] + np.concatenate([run, one, 1 - run, zero]) * numbers[:, 2:3]
    py = numbers[:, 1:2] + np.concatenate([zero, run, one, 1 - run]) * numbers[:, 3:4]
    return polygons(*georef.to_lonlat(px, py))


def sharing(
    a: NDArray[np.object_], b: NDArray[np.object_]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Pairs of positions in `a` (N,) and `b` (M,) that share ground, and how much of it, in square degrees.

    None shares nothing; neither do neighbours that only touch.
    """
    here = np.flatnonzero([s is not None for s in a])
    there = np.flatnonzero([s is not None for s in b])
    if not len(here) or not len(there):
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
    tree = shapely.STRtree(b[there])
    i, j = tree.query(a[here], predicate="intersects")
    i, j = here[i], there[j]
    area = shapely.area(shapely.intersection(a[i], b[j]))
    real = area > _SLIVER * np.minimum(shapely.area(a[i]), shapely.area(b[j]))
    return i[real], j[real], area[real]
