"""Results on scenes against labels on the ground: what was hit, missed and false, over the ground looked at.

Shapes are compared in a metric CRS: that of the result where it is projected, else one around the result. A label
that is no quadrilateral counts as the smallest rectangle around it. A horizontal detection says how far an object
reaches along the image's rows and columns, so it is compared with the label's reach along the detection's own sides.

Objects count where their centre lies on ground that was looked at. A detection whose only object is centred beyond
that ground is ignored: neither right nor wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import pyproj
import shapely
from numpy.typing import NDArray

from babelrs_geo import __version__
from babelrs_geo.errors import LabelError, ParameterError
from babelrs_geo.evaluation.report import Report
from babelrs_geo.metrics import Curve, wilson
from babelrs_geo.vectors import Labels, Result, read_labels, read_result

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

LOOKED_AT = ("detected", "empty")
"""States of the coverage in which the ground went through the detector."""

_PIECES = 256  # edges of the coverage longer than this share of it are bent in a new CRS


@dataclass(frozen=True, kw_only=True)
class GroundOptions:
    """How results and labels are matched. Raises `ParameterError` for an IoU outside (0, 1]."""

    iou: float = 0.5
    """Least intersection over union of a hit."""
    class_column: str = "class"
    """Column of the labels with the class."""
    rename: Mapping[str, str] = field(default_factory=dict)
    """Names of the detector's classes in place of the labels', where they differ."""

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        if not 0 < self.iou <= 1:
            raise ParameterError(f"iou is {self.iou:g}, expected a number above 0 and up to 1")


@dataclass(frozen=True, eq=False)
class Matches:
    """Detections and labels of the same ground, matched."""

    detections: gpd.GeoDataFrame
    """As they came, those of judged classes on ground looked at, best first."""
    outcomes: NDArray[np.object_]
    """(D,) `hit`, `false` or `ignored`."""
    partner: Integers
    """(D,) row of the label that overlaps a detection most, the matched one for a hit; -1 without any."""
    iou: Floats
    """(D,) with that label; 0 without any."""
    labels: gpd.GeoDataFrame
    """Of judged classes, in the CRS of the detections."""
    asked: NDArray[np.bool_]
    """(L,) whether a label's centre lies on ground that was looked at."""
    taken: NDArray[np.bool_]
    """(L,) whether a label was hit."""

    def table(self) -> gpd.GeoDataFrame:
        """Hits and false ones as the detector drew them, misses as the labels have them, in one layer.

        Columns: `outcome`, `class`, `score` (null for misses), `iou` with the label that overlaps most, and
        `labelled`, the class of that label where it is another.
        """
        d, missed = self.detections, self.labels[self.asked & ~self.taken]
        other = np.array(["", *self.labels["class"]], object)[self.partner + 1]
        other[(other == d["class"].to_numpy(object)) | (self.partner < 0)] = None
        found = {
            "outcome": self.outcomes,
            "class": d["class"].to_numpy(object),
            "score": d["score"].to_numpy(np.float64),
            "iou": np.where(self.partner >= 0, np.round(self.iou, 4), np.nan),
            "labelled": other,
        }
        lost = {
            "outcome": "missed",
            "class": missed["class"].to_numpy(object),
            "score": np.nan,
            "iou": np.nan,
        }
        both = pd.concat([pd.DataFrame(found), pd.DataFrame({**lost, "labelled": None})], ignore_index=True)
        text = {name: both[name].astype(object) for name in ("outcome", "class", "labelled")}
        shapes = np.concatenate([d.geometry.to_numpy(), missed.geometry.to_numpy()])
        return gpd.GeoDataFrame(both.assign(**text), geometry=shapes, crs=d.crs)


