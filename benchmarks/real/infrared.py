"""Detection on a radiometric infrared mosaic against detection on the 8-bit frames it is made of.

Frames of the val split are laid out on one map side by side, and written as their own bytes and as 16-bit
centikelvin by the fixed law `27315 + 20 v` for a byte v (273.15 K to 324.15 K). Detection is then compared frame by
frame with detection on the frames themselves:

* `mosaic_8bit`: what laying out and tiling cost, with the same bytes.
* `mosaic_fixed`: centikelvin with the law's own range given, so that every pixel maps back to v / 255.
* `mosaic_estimated`: centikelvin as a user has it, the range estimated from the scene.
* `mosaic_apart`: as `mosaic_fixed`, but with 96 px of nodata between the frames: what blank surroundings cost.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from babelrs_geo import DetectOptions, detect, open_scene
from babelrs_geo.datasets.mosaics import Assigned, Placed, lay_out, write_mosaic
from babelrs_geo.datasets.soi import read_split
from babelrs_geo.detections import Detections
from babelrs_geo.metrics import average_precision
from babelrs_geo.scenes import SceneOptions
from real.pictures import Layer, draw

if TYPE_CHECKING:
    from babelrs_geo.models.zoo import Weights
    from babelrs_geo.scenes import Scene

LAW_OFFSET_CK, LAW_STEP_CK = 27315, 20
LIMITS_CK = (float(LAW_OFFSET_CK), float(LAW_OFFSET_CK + 255 * LAW_STEP_CK))
GAP_PX = 96  # between the frames of the mosaic that has gaps
# Frames and mosaics have no collar; a search for one would take dark ground at the frames' edges.
AS_IT_IS = SceneOptions(collar=False)
MOSAIC_CRS = "EPSG:32651"
CORNER_M = (283000.0, 1615000.0)
# AP needs the tail of low scores; what is below this adds nothing to it.
LEAST_SCORE = 0.02
JUDGED = ("person", "car", "bicycle")
ALLOWED = 0.01


def read_frames(root: Path, classes: tuple[str, ...], limit: int | None = None, gap: int = 0) -> list[Placed]:
    """Val frames of a folder in SOI-Det's layout, laid out with `gap` pixels between.

    With a `limit` that many are taken, evenly spread over the file names, which go by time of day and height.
    """
    records = read_split(root, "ir", "val", classes)
    if limit is not None and limit < len(records):
        records = [records[i] for i in np.linspace(0, len(records) - 1, limit).astype(int)]
    return lay_out(records, gap)


def truth(frame: Placed, classes: tuple[str, ...]) -> Detections:
    """A frame's labels as detections of score 1."""
    boxes, labels = frame.record.boxes, frame.record.labels
    return Detections(boxes, np.ones(len(boxes), np.float32), labels, classes, True)


def write_frames(path: Path, frames: list[Placed], gsd: float, centikelvin: bool) -> None:
    """The mosaic: 16-bit centikelvin with nodata 0, or the frames' own bytes."""
    ground = Assigned(crs=MOSAIC_CRS, corner=CORNER_M, gsd=gsd)
    if centikelvin:
        write_mosaic(path, frames, ground, lambda v: LAW_OFFSET_CK + LAW_STEP_CK * v.astype(np.uint16), 0)
    else:
        write_mosaic(path, frames, ground)


def by_frame(found: Detections, frames: list[Placed]) -> list[Detections]:
    """Detections of the mosaic in each frame's own pixels, by their centres; the gaps' are left out."""
    x, y = found.boxes[:, 0], found.boxes[:, 1]
    return [
        found[(x >= f.x) & (x < f.x + f.width) & (y >= f.y) & (y < f.y + f.height)].shift(-f.x, -f.y)
        for f in frames
    ]


