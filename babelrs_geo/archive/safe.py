"""Sentinel-1 products in ESA's SAFE layout, a folder or a zip, here or on a web server, as one raster: a VRT over the
measurements.

The control points come from the annotations, the polarisations and the time from the manifest. GDAL's own driver wants
folders, original file names and calibration tables; products as archives keep them often lack one of these.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from urllib.parse import urlsplit, urlunsplit
from xml.sax.saxutils import escape, quoteattr

from babelrs_geo.archive import remote
from babelrs_geo.archive.addresses import bare
from babelrs_geo.archive.remote import web_address
from babelrs_geo.errors import SceneError

_MEASURED = re.compile(r"measurement/[^/]+\.tiff?$", re.I)
_CALLED = re.compile(r"S1[A-D]_", re.I)


@dataclass(frozen=True)
class _Product:
    """How the files of a product are reached."""

    names: frozenset[str] | None
    """Relative to the product's root; None where they cannot be listed: the manifest is then believed."""
    read: Callable[[str], bytes]
    place: Callable[[str], str]
    """How GDAL opens a file of the product."""


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
    if _CALLED.match(path.name):
        return True
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("manifest.safe") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def is_product(path: str) -> bool:
    """Whether a path or an address is that of a product: remote ones, and zips of a run's plan, by their names."""
    address = web_address(path)
    if address is not None:
        return _folder_of(address) is not None or _is_zip(address)
    local = Path(path)
    return is_safe(local) or (local.suffix.lower() == ".zip" and local.is_file())


def _folder_of(address: str) -> str | None:
    """The address of a SAFE folder, given as such or by its manifest; None for anything else."""
    parts = urlsplit(address)
    folder = parts.path.rstrip("/").removesuffix("/manifest.safe")
    return urlunsplit(parts._replace(path=folder)) if folder.upper().endswith(".SAFE") else None


def _is_zip(address: str) -> bool:
    name = PurePosixPath(urlsplit(address).path).name
    return name.lower().endswith(".zip") and _CALLED.match(name) is not None


@contextmanager
def opened(path: str) -> Iterator[str]:
    """A raster of a product's polarisations, one a band, under the product's own name, as GDAL opens it. It is in this
    process's memory alone, for it may hold the signature of an address.

    Raises SceneError where manifest, annotations or measurements are missing or damaged.
    """
    from rasterio.io import MemoryFile

    address = web_address(path)
    shown = path if address is None else bare(path)
    try:
        with ExitStack() as stack:
            product = _local(Path(path), stack) if address is None else _remote(address, stack)
            start, names = _manifest(product)
            bands = [_band(product, name) for name in names]
    except SceneError:
        raise
    except (ET.ParseError, KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise SceneError(
            f"{shown} is no whole Sentinel-1 product ({type(error).__name__}: {error}); fetch it again"
        ) from error
    if len({(band.width, band.height) for band in bands}) != 1:
        raise SceneError(
            f"{shown} has measurements of several sizes (sub-swaths); pass one of the files in measurement/"
        )
    stem = PurePosixPath(shown.partition("?")[0].rstrip("/").removesuffix("/manifest.safe")).stem
    where = blake2b(shown.encode(), digest_size=8).hexdigest()  # the same in every process
    with MemoryFile(_vrt(bands, start).encode(), dirname=where, filename=f"{stem}.SAFE") as file:
        yield file.name


def _local(path: Path, stack: ExitStack) -> _Product:
    if path.is_dir():
        names = frozenset(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
        return _Product(names, lambda name: (path / name).read_bytes(), lambda name: f"{path}/{name}")
    return _zip(stack.enter_context(path.open("rb")), str(path), str(path), stack)


def _remote(address: str, stack: ExitStack) -> _Product:
    from babelrs_geo.scenes.facts import gdal_path

    folder = _folder_of(address)
    if folder is None:
        file = stack.enter_context(remote.seekable(address))
        return _zip(file, bare(address), f"{{{gdal_path(address)}}}", stack)
    return _Product(
        None,
        lambda name: remote.read(remote.beside(folder, name)),
        lambda name: gdal_path(remote.beside(folder, name)),
    )


def _zip(file: BinaryIO, shown: str, inner: str, stack: ExitStack) -> _Product:
    """A product in a zip, which GDAL calls `inner`."""
    try:
        archive = stack.enter_context(zipfile.ZipFile(file))
    except (OSError, zipfile.BadZipFile) as error:
        raise SceneError(f"{shown} cannot be opened as a zip ({error}); fetch it again") from error
    inside = archive.namelist()
    manifest = next((name for name in inside if PurePosixPath(name).name == "manifest.safe"), None)
    if manifest is None:
        raise SceneError(f"{shown} holds no manifest.safe: it is no Sentinel-1 product; pass another file")
    prefix = manifest.removesuffix("manifest.safe")
    kept = frozenset(name.removeprefix(prefix) for name in inside if name.startswith(prefix))
    return _Product(
        kept, lambda name: archive.read(prefix + name), lambda name: f"/vsizip/{inner}/{prefix}{name}"
    )


def _manifest(product: _Product) -> tuple[str, list[str]]:
    """When the acquisition began, and the measurements, VV and HH first."""
    tree = ET.fromstring(product.read("manifest.safe"))
    start = next((node.text for node in tree.iter() if node.tag.endswith("}startTime")), None) or ""
    listed = [node.get("href", "").removeprefix("./") for node in tree.iter() if node.tag == "fileLocation"]
    names = [name for name in listed if _MEASURED.search(name)]
    if product.names is not None:
        names = [name for name in names if name in product.names]
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
    return _Band(product.place(name), str(told["polarisation"]).upper(), *size, points)


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
