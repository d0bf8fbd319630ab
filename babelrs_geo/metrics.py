"""How good detections are: average precision as COCO and as the rotated benchmarks count it, with intervals.

Two ways of counting, both over exact rotated IoU, so each serves horizontal and oriented boxes:

`coco`  as pycocotools does for boxes of all sizes: each detection, best first, takes the best truth that is
still free;
        precision is read at 101 recalls; at most 100 detections an image and class. For SAR.
`voc`   as mmrotate's `eval_map` does for DOTA and DroneVehicle: each detection looks at its best truth only,
and is
        wrong if that is taken; the area under the monotone precision curve over all points.

Images are matched one by one, once. Resampling images then only changes how often each counts, which makes a
bootstrap of a thousand replicates a matter of a second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from babelrs_geo.boxes import Floats, areas, rotated_iou
from babelrs_geo.detections import Detections
from babelrs_geo.errors import ParameterError
from babelrs_geo.kernels import compiled

Interpolation = Literal["voc", "coco"]

THRESHOLDS: tuple[float, ...] = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))
"""IoU from .5 to .95 in steps of .05."""

COCO_LIMIT = 100
"""Detections that COCO counts in an image, per class."""

Span = tuple[float, float]
"""Areas in square pixels, from and to."""

SIZES: dict[str, Span] = {"small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, np.inf)}
"""COCO's sizes; of an oriented box, the area of the box itself, not of its bounds."""


@dataclass(frozen=True, eq=False)
class Metrics:
    """Average precision by class and IoU threshold."""

    classes: tuple[str, ...]
    thresholds: tuple[float, ...]
    ap: Floats
    """(classes, thresholds) in [0, 1]; NaN for a class without truth."""
    truths: NDArray[np.int64]
    """(classes,) how many objects there were."""
    detections: NDArray[np.int64]
    """(classes,) how many detections were counted."""

    @property
    def ap50(self) -> float:
        """Mean over the classes that have truth, at IoU .5."""
        return _mean(self.ap[:, _column(self.thresholds, 0.5)])

    @property
    def map(self) -> float:
        """Mean over the classes that have truth and over all thresholds, .5 to .95 unless others were
        asked.
        """
        return _mean(self.ap.mean(1))

    def by_class(self, threshold: float = 0.5) -> dict[str, float]:
        """Average precision of each class at one threshold; NaN without truth."""
        return dict(zip(self.classes, self.ap[:, _column(self.thresholds, threshold)].tolist(), strict=True))


@dataclass(frozen=True, eq=False)
class Intervals:
    """Average precision over bootstrap replicates of the images."""

    classes: tuple[str, ...]
    thresholds: tuple[float, ...]
    replicates: Floats
    """(replicates, classes, thresholds); NaN where a class had no truth in a replicate."""
    level: float = 0.95

    def _range(self, values: Floats) -> tuple[float, float]:
        values = values[~np.isnan(values)]
        if not len(values):
            return float("nan"), float("nan")
        low, high = np.quantile(values, [(1 - self.level) / 2, (1 + self.level) / 2])
        return float(low), float(high)

    def ap50_replicates(self, classes: Sequence[str] | None = None) -> Floats:
        """(replicates,) class mean at IoU .5, to combine with those of other sensors; over `classes` only."""
        rows = [_position(self.classes, name) for name in classes or self.classes]
        return _row_means(self.replicates[:, rows, _column(self.thresholds, 0.5)])

    def map_replicates(self, classes: Sequence[str] | None = None) -> Floats:
        """(replicates,) mean over classes and thresholds; over `classes` only."""
        rows = [_position(self.classes, name) for name in classes or self.classes]
        return _row_means(self.replicates[:, rows].mean(2))

    def ap50(self, classes: Sequence[str] | None = None) -> tuple[float, float]:
        """(low, high) of the class mean at IoU .5."""
        return self._range(self.ap50_replicates(classes))

    def map(self, classes: Sequence[str] | None = None) -> tuple[float, float]:
        """(low, high) of the mean over classes and thresholds."""
        return self._range(self.map_replicates(classes))

    def by_class(self, threshold: float = 0.5) -> dict[str, tuple[float, float]]:
        """(low, high) of each class at one threshold."""
        column = _column(self.thresholds, threshold)
        return {name: self._range(self.replicates[:, k, column]) for k, name in enumerate(self.classes)}