def compare(folder: Path, weights: Weights, pictures: Path, limit: int | None = None) -> dict[str, Any]:
    """AP50 of the frames and of each mosaic, by class and as the mean of person, car and bicycle."""
    classes = tuple(weights.header.classes["ir"])
    low, high = weights.header.gsd["ir"]
    gsd = float(np.sqrt(low * high))
    frames = read_frames(folder, classes, limit)
    options = DetectOptions(score=LEAST_SCORE)
    report: dict[str, Any] = {"frames": len(frames)}
    alone = []
    for frame in frames:
        with open_scene(frame.record.path, "ir", AS_IT_IS) as scene:
            alone.append(detect(scene, weights, options).detections)
    report["frames_8bit"] = _ap50(alone, frames)
    wide = pictures / "infrared_centikelvin.tif"
    write_frames(wide, frames, gsd, centikelvin=True)
    narrow = pictures / "infrared_8bit.tif"
    write_frames(narrow, frames, gsd, centikelvin=False)
    fixed = SceneOptions(units="centikelvin", limits=LIMITS_CK)
    apart = read_frames(folder, classes, limit, GAP_PX)
    spread = pictures / "infrared_apart.tif"
    write_frames(spread, apart, gsd, centikelvin=True)
    runs = {
        "mosaic_8bit": (narrow, AS_IT_IS, frames),
        "mosaic_fixed": (wide, fixed, frames),
        "mosaic_estimated": (wide, SceneOptions(), frames),
        "mosaic_apart": (spread, fixed, apart),
    }
    for name, (path, how, laid) in runs.items():
        with open_scene(path, "ir", how) as scene:
            found = detect(scene, weights, options).detections
            kept = by_frame(found, laid)
            report[name] = _ap50(kept, laid)
            report[name]["between_frames"] = len(found) - sum(map(len, kept))
            report[name]["range"] = (*scene.radiometry.low, *scene.radiometry.high)
            _picture(pictures / f"infrared_{name}.png", scene, laid, found, weights)
    loss = {name: report["frames_8bit"]["mean"] - report[name]["mean"] for name in runs}
    report["difference"] = {name: round(value, 4) for name, value in loss.items()}
    # Weights that find nothing lose nothing: that is no success.
    report["met"] = report["frames_8bit"]["mean"] > 0 and all(
        abs(loss[name]) <= ALLOWED for name in ("mosaic_fixed", "mosaic_estimated")
    )
    return report


def _ap50(found: list[Detections], frames: list[Placed]) -> dict[str, Any]:
    """AP50 by class, and its mean over the classes that are judged."""
    there = [truth(frame, found[0].classes) for frame in frames]
    measured = average_precision(found, there, thresholds=(0.5,))
    ap: dict[str, float] = dict(
        zip(measured.classes, np.asarray(measured.ap, np.float64)[:, 0].tolist(), strict=True)
    )
    # A class without an object in these frames has no AP.
    by_class: dict[str, Any] = {name: None if np.isnan(v) else round(v, 4) for name, v in ap.items()}
    return by_class | {"mean": round(float(np.nanmean([ap[name] for name in JUDGED])), 4)}


def _picture(path: Path, scene: Scene, frames: list[Placed], found: Detections, weights: Weights) -> None:
    """The first four frames of the mosaic, labels green, what the stored thresholds report red."""
    thresholds = weights.header.thresholds["ir"]
    sure = found[np.array([s >= thresholds[c] for c, s in zip(found.class_names, found.scores, strict=True)])]
    row = [f for f in frames if f.y == frames[0].y][:4]
    margin = row[0].x
    window = (0, 0, row[-1].x + row[-1].width + margin, row[0].y + row[0].height + margin)
    marked = np.concatenate([truth(f, found.classes).shift(f.x, f.y).boxes for f in row])
    texts = [f"{c} {s:.2f}" for c, s in zip(sure.class_names, sure.scores, strict=True)]
    draw(
        path, scene.read(window).image, (0, 0), [Layer(marked, "lime"), Layer(sure.boxes, "red", texts)], 0.6
    )
