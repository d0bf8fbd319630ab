"""The report's pictures as text: a map of footprints, bars, and quicklooks of scenes with what was found in them."""

from __future__ import annotations

import base64
import json
import math
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from babelrs_geo.archive.cell import Turn
from babelrs_geo.archive.safe import is_product, opened

COLOURS = {
    "done": "#2a9d6f",
    "incomplete": "#e9b44c",
    "stale": "#8f8fbf",
    "failed": "#d1495b",
    "duplicate": "#b8b8b8",
    "planned": "#d9e2ec",
    "running": "#7fb4e0",
}
MAP_WIDTH, MAP_HEIGHT = 960, 480
LOOK_SIDE = 420
"""Pixels of a quicklook's longer side."""

Ring = Sequence[Sequence[float]]


def map_of(footprints: Sequence[tuple[str, Ring]]) -> str:
    """Footprints (state, ring of lon, lat) as an SVG in plate carrée, stretched to true shape at its middle."""
    if not footprints:
        return "<p>No scene with a place on the map yet.</p>"
    states, rings = [state for state, _ in footprints], _together([ring for _, ring in footprints])
    points = np.concatenate(rings)
    west, south = points.min(0)
    east, north = points.max(0)
    middle = math.radians((south + north) / 2)
    squeeze = max(0.05, math.cos(middle))
    span = max((east - west) * squeeze, (north - south) * MAP_WIDTH / MAP_HEIGHT, 1e-4) * 1.1
    scale = MAP_WIDTH / span
    x0, y0 = (west + east) / 2 - span / 2 / squeeze, (south + north) / 2 + MAP_HEIGHT / scale / 2

    def place(lon: float, lat: float) -> tuple[float, float]:
        return (lon - x0) * squeeze * scale, (y0 - lat) * scale

    parts = [_graticule(x0, y0, squeeze, scale, place)]
    for state, ring in sorted(zip(states, rings, strict=True), key=lambda each: -_area(each[1])):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in ring))
        colour = COLOURS.get(state, "#000")
        x, y = np.mean([place(*point) for point in ring], axis=0)
        # A dot, where the scene alone would be too small to be seen.
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>')
        parts.append(
            f'<polygon points="{path}" fill="{colour}" fill-opacity=".45" stroke="{colour}" '
            f'stroke-width="1.5" stroke-linejoin="round"/>'
        )
    return (
        f'<svg viewBox="0 0 {MAP_WIDTH} {MAP_HEIGHT}" class="map" role="img" aria-label="map of footprints">'
        + "".join(parts)
        + "</svg>"
    )


def _together(rings: Sequence[Ring]) -> list[NDArray[np.float64]]:
    """Rings (K, 2) that run on across the antimeridian, side by side: in the world about 0 or the one about 180
    degrees, whichever is the narrower map.
    """
    whole = [np.asarray(ring, float)[:, :2] for ring in rings]
    whole = [np.column_stack([np.unwrap(ring[:, 0], period=360.0), ring[:, 1]]) for ring in whole]
    ends = np.array([(ring[:, 0].min(), ring[:, 0].max()) for ring in whole])
    worlds = [-360.0 * np.round((ends.mean(1) - middle) / 360.0) for middle in (0.0, 180.0)]
    turns = min(worlds, key=lambda turns: float(np.ptp(ends + turns[:, None])))
    return [ring + np.array([turn, 0.0]) for ring, turn in zip(whole, turns, strict=True)]


def _area(ring: NDArray[np.float64]) -> float:
    x, y = ring.T
    return float(abs(np.dot(x[:-1], y[1:]) - np.dot(x[1:], y[:-1])) / 2)


def _graticule(
    x0: float, y0: float, squeeze: float, scale: float, place: Callable[[float, float], tuple[float, float]]
) -> str:
    """Lines of longitude and latitude, about six a side, with their degrees."""
    wide, high = MAP_WIDTH / scale / squeeze, MAP_HEIGHT / scale
    steps = [m * 10.0**e for e in range(-5, 3) for m in (1, 2, 5)]
    parts = []
    for span, start, across in ((wide, x0, True), (high, y0 - high, False)):
        step = next((s for s in steps if span / s <= 6), 90.0)
        digits = max(0, -math.floor(math.log10(step)))
        for n in range(math.ceil(start / step), math.floor((start + span) / step) + 1):
            value = n * step
            x, y = place(value, y0) if across else place(x0, value)
            line = f'x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{MAP_HEIGHT}"'
            label = f'x="{x + 3:.1f}" y="{MAP_HEIGHT - 5}"'
            if across and abs(value) > 180.0:
                value = (value + 180.0) % 360.0 - 180.0
            if not across:
                line = f'x1="0" x2="{MAP_WIDTH}" y1="{y:.1f}" y2="{y:.1f}"'
                label = f'x="4" y="{y - 3:.1f}"'
            parts.append(
                f'<line {line} class="grid"/><text {label} class="degree">{value:.{digits}f}°</text>'
            )
    return "".join(parts)


