"""Styles: colours that can be told apart, text that is well formed, and what QGIS itself makes of it."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import textwrap
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
import rasterio
from numpy.typing import NDArray
from rasterio.errors import NotGeoreferencedWarning

from babelrs_geo import qgis, vectors
from babelrs_geo.detections import Detections
from babelrs_geo.georef import Georef

SYSTEM_PYTHON = Path("/usr/bin/python3")  # Debian's QGIS speaks to Debian's Python only

CLASSES = {
    "sar": ("ship", "aircraft", "car", "tank", "bridge", "harbor"),
    "rgb": (
        "plane",
        "ship",
        "storage-tank",
        "baseball-diamond",
        "tennis-court",
        "basketball-court",
        "ground-track-field",
        "harbor",
        "bridge",
        "vehicle",
    ),
    "ir": ("person", "car", "bicycle", "other-vehicle", "bus", "truck", "van", "freight-car"),
    "rgb, fifteen": (
        "small-vehicle",
        "large-vehicle",
        "plane",
        "ship",
        "harbor",
        "tennis-court",
        "soccer-ball-field",
        "ground-track-field",
        "baseball-diamond",
        "swimming-pool",
        "roundabout",
        "basketball-court",
        "storage-tank",
        "bridge",
        "helicopter",
    ),
}

# Severity 1 of Machado, Oliveira and Fernandes (2009), on linear RGB.
SIGHT = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
}


def lab(colour: str, sight: str) -> NDArray[np.float64]:
    """CIE Lab (D65) of `#RRGGBB` as somebody sees it."""
    rgb = np.frombuffer(bytes.fromhex(colour[1:]), np.uint8) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ np.clip(SIGHT[sight] @ linear, 0, 1) / np.array([0.95047, 1, 1.08883])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize("sensor", CLASSES)
def test_classes_of_a_sensor_can_be_told_apart_by_anybody(sensor: str, sight: str) -> None:
    for one, other in itertools.combinations(CLASSES[sensor], 2):
        apart = np.linalg.norm(lab(qgis.class_colour(one), sight) - lab(qgis.class_colour(other), sight))
        assert apart > 10, (one, other)


def test_each_name_has_its_own_colour_in_every_spelling() -> None:
    names = {name for names in CLASSES.values() for name in names} - {"aircraft"}
    assert len({qgis.class_colour(name) for name in names}) == len(names)
    assert qgis.class_colour("aircraft") == qgis.class_colour("plane")
    assert qgis.class_colour("Ship") == qgis.class_colour(" ship ") == qgis.class_colour("ship")
    assert qgis.class_colour("FREIGHT_CAR") == qgis.class_colour("freight-car")


def test_unknown_classes_have_a_stable_colour() -> None:
    assert qgis.class_colour("zeppelin") == "#1ECECC"  # the same on any machine, in any run
    assert len({qgis.class_colour(f"class {i}") for i in range(50)}) == 50


def test_styles_depend_on_the_set_of_classes_alone() -> None:
    assert qgis.detections_style(["ship", "car", "ship"]) == qgis.detections_style(["car", "ship"])
    assert qgis.detections_style([]).qml.count("<category ") == 1  # what a user adds is drawn as well
    assert qgis.coverage_style() == qgis.coverage_style()


@pytest.mark.parametrize(
    "style", [qgis.detections_style(["car", "odd <&\"'> name", "ship"]), qgis.coverage_style()]
)
def test_styles_are_well_formed_and_name_every_category(style: qgis.Style) -> None:
    qml = ET.fromstring(style.qml)
    values = [category.get("value") for category in qml.iter("category")]
    symbols = {symbol.get("name") for symbol in qml.findall("renderer-v2/symbols/symbol")}
    assert {category.get("symbol") for category in qml.iter("category")} == symbols
    expected = list(qgis.STATES) if "coverage" in style.name else ["car", "odd <&\"'> name", "ship", ""]
    assert values == expected
    sld = ET.fromstring(style.sld)
    literals = [
        node.text for node in sld.findall(".//ogc:Filter//ogc:Literal", {"ogc": "http://www.opengis.net/ogc"})
    ]
    assert literals == [value for value in expected if value]
    assert len(style.name) <= 30  # the column QGIS makes for it


# --- QGIS itself ---

PROBE = """
    import json, sys
    from qgis.core import (Qgis, QgsApplication, QgsMapRendererParallelJob, QgsMapSettings, QgsRasterLayer,
                           QgsRectangle, QgsRenderContext, QgsVectorLayer)
    from qgis.PyQt.QtCore import QSize

    raster, package, picture, extent = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
    app = QgsApplication([], False)
    app.initQgis()
    told = {"version": Qgis.QGIS_VERSION}
    layers = []
    for name in ("detections", "coverage"):
        layer = QgsVectorLayer(f"{package}|layername={name}", name, "ogr")
        assert layer.isValid(), name
        renderer = layer.renderer()
        settings = layer.labeling().settings() if layer.labeling() else None
        told[name] = {
            "renderer": renderer.type(),
            "attribute": renderer.classAttribute(),
            "categories": {c.value(): c.label() for c in renderer.categories()},
            "lines": {c.value(): [l.color().name() for l in c.symbol().symbolLayers()]
                      for c in renderer.categories()},
            "ordered": renderer.orderByEnabled(),
            "labels": layer.labelsEnabled(),
            "expression": settings.fieldName if settings else None,
            "tip": layer.mapTipTemplate(),
            "features": layer.featureCount(),
            "crs": layer.crs().authid(),
        }
        layers.append(layer)
    scene = QgsRasterLayer(raster, "scene")
    assert scene.isValid()
    canvas = QgsMapSettings()
    canvas.setLayers([*layers, scene])
    canvas.setDestinationCrs(scene.crs())
    canvas.setExtent(QgsRectangle(*extent))
    canvas.setOutputSize(QSize(800, 600))
    job = QgsMapRendererParallelJob(canvas)
    job.start()
    job.waitForFinished()
    job.renderedImage().save(picture)
    told["errors"] = [str(error.message) for error in job.errors()]
    labels = job.takeLabelingResults()
    told["texts"] = sorted(label.labelText for label in labels.labelsWithinRect(canvas.visibleExtent()))
    print("TOLD" + json.dumps(told))
    sys.stdout.flush()
    del labels, job, layers, layer, scene
    app.exitQgis()