@dataclass(frozen=True, eq=False)
class _Matches:
    """One class: its detections over all images, best first."""

    scores: NDArray[np.float32]  # (D,)
    images: NDArray[np.int64]  # (D,) which image each is in
    right: NDArray[np.bool_]  # (D, thresholds)
    counted: NDArray[np.bool_]  # (D, thresholds) False for those that are neither right nor wrong
    truths: NDArray[np.int64]  # (images,) objects in each image


def average_precision(
    predictions: Sequence[Detections],
    truths: Sequence[Detections],
    thresholds: Sequence[float] = THRESHOLDS,
    interpolation: Interpolation = "voc",
    span: Span | None = None,
) -> Metrics:
    """Average precision of `predictions` against `truths`, one of each per image.

    Classes are those of the truths, matched by name: detections of other classes are not counted. Scores of
    truths do not matter. With a `span`, objects of other areas are neither asked for nor wrong to find, and wrong
    detections of other areas do not count: `coco` takes both ends in, `voc` the lower one only, as
    their originals do. Raises `ParameterError` for lists of different lengths, truths that differ in classes, or no
    images.
    """
    found = _match(predictions, truths, thresholds, interpolation, span)
    once = np.ones((1, len(truths)))
    return Metrics(
        classes=truths[0].classes,
        thresholds=tuple(thresholds),
        ap=np.stack([_resampled(each, once, interpolation)[0] for each in found]),
        truths=np.array([each.truths.sum() for each in found]),
        detections=np.array([int(each.counted[:, 0].sum()) for each in found]),
    )


def bootstrap(
    predictions: Sequence[Detections],
    truths: Sequence[Detections],
    n: int = 1000,
    seed: int = 0,
    thresholds: Sequence[float] = THRESHOLDS,
    interpolation: Interpolation = "voc",
    span: Span | None = None,
) -> Intervals:
    """Percentile intervals of average precision over `n` resamplings of the images (Efron 1979).

    Each replicate draws as many images as there are, with replacement; the same `seed` draws the same.
    """
    found = _match(predictions, truths, thresholds, interpolation, span)
    count = len(truths)
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(count, np.full(count, 1 / count), size=n).astype(np.float64)
    replicates = np.stack([_resampled(each, draws, interpolation) for each in found], axis=1)
    return Intervals(truths[0].classes, tuple(thresholds), replicates)


def best_f1_thresholds(
    predictions: Sequence[Detections],
    truths: Sequence[Detections],
    iou: float = 0.5,
    *,
    slack: float = 0.01,
    borrowed: float = 30.0,
) -> dict[str, float]:
    """The score per class from which on detections have an F1 within `slack` of the best.

    A class of few objects says little about its own threshold, so it borrows: its F1 is the mean of its own, which
    weighs as many as it has objects, and of that of all classes that have some, which weighs `borrowed` objects. The
    default is what judged best on images that thresholds were not chosen on (`benchmarks/thresholds.py`).

    F1 is often flat over a wide range of scores, and where in it the very best lies is chance: at its end, the
    slightest change of surroundings would turn detections away. So this is the middle of the range, which is the
    unbroken run of thresholds around the best F1 (ties: the higher score). Where nothing is found there is no best
    threshold: without borrowing such classes are left out, with it all are there, or none.
    """
    found = _match(predictions, truths, (iou,), "coco", limit=None)
    scores = np.unique(np.concatenate([each.scores for each in found]).astype(np.float64))[::-1]
    there = [each for each in found if each.truths.sum()]
    if not there or not len(scores):
        return {}
    below = np.append(scores[1:], min(0.0, scores[-1]))
    common = sum((_f1(each, scores) for each in there), np.zeros(len(scores))) / len(there)
    best: dict[str, float] = {}
    for name, each in zip(truths[0].classes, found, strict=True):
        own = float(each.truths.sum())
        f1 = (own * _f1(each, scores) + borrowed * common) / max(own + borrowed, 1.0)
        top = int(np.argmax(f1))
        if f1[top] == 0:
            continue
        poor = np.flatnonzero(f1 < f1[top] - slack)
        first = int(poor[poor < top].max(initial=-1)) + 1
        last = int(poor[poor > top].min(initial=len(f1))) - 1
        best[name] = float((scores[first] + below[last]) / 2)
    return best


