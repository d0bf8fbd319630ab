"""A chip as a file: a tiled GeoTIFF of raw numbers, with the georeference of its window and the scene's validity."""

from __future__ import annotations

import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.control import GroundControlPoint
from rasterio.enums import ColorInterp
from rasterio.errors import NotGeoreferencedWarning
from rasterio.rpc import RPC
from rasterio.session import DummySession

from babelrs_geo.drafts import draft
from babelrs_geo.georef import Georef
from babelrs_geo.scenes import Facts
from babelrs_geo.tiling import Rect

_SIDES = range(192, 513, 16)  # of a block
_LONGEST = 1000  # characters of a metadata item that every chip repeats
_OWN = (
    "AREA_OR_POINT",
    "STATISTICS_",
    "OVR_",
    "LAYOUT",
)  # items that speak of the scene's file, not of its pixels


def creation(facts: Facts, compress: str, width: int, height: int) -> dict[str, Any]:
    """What a GeoTIFF of such a window is created with, but for its place."""
    about = facts.bands
    dtype = np.dtype(about.dtype)
    profile: dict[str, Any] = {
        "driver": "GTiff",
        "count": len(about.interpretations),
        "width": width,
        "height": height,
        "dtype": about.dtype,
        "tiled": True,
        "blockxsize": _block(width),
        "blockysize": _block(height),
        "interleave": "pixel",
        "bigtiff": "IF_SAFER",
        "photometric": "RGB" if about.interpretations[:3] == ("red", "green", "blue") else "MINISBLACK",
    }
    if (nodata := _nodata(facts, dtype)) is not None:
        profile["nodata"] = nodata
    if compress != "none":
        profile["compress"] = compress
        if dtype.kind in "uif" and dtype.itemsize <= 8:
            profile["predictor"] = 3 if dtype.kind == "f" else 2
        profile |= {"zstd": {"zstd_level": 1}, "deflate": {"zlevel": 1}}.get(compress, {})
    return profile


def _block(length: int) -> int:
    """Side of the blocks that such a length is stored in: what they reach beyond it is compressed in vain."""
    if length < _SIDES[0]:
        return -(-length // 16) * 16
    return min(_SIDES, key=lambda side: (-length % side, abs(side - 256)))


def _nodata(facts: Facts, dtype: np.dtype[Any]) -> float | None:
    """The value that every band declares, where the type can hold it; the mask tells the rest."""
    first = facts.nodata[0]
    same = first is not None and all(v is not None and (v == first or v != v) for v in facts.nodata)
    if not same or first is None:
        return None
    if dtype.kind in "ui":
        info = np.iinfo(dtype)
        return first if float(first).is_integer() and info.min <= first <= info.max else None
    return first


def place(georef: Georef, x: int, y: int) -> dict[str, Any]:
    """The georeference of the window at (x, y), as rasterio writes it."""
    own = georef.window((x, y, 1, 1))
    crs = None if georef.crs is None else _crs(georef.crs.to_wkt())
    dx, dy = own.origin
    if georef.kind == "affine":
        return {"transform": own.affine} | ({} if crs is None else {"crs": crs})
    if georef.kind == "gcps":
        points = [
            GroundControlPoint(row=q - dy, col=p - dx, x=e, y=n, z=0.0, id=str(i))
            for i, (p, q, e, n) in enumerate(georef.gcps)
        ]
        return {"gcps": points, "crs": crs or rasterio.CRS()}
    if georef.kind == "rpcs":
        numbers = dict(georef.rpcs)
        numbers["SAMP_OFF"] = repr(float(numbers["SAMP_OFF"].split()[0]) - dx)
        numbers["LINE_OFF"] = repr(float(numbers["LINE_OFF"].split()[0]) - dy)
        return {"rpcs": RPC.from_gdal(numbers)}
    return {}


@lru_cache
def _crs(wkt: str) -> rasterio.CRS:
    return rasterio.CRS.from_wkt(wkt)


def write_chip(
    path: Path,
    raw: NDArray[Any],
    valid: NDArray[np.bool_],
    facts: Facts,
    georef: Georef,
    rect: Rect,
    compress: str = "zstd",
) -> None:
    """Write raw `(band, y, x)` and validity `(y, x)` of a window of the scene, whole or not at all.

    Raises OutputError where it cannot be written.
    """
    profile = creation(facts, compress, rect.width, rect.height) | place(georef, rect.x, rect.y)
    about = facts.bands
    advice = "check the disk's space and permissions, then run the same again: it goes on where it stopped"
    with (
        draft(path, advice, (rasterio.errors.RasterioError,)) as hidden,
        warnings.catch_warnings(),
        rasterio.Env(session=DummySession(), GDAL_TIFF_INTERNAL_MASK=True, GDAL_PAM_ENABLED=False),
    ):
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(hidden, "w", **profile) as file:
            file.update_tags(**_tags(facts))
            file.colorinterp = [_colour(name) for name in about.interpretations]
            for key, values in _texts(facts).items():
                setattr(file, key, values)
            file.write(raw)
            file.write_mask(valid)


def _tags(facts: Facts) -> dict[str, str]:
    return {
        k: v
        for k, v in facts.tags
        if not k.startswith(_OWN) and len(v) <= _LONGEST and "=" not in k and k.strip()
    }


def _colour(name: str) -> ColorInterp:
    return ColorInterp[name] if name in ColorInterp.__members__ else ColorInterp.undefined


def _texts(facts: Facts) -> dict[str, tuple[Any, ...]]:
    """Descriptions, units, factors and offsets of the bands, where there are any."""
    about = facts.bands
    found: dict[str, tuple[Any, ...]] = {}
    for key, values, plain in (
        ("descriptions", about.descriptions, ""),
        ("units", about.units, ""),
        ("scales", about.scale, 1.0),
        ("offsets", about.offset, 0.0),
    ):
        if any(v != plain for v in values):
            found[key] = values
    return found