def bars(rows: Sequence[tuple[str, float]], unit: str = "") -> str:
    """Names and numbers as a table with bars."""
    if not rows:
        return "<p>Nothing yet.</p>"
    most = max(value for _, value in rows) or 1
    lines = "".join(
        f'<tr><th>{escape(name)}</th><td class="number">{value:,.0f}{unit}</td>'
        f'<td class="bar"><span style="width:{100 * value / most:.1f}%"></span></td></tr>'
        for name, value in rows
    )
    return f'<table class="bars">{lines}</table>'


def timeline(rows: Sequence[tuple[str, int]], what: str) -> str:
    """Counts over time as an SVG of columns; rows are in order."""
    if not rows:
        return "<p>Nothing yet.</p>"
    width, height = 960, 120
    most, each = max(n for _, n in rows), 960 / len(rows)
    columns = "".join(
        f'<rect x="{i * each:.2f}" y="{height - height * n / most:.1f}" width="{max(each - 1, 0.5):.2f}" '
        f'height="{height * n / most:.1f}" class="column"><title>{escape(when)}: {n:,} {what}</title></rect>'
        for i, (when, n) in enumerate(rows)
    )
    first, last = escape(rows[0][0]), escape(rows[-1][0])
    return (
        f'<svg viewBox="0 -14 {width} {height + 34}" class="timeline" role="img" aria-label="{what} over time">'
        f'{columns}<text x="0" y="{height + 15}">{first}</text>'
        f'<text x="{width}" y="{height + 15}" text-anchor="end">{last}</text>'
        f'<text x="0" y="-3">{most:,} {what} at most</text></svg>'
    )


@dataclass(frozen=True)
class Look:
    """A scene to be shown with its result."""

    path: str
    result: str
    sensor: str | None
    options: Mapping[str, Any] = field(default_factory=dict)


class Quicklooks:
    """Work for a cell: scenes as small pictures, for what hangs or crashes at reading must not end a report."""

    def start(self, turn: Turn) -> Callable[[Look], str]:
        """Nothing to make ready."""
        return quicklook


def quicklook(look: Look) -> str:
    """A scene with what was found in it, as an SVG that holds its pixels. Raises SceneError, LabelError."""
    import shapely

    from babelrs_geo.scenes import SceneOptions, open_scene
    from babelrs_geo.vectors import read_result

    reading: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in look.options.items()}
    found = read_result(look.result).features
    product = opened(look.path) if is_product(look.path) else nullcontext(look.path)
    with product as path, open_scene(path, look.sensor, SceneOptions(**reading)) as scene:
        scale = min(1.0, LOOK_SIDE / max(scene.width, scene.height))
        rows, columns = scene.shape_at(scale)
        image = scene.read((0, 0, columns, rows), scale).image
        shapes = found.geometry
        if scene.georef.crs is not None and found.crs is not None:
            shapes = shapes.to_crs(scene.georef.crs)
        drawn = []
        for shape in shapes:
            if shape is None or shape.is_empty:
                continue
            for outline in shapely.get_parts(shape):
                x, y = np.array(outline.exterior.coords)[:, :2].T
                if found.crs is not None:
                    x, y = scene.georef.to_pixel(x, y)
                drawn.append(" ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x * scale, y * scale, strict=True)))
    pixels = base64.b64encode(png(np.rint(image * 255).astype(np.uint8))).decode()
    boxes = "".join(f'<polygon points="{points}" class="box"/>' for points in drawn)
    return (
        f'<svg viewBox="0 0 {columns} {rows}" class="look"><image href="data:image/png;base64,{pixels}" '
        f'width="{columns}" height="{rows}"/>{boxes}</svg>'
    )


def png(image: NDArray[np.uint8]) -> bytes:
    """Pixels (3, y, x) as a PNG (ISO/IEC 15948), grey where the three are the same."""
    grey = bool((image[0] == image[1]).all() and (image[0] == image[2]).all())
    body = image[0][..., None] if grey else image.transpose(1, 2, 0)
    rows, columns, depth = body.shape
    lines = np.zeros((rows, columns * depth + 1), np.uint8)  # each begins with its filter: none
    lines[:, 1:] = body.reshape(rows, -1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", columns, rows, 8, 0 if grey else 2, 0, 0, 0)
    data = zlib.compress(lines.tobytes(), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def look_of(row: Mapping[str, Any], folder: Path, reading: Mapping[str, Any]) -> Look:
    """What the ledger says of a scene, as a picture needs it."""
    own = json.loads(row["options"] or "{}")
    return Look(row["source"], str(folder / row["output"]), row["sensor"], {**reading, **own})