def _f1(found: _Matches, scores: Floats) -> Floats:
    """F1 of what scores at least each of `scores`; 0 where there is nothing to find."""
    kept = np.searchsorted(-found.scores.astype(np.float64), -scores, side="right")
    right = np.append(0, np.cumsum(found.right[:, 0]))[kept]
    f1: Floats = 2 * right / np.maximum(kept + found.truths.sum(), 1)
    return f1


def precision_recall(
    predictions: Sequence[Detections], truths: Sequence[Detections], iou: float = 0.5
) -> dict[str, tuple[float, float]]:
    """(precision, recall) of each class for the detections as given, at one IoU; NaN where there is
    nothing.
    """
    rates = {}
    found = _match(predictions, truths, (iou,), "coco", limit=None)
    for name, each in zip(truths[0].classes, found, strict=True):
        right, total = int(each.right.sum()), int(each.truths.sum())
        rates[name] = (
            right / len(each.scores) if len(each.scores) else float("nan"),
            right / total if total else float("nan"),
        )
    return rates


@dataclass(frozen=True, eq=False)
class Curve:
    """Precision against recall as the score falls."""

    scores: NDArray[np.float64]
    """(D,) from the highest down."""
    precision: Floats
    """(D,) of the detections down to each score."""
    recall: Floats
    """(D,) NaN where there is nothing to find."""

    @classmethod
    def of(cls, scores: ArrayLike, right: ArrayLike, truths: int) -> Curve:
        """The curve of detections (D,) in any order, of which some are `right`, for `truths` objects."""
        score, good = np.asarray(scores, np.float64), np.asarray(right, np.bool_)
        order = np.argsort(-score, kind="stable")
        found = np.cumsum(good[order])
        recall = found / truths if truths else np.full(len(order), np.nan)
        return cls(score[order], found / np.arange(1, len(order) + 1), recall)

    @property
    def area(self) -> float:
        """Area under the monotone curve over all points, as `voc` counts; 0 without detections."""
        best = np.maximum.accumulate(self.precision[::-1])[::-1]
        return float((np.diff(self.recall, prepend=0.0) * best).sum())


def curves(
    predictions: Sequence[Detections],
    truths: Sequence[Detections],
    iou: float = 0.5,
    interpolation: Interpolation = "voc",
) -> dict[str, Curve]:
    """The curve of each class that has truth, at one IoU."""
    found = zip(truths[0].classes, _match(predictions, truths, (iou,), interpolation), strict=True)
    return {
        name: Curve.of(each.scores, each.right[:, 0], int(each.truths.sum()))
        for name, each in found
        if each.truths.any()
    }


def wilson(hits: int, of: int, level: float = 0.95) -> tuple[float, float]:
    """Interval of a share, `hits` out of `of` (Wilson 1927): within [0, 1] for any counts, NaN for none."""
    if not of:
        return float("nan"), float("nan")
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = hits / of
    middle = (share + z * z / (2 * of)) / (1 + z * z / of)
    reach = z / (1 + z * z / of) * sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    return max(0.0, middle - reach), min(1.0, middle + reach)


