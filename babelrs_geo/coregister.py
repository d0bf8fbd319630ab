"""Scenes of one ground by several sensors on one grid, each resampled once, and the shift between them measured.

The grid is the reference's own, cut to the ground that all scenes cover. A pixel of it takes from another scene what a
triangle of its own size sees there (bilinear where the scene is coarser, an antialiased mean where it is finer), valid
pixels only. SAR is averaged as power, whatever its unit, since speckle is; temperatures and colours as they are. The
reference keeps its numbers. A pixel is valid where every sensor saw it.

The shift is where the gradient magnitudes of two sensors match best: they share edges, not brightness. Cross-power
spectra (Kuglin and Hines 1975) of windows spread over the ground, each whitened, are summed under a Gaussian low pass;
their peak is then a Gaussian too, and a parabola through its logarithm tells it to a fraction of a pixel.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyproj
import rasterio
from numpy.typing import NDArray
from rasterio.session import DummySession
from rasterio.windows import Window

from babelrs_geo.drafts import draft, make_folder
from babelrs_geo.errors import GeorefError, OutputError, ParameterError
from babelrs_geo.georef import Georef
from babelrs_geo.kernels import compiled
from babelrs_geo.scenes import Scene, SceneOptions, open_scene
from babelrs_geo.sensors import Radiometry, Sensor, magnitude

Floats = NDArray[np.float64]

_STEP = 32  # pixels between places that are mapped exactly; in between they are interpolated
_BLOCK = 1024  # pixels a side that are written at once
_SOURCE = (
    1 << 22
)  # pixels of a scene that are held at once, about: a pixel of the grid may show many of a finer one
_NOWHERE = -1e9  # pixels: far from any scene
_LOOK = 512  # pixels a side of a window in which the shift is measured
_LOOKS = 4  # windows a side
_BLUR = 1.5  # pixels: the low pass of the spectra
_CLEAR = 6.0  # a peak of fewer standard deviations above the rest is no match


@dataclass(frozen=True, kw_only=True)
class Shift:
    """How far a sensor's picture lies from the reference's, in pixels of the shared grid."""

    sensor: str
    reference: str
    dx: float
    """To the right; nan where nothing matches."""
    dy: float
    """Down."""
    clearness: float
    """Height of the peak in standard deviations of the rest."""
    metres: float
    """Length of the shift on the ground."""
    corrected: bool
    """True where the files have it taken out."""

    def sentence(self) -> str:
        """The same in words."""
        if not np.isfinite(self.dx):
            return f"{self.sensor} against {self.reference}: no shift can be told, their edges do not match"
        done = "taken out" if self.corrected else "left as it is; --correct-shift takes it out"
        return (
            f"{self.sensor} lies {self.dx:+.2f} px right and {self.dy:+.2f} px down of {self.reference} "
            f"({self.metres:.2g} m): {done}"
        )


@dataclass(frozen=True)
class Shared:
    """The grid that all scenes are brought to."""

    georef: Georef
    width: int
    height: int


def shared_grid(scenes: Mapping[str, Scene], reference: str | None = None) -> tuple[str, Shared]:
    """Whose grid it is (the finest unless given), and its part that all scenes cover.

    Raises GeorefError where a scene has no place on the ground, the reference is not placed by an affine, or the
    scenes share no ground; ParameterError for a reference that is not there.
    """
    if len(scenes) < 2:
        raise ParameterError(f"{len(scenes)} scene was given to co-register; pass at least two")
    for sensor, scene in scenes.items():
        if not scene.georef.on_earth:
            raise GeorefError(
                f"{sensor}: {scene.name} has no place on the ground, so it cannot be co-registered"
            )
    if reference is not None and reference not in scenes:
        raise ParameterError(f"reference {reference} was asked of {', '.join(scenes)}; name one of these")
    straight = {s: scene for s, scene in scenes.items() if scene.georef.kind == "affine"}
    chosen = reference or min(straight, key=lambda s: straight[s].gsd or np.inf, default=None)
    if chosen is None or chosen not in straight:
        raise GeorefError(
            "the shared grid needs a scene placed by an affine, not by control points or RPCs; choose another reference"
        )
    own = straight[chosen]
    low, high = np.zeros(2), np.array([own.width, own.height], float)
    for sensor, scene in scenes.items():
        if sensor == chosen:
            continue
        run = np.linspace(0, 1, 17)
        u, v = (a.ravel() for a in np.meshgrid(run * scene.width, run * scene.height))
        px, py = between(scene.georef, own.georef, u, v)
        low = np.maximum(low, np.floor([np.nanmin(px), np.nanmin(py)]))
        high = np.minimum(high, np.ceil([np.nanmax(px), np.nanmax(py)]))
    if not (high - low >= 1).all():
        raise GeorefError(
            "the scenes share no ground, so they cannot be co-registered: check their places with info"
        )
    x, y, width, height = (int(v) for v in (*low, *(high - low)))
    moved = own.georef.window((x, y, width, height)).affine
    assert moved is not None
    grid = Georef.from_affine(tuple(moved), own.georef.crs_text, (width, height))
    return chosen, Shared(grid, width, height)


def between(source: Georef, target: Georef, px: NDArray[Any], py: NDArray[Any]) -> tuple[Floats, Floats]:
    """Pixels of one georeference to those of another; NaN where they have no place."""
    x, y = source.to_map(px, py)
    if source.crs_text != target.crs_text:
        change = pyproj.Transformer.from_crs(source.crs, target.crs, always_xy=True)
        x, y = (np.asarray(v, np.float64).reshape(np.shape(px)) for v in change.transform(x, y))
    return target.to_pixel(x, y)


@dataclass(frozen=True)
class Onto:
    """A scene on the shared grid: windows of it, resampled."""

    scene: Scene
    shared: Shared
    shift: tuple[float, float] = (0.0, 0.0)
    """Where the scene's picture lies from where its georeference says, in pixels of the grid."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the resampled numbers: the scene's own, amplitude for complex ones."""
        kind = np.dtype(self.scene.dtype)
        return np.dtype("float32") if kind.kind == "c" else kind

    @cached_property
    def _reach(self) -> tuple[float, float]:
        """Half the triangle's width in pixels of the scene, across and down."""
        x, y = self.shared.width / 2, self.shared.height / 2
        sx, sy = between(
            self.shared.georef,
            self.scene.georef,
            np.array([x - 1, x + 1, x, x]),
            np.array([y, y, y - 1, y + 1]),
        )
        across = np.hypot(sx[1] - sx[0], sx[3] - sx[2]) / 2
        down = np.hypot(sy[1] - sy[0], sy[3] - sy[2]) / 2
        return max(1.0, float(across)), max(1.0, float(down))

    def read(self, window: tuple[int, int, int, int]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Numbers `(band, y, x)` of the radiometry's bands and validity of a window of the grid."""
        scene = self.scene
        out = np.zeros((len(scene.radiometry.bands), window[3], window[2]), np.float64)
        share = np.zeros(out.shape[1:])
        sx, sy = self._places(window)
        side = max(1, int(np.sqrt(_SOURCE / np.prod(self._reach))))
        for y in range(0, window[3], side):
            for x in range(0, window[2], side):
                part = slice(y, y + side), slice(x, x + side)
                self._add(sx[part], sy[part], out[:, *part], share[part])
        seen = share >= 0.5
        out[:, seen] /= share[seen]
        out = _from_mean(scene.radiometry, out)
        out[:, ~seen] = 0.0
        if self.dtype.kind in "ui":
            info = np.iinfo(self.dtype)
            out = np.clip(np.rint(out), info.min, info.max)
        return out.astype(self.dtype), seen

    def _add(self, sx: Floats, sy: Floats, out: Floats, share: Floats) -> None:
        """Add what the scene has at places (sx, sy) to `out`, and how much of it is valid to `share`."""
        scene, bands = self.scene, self.scene.radiometry.bands
        rx, ry = self._reach
        placed = np.isfinite(sx + sy)
        if not placed.any():
            return
        x0, y0 = max(0, int(sx[placed].min() - rx) - 1), max(0, int(sy[placed].min() - ry) - 1)
        x1 = min(scene.width, int(sx[placed].max() + rx) + 2)
        y1 = min(scene.height, int(sy[placed].max() + ry) + 2)
        if x0 >= x1 or y0 >= y1:
            return
        sx, sy = np.where(placed, sx, _NOWHERE), np.where(placed, sy, _NOWHERE)
        raw, valid = scene.read_both((x0, y0, x1 - x0, y1 - y0))
        planes = magnitude(raw[[b - 1 for b in bands]]).astype(np.float64)
        planes = _to_mean(scene.radiometry, np.where(valid, planes, 0.0))
        planes[:, ~valid] = 0.0
        _gather(planes, valid, (x0, y0), (sx, sy), (rx, ry), out, share)

    def _places(self, window: tuple[int, int, int, int]) -> tuple[Floats, Floats]:
        """Where the centres of a window's pixels lie in the scene: exact every few pixels, linear in between."""
        x, y, width, height = window
        gx = np.linspace(x, x + width, max(1, -(-width // _STEP)) + 1) + self.shift[0]
        gy = np.linspace(y, y + height, max(1, -(-height // _STEP)) + 1) + self.shift[1]
        knots = between(self.shared.georef, self.scene.georef, *np.meshgrid(gx, gy))
        px = np.arange(x, x + width) + 0.5 + self.shift[0]
        py = np.arange(y, y + height) + 0.5 + self.shift[1]
        found = []
        for plane in knots:
            wide = np.stack([np.interp(px, gx, row) for row in plane])
            found.append(np.stack([np.interp(py, gy, column) for column in wide.T], 1))
        return found[0], found[1]


def _to_mean(how: Radiometry, planes: Floats) -> Floats:
    """Numbers of the file to what may be averaged: power for SAR."""
    if how.sensor is not Sensor.SAR or how.kind == "intensity":
        return planes
    unit = planes * (how.scale[0] if how.scale else 1.0) + (how.offset[0] if how.offset else 0.0)
    return np.power(10.0, unit / 10.0) if how.kind == "db" else unit * unit


def _from_mean(how: Radiometry, planes: Floats) -> Floats:
    """The inverse of `_to_mean`."""
    if how.sensor is not Sensor.SAR or how.kind == "intensity":
        return planes
    unit = 10.0 * np.log10(np.maximum(planes, 1e-20)) if how.kind == "db" else np.sqrt(planes)
    return (unit - (how.offset[0] if how.offset else 0.0)) / (how.scale[0] if how.scale else 1.0)


@compiled
def _gather(planes, valid, corner, places, reach, out, share):  # type: ignore[no-untyped-def]
    """Sums under a triangle of half-widths `reach` at `places`, weights in all 1, of valid pixels only.

    Places are pixels of the scene, of which `planes` begin at `corner`: parts of a scene give the same to the bit.
    """
    rows, columns = valid.shape
    (x0, y0), (sx, sy), (rx, ry) = corner, places, reach
    for i in range(sx.shape[0]):
        for j in range(sx.shape[1]):
            x, y = sx[i, j] - 0.5, sy[i, j] - 0.5  # of pixel centres
            whole = 0.0
            for q in range(int(np.ceil(y - ry)), int(np.floor(y + ry)) + 1):
                wy = 1.0 - abs(q - y) / ry
                for p in range(int(np.ceil(x - rx)), int(np.floor(x + rx)) + 1):
                    w = wy * (1.0 - abs(p - x) / rx)
                    whole += w
                    u, v = p - x0, q - y0
                    if 0 <= v < rows and 0 <= u < columns and valid[v, u] and w > 0.0:
                        share[i, j] += w
                        for b in range(planes.shape[0]):
                            out[b, i, j] += w * planes[b, v, u]
            if whole > 0.0:
                share[i, j] /= whole
                for b in range(planes.shape[0]):
                    out[b, i, j] /= whole


def measure(reference: Onto, other: Onto) -> tuple[float, float, float]:
    """The shift (dx, dy) of the other's picture in pixels of the grid, and how clear it is; nan where nothing matches.

    Shifts of up to an eighth of a window (64 px) are found.
    """
    width, height = reference.shared.width, reference.shared.height
    w, h = min(_LOOK, width), min(_LOOK, height)
    total = np.zeros((h, w), np.complex128)
    count = 0
    for y in sorted({round(t * (height - h)) for t in np.linspace(0, 1, _LOOKS)}):
        for x in sorted({round(t * (width - w)) for t in np.linspace(0, 1, _LOOKS)}):
            first, second = (_edges(each, (x, y, w, h)) for each in (reference, other))
            if first is None or second is None:
                continue
            cross = np.conj(np.fft.fft2(first)) * np.fft.fft2(second)
            total += cross / np.maximum(np.abs(cross), 1e-12 * np.abs(cross).max() + 1e-300)
            count += 1
    if not count:
        return np.nan, np.nan, 0.0
    fx, fy = np.fft.fftfreq(w), np.fft.fftfreq(h)
    low = np.exp(-2 * (np.pi * _BLUR) ** 2 * (fx[None] ** 2 + fy[:, None] ** 2))
    surface = np.fft.fftshift(np.fft.ifft2(total * low).real)
    cy, cx, ry, rx = h // 2, w // 2, max(2, h // 8), max(2, w // 8)
    near = surface[cy - ry : cy + ry + 1, cx - rx : cx + rx + 1]
    i, j = np.unravel_index(int(near.argmax()), near.shape)
    clear = float((near[i, j] - surface.mean()) / max(surface.std(), 1e-300))
    if clear < _CLEAR or not (0 < i < near.shape[0] - 1 and 0 < j < near.shape[1] - 1):
        return np.nan, np.nan, clear
    dx = j - rx + _vertex(near[i, j - 1 : j + 2])
    dy = i - ry + _vertex(near[i - 1 : i + 2, j])
    return float(dx), float(dy), clear


def _edges(each: Onto, window: tuple[int, int, int, int]) -> Floats | None:
    """Gradient magnitude of a window as the model sees it, faded out at the border; None where half is not valid."""
    raw, valid = each.read(window)
    if valid.mean() < 0.5:
        return None
    how = replace(each.scene.radiometry, bands=tuple(range(1, len(raw) + 1)))
    grey = how.apply(raw, valid).mean(0).astype(np.float64)
    for _ in range(2):  # a small blur, against speckle
        grey = (np.roll(grey, 1, 0) + 2 * grey + np.roll(grey, -1, 0)) / 4
        grey = (np.roll(grey, 1, 1) + 2 * grey + np.roll(grey, -1, 1)) / 4
    inner = valid.copy()
    for axis in (0, 1):
        for step in (-3, -2, -1, 1, 2, 3):
            inner &= np.roll(valid, step, axis)
    down, across = np.gradient(grey)
    size = np.where(inner, np.hypot(down, across), 0.0)
    size[inner] -= size[inner].mean() if inner.any() else 0.0
    return size * np.hanning(window[3])[:, None] * np.hanning(window[2])[None]


def _vertex(three: Floats) -> float:
    """Where a Gaussian through three values, the middle one the largest, peaks: -.5 to .5."""
    a, b, c = np.log(np.maximum(three, 1e-12 * three[1]))
    bend = a - 2 * b + c
    return float(np.clip((a - c) / (2 * bend), -0.5, 0.5)) if bend < 0 else 0.0


def align(
    scenes: Mapping[str, Scene],
    folder: str | os.PathLike[str],
    reference: str | None = None,
    *,
    correct: bool = False,
) -> tuple[dict[str, Scene], list[Shift]]:
    """Write each scene on the shared grid as `folder/<sensor>.tif` with the joint mask, and open them.

    The files hold the bands that the model reads, in their unit; the scenes have the radiometry of those they come
    from. Files that an earlier call with the same scenes and choices has written are taken as they are. With `correct`
    the measured shifts are taken out. Raises as `shared_grid`; OutputError where files cannot be written, or were
    written for other scenes.
    """
    chosen, shared = shared_grid(scenes, reference)
    folder = Path(folder)
    note = folder / "shifts.json"
    asked = {
        "sources": {s: scene.identity for s, scene in scenes.items()},
        "reference": chosen,
        "correct": correct,
    }
    if note.exists():
        held = json.loads(note.read_text(encoding="utf-8"))
        if held["asked"] != asked:
            raise OutputError(
                f"{folder} holds scenes co-registered otherwise; remove it, or write elsewhere with -o"
            )
        shifts = [Shift(**each) for each in held["shifts"]]
    else:
        plain = {sensor: Onto(scene, shared) for sensor, scene in scenes.items()}
        shifts = []
        for sensor, scene in scenes.items():
            if sensor == chosen:
                continue
            dx, dy, clear = measure(plain[chosen], plain[sensor])
            gsd = shared.georef.ground_sampling_distance(shared.width / 2, shared.height / 2) or np.nan
            told = np.isfinite(dx) and correct
            if told:
                plain[sensor] = Onto(scene, shared, (dx, dy))
            shifts.append(
                Shift(
                    sensor=sensor,
                    reference=chosen,
                    dx=dx,
                    dy=dy,
                    clearness=clear,
                    metres=float(np.hypot(dx, dy) * gsd),
                    corrected=bool(told),
                )
            )
        _write(plain, chosen, shared, folder)
        with draft(note) as hidden:
            hidden.write_text(
                json.dumps({"asked": asked, "shifts": [asdict(s) for s in shifts]}), encoding="utf-8"
            )
    opened = {}
    for sensor, scene in scenes.items():
        how = scene.radiometry
        how = replace(how, bands=tuple(range(1, len(how.bands) + 1)))
        opened[sensor] = open_scene(
            folder / f"{sensor}.tif", sensor, SceneOptions(collar=False, radiometry=how)
        )
    return opened, shifts


def _write(onto: Mapping[str, Onto], chosen: str, shared: Shared, folder: Path) -> None:
    """All files block by block, each valid where all are."""
    make_folder(folder)
    place = {"crs": rasterio.CRS.from_user_input(shared.georef.crs_text), "transform": shared.georef.affine}
    own = onto[chosen].scene.georef.to_pixel(*shared.georef.to_map(0.0, 0.0))
    corner = tuple(round(float(v)) for v in own)
    with (
        ExitStack() as stack,
        rasterio.Env(session=DummySession(), GDAL_TIFF_INTERNAL_MASK=True, GDAL_PAM_ENABLED=False),
        ExitStack() as opened,  # closed before the first file takes its name
    ):
        files = {}
        for sensor, each in onto.items():
            hidden = stack.enter_context(
                draft(folder / f"{sensor}.tif", failures=(rasterio.errors.RasterioError,))
            )
            files[sensor] = opened.enter_context(
                rasterio.open(
                    hidden, "w", driver="GTiff", width=shared.width, height=shared.height,
                    count=len(each.scene.radiometry.bands), dtype=each.dtype.name, tiled=True, blockxsize=512,
                    blockysize=512, compress="zstd", zstd_level=1, bigtiff="IF_SAFER", **place,
                )
            )  # fmt: skip
            if each.scene.acquired is not None:
                files[sensor].update_tags(ACQUISITION_TIME=each.scene.acquired.isoformat())
        for y in range(0, shared.height, _BLOCK):
            for x in range(0, shared.width, _BLOCK):
                window = (x, y, min(_BLOCK, shared.width - x), min(_BLOCK, shared.height - y))
                parts = {}
                for sensor, each in onto.items():
                    parts[sensor] = _own(each, window, corner) if sensor == chosen else each.read(window)
                joint = np.logical_and.reduce([valid for _, valid in parts.values()])
                for sensor, (raw, _) in parts.items():
                    files[sensor].write(raw, window=Window(*window))
                    files[sensor].write_mask(joint, window=Window(*window))


def _own(
    each: Onto, window: tuple[int, int, int, int], corner: tuple[int, ...]
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """The reference's own numbers in a window of the grid."""
    x, y, width, height = window
    raw, valid = each.scene.read_both((x + corner[0], y + corner[1], width, height))
    picked = raw[[b - 1 for b in each.scene.radiometry.bands]]
    return magnitude(picked).astype(each.dtype), valid
