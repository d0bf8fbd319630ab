"""Boxes drawn over pixels, for a person to look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import shapely
from numpy.typing import NDArray

from babelrs_geo import boxes as bx

matplotlib.use("Agg")  # files only: no display is needed
from matplotlib import pyplot as plt

_DPI = 100
_MARGIN_PX = 40


@dataclass(frozen=True)
class Layer:
    """Boxes that belong together."""

    boxes: NDArray[np.float64]
    """(N, 5) in scene pixels."""
    colour: str
    labels: Sequence[str] = ()
    """One text a box, or none at all."""


def draw(
    path: Path,
    image: NDArray[np.float32],
    corner: tuple[int, int],
    layers: Sequence[Layer],
    zoom: float = 1.0,
    area: shapely.Geometry | None = None,
) -> None:
    """Write a PNG of model input (3, h, w) in [0, 1] with boxes over it.

    Its first pixel is `corner` in the scene. Axes count scene pixels; `zoom` is picture pixels per scene
    pixel; `area` is outlined dashed.
    """
    height, width = image.shape[1:]
    size = (width * zoom + _MARGIN_PX, height * zoom + _MARGIN_PX)
    figure = plt.figure(figsize=(size[0] / _DPI, size[1] / _DPI), dpi=_DPI)
    left, below = _MARGIN_PX / size[0], _MARGIN_PX / size[1]
    axes = figure.add_axes((left, below, 1 - left, 1 - below))
    x, y = corner
    axes.imshow(image.transpose(1, 2, 0), extent=(x, x + width, y + height, y), interpolation="nearest")
    for layer in layers:
        outlines = bx.corners(layer.boxes)
        closed = outlines[:, [0, 1, 2, 3, 0]]
        axes.plot(closed[..., 0].T, closed[..., 1].T, color=layer.colour, linewidth=1)
        for outline, text in zip(outlines, layer.labels, strict=False):
            at = outline[outline[:, 0].argmax()]
            axes.text(at[0], at[1], text, color=layer.colour, fontsize=6, clip_on=True)
    if area is not None:
        for polygon in shapely.get_parts(area):
            axes.plot(*np.asarray(polygon.exterior.coords).T, "--", color="white", linewidth=0.7)
    axes.set_xlim(x, x + width)
    axes.set_ylim(y + height, y)
    axes.tick_params(labelsize=7)
    figure.savefig(path)
    plt.close(figure)