def judge_ground(
    detections: Path, labels: Path, options: GroundOptions | None = None
) -> tuple[Report, Matches, Result]:
    """A result of `babelrs-geo detect` against a vector file of labels, both read from their files.

    Raises LabelError where either cannot be read or has no CRS while the other has one, where no class is shared, or
    where no ground was looked at.
    """
    options = options or GroundOptions()
    result = read_result(detections)
    known = _known(result)
    truth, unknown = _truth(read_labels(labels, options.class_column), labels, result, known, options)
    judged = sorted(set(truth["class"]))
    matches = match(result, truth, judged, options.iou)
    counts = zip(*np.unique(result.features["class"].to_numpy(str), return_counts=True), strict=True)
    figures = {
        "software": f"babelrs-geo {__version__}",
        "kind": "ground",
        "detections": detections.name,
        "labels": labels.name,
        "weights": {key: result.provenance.get(f"weights.{key}") for key in ("name", "sha256")},
        "scene": result.provenance.get("scene.name"),
        "iou": options.iou,
        "options": {"rename": dict(options.rename), "class_column": options.class_column},
        **_figures(matches, judged, result),
        "left_out": {
            "unknown_to_the_detector": unknown,
            "not_labelled": {str(n): int(k) for n, k in counts if n not in judged},
            "labels_where_nobody_looked": int((~matches.asked).sum()),
            "detections_ignored": int((matches.outcomes == "ignored").sum()),
        },
    }
    curves = {name: _curve(matches, name) for name in judged}
    return Report(figures, {"ground": {k: v for k, v in curves.items() if len(v.scores)}}), matches, result


def _known(result: Result) -> set[str]:
    """The classes that the result could have."""
    told = result.provenance.get("parameters.classes") or []
    return set(told) | set(result.features["class"].astype(str))


def _truth(
    labels: Labels, path: Path, result: Result, known: set[str], options: GroundOptions
) -> tuple[gpd.GeoDataFrame, dict[str, int]]:
    """Labels of the classes that the detector knows, in the result's CRS; and how many there are of others."""
    frame = labels.frame
    if frame is None:
        raise LabelError(f"{path} holds boxes in pixels of images; pass a vector file of labelled polygons")
    crs = result.features.crs
    if (frame.crs is None) != (crs is None):
        lacking = "labels have no CRS, the result has one" if crs else "labels have a CRS, the result none"
        raise LabelError(f"{path}: the {lacking}, so they cannot be compared: assign the missing CRS")
    if crs is None and "scene" in frame:
        scenes = {Path(str(name)).stem for name in result.features["scene"]}
        scenes |= {Path(str(result.provenance.get("scene.name"))).stem}
        frame = frame[[Path(str(name)).stem in scenes for name in frame["scene"]]]
    names = frame["class"].map(lambda name: options.rename.get(name, name)).to_numpy(object)
    kept = np.array([name in known for name in names], bool)
    unknown = {str(name): n for name, n in sorted(Counter(names[~kept]).items())}
    if not kept.any():
        there = ", ".join(sorted(set(map(str, names)))) or "none"
        raise LabelError(
            f"{path} and the result share no class: labelled are {there}, the detector knows "
            f"{', '.join(sorted(known)) or 'none'}; rename classes, or pass other labels"
        )
    columns = {"class": names[kept].astype(str)}
    mine = gpd.GeoDataFrame(columns, geometry=frame.geometry.to_numpy()[kept], crs=frame.crs)
    return (mine if crs is None else mine.to_crs(crs)), unknown


def match(result: Result, truth: gpd.GeoDataFrame, classes: Sequence[str], iou: float = 0.5) -> Matches:
    """The detections of some classes matched with labels (column `class`, in the same CRS), on ground looked at.

    Within a class the surest detection chooses first, among the labels still free the one it overlaps most.
    Raises LabelError where no ground was looked at.
    """
    crs = metric_crs(result)
    ground = _looked_at(result.coverage, crs)
    every = result.features[result.features["class"].isin(classes) & result.features.geometry.notna()]
    every = every.sort_values("score", ascending=False, kind="stable")
    drawn = _quads(_moved(every.geometry, crs))
    here = _within(ground, shapely.centroid(drawn))
    found, drawn = every[here].reset_index(drop=True), drawn[here]
    labels = truth.reset_index(drop=True)
    shapes = _moved(labels.geometry, crs)
    quads = _quads(shapes)
    asked = _within(ground, shapely.centroid(quads))
    pairs, shares = _overlaps(drawn, (found["box"] == "horizontal").to_numpy(bool), shapes, quads)
    own = found["class"].to_numpy(str)[pairs[0]] == labels["class"].to_numpy(str)[pairs[1]]
    outcomes, partner, taken = _assign(len(found), pairs[:, own], shares[own], asked, iou)
    best = np.zeros(len(found))
    lone = outcomes == "false"
    for (row, label), share in zip(pairs.T, shares, strict=True):
        if share > best[row] and (lone[row] or label == partner[row]):
            best[row], partner[row] = share, label
    return Matches(found, outcomes, partner, best, labels, asked, taken)


