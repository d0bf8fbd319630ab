"""Frames of a benchmark beside each other on the map: a scene with labels, from images that have no place.

`lay_out` gives each frame its place, `write_mosaic` makes a GeoTIFF with an assigned georeference of them and
`write_labels` the vector file that goes with it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import rasterio
import shapely
from affine import Affine
from numpy.typing import NDArray
from PIL import Image
from rasterio.transform import from_origin

from babelrs_geo.boxes import corners
from babelrs_geo.datasets.soi import Record, frame_pixels
from babelrs_geo.drafts import draft
from babelrs_geo.errors import ParameterError


@dataclass(frozen=True)
class Placed:
    """A frame and the pixel of the mosaic that its first pixel lies on."""

    record: Record
    x: int
    y: int
    width: int
    height: int


@dataclass(frozen=True, kw_only=True)
class Assigned:
    """A georeference that is assigned to a mosaic, north up."""

    crs: str
    corner: tuple[float, float]
    """Of the first pixel, left and top, in the CRS."""
    gsd: float
    """Units of the CRS a pixel."""

    @property
    def affine(self) -> Affine:
        """Pixels to the map."""
        return from_origin(*self.corner, self.gsd, self.gsd)


def lay_out(records: Sequence[Record], gap: int = 0) -> list[Placed]:
    """Frames row by row on a near-square grid of cells as large as the largest, with `gap` pixels between and around.

    Raises ParameterError for no frames.
    """
    if not records:
        raise ParameterError("no frames were given to lay out; pass at least one")
    sizes = []
    for record in records:
        with Image.open(record.path) as image:
            sizes.append(np.array(image.size) - 2 * record.border)
    columns = int(np.ceil(np.sqrt(len(records))))
    cell = np.max(sizes, axis=0) + gap
    placed = []
    for i, (record, size) in enumerate(zip(records, sizes, strict=True)):
        row, column = divmod(i, columns)
        x, y = (int(v) for v in gap + np.array([column, row]) * cell)
        placed.append(Placed(record, x, y, int(size[0]), int(size[1])))
    return placed


def write_mosaic(
    path: Path,
    placed: Sequence[Placed],
    ground: Assigned,
    convert: Callable[[NDArray[np.uint8]], NDArray[Any]] | None = None,
    nodata: float | None = None,
) -> None:
    """All frames in one tiled GeoTIFF: three bands of RGB, one of other sensors; whole in memory meanwhile.

    Their own bytes, or what `convert` makes of them. What no frame covers is `nodata`, or where that is None left out
    by a mask, since 0 is a byte like any other. The file appears whole or not at all. Raises SceneError as
    `frame_pixels`.
    """
    margin = min(p.x for p in placed)
    width, height = (max(p.x + p.width for p in placed), max(p.y + p.height for p in placed))
    pixels = [_pixels(p.record) if convert is None else convert(_pixels(p.record)) for p in placed]
    mosaic = np.full((len(pixels[0]), height + margin, width + margin), nodata or 0, pixels[0].dtype)
    held = np.zeros(mosaic.shape[1:], bool)
    for p, own in zip(placed, pixels, strict=True):
        here = np.s_[p.y : p.y + p.height, p.x : p.x + p.width]
        held[here] = True
        mosaic[:, *here] = own
    with (
        draft(path, failures=(rasterio.errors.RasterioError,)) as hidden,
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        rasterio.open(
            hidden,
            "w",
            driver="GTiff",
            width=mosaic.shape[2],
            height=mosaic.shape[1],
            count=len(mosaic),
            dtype=mosaic.dtype.name,
            crs=ground.crs,
            transform=ground.affine,
            nodata=nodata,
            tiled=True,
            compress="deflate",
        ) as out,
    ):
        out.write(mosaic)
        if nodata is None:
            out.write_mask(held)


def _pixels(record: Record) -> NDArray[np.uint8]:
    """A frame's bytes (band, y, x), without its border."""
    array = frame_pixels(record, "RGB" if record.sensor == "rgb" else "L")
    return array.reshape(*array.shape[:2], -1).transpose(2, 0, 1)


def write_labels(path: Path, placed: Sequence[Placed], classes: Sequence[str], ground: Assigned) -> int:
    """The frames' boxes as polygons with a column `class`, in any format that geopandas writes; returns how many."""
    quads = [corners(p.record.boxes) + np.array([p.x, p.y]) for p in placed]
    names = [classes[label] for p in placed for label in p.record.labels]
    x, y = np.moveaxis(np.concatenate([np.zeros((0, 4, 2)), *quads]), 2, 0)
    shapes = shapely.polygons(np.stack(ground.affine @ (x, y), -1))
    frame = gpd.GeoDataFrame({"class": names}, geometry=shapes, crs=ground.crs)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        frame.to_file(Path(folder) / path.name)  # its layer is called as the file
        for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name):
            file.replace(
                path.with_name(file.name)
            )  # a Shapefile is several; the one that was named comes last
    return len(names)
