"""What the detector does on real scenes, and whether it lands where it should.

    python benchmarks/real_scenes.py ../shared/data --json out.json --pictures out/

Parts (`--parts port_la,manila,...` runs some of them):

* `places`: landmarks with published coordinates against where the scenes' georeferences put them.
* `port_la`, `manila`: precision and recall against the marks of `tests/marks`, by the rule of `marks.py`.
* `gcps`: residuals at the control points, and false alarms where nothing can be seen.
* `infrared`: AP50 on a 16-bit centikelvin mosaic against the 8-bit frames it is made of (`infrared.py`).
* `airbus`: no aircraft twice, none lost that a window centred on it finds (`airbus.py`).

Exit status 1 where something demanded is not met. Pictures show the pixels as the model gets them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyproj
from real import airbus, infrared
from real import marks as by_eye
from real.pictures import Layer, draw

from babelrs_geo import DetectOptions, detect, open_scene
from babelrs_geo.errors import SceneError
from babelrs_geo.models import zoo

if TYPE_CHECKING:
    from babelrs_geo.detections import Detections
    from babelrs_geo.models.zoo import Weights
    from babelrs_geo.scenes import Scene

MARKS = Path(__file__).resolve().parent.parent / "tests" / "marks"
SWEPT_SCORES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
SWEPT_SCALES = (0.33, 0.5, 0.67, 1.0, 1.5, 2.0, 3.0)
GCP_RESIDUAL_PX = 0.1
FALSE_ALARMS_PER_MEGAPIXEL = 1.0

Report = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """What every part is given."""

    data: Path
    """The shared data folder: `scenes`, `soi_mini`, `airbus_aircraft`."""
    weights: Weights
    pictures: Path
    """Where overlays, and the mosaic of the infrared part, are written."""
    frames: int | None = None
    """How many infrared frames at most; None for all."""
    overlap: int = DetectOptions.overlap
    """Pixels that tiles of the aircraft's scenes share."""
    sweep: bool = False
    """Also measure other ground samplings and score thresholds on the marked scenes."""

    def scene(self, name: str, sensor: str) -> Scene:
        """One of the shared scenes."""
        return open_scene(self.data / "scenes" / name, sensor)


def places(setting: Setting) -> Report:
    """Metres between where a scene puts a landmark and where it is published to be."""
    geod = pyproj.Geod(ellps="WGS84")
    report: Report = {"met": True}
    sensors = {"rgb_manila_drone.tif": "rgb"}
    for feature in json.loads((MARKS / "landmarks.geojson").read_text(encoding="utf-8"))["features"]:
        about = feature["properties"]
        scene = setting.scene(about["scene"], sensors.get(about["scene"], "sar"))
        lon, lat = (float(v) for v in scene.georef.to_lonlat(*about["pixel"]))
        off = geod.inv(lon, lat, *feature["geometry"]["coordinates"])[2]
        report[about["id"]] = {"off_m": round(off, 1), "within_m": about["within_m"]}
        report["met"] = report["met"] and off <= about["within_m"]
    return report


def port_la(setting: Setting) -> Report:
    """Vessels off Los Angeles and Long Beach."""
    scene = setting.scene("sentinel1_port_la_db.tif", "sar")
    windows = {
        "harbour": (225, 130, 260, 170),
        "anchorage": (440, 120, 260, 180),
        "offshore_west": (290, 260, 200, 190),
        "offshore_east": (460, 290, 296, 260),
    }
    return _marked(setting, scene, "port_la", "port_la_vessels.geojson", ("ship",), windows)


def manila(setting: Setting) -> Report:
    """Parked cars in Manila."""
    scene = setting.scene("rgb_manila_drone.tif", "rgb")
    windows = {"car_park": (1380, 270, 668, 790)}
    return _marked(setting, scene, "manila", "manila_cars.geojson", ("vehicle",), windows)


def gcps(setting: Setting) -> Report:
    """Control points reproduced, and next to nothing found in a scene of 200 m pixels: it is refused, and for what is
    found where one looks all the same, the figure is there too.
    """
    scene = setting.scene("sentinel1_grd_gcps.tif", "sar")
    residual = float(scene.georef.gcp_residuals().max())
    megapixels = scene.valid_share * scene.width * scene.height / 1e6
    reports: Report = {"max_residual_px": residual}
    for name, gsd in (("by itself", None), ("with --gsd 15", 15.0)):
        try:
            found = detect(scene, setting.weights, DetectOptions(gsd=gsd)).detections
        except SceneError as error:
            reports[name] = {"refused": str(error), "per_megapixel": 0.0}
            continue
        _overlay(setting, scene, "gcps", (0, 0, scene.width, scene.height), found, None, 1.2)
        reports[name] = {"detections": len(found), "per_megapixel": round(len(found) / megapixels, 3)}
    few = reports["by itself"]["per_megapixel"] <= FALSE_ALARMS_PER_MEGAPIXEL
    return reports | {"met": residual < GCP_RESIDUAL_PX and few}