def metric_crs(result: Result) -> pyproj.CRS | None:
    """A CRS in metres for a result: its own unless in degrees, then azimuthal equidistant; None for pixels."""
    crs = result.features.crs
    if crs is None or not crs.is_geographic:
        return crs
    lonlat = result.coverage.to_crs("EPSG:4326").geometry
    points = shapely.get_coordinates(lonlat.to_numpy())
    if not len(points):
        raise LabelError("the result's coverage is empty, so no ground was looked at; pass another result")
    turn = np.radians(points[:, 0])
    lon = float(np.degrees(np.arctan2(np.sin(turn).mean(), np.cos(turn).mean())))  # right across 180 degrees
    lat = float((points[:, 1].min() + points[:, 1].max()) / 2)
    return pyproj.CRS.from_proj4(f"+proj=aeqd +lat_0={lat:.6f} +lon_0={lon:.6f} +datum=WGS84 +units=m")


def _moved(shapes: gpd.GeoSeries, crs: pyproj.CRS | None) -> NDArray[np.object_]:
    same = crs is None or shapes.crs == crs
    moved: NDArray[np.object_] = (shapes if same else shapes.to_crs(crs)).to_numpy()
    return moved


def _looked_at(coverage: gpd.GeoDataFrame, crs: pyproj.CRS | None) -> shapely.Geometry:
    looked = coverage[coverage["state"].isin(LOOKED_AT)].geometry
    if looked.is_empty.all():
        raise LabelError("the result's coverage says that no ground was looked at; pass another result")
    if crs is not None and looked.crs != crs:
        west, south, east, north = looked.total_bounds
        looked = looked.segmentize(max(east - west, north - south) / _PIECES)
    ground = shapely.union_all(shapely.make_valid(_moved(looked, crs)))
    shapely.prepare(ground)
    return ground


def _within(ground: shapely.Geometry, points: NDArray[np.object_]) -> NDArray[np.bool_]:
    inside: NDArray[np.bool_] = shapely.intersects_xy(ground, shapely.get_x(points), shapely.get_y(points))
    return inside


def _quads(shapes: NDArray[np.object_]) -> NDArray[np.object_]:
    """Quadrilaterals as they are, all other shapes as the smallest rectangles around them."""
    plain = shapely.get_type_id(shapes) == shapely.GeometryType.POLYGON
    plain &= (shapely.get_num_coordinates(shapes) == 5) & shapely.is_valid(shapes)
    out = shapes.copy()
    if (~plain).any():
        out[~plain] = shapely.oriented_envelope(shapes[~plain])
    return out


def _overlaps(
    drawn: NDArray[np.object_],
    horizontal: NDArray[np.bool_],
    shapes: NDArray[np.object_],
    quads: NDArray[np.object_],
) -> tuple[Integers, Floats]:
    """Pairs (2, N) of a detection and a label that overlap, by detection, and their IoU (N,)."""
    x0, y0, x1, y1 = shapely.bounds(shapes).T if len(shapes) else np.zeros((4, 0))
    # Bounds along other axes may reach beyond the label, but not beyond the circle around its own bounds.
    reach = np.hypot(x1 - x0, y1 - y0) / np.sqrt(2)
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    tree = shapely.STRtree(shapely.box(x - reach, y - reach, x + reach, y + reach))
    pairs: Integers = np.asarray(tree.query(drawn), np.int64).reshape(2, -1)
    pairs = pairs[:, np.lexsort((pairs[1], pairs[0]))]
    pairs = pairs[:, shapely.area(drawn)[pairs[0]] > 0]  # what has no extent overlaps nothing
    shares = np.zeros(pairs.shape[1])
    upright = horizontal[pairs[0]]
    if (~upright).any():
        a, b = drawn[pairs[0, ~upright]], quads[pairs[1, ~upright]]
        common = shapely.area(shapely.intersection(a, b))
        union = shapely.area(a) + shapely.area(b) - common
        shares[~upright] = np.divide(common, union, out=np.zeros(len(union)), where=union > 0)
    if upright.any():
        shares[upright] = _upright_iou(drawn[pairs[0, upright]], shapes[pairs[1, upright]])
    kept = shares > 0
    return pairs[:, kept], shares[kept]