"""


@pytest.fixture(scope="module")
def system_python() -> Path:
    if not SYSTEM_PYTHON.exists():
        pytest.skip(f"no {SYSTEM_PYTHON}")
    probe = subprocess.run([SYSTEM_PYTHON, "-c", "import qgis.core"], capture_output=True, env=environment())
    if probe.returncode:
        pytest.skip(f"{SYSTEM_PYTHON} has no QGIS: apt-get install python3-qgis")
    return SYSTEM_PYTHON


def environment() -> dict[str, str]:
    """Ours without what would lead Debian's Python into our libraries or to a screen."""
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "GDAL_", "PROJ_"))}
    return ours | {"QT_QPA_PLATFORM": "offscreen", "XDG_RUNTIME_DIR": "/tmp"}


@pytest.mark.qgis
def test_qgis_opens_the_geopackage_with_classes_coloured_and_scores_labelled(
    tmp_path: Path, system_python: Path
) -> None:
    transform = (0.5, 0, 380_000, 0, -0.5, 3_735_000)
    scene = np.broadcast_to(np.arange(400, dtype=np.float32) / 4, (1, 300, 400)).astype(np.uint8)
    with rasterio.open(
        tmp_path / "scene.tif", "w", driver="GTiff", width=400, height=300, count=1, dtype="uint8",
        crs="EPSG:32611", transform=rasterio.Affine(*transform),
    ) as target:  # fmt: skip
        target.write(scene)
    georef = Georef.from_affine(transform, "EPSG:32611")
    rows = np.array(
        [[100, 80, 60, 20, 30], [180, 90, 30, 12, -60], [300, 70, 50, 50, 0], [90, 200, 40, 14, 80.0]]
    )
    found = Detections(
        rows, np.array([0.93, 0.871, 0.66, 0.5]), np.array([0, 1, 2, 0]), ("ship", "car", "zeppelin"), True
    )
    table = vectors.features(found, georef, vectors.Origin("scene", "rgb"))
    inners = [
        [0, 0, 200, 150],
        [200, 0, 200, 150],
        [0, 150, 200, 150],
        [200, 150, 100, 150],
        [300, 150, 100, 150],
    ]
    states = ["detected", "detected", "empty", "failed", "invalid"]
    ground = vectors.coverage(inners, states, ["", "", "", "block 3 is damaged", ""], georef)
    package = vectors.write(tmp_path / "found.gpkg", table, ground, {"software": "babelrs-geo"})
    picture = tmp_path / "picture.png"
    extent = [380_000 - 10, 3_735_000 - 160, 380_210, 3_735_000 + 10]

    done = subprocess.run(
        [
            system_python,
            "-c",
            textwrap.dedent(PROBE),
            tmp_path / "scene.tif",
            package,
            picture,
            json.dumps(extent),
        ],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=120,
    )
    answers = [line[4:] for line in done.stdout.splitlines() if line.startswith("TOLD")]
    assert answers, done.stderr
    told = json.loads(answers[0])
    assert told["errors"] == []
    assert told["texts"] == ["car 0.87", "ship 0.50", "ship 0.93", "zeppelin 0.66"]
    detections, coverage = told["detections"], told["coverage"]
    assert (detections["renderer"], detections["attribute"]) == ("categorizedSymbol", "class")
    assert list(detections["categories"]) == ["car", "ship", "zeppelin", ""]
    for name in ("car", "ship", "zeppelin"):
        assert detections["lines"][name][-1] == qgis.class_colour(name).lower()
    assert detections["labels"]
    assert detections["ordered"]
    assert '"class"' in detections["expression"]
    assert '"score"' in detections["expression"]
    assert "heading_deg" in detections["tip"]
    assert detections["crs"] == coverage["crs"] == "EPSG:32611"
    assert (coverage["renderer"], coverage["attribute"]) == ("categorizedSymbol", "state")
    assert list(coverage["categories"]) == list(qgis.STATES)
    assert not coverage["labels"]
    assert (detections["features"], coverage["features"]) == (4, 4)

    with pytest.warns(NotGeoreferencedWarning), rasterio.open(picture) as drawn:
        pixels = drawn.read([1, 2, 3]).reshape(3, -1).T.astype(int)
    wanted = [qgis.class_colour(name) for name in ("ship", "car", "zeppelin")] + ["#F4511E", "#00A7A0"]
    for colour in wanted:
        rgb = np.frombuffer(bytes.fromhex(colour[1:]), np.uint8).astype(int)
        assert (np.abs(pixels - rgb).max(1) <= 12).sum() > 60, colour
