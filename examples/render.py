"""Draw a result over its scene: what `babelrs-geo detect` found, as QGIS would show it, into a PNG.

    python examples/render.py harbour_sar_detections.gpkg examples/harbour_sar.tif docs/harbour.png

With `--truth examples/harbour_ships.geojson` the true outlines are drawn beneath, thin and white. With
`--crop X Y WIDTH HEIGHT` (pixels of the scene) a part of it is drawn. Needs matplotlib, which
`pip install ".[test]"` brings.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import geopandas as gpd
import matplotlib
import numpy as np

import babelrs_geo as bg
from babelrs_geo.scenes import Scene

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patheffects import withStroke

COLOURS = ("#E69F00", "#56B4E9", "#F6FA96", "#D8265D", "#89EBFD", "#49AAA5", "#AC5EFC", "#ABF8DB")


@dataclass(frozen=True, kw_only=True)
class Picture:
    """What to draw."""

    crop: tuple[int, int, int, int] | None = None
    """`x, y, width, height` in pixels of the scene; None for all of it."""
    truth: Path | None = None
    """Outlines to draw beneath the result, in any CRS."""
    side: int = 1400
    """Longer side of the PNG, in pixels."""
    labels: bool = True
    """Write scores beside the boxes."""


def outlines(frame: gpd.GeoDataFrame, scene: Scene) -> list[np.ndarray]:
    """Exterior rings in pixels of the scene, (N, 2) each."""
    if frame.crs is None:
        return [np.array(shape.exterior.coords) for shape in frame.geometry]
    on_scene = frame.to_crs(scene.georef.crs).geometry
    rings = []
    for shape in on_scene:
        x, y = np.array(shape.exterior.coords).T
        rings.append(np.column_stack(scene.georef.to_pixel(x, y)))
    return rings


def draw(result: Path, scene: Scene, target: Path, picture: Picture | None = None) -> int:
    """Write the PNG and return how many objects of the result are in it."""
    picture = picture or Picture()
    found = gpd.read_file(result, layer="detections")
    x, y, width, height = picture.crop or (0, 0, scene.width, scene.height)
    scale = min(1.0, picture.side / max(width, height))
    rows, columns = scene.shape_at(scale)
    left, top = min(int(x * scale), columns - 1), min(int(y * scale), rows - 1)
    window = (left, top, max(1, min(round(width * scale), columns - left)), 0)
    window = (*window[:3], max(1, min(round(height * scale), rows - top)))
    pixels = scene.read(window, scale)

    size = np.array([width, height]) / max(width, height) * picture.side / 100
    figure = plt.figure(figsize=tuple(size), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(
        pixels.image.transpose(1, 2, 0), extent=(x, x + width, y + height, y), interpolation="nearest"
    )
    axes.set_axis_off()
    casing = [withStroke(linewidth=3, foreground="black", alpha=0.6)]
    if picture.truth is not None:
        for ring in outlines(gpd.read_file(picture.truth), scene):
            axes.plot(*ring.T, color="white", linewidth=0.8)
    shown = 0
    classes = sorted(set(found["class"]))
    for ring, name, score in zip(outlines(found, scene), found["class"], found["score"], strict=True):
        inside = (ring >= (x, y)).all() and (ring <= (x + width, y + height)).all()
        if not inside:
            continue
        shown += 1
        colour = COLOURS[classes.index(name) % len(COLOURS)]
        axes.plot(*ring.T, color=colour, linewidth=1.6, path_effects=casing)
        if picture.labels:
            axes.annotate(
                f"{score:.2f}",
                ring[ring[:, 1].argmin()],
                xytext=(2, 3),
                textcoords="offset points",
                color=colour,
                fontsize=8,
                path_effects=[withStroke(linewidth=2, foreground="black")],
            )
    axes.set_xlim(x, x + width)
    axes.set_ylim(y + height, y)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target)
    plt.close(figure)
    return shown


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(description="Draw a result over its scene.")
    parser.add_argument("result", type=Path, help="the GeoPackage that babelrs-geo detect wrote")
    parser.add_argument("scene")
    parser.add_argument("target", type=Path, help="PNG to write")
    parser.add_argument("--sensor")
    parser.add_argument("--truth", type=Path)
    parser.add_argument("--crop", type=int, nargs=4, metavar=("X", "Y", "WIDTH", "HEIGHT"))
    parser.add_argument("--side", type=int, default=1400)
    parser.add_argument("--no-labels", action="store_true")
    given = parser.parse_args(arguments)
    crop = tuple(given.crop) if given.crop else None
    picture = Picture(crop=crop, truth=given.truth, side=given.side, labels=not given.no_labels)
    with bg.open_scene(given.scene, sensor=given.sensor) as scene:
        shown = draw(given.result, scene, given.target, picture)
    print(f"{given.target}: {shown} objects")


if __name__ == "__main__":
    main()