def _upright_iou(drawn: NDArray[np.object_], shapes: NDArray[np.object_]) -> Floats:
    """IoU (N,) of detections with the bounds of labels along their sides.

    In the coordinates that make a detection the unit square; IoU does not depend on them.
    """
    corner = shapely.get_coordinates(drawn).reshape(-1, 5, 2)
    origin, across, down = corner[:, 0], corner[:, 1] - corner[:, 0], corner[:, 3] - corner[:, 0]
    cross = across[:, 0] * down[:, 1] - across[:, 1] * down[:, 0]
    points, owner = shapely.get_coordinates(shapes, return_index=True)
    away = points - origin[owner]
    s = (away[:, 0] * down[owner, 1] - away[:, 1] * down[owner, 0]) / cross[owner]
    t = (across[owner, 0] * away[:, 1] - across[owner, 1] * away[:, 0]) / cross[owner]
    starts = np.flatnonzero(np.diff(owner, prepend=-1))
    (s0, s1), (t0, t1) = ((np.minimum.reduceat(v, starts), np.maximum.reduceat(v, starts)) for v in (s, t))
    common = (np.minimum(s1, 1) - np.maximum(s0, 0)).clip(0) * (np.minimum(t1, 1) - np.maximum(t0, 0)).clip(0)
    shares: Floats = common / (1 + (s1 - s0) * (t1 - t0) - common)
    return shares


def _assign(
    count: int, pairs: Integers, shares: Floats, asked: NDArray[np.bool_], iou: float
) -> tuple[NDArray[np.object_], Integers, NDArray[np.bool_]]:
    """Outcome (D,), label (D,) of hits, and which labels (L,) were hit; detections and pairs best first."""
    outcomes = np.full(count, "false", object)
    partner = np.full(count, -1, np.int64)
    taken = np.zeros(len(asked), bool)
    starts = np.searchsorted(pairs[0], np.arange(count + 1))
    for row in range(count):
        own = slice(starts[row], starts[row + 1])
        labels, share = pairs[1, own], shares[own]
        free = (share >= iou) & asked[labels] & ~taken[labels]
        if free.any():
            chosen = labels[np.argmax(np.where(free, share, -1.0))]
            outcomes[row], partner[row], taken[chosen] = "hit", chosen, True
        elif ((share >= iou) & ~asked[labels]).any():
            outcomes[row] = "ignored"
    return outcomes, partner, taken


def _curve(matches: Matches, name: str) -> Curve:
    mine = (matches.detections["class"] == name).to_numpy(bool) & (matches.outcomes != "ignored")
    right = matches.outcomes[mine] == "hit"
    truths = int(((matches.labels["class"] == name).to_numpy(bool) & matches.asked).sum())
    return Curve.of(matches.detections["score"].to_numpy(np.float64)[mine], right, truths)


def _figures(matches: Matches, classes: Sequence[str], result: Result) -> dict[str, Any]:
    """Rates of each class and of all together, and the mean of the classes' average precision."""
    each: dict[str, Any] = {}
    found, labels = matches.detections["class"].to_numpy(str), matches.labels["class"].to_numpy(str)
    for name in classes:
        hits = int(((found == name) & (matches.outcomes == "hit")).sum())
        false = int(((found == name) & (matches.outcomes == "false")).sum())
        objects = int(((labels == name) & matches.asked).sum())
        curve = _curve(matches, name)
        threshold = result.provenance.get(f"parameters.thresholds.{name}")
        each[name] = {"threshold": threshold, **_rates(hits, false, objects)}
        each[name]["ap"] = curve.area if objects else float("nan")
    sums = {key: sum(row[key] for row in each.values()) for key in ("hits", "false", "objects")}
    known = [row["ap"] for row in each.values() if row["objects"]]
    mean = float(np.mean(known)) if known else float("nan")
    return {"overall": {**_rates(**sums), "mean_ap": mean, "classes": len(known)}, "by_class": each}


def _rates(hits: int, false: int, objects: int) -> dict[str, Any]:
    """Precision, recall and F1 with 95 % Wilson intervals; NaN where there is nothing.

    F1 = 2 J / (1 + J) with J = hits / (hits + false + missed), a share whose interval carries over.
    """
    whole = false + objects
    share = [hits / whole if whole else float("nan"), *wilson(hits, whole)]
    f1, low, high = (2 * j / (1 + j) for j in share)
    return {
        "objects": objects,
        "hits": hits,
        "false": false,
        "missed": objects - hits,
        "precision": hits / (hits + false) if hits + false else float("nan"),
        "precision_interval": list(wilson(hits, hits + false)),
        "recall": hits / objects if objects else float("nan"),
        "recall_interval": list(wilson(hits, objects)),
        "f1": f1,
        "f1_interval": [low, high],
    }
