"""A small Sentinel-1 GRD product in ESA's SAFE layout, truthful in what is read of it: manifest, annotations with their
geolocation grid, and measurement GeoTIFFs whose own control points are the same.

    python tests/make_safe.py FOLDER  # S1A_....SAFE and S1A_....SAFE.zip
"""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.control import GroundControlPoint

START, STOP = "2026-03-01T05:12:10.123456", "2026-03-01T05:12:35.123456"
NAME = "S1A_IW_GRDH_1SDV_20260301T051210_20260301T051235_063511_07F2A1_9C4E.SAFE"
CORNER = (12.30, 45.40)  # longitude, latitude of the first pixel
STEP = (0.000128, -0.00009)  # degrees a pixel, about 10 m

Points = list[tuple[float, float, float, float]]
"""line, pixel, longitude, latitude"""


def grid_points(height: int, width: int, per_side: int = 5) -> Points:
    """A geolocation grid that leans, as an orbit does, and curves a little."""
    found = []
    for line in np.linspace(0, height - 1, per_side):
        for pixel in np.linspace(0, width - 1, per_side):
            lon = CORNER[0] + STEP[0] * pixel - 0.2 * STEP[0] * line + 1e-10 * pixel * line
            lat = CORNER[1] + STEP[1] * line + 0.2 * STEP[1] * pixel
            found.append((float(round(line)), float(round(pixel)), float(lon), float(lat)))
    return found