def class_weighted(values: Mapping[str, Any], classes: Mapping[str, int]) -> Any:
    """The sensors' means weighted by their numbers of classes: the mean over all classes (BabelRS's overall).

    `values` are numbers, or replicates (N,) of them.
    """
    return sum(values[s] * classes[s] for s in values) / sum(classes[s] for s in values)


def h_mean(sar: float, rgb: float, ir: float) -> float:
    """Harmonic mean over the three sensors (BabelRS's H-mAP): 3 / (1/sar + 1/rgb + 1/ir); 0 if one is 0."""
    if min(sar, rgb, ir) <= 0:
        return 0.0
    return 3 / (1 / sar + 1 / rgb + 1 / ir)


# ----------------------------------------------------------------------------------------------------


def _column(thresholds: Sequence[float], wanted: float) -> int:
    for k, threshold in enumerate(thresholds):
        if abs(threshold - wanted) < 1e-9:
            return k
    raise ParameterError(f"IoU {wanted} was not evaluated; ask for it: thresholds were {tuple(thresholds)}")


def _position(classes: tuple[str, ...], name: str) -> int:
    if name not in classes:
        raise ParameterError(f"class {name!r} was not evaluated; there are {', '.join(classes)}")
    return classes.index(name)


def _row_means(values: Floats) -> Floats:
    """Means over the last axis without its NaN; NaN where all are."""
    known = ~np.isnan(values)
    total = np.where(known, values, 0.0).sum(-1)
    count = known.sum(-1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _mean(values: Floats) -> float:
    return float(_row_means(values[None])[0])


def _match(
    predictions: Sequence[Detections],
    truths: Sequence[Detections],
    thresholds: Sequence[float],
    interpolation: Interpolation,
    span: Span | None = None,
    limit: int | None = COCO_LIMIT,
) -> list[_Matches]:
    """Which detections are right, for each class of the truths; `coco` takes only the best `limit` of an image."""
    if interpolation not in ("voc", "coco"):
        raise ParameterError(f"interpolation {interpolation!r} is unknown; it is 'voc' or 'coco'")
    if len(predictions) != len(truths) or not truths:
        raise ParameterError(
            f"{len(predictions)} predictions and {len(truths)} truths; give one of each for at least one"
        )
    classes = truths[0].classes
    for truth in truths:
        if truth.classes != classes:
            raise ParameterError(f"truths of {truth.classes} and of {classes}; evaluate one set at a time")
    least = np.array([min(t, 1 - 1e-10) if interpolation == "coco" else t for t in thresholds], np.float64)
    most = limit if interpolation == "coco" else None
    return [_match_class(predictions, truths, name, least, interpolation, span, most) for name in classes]


def _match_class(
    predictions: Sequence[Detections],
    truths: Sequence[Detections],
    name: str,
    limits: Floats,
    interpolation: Interpolation,
    span: Span | None,
    most: int | None,
) -> _Matches:
    scores, images, right, counted = [], [], [], []
    counts = np.zeros(len(truths), np.int64)
    for image, (prediction, truth) in enumerate(zip(predictions, truths, strict=True)):
        objects = truth.boxes[truth.labels == truth.classes.index(name)]
        beside = _beyond(objects, span, interpolation)
        counts[image] = len(objects) - beside.sum()
        order = np.argsort(beside, kind="stable")  # those asked for first
        objects, beside = objects[order], beside[order]
        if name not in prediction.classes:
            continue
        mine = np.flatnonzero(prediction.labels == prediction.classes.index(name))
        mine = mine[np.argsort(-prediction.scores[mine], kind="stable")][:most]
        hit, aside = (np.zeros((len(mine), len(limits)), np.bool_) for _ in range(2))
        if len(mine) and len(objects):
            iou = rotated_iou(prediction.boxes[mine], objects)
            take = _take_best_free if interpolation == "coco" else _take_best_only
            take(iou, limits, beside, hit, aside)
        aside |= ~hit & _beyond(prediction.boxes[mine], span, interpolation)[:, None]
        scores.append(prediction.scores[mine])
        images.append(np.full(len(mine), image))
        right.append(hit)
        counted.append(~aside)
    score = np.concatenate([np.zeros(0, np.float32), *scores])
    order = np.argsort(-score, kind="stable")
    return _Matches(
        scores=score[order],
        images=np.concatenate([np.zeros(0, np.int64), *images])[order],
        right=np.concatenate([np.zeros((0, len(limits)), np.bool_), *right])[order],
        counted=np.concatenate([np.zeros((0, len(limits)), np.bool_), *counted])[order],
        truths=counts,
    )


def _beyond(boxes: Floats, span: Span | None, interpolation: Interpolation) -> NDArray[np.bool_]:
    """Which boxes (N,) have another area than asked for."""
    if span is None:
        return np.zeros(len(boxes), np.bool_)
    area = areas(boxes)
    beyond: NDArray[np.bool_] = (area < span[0]) | (
        area > span[1] if interpolation == "coco" else area >= span[1]
    )
    return beyond


@compiled
def _take_best_free(iou, limits, beside, hit, aside):  # type: ignore[no-untyped-def]
    """COCO: each detection takes the free truth it overlaps most, the later one where they tie; one that is
    `beside` the point only where no other is left.
    """
    taken = np.zeros((len(limits), iou.shape[1]), np.bool_)
    for t in range(len(limits)):
        for d in range(len(iou)):
            best, which = limits[t], -1
            for g in range(iou.shape[1]):
                if which >= 0 and beside[g] and not beside[which]:
                    break
                if not taken[t, g] and iou[d, g] >= best:
                    best, which = iou[d, g], g
            if which >= 0:
                taken[t, which] = True
                hit[d, t] = not beside[which]
                aside[d, t] = beside[which]


@compiled
def _take_best_only(iou, limits, beside, hit, aside):  # type: ignore[no-untyped-def]
    """VOC: each detection takes the truth it overlaps most, the first where they tie, if it is free."""
    taken = np.zeros((len(limits), iou.shape[1]), np.bool_)
    for d in range(len(iou)):
        which = np.argmax(iou[d])
        for t in range(len(limits)):
            if iou[d, which] < limits[t]:
                continue
            if beside[which]:
                aside[d, t] = True
            elif not taken[t, which]:
                taken[t, which] = True
                hit[d, t] = True


def _resampled(matches: _Matches, draws: Floats, interpolation: Interpolation) -> Floats:
    """Average precision (replicates, thresholds) where image k counts draws[:, k] times."""
    out = np.full((len(draws), matches.right.shape[1]), np.nan)
    recalls = np.linspace(0, 1, 101) if interpolation == "coco" else np.zeros(0)
    _average(matches.images, matches.right, matches.counted, draws, draws @ matches.truths, recalls, out)
    return out


@compiled
def _average(images, right, counted, draws, truths, recalls, out):  # type: ignore[no-untyped-def]
    """Area under the precision curve; at the given recalls, or over all points if there are none given."""
    n = len(images)
    recall, precision = np.empty(n), np.empty(n)
    for b in range(len(draws)):
        if truths[b] <= 0:
            continue
        for t in range(right.shape[1]):
            good, all_ = 0.0, 0.0
            for k in range(n):
                weight = draws[b, images[k]]
                if counted[k, t]:
                    all_ += weight
                if right[k, t]:
                    good += weight
                recall[k] = good / truths[b]
                precision[k] = good / all_ if all_ > 0 else 0.0
            area, best = 0.0, 0.0
            if len(recalls) == 0:
                for k in range(n - 1, -1, -1):
                    best = max(best, precision[k])
                    area += (recall[k] - (recall[k - 1] if k > 0 else 0.0)) * best
                out[b, t] = area
                continue
            # from the highest recall down: the best precision at that recall or beyond
            k = n - 1
            for m in range(len(recalls) - 1, -1, -1):
                while k >= 0 and recall[k] >= recalls[m]:
                    best = max(best, precision[k])
                    k -= 1
                area += best
            out[b, t] = area / len(recalls)
