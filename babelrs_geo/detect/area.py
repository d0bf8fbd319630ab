"""An area of interest on the map, asked in pixels of a scene."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from babelrs_geo.errors import LabelError

if TYPE_CHECKING:
    import numpy as np
    import shapely
    from numpy.typing import NDArray

    from babelrs_geo.scenes import Scene


@dataclass(frozen=True)
class MapArea:
    """An area of interest in map coordinates, asked in scene pixels (`inference.Area`)."""

    geometry: shapely.Geometry
    scene: Scene

    def touches(self, rects: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which rectangles (N, 4) in scene pixels share ground with the area, their edges followed through
        the georeference at nine points each (a GCP scene's rows are no straight lines on the map).
        """
        import numpy as np
        import shapely

        run = np.linspace(0, 1, 9)[:-1]
        side, zero = np.ones_like(run), np.zeros_like(run)
        around_x = np.concatenate([run, side, 1 - run, zero])
        around_y = np.concatenate([zero, run, side, 1 - run])
        px = rects[:, :1] + around_x * rects[:, 2:3]
        py = rects[:, 1:2] + around_y * rects[:, 3:4]
        x, y = self.scene.georef.to_map(px.ravel(), py.ravel())
        outlines = np.stack([x, y], axis=-1).reshape(*px.shape, 2)
        shapely.prepare(self.geometry)
        tiles = shapely.polygons(outlines)
        hit: NDArray[np.bool_] = shapely.intersects(self.geometry, tiles) & ~shapely.touches(
            self.geometry, tiles
        )
        return hit

    def holds(self, px: NDArray[np.float64], py: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Which points, in scene pixels, lie in the area or on its outline."""
        import shapely

        shapely.prepare(self.geometry)
        inside: NDArray[np.bool_] = shapely.intersects_xy(self.geometry, *self.scene.georef.to_map(px, py))
        return inside


def area_of(scene: Scene, path: str | os.PathLike[str]) -> MapArea:
    """The area of interest in `path`, in the scene's map coordinates.

    In degrees those may run on beyond 180: the area is laid over each turn of the globe that the scene shows.
    """
    import numpy as np
    import shapely

    from babelrs_geo import vectors

    drawn = vectors.read_area(path, scene.georef.crs)
    turns = (-360.0, 0.0, 360.0) if scene.georef.in_degrees else (0.0,)
    laid = [shapely.transform(drawn, lambda p, turn=turn: p + np.array([turn, 0.0])) for turn in turns]
    whole = np.array([[0, 0, scene.width, scene.height]], np.int64)
    over = [each for each in laid if MapArea(each, scene).touches(whole).any()]
    if not over:
        raise LabelError(
            f"the area of interest {Path(path).name} does not touch {scene.name}: pass an area over "
            "the scene (babelrs-geo info tells where it lies), or leave it out"
        )
    return MapArea(over[0] if len(over) == 1 else shapely.union_all(over), scene)
