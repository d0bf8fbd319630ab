"""Sentinel-1 products in ESA's SAFE layout, a folder or a zip, as one raster: a VRT over the measurements.

The control points come from the annotations, the polarisations and the time from the manifest. GDAL's own driver wants
folders, original file names and calibration tables; products as archives keep them often lack one of these.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from xml.sax.saxutils import escape, quoteattr

from babelrs_geo.errors import SceneError

_MEASURED = re.compile(r"measurement/[^/]+\.tiff?$", re.I)


@dataclass(frozen=True)
class _Product:
    """How the files of a product are reached."""

    names: frozenset[str]
    """Relative to the product's root."""
    read: Callable[[str], bytes]
    root: str
    """As GDAL opens it."""


@dataclass(frozen=True)
class _Band:
    path: str
    polarisation: str
    width: int
    height: int
    points: Sequence[tuple[float, float, float, float, float]]
    """line, pixel, longitude, latitude, height"""


def is_safe(path: Path) -> bool:
    """Whether a path is a SAFE folder, by its name."""
    return path.suffix.upper() == ".SAFE" and path.is_dir()


def zipped_safe(path: Path) -> bool:
    """Whether a zip is called as Sentinel-1 products are, or holds one."""
    if re.match(r"S1[A-D]_", path.name, re.I):
        return True
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("manifest.safe") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def write_vrt(path: Path, folder: Path) -> Path:
    """A raster of a product's polarisations, one a band, written to `folder` under the product's own name.

    Raises SceneError where manifest, annotations or measurements are missing or damaged.
    """
    product = _open(path)
    try:
        start, names = _manifest(product)
        bands = [_band(product, name) for name in names]
    except (ET.ParseError, KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise SceneError(
            f"{path} is no whole Sentinel-1 product ({type(error).__name__}: {error}); fetch it again"
        ) from error
    if len({(band.width, band.height) for band in bands}) != 1:
        raise SceneError(
            f"{path} has measurements of several sizes (sub-swaths); pass one of the files in measurement/"
        )
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{path.stem}.SAFE"
    target.write_text(_vrt(bands, start), encoding="utf-8")
    return target


def _open(path: Path) -> _Product:
    if path.is_dir():
        names = frozenset(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
        return _Product(names, lambda name: (path / name).read_bytes(), str(path))
    try:
        with zipfile.ZipFile(path) as archive:
            inside = archive.namelist()
    except (OSError, zipfile.BadZipFile) as error:
        raise SceneError(f"{path} cannot be opened as a zip ({error}); fetch it again") from error
    manifest = next((name for name in inside if PurePosixPath(name).name == "manifest.safe"), None)
    if manifest is None:
        raise SceneError(f"{path} holds no manifest.safe: it is no Sentinel-1 product; pass another file")
    prefix = manifest.removesuffix("manifest.safe")

    def read(name: str) -> bytes:
        with zipfile.ZipFile(path) as archive:
            return archive.read(prefix + name)

    kept = frozenset(name.removeprefix(prefix) for name in inside if name.startswith(prefix))
    return _Product(kept, read, f"/vsizip/{path}/{prefix}".rstrip("/"))


def _manifest(product: _Product) -> tuple[str, list[str]]:
    """When the acquisition began, and the measurements, VV and HH first."""
    tree = ET.fromstring(product.read("manifest.safe"))
    start = next((node.text for node in tree.iter() if node.tag.endswith("}startTime")), None) or ""
    listed = [node.get("href", "").removeprefix("./") for node in tree.iter() if node.tag == "fileLocation"]
    names = [name for name in listed if _MEASURED.search(name) and name in product.names]
    names = names or sorted(name for name in product.names if _MEASURED.search(name))
    if not names:
        raise ValueError("it has no measurement")
    return start.strip(), names


def _band(product: _Product, name: str) -> _Band:
    stem = PurePosixPath(name).stem
    tree = ET.fromstring(product.read(f"annotation/{stem}.xml"))
    told = {key: tree.findtext(f".//{key}") for key in ("polarisation", "numberOfSamples", "numberOfLines")}
    if any(value is None for value in told.values()):
        raise ValueError(f"annotation/{stem}.xml lacks polarisation or size")
    points = [
        (
            float(node.findtext("line", "nan")),
            float(node.findtext("pixel", "nan")),
            float(node.findtext("longitude", "nan")),
            float(node.findtext("latitude", "nan")),
            float(node.findtext("height", "0")),
        )
        for node in tree.iter("geolocationGridPoint")
    ]
    if not points:
        raise ValueError(f"annotation/{stem}.xml has no geolocation grid")
    size = int(told["numberOfSamples"] or 0), int(told["numberOfLines"] or 0)
    return _Band(f"{product.root}/{name}", str(told["polarisation"]).upper(), *size, points)


def _vrt(bands: Sequence[_Band], start: str) -> str:
    first = bands[0]
    points = "".join(
        f'<GCP Id="{n}" Pixel="{pixel!r}" Line="{line!r}" X="{lon!r}" Y="{lat!r}" Z="{height!r}"/>'
        for n, (line, pixel, lon, lat, height) in enumerate(first.points)
    )
    layers = "".join(
        f'<VRTRasterBand dataType="UInt16" band="{n}"><Description>{escape(band.polarisation)}</Description>'
        f'<NoDataValue>0</NoDataValue><SimpleSource><SourceFilename relativeToVRT="0">{escape(band.path)}'
        "</SourceFilename><SourceBand>1</SourceBand></SimpleSource></VRTRasterBand>"
        for n, band in enumerate(bands, 1)
    )
    zone = "" if not start or start.endswith("Z") else "Z"
    return (
        f'<VRTDataset rasterXSize="{first.width}" rasterYSize="{first.height}">'
        f'<GCPList Projection="EPSG:4326">{points}</GCPList>'
        f"<Metadata><MDI key={quoteattr('ACQUISITION_START_TIME')}>{escape(start + zone)}</MDI>"
        f'<MDI key="SATELLITE_IDENTIFIER">SENTINEL-1</MDI></Metadata>{layers}</VRTDataset>'
    )