def infrared_mosaic(setting: Setting) -> Report:
    """Radiometric mosaic against 8-bit frames."""
    return infrared.compare(setting.data / "soi_mini", setting.weights, setting.pictures, setting.frames)


def airbus_aircraft(setting: Setting) -> Report:
    """Tiles against windows centred on each aircraft."""
    return airbus.compare(
        setting.data / "airbus_aircraft", setting.weights, setting.pictures, setting.overlap
    )


PARTS: dict[str, Callable[[Setting], Report]] = {
    "places": places,
    "port_la": port_la,
    "manila": manila,
    "gcps": gcps,
    "infrared": infrared_mosaic,
    "airbus": airbus_aircraft,
}


def _marked(
    setting: Setting,
    scene: Scene,
    name: str,
    file: str,
    classes: tuple[str, ...],
    windows: dict[str, tuple[int, int, int, int]],
) -> Report:
    """Detect, hold against marks, draw."""
    truth = by_eye.read_marks(MARKS / file, scene.georef)
    options = DetectOptions(classes=classes)
    found = detect(scene, setting.weights, options).detections
    for part, window in windows.items():
        _overlay(setting, scene, f"{name}_{part}", window, found, truth, 1200 / max(window[2:]))
    report: Report = {"detections": len(found), **by_eye.score(found.boxes, truth).as_json()}
    if setting.sweep and scene.gsd is not None:
        report["sweep"] = []
        for gsd in (scene.gsd / scale for scale in SWEPT_SCALES):
            every = replace(options, score=SWEPT_SCORES[0], gsd=gsd)
            swept = _swept(detect(scene, setting.weights, every).detections, truth)
            report["sweep"].append({"gsd_m": round(gsd, 3)} | swept)
    return report


def _swept(found: Detections, truth: by_eye.Marks) -> Report:
    """(recall, precision) by score threshold."""
    rows: Report = {}
    for threshold in SWEPT_SCORES:
        scored = by_eye.score(found.boxes[found.scores >= threshold], truth)
        reported = scored.hits + scored.false_alarms
        rows[f"{threshold:g}"] = (
            round(scored.hits / scored.marks, 3),
            round(scored.hits / reported, 3) if reported else None,
        )
    return rows


def _overlay(
    setting: Setting,
    scene: Scene,
    name: str,
    window: tuple[int, int, int, int],
    found: Detections,
    truth: by_eye.Marks | None,
    zoom: float,
) -> None:
    layers = [Layer(found.boxes, "red", [f"{score:.2f}" for score in found.scores])]
    if truth is not None:
        layers[:0] = [Layer(truth.objects, "lime"), Layer(truth.doubtful, "orange")]
    area = None if truth is None else truth.area
    draw(setting.pictures / f"{name}.png", scene.read(window).image, window[:2], layers, zoom, area)


def main(arguments: list[str] | None = None) -> int:
    """Run the parts asked for, print what they found and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data", type=Path, help="the shared data folder")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument("--pictures", type=Path, default=Path("real_scenes"), help="folder for overlays")
    parser.add_argument("--weights", default="compact", help="bundled name or file")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated, of: " + ", ".join(PARTS))
    parser.add_argument("--frames", type=int, help="at most so many infrared frames")
    parser.add_argument("--overlap", type=int, default=DetectOptions.overlap, help="of tiles, aircraft alone")
    parser.add_argument("--sweep", action="store_true", help="marked scenes: other scales and thresholds too")
    given = parser.parse_args(arguments)
    asked = given.parts.split(",")
    unknown = [part for part in asked if part not in PARTS]
    if unknown:
        parser.error(f"unknown parts {', '.join(unknown)}: expected some of {', '.join(PARTS)}")
    given.pictures.mkdir(parents=True, exist_ok=True)
    # Scenes far from what the weights know, and images without a georeference, are the point here.
    warnings.simplefilter("ignore", UserWarning)
    weights = zoo.load(given.weights, given.device)
    setting = Setting(
        given.data, weights, given.pictures, given.frames, overlap=given.overlap, sweep=given.sweep
    )
    report: Report = {"weights": {"name": weights.name, "sha256": weights.sha256}}
    for part in asked:
        started = time.perf_counter()
        report[part] = PARTS[part](setting)
        report[part]["seconds"] = round(time.perf_counter() - started, 1)
        print(f"{part}: {json.dumps(report[part], default=_plain)}", flush=True)
    if given.json is not None:
        given.json.write_text(json.dumps(report, indent=1, default=_plain) + "\n", encoding="utf-8")
    missed = [part for part in asked if report[part].get("met") is False]
    if missed:
        print(f"not met: {', '.join(missed)}", file=sys.stderr)
    return 1 if missed else 0


def _plain(value: object) -> object:
    """NumPy scalars as Python's, for JSON."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} does not go into JSON")


if __name__ == "__main__":
    sys.exit(main())
