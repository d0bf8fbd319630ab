"""One way to merge boxes, timed in a process of its own: what `merging.py` and `seams.py` start.

    python benchmarks/contestants.py "lsnms" boxes.npz --repeats 5 --out kept.npz

The file holds boxes (N, 5) `cx, cy, w, h, r` (pixels, degrees counter-clockwise on the image), scores (N,), labels
(N,), tiles (N, 4) `x, y, width, height` and the scene's side. Printed is JSON: the median seconds after one call that
is not counted, and the megabytes that the first and the second call added at their peaks. What stayed is written as
positions or boxes. Each tool is imported by its own function alone, so that the file runs in either environment.
Conversions to the form that a tool asks for are not timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

IOU = 0.5


@dataclass(frozen=True)
class Boxes:
    """What is merged."""

    boxes: Any
    scores: Any
    labels: Any
    tiles: Any
    side: int

    @cached_property
    def turned(self) -> bool:
        """Whether any box has an angle."""
        return bool(self.boxes[:, 4].any())

    @cached_property
    def xyxy(self) -> Any:
        """(N, 4) upright bounds of the boxes."""
        low, high = self.corners.min(1), self.corners.max(1)
        return np.ascontiguousarray(np.column_stack([low, high]))

    @cached_property
    def corners(self) -> Any:
        """(N, 4, 2)."""
        cx, cy, w, h, r = self.boxes.T
        c, s = np.cos(np.deg2rad(r)), np.sin(np.deg2rad(r))
        along, across = np.stack([c, -s], 1) * w[:, None] / 2, np.stack([s, c], 1) * h[:, None] / 2
        middle = np.column_stack([cx, cy])
        signs = ((-1, -1), (1, -1), (1, 1), (-1, 1))
        return np.stack([middle + a * along + b * across for a, b in signs], 1)

    @cached_property
    def apart(self) -> Any:
        """(N, 1) a shift for each class that no box of another reaches, for tools that know no classes."""
        return self.labels[:, None] * (4.0 * self.side)

    @cached_property
    def rows(self) -> Any:
        """(N, 6) bounds, score and label."""
        return np.column_stack([self.xyxy, self.scores, self.labels])


Result = Any
"""Positions (n,) of what stays, a mask (N,), or merged boxes (n, 5)."""


def ours(b: Boxes) -> tuple[Any, Any]:
    """Our package and the boxes in its form."""
    detections = import_module("babelrs_geo.detections")
    found = detections.Detections(
        b.boxes, b.scores, b.labels, tuple(map(str, range(int(b.labels.max()) + 1))), b.turned
    )
    return import_module("babelrs_geo.merging"), found


def our_nms(b: Boxes) -> Callable[[], Result]:
    """Exact suppression."""
    merging, found = ours(b)
    return lambda: merging.nms(found, IOU)


def our_merge(b: Boxes) -> Callable[[], Result]:
    """Merging that knows the tiles."""
    merging, found = ours(b)
    return lambda: merging.merge(found, b.tiles, (b.side, b.side)).boxes


def nothing(b: Boxes) -> Callable[[], Result]:
    """All boxes."""
    return lambda: np.arange(len(b.boxes))


def strtree(b: Boxes) -> Callable[[], Result]:
    """What one writes with shapely: its tree for the pairs, its areas, and a loop over pairs that are the same."""
    shapely = import_module("shapely")
    corners = b.corners + b.apart[:, None]

    def run() -> Result:
        shapes = shapely.polygons(corners) if b.turned else shapely.box(*(b.xyxy + b.apart).T)
        i, j = shapely.STRtree(shapes).query(shapes, predicate="intersects")
        i, j = i[i < j], j[i < j]
        area = shapely.area(shapes)
        shared = shapely.area(shapely.intersection(shapes[i], shapes[j]))
        same = shared / (area[i] + area[j] - shared) > IOU
        rank = np.empty(len(shapes), np.int64)
        rank[np.argsort(-b.scores, kind="stable")] = np.arange(len(shapes))
        i, j = i[same], j[same]
        better, worse = np.where(rank[i] < rank[j], (i, j), (j, i))
        gone = np.zeros(len(shapes), np.bool_)
        for k in np.argsort(rank[better], kind="stable").tolist():
            if not gone[better[k]]:
                gone[worse[k]] = True
        return ~gone

    return run


def torchvision(b: Boxes) -> Callable[[], Result]:
    """Its suppression class by class, in quadratic time."""
    torch, ops = import_module("torch"), import_module("torchvision.ops")
    tensors = [torch.from_numpy(x) for x in (b.xyxy, b.scores.astype(float), b.labels)]
    return lambda: ops.batched_nms(*tensors, IOU).numpy()


def lsnms(b: Boxes) -> Callable[[], Result]:
    """An R-tree."""
    module = import_module("lsnms")
    scores = b.scores.astype(float)
    return lambda: module.nms(b.xyxy, scores, iou_threshold=IOU, class_ids=b.labels)


def powerboxes(b: Boxes) -> Callable[[], Result]:
    """An R-tree; it knows no classes."""
    module = import_module("powerboxes")
    scores = b.scores.astype(float)
    if not b.turned:
        xyxy = b.xyxy + b.apart
        return lambda: module.rtree_nms(xyxy, scores, IOU, 0.0)
    turned = b.boxes.copy()
    turned[:, :2] += b.apart
    turned[:, 4] *= -1  # clockwise
    return lambda: module.rtree_rotated_nms(turned, scores, IOU, 0.0)


def sahi_nms(b: Boxes, metric: str = "IOU") -> Callable[[], Result]:
    """Its suppression."""
    combine = import_module("sahi.postprocess.combine")
    return lambda: np.asarray(combine.batched_nms(b.rows, metric, IOU))


def sahi_nms_ios(b: Boxes) -> Callable[[], Result]:
    """The same by intersection over the smaller."""
    return sahi_nms(b, "IOS")


def sahi_merging(b: Boxes, name: str) -> Callable[[], Result]:
    """Merges as SAHI's own post-processing does it: a match's box grows around what it takes in."""
    combine, prediction = import_module("sahi.postprocess.combine"), import_module("sahi.prediction")
    side = b.side
    every = [
        prediction.ObjectPrediction(
            bbox=row[:4].tolist(), category_id=int(row[5]), score=float(row[4]), full_shape=[side, side],
            category_name=str(int(row[5])),
        )
        for row in b.rows
    ]  # fmt: skip
    merge = getattr(combine, name)(match_threshold=IOU, match_metric="IOS", class_agnostic=False)

    def run() -> Result:
        xyxy = np.array([p.bbox.to_xyxy() for p in merge(every)])
        size = xyxy[:, 2:] - xyxy[:, :2]
        return np.column_stack([xyxy[:, :2] + size / 2, size, np.zeros(len(size))])

    return run


def sahi_greedy(b: Boxes) -> Callable[[], Result]:
    """Its default."""
    return sahi_merging(b, "GreedyNMMPostprocess")


def sahi_nmm(b: Boxes) -> Callable[[], Result]:
    """Its merging along chains."""
    return sahi_merging(b, "NMMPostprocess")


def supervision_nms(b: Boxes) -> Callable[[], Result]:
    """By a matrix of all pairs."""
    module = import_module("supervision.detection.utils.iou_and_nms")
    if b.turned:
        return lambda: module.oriented_box_non_max_suppression(b.rows, b.corners, IOU)
    return lambda: module.box_non_max_suppression(b.rows, IOU)


def supervision_nmm(b: Boxes) -> Callable[[], Result]:
    """Its merging, by intersection over the smaller."""
    sv = import_module("supervision")
    found = sv.Detections(b.xyxy, confidence=b.scores, class_id=b.labels)

    def run() -> Result:
        xyxy = found.with_nmm(IOU, overlap_metric=sv.OverlapMetric.IOS).xyxy
        size = xyxy[:, 2:] - xyxy[:, :2]
        return np.column_stack([xyxy[:, :2] + size / 2, size, np.zeros(len(size))])

    return run


def geodeep(b: Boxes) -> Callable[[], Result]:
    """Its two passes over a scene, of which the second goes by area and looks at ten neighbours."""
    module = import_module("geodeep.detection")
    rows = np.column_stack([b.xyxy + b.apart, b.scores, np.arange(len(b.boxes))])
    options = {"det_type": "YOLO", "det_iou_thresh": IOU}

    def run() -> Result:
        left = module.sort_by_area(module.non_max_suppression_fast(rows, options), reverse=True)
        return module.non_max_kdtree(left, IOU)[:, 5].astype(np.int64)

    return run


def deepforest(b: Boxes) -> Callable[[], Result]:
    """What it does across windows: all classes together, IoU .15, whole pixels."""
    predict, pandas = import_module("deepforest.predict"), import_module("pandas")
    table = pandas.DataFrame(b.xyxy, columns=["xmin", "ymin", "xmax", "ymax"])
    table["score"], table["label"] = b.scores, b.labels

    def run() -> Result:
        xyxy = predict.across_class_nms(table)[["xmin", "ymin", "xmax", "ymax"]].to_numpy(float)
        size = xyxy[:, 2:] - xyxy[:, :2]
        return np.column_stack([xyxy[:, :2] + size / 2, size, np.zeros(len(size))])

    return run


def ultralytics(b: Boxes) -> Callable[[], Result]:
    """Its rotated suppression, by the distance of Gaussians."""
    torch, nms = import_module("torch"), import_module("ultralytics.utils.nms")
    turned = b.boxes.copy()
    turned[:, :2] += b.apart
    turned[:, 4] = -np.deg2rad(turned[:, 4])
    boxes, scores = torch.from_numpy(turned).float(), torch.from_numpy(b.scores)
    return lambda: nms.TorchNMS.fast_nms(boxes, scores, IOU, iou_func=nms.batch_probiou).numpy()


CONTESTANTS: dict[str, Callable[[Boxes], Callable[[], Result]]] = {
    "ours, nms": our_nms,
    "ours, merge": our_merge,
    "nothing": nothing,
    "shapely STRtree": strtree,
    "torchvision": torchvision,
    "lsnms": lsnms,
    "powerboxes": powerboxes,
    "SAHI NMS": sahi_nms,
    "SAHI NMS, IoS": sahi_nms_ios,
    "SAHI GreedyNMM": sahi_greedy,
    "SAHI NMM": sahi_nmm,
    "supervision NMS": supervision_nms,
    "supervision NMM": supervision_nmm,
    "GeoDeep": geodeep,
    "DeepForest": deepforest,
    "ultralytics rotated": ultralytics,
}
OURS = ("ours, nms", "ours, merge", "nothing", "shapely STRtree", "torchvision")
"""What runs without the other tools."""


def peak_mb() -> float:
    """Megabytes, the most that this process held since `forget_peak`."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def forget_peak() -> None:
    """Count peaks from now on."""
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    """Read the file, merge, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=CONTESTANTS)
    parser.add_argument("file", type=Path)
    parser.add_argument("--repeats", type=int, default=0, help="calls beside the first")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with np.load(args.file) as data:
        given = Boxes(data["boxes"], data["scores"], data["labels"], data["tiles"], int(data["side"]))
    run = CONTESTANTS[args.name](given)
    forget_peak()
    before = peak_mb()
    start = time.perf_counter()
    result = np.asarray(run())
    seconds = [time.perf_counter() - start]
    added = again = peak_mb() - before
    for k in range(args.repeats):
        if k == 0:
            forget_peak()
            before = peak_mb()
        elif k == 1:
            again = peak_mb() - before
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    if args.out:
        np.savez(args.out, result=np.flatnonzero(result) if result.dtype == bool else result)
    print(
        json.dumps(
            {"seconds": statistics.median(seconds[1:] or seconds), "added_mb": added, "again_mb": again}
        )
    )


if __name__ == "__main__":
    main()
