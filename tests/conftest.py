"""Small real rasters for every test: one factory, any format, data type, validity and georeference."""

from __future__ import annotations

import resource
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from hypothesis import settings
from numpy.typing import NDArray
from rasterio.enums import ColorInterp, Resampling
from rasterio.errors import NotGeoreferencedWarning
from rasterio.transform import Affine, from_origin

# First calls load compiled kernels, and machines are shared: no example is too slow.
settings.register_profile("here", deadline=None)
settings.load_profile("here")

# A shell's background jobs are born deaf to Ctrl-C; tests of interrupts, and the programs they start, must hear it.
signal.signal(signal.SIGINT, signal.default_int_handler)

UTM = "EPSG:32611"
NORTH_UP = from_origin(380_000.0, 3_735_000.0, 10.0, 10.0)
DRIVERS = {
    ".tif": "GTiff",
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jp2": "JP2OpenJPEG",
    ".vrt": "VRT",
    ".cog": "COG",
}


@dataclass(frozen=True)
class Raster:
    """What a test wants written: `pixels` (band, y, x) or (y, x) and what the file says of them."""

    pixels: NDArray[Any]
    suffix: str = ".tif"
    crs: str | None = UTM
    transform: Affine | None = NORTH_UP
    gcps: Sequence[Any] = ()
    rpcs: Any = None
    nodata: float | None = None
    mask: NDArray[np.bool_] | None = None
    colours: Sequence[str] = ()
    descriptions: Sequence[str] = ()
    units: Sequence[str] = ()
    scales: Sequence[float] = ()
    offsets: Sequence[float] = ()
    tags: dict[str, str] = field(default_factory=dict)
    overviews: Sequence[int] = ()
    creation: dict[str, Any] = field(default_factory=dict)


MakeRaster = Callable[..., Path]


@pytest.fixture
def make_raster(tmp_path: Path) -> MakeRaster:
    """`make_raster(pixels, name="scene", **what)` writes a `Raster` and gives its path."""

    def make(pixels: NDArray[Any], name: str = "scene", **what: Any) -> Path:
        return write_raster(tmp_path / name, Raster(np.asarray(pixels), **what))

    return make


@contextmanager
def files_open(more: int) -> Iterator[None]:
    """This process may have only so many more files open than it has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = {int(each.name) for each in Path("/proc/self/fd").iterdir()}
    free = (number for number in count() if number not in taken)
    resource.setrlimit(resource.RLIMIT_NOFILE, (next(islice(free, more, None)), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def write_raster(stem: Path, raster: Raster) -> Path:
    """Write a raster beside `stem`; formats that GDAL can only copy into go by way of a GeoTIFF."""
    path = stem.with_suffix(raster.suffix)
    plain = path if raster.suffix == ".tif" else stem.with_suffix(".source.tif")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
            _write_tiff(plain, raster)
            if plain != path:
                copied = {} if raster.suffix == ".tif" else raster.creation
                rasterio.shutil.copy(plain, path, driver=DRIVERS[raster.suffix], **copied)
    return path


def _write_tiff(path: Path, raster: Raster) -> None:
    pixels = raster.pixels if raster.pixels.ndim == 3 else raster.pixels[None]
    place = {"crs": raster.crs, "transform": raster.transform}
    if raster.gcps or raster.rpcs is not None:
        place = {"crs": raster.crs} if raster.gcps else {}
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        count=pixels.shape[0],
        height=pixels.shape[1],
        width=pixels.shape[2],
        dtype=pixels.dtype,
        nodata=raster.nodata,
        **{k: v for k, v in place.items() if v is not None},
        **(raster.creation if raster.suffix == ".tif" else {}),
    ) as file:
        file.write(pixels)
        if raster.colours:
            file.colorinterp = [ColorInterp[name] for name in raster.colours]
        if raster.gcps:
            file.gcps = (list(raster.gcps), rasterio.CRS.from_string(raster.crs or "EPSG:4326"))
        if raster.rpcs is not None:
            file.rpcs = raster.rpcs
        if raster.mask is not None:
            file.write_mask(raster.mask)
        for key in ("descriptions", "units", "scales", "offsets"):
            if getattr(raster, key):
                setattr(file, key, tuple(getattr(raster, key)))
        file.update_tags(**raster.tags)
    if raster.overviews:
        with rasterio.open(path, "r+") as file:
            file.build_overviews(list(raster.overviews), Resampling.average)
