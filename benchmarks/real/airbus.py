"""Tiled detection against windows centred on each aircraft, on eight annotated scenes of 2560 px.

A window shows the detector one aircraft whole and in the middle; tiling must find what the window finds, and
find it once. What a window that is moved by one pixel loses tells how much of that is the detector's alone. The
annotations are upright and the detections oriented, so a fit asks for an IoU of .3: a square turned by 45 degrees has
.7 with its twin upright, and neighbouring aircraft have none.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from babelrs_geo import DetectOptions, detect, open_scene
from babelrs_geo import boxes as bx
from babelrs_geo.datasets.airbus import CLASS, read_airbus
from real.pictures import Layer, draw

if TYPE_CHECKING:
    from babelrs_geo.detections import Detections
    from babelrs_geo.models.zoo import Weights
    from babelrs_geo.scenes import Scene

Floats = NDArray[np.float64]

FIT_IOU = 0.3
TWICE = 0.5
LOST_SHARE = 0.01
SIDES = (0.0, 80.0, 120.0, np.inf)
"""Bounds, in pixels, of the groups that aircraft are told of by size: root of their upright box's area."""


def twice(found: Detections) -> int:
    """Pairs of one class whose IoU, or intersection over the smaller, is above .5."""
    pairs = 0
    for label in np.unique(found.labels):
        boxes = found.boxes[found.labels == label]
        iou, area = bx.rotated_iou(boxes, boxes), bx.areas(boxes)
        shared = iou * (area[:, None] + area[None, :]) / (1 + iou)
        contained = shared / np.minimum(area[:, None], area[None, :])
        pairs += int((np.triu(np.maximum(iou, contained), k=1) > TWICE).sum())
    return pairs


def hit(found: Detections, truth: Floats) -> NDArray[np.bool_]:
    """Which of the annotated aircraft (N, 5) some detected plane fits."""
    planes = found.boxes[found.class_names == CLASS]
    if not len(planes):
        return np.zeros(len(truth), bool)
    fits: NDArray[np.bool_] = np.any(bx.rotated_iou(planes, truth) >= FIT_IOU, axis=0)
    return fits


def hit_in_window(
    scene: Scene, weights: Weights, truth: Floats, side: int, moved: int = 0
) -> NDArray[np.bool_]:
    """Which aircraft a window of `side` pixels centred on each, or so many pixels to the right and down of that (moved
    into the scene at its edge), finds.
    """
    detector = weights.detector(str(scene.sensor))
    seen = np.zeros(len(truth), bool)
    for i, (cx, cy) in enumerate(truth[:, :2]):
        x = int(np.clip(round(cx - side / 2) + moved, 0, scene.width - side))
        y = int(np.clip(round(cy - side / 2) + moved, 0, scene.height - side))
        found = detector(scene.read((x, y, side, side)).image[None])[0].shift(x, y)
        seen[i] = hit(found, truth[i : i + 1])[0]
    return seen


def compare(
    folder: Path, weights: Weights, pictures: Path, overlap: int = DetectOptions.overlap
) -> dict[str, Any]:
    """All scenes, in tiles that share `overlap` pixels: pairs reported twice, aircraft lost by tiling, recall beside
    them, and, to compare with, what windows lose that are moved by one pixel.
    """
    options = DetectOptions(overlap=overlap)
    doubles = detected = 0
    each: list[Floats] = []  # side, found in tiles, in a window, in a window beside it
    for record in read_airbus(folder):
        truth = record.boxes
        with open_scene(record.path, "rgb") as scene:
            found = detect(scene, weights, options).detections
            side = options.tile or weights.header.tile
            windows = [hit_in_window(scene, weights, truth, side, moved) for moved in (0, 1)]
            image = scene.read((0, 0, scene.width, scene.height)).image
        doubles += twice(found)
        detected += int((found.class_names == CLASS).sum())
        each.append(np.stack([np.sqrt(truth[:, 2] * truth[:, 3]), hit(found, truth), *windows], 1))
        texts = [f"{c} {s:.2f}" for c, s in zip(found.class_names, found.scores, strict=True)]
        layers = [Layer(truth, "lime"), Layer(found.boxes, "red", texts)]
        draw(pictures / f"airbus_{record.path.stem[:8]}.png", image, (0, 0), layers, 0.5)
    aircraft = np.concatenate(each)
    own = counts(aircraft)
    met = own["found_in_windows"] > 0 and doubles == 0
    return {
        **own,
        "planes_detected": detected,
        "pairs_reported_twice": doubles,
        "by_side_px": {
            f"{low:g} to {high:g}": counts(aircraft[(low <= aircraft[:, 0]) & (aircraft[:, 0] < high)])
            for low, high in itertools.pairwise(SIDES)
        },
        "met": met and own["lost_by_tiling"] <= LOST_SHARE * own["found_in_windows"],
    }


def counts(aircraft: Floats) -> dict[str, int]:
    """How many of them (N, 4: side, found in tiles, in a window, in one beside it) are found how, and lost."""
    tiles, window, beside = aircraft[:, 1:].T.astype(bool)
    return {
        "aircraft": len(aircraft),
        "found_in_windows": int(window.sum()),
        "found_in_tiles": int(tiles.sum()),
        "lost_by_tiling": int((window & ~tiles).sum()),
        "gained_by_tiling": int((tiles & ~window).sum()),
        "lost_by_moving_the_window_one_pixel": int((window & ~beside).sum()),
    }