def make_safe(
    folder: Path,
    pixels: NDArray[np.uint16],
    polarisations: Sequence[str] = ("VV", "VH"),
    name: str = NAME,
) -> Path:
    """Write the product; every polarisation shows `pixels` (y, x), the later ones darker. Gives the .SAFE folder."""
    root = folder / name
    for sub in ("measurement", "annotation"):
        (root / sub).mkdir(parents=True)
    height, width = pixels.shape
    points = grid_points(height, width)
    objects = []
    for number, polarisation in enumerate(polarisations, 1):
        when = "20260301t051210-20260301t051235-063511-07f2a1"
        stem = f"{name[:3].lower()}-iw-grd-{polarisation.lower()}-{when}-{number:03d}"
        _measurement(root / "measurement" / f"{stem}.tiff", pixels // number, points)
        (root / "annotation" / f"{stem}.xml").write_text(_annotation(polarisation, pixels.shape, points))
        objects.append((stem, polarisation))
    (root / "manifest.safe").write_text(_manifest(objects, points))
    return root


def zipped(safe: Path) -> Path:
    """The product as it is distributed: one zip that holds the folder."""
    path = safe.with_name(safe.name.removesuffix(".SAFE") + ".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(safe.rglob("*")):
            archive.write(file, file.relative_to(safe.parent))
    return path


def _measurement(path: Path, pixels: NDArray[np.uint16], points: Points) -> None:
    profile = {"driver": "GTiff", "count": 1, "height": pixels.shape[0], "width": pixels.shape[1]}
    gcps = [GroundControlPoint(row=r, col=c, x=x, y=y, z=0.0) for r, c, x, y in points]
    with rasterio.open(path, "w", dtype="uint16", gcps=gcps, crs="EPSG:4326", **profile) as file:
        file.write(pixels[None])


def _annotation(polarisation: str, shape: tuple[int, int], points: Points) -> str:
    rows = "".join(
        f"""
      <geolocationGridPoint><azimuthTime>{START}</azimuthTime><slantRangeTime>5.3e-03</slantRangeTime>
        <line>{line:.0f}</line><pixel>{pixel:.0f}</pixel><latitude>{lat:.9e}</latitude><longitude>{lon:.9e}</longitude>
        <height>0.0e+00</height><incidenceAngle>3.9e+01</incidenceAngle><elevationAngle>3.4e+01</elevationAngle>
      </geolocationGridPoint>"""
        for line, pixel, lon, lat in points
    )
    return f"""<?xml version="1.0" encoding="UTF-8"?>
<product>
  <adsHeader><missionId>S1A</missionId><productType>GRD</productType><polarisation>{polarisation}</polarisation>
    <mode>IW</mode><swath>IW</swath><startTime>{START}</startTime><stopTime>{STOP}</stopTime>
    <absoluteOrbitNumber>63511</absoluteOrbitNumber><missionDataTakeId>520865</missionDataTakeId></adsHeader>
  <generalAnnotation><productInformation><pass>Descending</pass><projection>Ground Range</projection>
  </productInformation></generalAnnotation>
  <imageAnnotation><imageInformation>
    <productFirstLineUtcTime>{START}</productFirstLineUtcTime><productLastLineUtcTime>{STOP}</productLastLineUtcTime>
    <rangePixelSpacing>1.0e+01</rangePixelSpacing><azimuthPixelSpacing>1.0e+01</azimuthPixelSpacing>
    <pixelValue>Detected</pixelValue><outputPixels>16 bit Unsigned Integer</outputPixels>
    <numberOfSamples>{shape[1]}</numberOfSamples><numberOfLines>{shape[0]}</numberOfLines>
  </imageInformation></imageAnnotation>
  <geolocationGrid><geolocationGridPointList count="{len(points)}">{rows}
  </geolocationGridPointList></geolocationGrid>
</product>
"""


def _manifest(objects: list[tuple[str, str]], points: Points) -> str:
    lon, lat = [p[2] for p in points], [p[3] for p in points]
    ring = ((max(lat), min(lon)), (max(lat), max(lon)), (min(lat), max(lon)), (min(lat), min(lon)))
    data, units = "", ""
    for stem, polarisation in objects:
        key = stem.replace("-", "")
        data += f"""
    <dataObject ID="{key}" repID="s1Level1MeasurementSchema"><byteStream mimeType="application/octet-stream" size="0">
      <fileLocation locatorType="URL" href="./measurement/{stem}.tiff"/></byteStream></dataObject>
    <dataObject ID="product{key}" repID="s1Level1ProductSchema"><byteStream mimeType="text/xml" size="0">
      <fileLocation locatorType="URL" href="./annotation/{stem}.xml"/></byteStream></dataObject>"""
        units += f"""
      <xfdu:contentUnit unitType="Measurement Data Unit" repID="s1Level1MeasurementSchema" dmdID="acquisitionPeriod"
        textInfo="{polarisation}"><dataObjectPointer dataObjectID="{key}"/></xfdu:contentUnit>
      <xfdu:contentUnit unitType="Metadata Unit" repID="s1Level1ProductSchema"
        ><dataObjectPointer dataObjectID="product{key}"/></xfdu:contentUnit>"""
    channels = "".join(
        f"<s1sarl1:transmitterReceiverPolarisation>{p}</s1sarl1:transmitterReceiverPolarisation>"
        for _, p in objects
    )
    return f"""<?xml version="1.0" encoding="UTF-8"?>
<xfdu:XFDU xmlns:xfdu="urn:ccsds:schema:xfdu:1" xmlns:gml="http://www.opengis.net/gml"
  xmlns:safe="http://www.esa.int/safe/sentinel-1.0" xmlns:s1="http://www.esa.int/safe/sentinel-1.0/sentinel-1"
  xmlns:s1sar="http://www.esa.int/safe/sentinel-1.0/sentinel-1/sar"
  xmlns:s1sarl1="http://www.esa.int/safe/sentinel-1.0/sentinel-1/sar/level-1"
  version="esa/safe/sentinel-1.0/sentinel-1/sar/level-1/grd/standard/iwdv">
  <informationPackageMap><xfdu:contentUnit unitType="SAFE Archive Information Package"
    textInfo="Sentinel-1 IW Level-1 GRD Product">{units}
  </xfdu:contentUnit></informationPackageMap>
  <metadataSection>
    <metadataObject ID="acquisitionPeriod" classification="DESCRIPTION" category="DMD"><metadataWrap mimeType="text/xml"
      vocabularyName="SAFE" textInfo="Acquisition Period"><xmlData><safe:acquisitionPeriod>
      <safe:startTime>{START}</safe:startTime><safe:stopTime>{
        STOP
    }</safe:stopTime></safe:acquisitionPeriod></xmlData>
      </metadataWrap></metadataObject>
    <metadataObject ID="platform" classification="DESCRIPTION" category="DMD"><metadataWrap mimeType="text/xml"
      vocabularyName="SAFE" textInfo="Platform Description"><xmlData><safe:platform>
      <safe:familyName>SENTINEL-1</safe:familyName><safe:number>A</safe:number>
      <safe:instrument><safe:familyName abbreviation="SAR">Synthetic Aperture Radar</safe:familyName>
      <safe:extension><s1sarl1:instrumentMode><s1sarl1:mode>IW</s1sarl1:mode><s1sarl1:swath>IW</s1sarl1:swath>
      </s1sarl1:instrumentMode></safe:extension></safe:instrument></safe:platform></xmlData>
      </metadataWrap></metadataObject>
    <metadataObject ID="generalProductInformation" classification="DESCRIPTION" category="DMD"><metadataWrap
      mimeType="text/xml" vocabularyName="SAFE" textInfo="General Product Information"><xmlData>
      <s1sarl1:standAloneProductInformation><s1sarl1:instrumentConfigurationID>7</s1sarl1:instrumentConfigurationID>
      {
        channels
    }<s1sarl1:productType>GRD</s1sarl1:productType></s1sarl1:standAloneProductInformation></xmlData>
      </metadataWrap></metadataObject>
    <metadataObject ID="measurementFrameSet" classification="DESCRIPTION" category="DMD"><metadataWrap
      mimeType="text/xml" vocabularyName="SAFE" textInfo="Frame Set"><xmlData><safe:frameSet><safe:frame>
      <safe:footPrint srsName="http://www.opengis.net/gml/srs/epsg.xml#4326"><gml:coordinates>{
        " ".join(f"{a:.6f},{b:.6f}" for a, b in ring)
    }</gml:coordinates></safe:footPrint></safe:frame></safe:frameSet></xmlData></metadataWrap></metadataObject>
  </metadataSection>
  <dataObjectSection>{data}
  </dataObjectSection>
</xfdu:XFDU>
"""


if __name__ == "__main__":
    drawn = np.random.default_rng(0).gamma(2.0, 40.0, (300, 400)).astype(np.uint16) + 1
    print(made := make_safe(Path(sys.argv[1]), drawn))
    print(zipped(made))
