"""Objects marked by eye, and how detections are held against them.

The rule, used for every scene: a detection and a mark fit where their IoU is at least .1 or their centres lie
within half the mark's length of each other (at least two pixels, the unsharpness of a mark on a small ship).
Fits are made one to one, best IoU first, then nearest centre. What stays unmatched is a false alarm if its
centre lies in the marked area and it fits no doubtful mark, and a miss if it is a mark. Horizontal boxes are
held against the marks' bounds for the stricter count at IoU .5, since that is all they can show.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyproj
import shapely
from numpy.typing import NDArray

from babelrs_geo import boxes as bx
from babelrs_geo.georef import Georef

Floats = NDArray[np.float64]

LOOSE_IOU = 0.1
LEAST_REACH_PX = 2.0
DOUBTFUL, AREA = "doubtful", "area"


@dataclass(frozen=True)
class Marks:
    """Marks of one scene, in its pixels."""

    objects: Floats
    """Boxes (N, 5) of what is surely there."""
    doubtful: Floats
    """Boxes (M, 5) of what may be: a detection there counts neither way."""
    area: shapely.Geometry
    """Where marking is complete."""


@dataclass(frozen=True)
class Score:
    """Detections against marks."""

    marks: int
    hits: int
    false_alarms: int
    ignored: int
    """Detections on doubtful marks, or outside the area and on no mark."""
    hits_iou50: int
    """How many of the hits reach IoU .5."""

    def as_json(self) -> dict[str, Any]:
        """Counts, with precision and recall and their 95 % Wilson intervals."""
        reported = self.hits + self.false_alarms
        return {
            "marks": self.marks,
            "hits": self.hits,
            "false_alarms": self.false_alarms,
            "ignored": self.ignored,
            "recall": share(self.hits, self.marks),
            "precision": share(self.hits, reported),
            "recall_iou50": share(self.hits_iou50, self.marks),
        }


def share(part: int, whole: int) -> dict[str, float] | None:
    """`part / whole` with its 95 % Wilson interval; None where there is nothing to share.

    Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).
    """
    if whole == 0:
        return None
    z, p = 1.959964, part / whole
    middle = (p + z * z / (2 * whole)) / (1 + z * z / whole)
    half = z / (1 + z * z / whole) * float(np.sqrt(p * (1 - p) / whole + z * z / (4 * whole * whole)))
    return {
        "value": round(p, 4),
        "low": round(max(0.0, middle - half), 4),
        "high": round(min(1.0, middle + half), 4),
    }


def read_marks(path: Path, georef: Georef) -> Marks:
    """The marks in a GeoJSON file (lon/lat, WGS 84) as boxes in the pixels of a scene with this georeference.

    Raises OSError or ValueError where the file is not there or not what `tests/marks/README.md` describes.
    """
    features = json.loads(path.read_text(encoding="utf-8"))["features"]
    quads: dict[bool, list[Floats]] = {True: [], False: []}
    areas = []
    for feature in features:
        ring = lonlat_to_pixel(np.asarray(feature["geometry"]["coordinates"][0], np.float64)[:-1], georef)
        kind = feature["properties"]["kind"]
        if kind == AREA:
            areas.append(shapely.Polygon(ring))
        else:
            quads[kind == DOUBTFUL].append(ring)
    if not areas:
        raise ValueError(f'{path.name} has no feature of kind "{AREA}", so precision cannot be told')
    return Marks(_boxes(quads[False]), _boxes(quads[True]), shapely.union_all(areas))


def lonlat_to_pixel(lonlat: Floats, georef: Georef) -> Floats:
    """Points (N, 2) in longitude and latitude (WGS 84) to scene pixels (N, 2)."""
    to_map = pyproj.Transformer.from_crs("EPSG:4326", georef.crs, always_xy=True)
    px, py = georef.to_pixel(*to_map.transform(lonlat[:, 0], lonlat[:, 1]))
    return np.stack([px, py], axis=-1)


def match(found: Floats, truth: Floats) -> list[tuple[int, int, float]]:
    """One-to-one fits of boxes (K, 5) to marks (N, 5), by the module's rule, as (detection, mark, IoU)."""
    if not len(found) or not len(truth):
        return []
    iou = bx.rotated_iou(found, truth)
    apart = np.hypot(
        found[:, None, 0] - truth[None, :, 0],
        found[:, None, 1] - truth[None, :, 1],
    )
    reach = np.maximum(LEAST_REACH_PX, truth[:, 2:4].max(axis=1) / 2)
    rows, columns = np.nonzero((iou >= LOOSE_IOU) | (apart <= reach))
    order = np.lexsort((apart[rows, columns], -iou[rows, columns]))
    fits: list[tuple[int, int, float]] = []
    taken_found: set[int] = set()
    taken_truth: set[int] = set()
    for i, j in zip(rows[order].tolist(), columns[order].tolist(), strict=True):
        if i not in taken_found and j not in taken_truth:
            taken_found.add(i)
            taken_truth.add(j)
            fits.append((i, j, float(iou[i, j])))
    return fits


def score(found: Floats, marks: Marks) -> Score:
    """Hold boxes (K, 5) in scene pixels against the marks."""
    fits = match(found, marks.objects)
    left = np.setdiff1d(np.arange(len(found)), [i for i, _, _ in fits])
    inside = shapely.contains_xy(marks.area, found[left, 0], found[left, 1])
    doubtful = {int(left[i]) for i, _, _ in match(found[left], marks.doubtful)}
    false_alarms = sum(int(i) not in doubtful for i in left[inside])
    return Score(
        marks=len(marks.objects),
        hits=len(fits),
        false_alarms=false_alarms,
        ignored=len(left) - false_alarms,
        hits_iou50=_tight(found, marks.objects, fits),
    )


def _tight(found: Floats, truth: Floats, fits: list[tuple[int, int, float]]) -> int:
    """How many fits reach IoU .5, horizontal detections against the marks' bounds."""
    if not fits:
        return 0
    i, j = (np.array(column) for column in list(zip(*fits, strict=True))[:2])
    upright = bx.from_xyxy(bx.bounds(truth[j]))
    against = truth[j] if np.any(found[:, 4]) else upright
    return int((bx.rotated_iou_pairs(found[i], against) >= 0.5).sum())


def _boxes(quads: list[Floats]) -> Floats:
    return bx.from_corners(np.stack(quads)) if quads else np.zeros((0, 5))
