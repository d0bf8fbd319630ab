"""What a raster says of itself, as plain values, and the name that GDAL opens it by."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rasterio.enums import MaskFlags

from babelrs_geo.errors import SceneError
from babelrs_geo.georef import Georef
from babelrs_geo.sensors import Bands

_SCHEMES = {  # how GDAL names what a browser or a cloud client names by URL
    "http://": "/vsicurl/http://",
    "https://": "/vsicurl/https://",
    "ftp://": "/vsicurl/ftp://",
    "s3://": "/vsis3/",
    "gs://": "/vsigs/",
    "az://": "/vsiaz/",
    "file://": "",
}
_LOSSY = {"JPEG", "YCbCr JPEG", "WEBP", "JXL", "JPEG2000"}


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a raster says of itself, as plain values."""

    width: int
    height: int
    driver: str
    nodata: tuple[float | None, ...]
    """Declared nodata value of each band."""
    mask: Literal["none", "shared", "by band"]
    """Whether a mask beside the bands declares validity, one for all or one each."""
    alpha: int | None
    """The band that tells how opaque pixels are."""
    overviews: tuple[int, ...]
    """Decimation of each overview, in the file's order."""
    block: tuple[int, int]
    """Rows and columns of a block."""
    lossy: bool
    """True where the stored bytes went through a lossy compression: black is then only nearly black."""
    tags: tuple[tuple[str, str], ...]
    """Metadata items of the default domain."""
    bands: Bands
    georef: Georef

    def tag(self, name: str) -> str | None:
        """The value of a metadata item, None where it is absent."""
        return dict(self.tags).get(name)

    @property
    def is_tiled(self) -> bool:
        """Whether it is stored in tiles, not in whole rows."""
        return self.block[1] < self.width


def gdal_path(path: str | os.PathLike[str]) -> str:
    """The name GDAL opens: URLs become its virtual file systems, files on disk absolute paths."""
    text = os.fspath(path)
    for scheme, prefix in _SCHEMES.items():
        if text.lower().startswith(scheme):
            return prefix + text[len(scheme) :]
    on_disk = not text.startswith("/vsi") and exists(text)  # else a GDAL connection string, or a mistake
    return str(Path(text).absolute()) if on_disk else text


def exists(text: str) -> bool:
    """Whether this names something on disk."""
    try:
        return Path(text).exists()
    except OSError:  # longer than a file name may be: inline XML of a VRT, say
        return False


def file_state(path: str) -> dict[str, Any]:
    """What tells whether a file is still the same, as JSON values: its path, its size and when it was written; None for
    what is no file on disk.
    """
    state = Path(path).stat() if exists(path) and Path(path).is_file() else None
    return {
        "path": path,
        "bytes": None if state is None else state.st_size,
        "modified": None if state is None else state.st_mtime_ns,
    }


def facts_of(dataset: Any, given: str, height: float | None, dem: str | None) -> Facts:
    """The facts of an open dataset, `height` and `dem` as in `SceneOptions`. SceneError where it holds no band."""
    if dataset.count == 0:
        inside = dataset.subdatasets
        remedy = (
            f"pass one of its {len(inside)} subdatasets, such as {inside[0]}"
            if inside
            else "pass another file"
        )
        raise SceneError(f"{given} holds no band; {remedy}")
    colours = [c.name for c in dataset.colorinterp]
    alpha = colours.index("alpha") + 1 if "alpha" in colours and len(colours) > 1 else None
    tags = dataset.tags()
    structure = dataset.tags(ns="IMAGE_STRUCTURE")
    dtypes = {d for d, c in zip(dataset.dtypes, colours, strict=True) if c != "alpha"} or set(dataset.dtypes)
    every = [*tags.items(), *(item for b in dataset.indexes for item in dataset.tags(b).items())]
    for domain in ("IMAGERY", "EXIF"):
        every += dataset.tags(ns=domain).items()
    reversible = structure.get("COMPRESSION_REVERSIBILITY", "")  # JPEG 2000 and WebP say so themselves
    compression = structure.get("COMPRESSION", "JPEG" if dataset.driver == "JPEG" else "")
    lossy = reversible == "LOSSY" or (compression in _LOSSY and not reversible.startswith("LOSSLESS"))
    return Facts(
        width=dataset.width,
        height=dataset.height,
        driver=dataset.driver,
        nodata=tuple(dataset.nodatavals),
        mask=_mask(dataset),
        alpha=alpha,
        overviews=tuple(dataset.overviews(1)),
        block=tuple(dataset.block_shapes[0]),
        lossy=lossy,
        tags=tuple((str(k), str(v)) for k, v in dict(every).items()),
        bands=Bands(
            dtype=str(np.result_type(*("complex64" if d == "complex_int16" else d for d in dtypes))),
            interpretations=tuple(colours),
            descriptions=tuple(_description(dataset, b) for b in dataset.indexes),
            units=tuple(u or "" for u in dataset.units),
            tags="\n".join(f"{k}={v}" for k, v in every),
            name=Path(given.partition("?")[0] if "://" in given else given).name,
            scale=tuple(dataset.scales),
            offset=tuple(dataset.offsets),
        ),
        georef=_georef(dataset, height, dem),
    )


def _mask(dataset: Any) -> Literal["none", "shared", "by band"]:
    """As in `Facts`. To GDAL nodata and alpha are masks, too, and it names one of several: they are looked at apart."""
    flags = dataset.mask_flag_enums
    if any(MaskFlags.per_dataset in each and MaskFlags.alpha not in each for each in flags):
        return "shared"
    return "none" if all(flags) else "by band"


def _description(dataset: Any, band: int) -> str:
    """What the file calls a band; GDAL's Sentinel-1 driver has the polarisation in a metadata item."""
    tags = dataset.tags(band)
    return dataset.descriptions[band - 1] or tags.get("POLARISATION") or tags.get("POLARIZATION") or ""


def _georef(dataset: Any, height: float | None, dem: str | None) -> Georef:
    """The best georeference the file has: an affine, many GCPs, RPCs, few GCPs (mere corners), none, in this
    order.
    """
    crs = dataset.crs.to_wkt() if dataset.crs else None
    if not dataset.transform.is_identity:  # GDAL's way to say that there is none, whatever the CRS
        return Georef.from_affine(dataset.transform, crs)
    points, gcp_crs = dataset.gcps
    if len(points) > 4 or (points and not dataset.rpcs):
        return Georef.from_gcps(
            [(p.col, p.row, p.x, p.y) for p in points], gcp_crs.to_wkt() if gcp_crs else None
        )
    if dataset.rpcs:
        return Georef.from_rpcs(dataset.rpcs.to_gdal(), height, dem and gdal_path(dem))
    return Georef()
