"""Scenes whose objects are bright rectangles on dark, and the detector that finds exactly those."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import NORTH_UP, UTM, Raster, write_raster
from hypothesis import strategies as st
from numpy.typing import NDArray
from oracle import patches

from babelrs_geo.detections import Detections
from babelrs_geo.models.checkpoints import Header
from babelrs_geo.models.detector import COMPACT

LEFT, TOP, PIXEL = NORTH_UP.c, NORTH_UP.f, NORTH_UP.a

SHIPS = np.array([[10, 12, 9, 5], [40, 20, 6, 12], [70, 66, 14, 6], [30, 80, 7, 7]])  # x, y, width, height


def canvas(
    width: int, height: int, rectangles: Sequence[Sequence[int]], bright: int = 200
) -> NDArray[np.uint8]:
    """Dark with bright rectangles (x, y, width, height), (y, x); not black, which would be taken for a
    collar.
    """
    image = np.full((height, width), 20, np.uint8)
    for x, y, w, h in rectangles:
        image[y : y + h, x : x + w] = bright
    return image


def write_scene(path: Path, image: NDArray[np.generic], nodata: float | None = None, **more: Any) -> Path:
    """A GeoTIFF of one band (y, x) or several (band, y, x); 10 m pixels unless `crs` is None or `gcps` are
    given.
    """
    if more.get("crs", UTM) is None:
        more["transform"] = None
    return write_raster(path.with_suffix(""), Raster(image, nodata=nodata, **more))


@st.composite
def pictures(draw: st.DrawFn) -> tuple[int, int, int, int, list[tuple[int, int, int, int]]]:
    """A scene's size, a tile size, an overlap, and rectangles no larger than the overlap, two pixels apart or
    more.
    """
    width, height = draw(st.integers(1, 110)), draw(st.integers(1, 110))
    tile = draw(st.integers(12, 64))
    overlap = draw(st.integers(4, tile * 2 // 3))
    taken = np.zeros((height, width), bool)
    ships = []
    for _ in range(draw(st.integers(0, 8))):
        w, h = (draw(st.integers(1, min(side, overlap))) for side in (width, height))
        x, y = draw(st.integers(0, width - w)), draw(st.integers(0, height - h))
        around = np.s_[max(0, y - 2) : y + h + 2, max(0, x - 2) : x + w + 2]
        if not taken[around].any():
            taken[y : y + h, x : x + w] = True
            ships.append((x, y, w, h))
    return width, height, tile, overlap, ships


def as_boxes(rectangles: Sequence[Sequence[int]]) -> NDArray[np.float64]:
    """Rectangles (N, 4) as boxes (N, 5)."""
    x, y, w, h = np.asarray(rectangles, float).reshape(-1, 4).T
    return np.stack([x + w / 2, y + h / 2, w, h, np.zeros_like(x)], axis=1)


def bright_detector(images: NDArray[np.float32], classes: tuple[str, ...] = ("ship",)) -> list[Detections]:
    """The bounds of each connected bright patch, scored by its area: an oracle for `canvas`."""
    found = []
    for image in images:
        rectangles = patches(image[0] > 0.5)
        scores = 1 - 1 / (1 + rectangles[:, 2:].prod(1))
        labels = np.zeros(len(rectangles), np.int64)
        found.append(Detections(as_boxes(rectangles), scores, labels, classes, oriented=False))
    return found


def rectangles_of(found: Detections) -> list[tuple[float, ...]]:
    """The boxes as sorted (x, y, width, height), to compare with what was drawn."""
    cx, cy, w, h = found.boxes[:, :4].T
    return sorted(zip((cx - w / 2).tolist(), (cy - h / 2).tolist(), w.tolist(), h.tolist(), strict=True))


@dataclass(frozen=True)
class BrightHeader(Header):
    """The header of weights that know ships on SAR scenes, and planes, ships and vehicles on RGB scenes."""

    name: str = "bright"
    classes: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {"sar": ("ship",), "rgb": ("plane", "ship", "vehicle")}
    )
    box_kind: Mapping[str, str] = field(default_factory=lambda: {"sar": "horizontal", "rgb": "oriented"})
    gsd: Mapping[str, tuple[float, float]] = field(
        default_factory=lambda: {"sar": (5.0, 20.0), "rgb": (5.0, 20.0)}
    )
    thresholds: Mapping[str, Mapping[str, float]] = field(
        default_factory=lambda: {"sar": {"ship": 0.3}, "rgb": {"plane": 0.3, "ship": 0.4, "vehicle": 0.5}}
    )
    radiometry: Mapping[str, str] = field(default_factory=dict)
    architecture: Mapping[str, Any] = field(default_factory=COMPACT.to_dict)
    licence: str = "none"


@dataclass
class BrightWeights:
    """As loaded weights, with `bright_detector` for a network."""

    header: BrightHeader = field(default_factory=BrightHeader)
    name: str = "bright"
    sha256: str = "0" * 64
    asked: list[tuple[str, float | None, tuple[str, ...] | None]] = field(default_factory=list)
    fails: BaseException | None = None
    holds: int = 1000
    """Images at once, beyond which memory does not suffice."""
    device: str = "cpu"

    def detector(self, sensor, score=None, classes=None):
        self.asked.append((str(sensor), score, classes))

        def run(images: NDArray[np.float32]) -> list[Detections]:
            if self.fails is not None:
                raise self.fails
            if len(images) > self.holds:
                raise torch.OutOfMemoryError(f"Tried to allocate {len(images)} GiB")
            return bright_detector(images, tuple(classes or self.header.classes[sensor]))

        return run
