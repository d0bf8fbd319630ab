"""Raw numbers to model input in one pass, bit for bit what `Radiometry.apply` gives, at a tenth of its cost."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from babelrs_geo.errors import ParameterError
from babelrs_geo.kernels import compiled
from babelrs_geo.scenes.blocks import Mosaic, Patch, Piece
from babelrs_geo.scenes.memory import MEMORY
from babelrs_geo.sensors import Radiometry

_LINEAR = {"amplitude", "kelvin", "centikelvin", "celsius", "counts", "reflectance", "uint8"}
_NONE = np.zeros((1, 1), bool)  # in place of a mask
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)

Shown = NDArray[np.float32] | NDArray[np.uint8]
"""What is shown to a model: floats in [0, 1], or bytes, of which it takes `x / 255`."""
Kernel = Callable[[NDArray[Any], NDArray[np.bool_], bool, tuple[int, ...], Shown], None]
"""Called with raw numbers (band, y, x), a mask (y, x), whether it counts, a place, and the output (band, y, x). The
place is `(y, x)` in the first two, `(y, x)` in the output, rows and columns. Arrays are contiguous: loops become vector
code.
"""

_vectorised = partial(compiled, error_model="numpy")  # else each division looks for a zero, number by number


def develop(
    radiometry: Radiometry, raw: NDArray[Any], valid: NDArray[np.bool_], out: Shown | None = None
) -> Shown:
    """Raw numbers `(band, y, x)` to model input `(3, y, x)` in [0, 1], 0 where not `valid` `(y, x)`; into `out`
    where given. Bytes may stay bytes, of which model input is `x / 255`.
    """
    if out is None:
        out = np.empty((3, *valid.shape), np.float32)
    high, wide = valid.shape
    piece = Piece(np.ascontiguousarray(raw), np.ascontiguousarray(valid))
    if not develop_mosaic(radiometry, Mosaic(high, wide, (Patch(piece, (0, 0), (0, 0), (high, wide)),)), out):
        out[:] = radiometry.apply(raw, valid)
    return out


def develop_mosaic(radiometry: Radiometry, mosaic: Mosaic, out: Shown) -> bool:
    """The same straight from the pieces of a window; False, and nothing done, where numbers of this kind have no such
    pass.
    """
    kernel = _kernel(radiometry, mosaic.patches[0].piece.raw.dtype.str, out.dtype.str)
    if kernel is None:
        return False
    own = out[: len(radiometry.bands)]
    whole: Shown = own if own.flags.c_contiguous else np.empty(own.shape, own.dtype)
    for patch in mosaic.patches:
        valid = patch.piece.valid
        mask, masked = (_NONE, False) if valid is None else (valid, True)
        kernel(patch.piece.raw, mask, masked, (*patch.there, *patch.here, *patch.size), whole)
    if whole is not own:
        own[:] = whole
    if len(own) < len(out) and out.strides[0]:  # three planes, not one shown three times
        out[1:] = own
    return True


def sheet(
    radiometry: Radiometry, images: int, high: int, wide: int, dtype: DTypeLike = np.float32
) -> NDArray[Any]:
    """Memory for so many images, `(images, 3, y, x)`, with anything in it. Grey ones are one plane shown three times, a
    third of the memory to write: what is written to one channel is in all of them.
    """
    bands = len(radiometry.bands)
    planes = MEMORY.empty((images, bands, high, wide), dtype)
    if bands == 3:
        return planes
    strides = (planes.strides[0], 0, *planes.strides[2:])
    return np.lib.stride_tricks.as_strided(planes, (images, 3, high, wide), strides)


@lru_cache(maxsize=8)
def _kernel(radiometry: Radiometry, dtype: str, wanted: str) -> Kernel | None:
    """One pass from numbers of this type to those wanted; None where there is none."""
    number, as_bytes = np.dtype(dtype), np.dtype(wanted) == np.uint8
    if radiometry.is_exact and number == np.uint8:
        return _as_they_are if as_bytes else _bytes
    if as_bytes:
        raise ParameterError(f"bytes were asked of numbers that are not ({number}); ask for float32")
    if number.kind in "ui" and number.itemsize <= 2:
        limits = np.iinfo(number)
        every = np.arange(limits.min, limits.max + 1).astype(number)
        shown = np.broadcast_to(every, (len(radiometry.bands), 1, len(every)))
        table = radiometry.apply(shown, np.ones((1, len(every)), bool))[:, 0]
        return _with(_look_up, np.ascontiguousarray(table), int(limits.min))
    if number == np.float32 and radiometry.kind in _LINEAR | {"intensity"}:
        bands = len(radiometry.bands)
        scale, offset = radiometry.scale or (1.0,) * bands, radiometry.offset or (0.0,) * bands
        low, high = np.array(radiometry.low), np.array(radiometry.high)
        if radiometry.kind == "intensity":
            low, high = np.sqrt(np.maximum(low, 0.0)), np.sqrt(np.maximum(high, 0.0))
        factors = np.array([scale, offset, low, high - low], np.float32)
        scaled = bool(radiometry.scale or radiometry.offset) and not radiometry.is_exact
        return _with(_roots if radiometry.kind == "intensity" else _lines, factors, scaled)
    return None


def _as_they_are(
    raw: NDArray[Any], valid: NDArray[np.bool_], masked: bool, place: tuple[int, ...], out: Shown
) -> None:
    """Bytes, copied."""
    top, left, row, column, high, wide = place
    here = out[:, row : row + high, column : column + wide]
    here[:] = raw[:, top : top + high, left : left + wide]
    if masked:
        here[:, ~valid[top : top + high, left : left + wide]] = 0


def _with(kernel: Callable[..., None], *more: Any) -> Kernel:
    def call(*given: Any) -> None:
        kernel(*given, *more)

    return call


@_vectorised
def _finish(y, valid, place, out):  # type: ignore[no-untyped-def]  # numba infers
    """Zero where row `y` of a place is not valid."""
    top, left, row, column, _, wide = place
    seen = valid[top + y, left : left + wide]
    for b in range(out.shape[0]):
        here = out[b, row + y, column : column + wide]
        for x in range(wide):
            here[x] = here[x] if seen[x] else np.float32(0.0)


@_vectorised
def _bytes(raw, valid, masked, place, out):  # type: ignore[no-untyped-def]
    """`x / 255` of bytes."""
    top, left, row, column, high, wide = place
    for y in range(high):
        for b in range(out.shape[0]):
            there, here = raw[b, top + y, left : left + wide], out[b, row + y, column : column + wide]
            for x in range(wide):
                here[x] = np.float32(there[x]) / np.float32(255.0)
        if masked:
            _finish(y, valid, place, out)


@_vectorised
def _look_up(raw, valid, masked, place, out, table, least):  # type: ignore[no-untyped-def]
    """Model input (band, number) of every number from `least` on."""
    top, left, row, column, high, wide = place
    for y in range(high):
        for b in range(out.shape[0]):
            there, here = raw[b, top + y, left : left + wide], out[b, row + y, column : column + wide]
            for x in range(wide):
                here[x] = table[b, np.uint64(np.int64(there[x]) - least)]
        if masked:
            _finish(y, valid, place, out)


@_vectorised
def _lines(raw, valid, masked, place, out, factors, scaled):  # type: ignore[no-untyped-def]
    """Stretched by factors (4, band): scale, offset, low, high - low."""
    top, left, row, column, high, wide = place
    for y in range(high):
        for b in range(out.shape[0]):
            there, here = raw[b, top + y, left : left + wide], out[b, row + y, column : column + wide]
            scale, offset, low, span = factors[0, b], factors[1, b], factors[2, b], factors[3, b]
            for x in range(wide):
                value = there[x]
                if scaled:
                    value = value * scale + offset
                here[x] = min(max((value - low) / span, _ZERO), _ONE) + _ZERO
        if masked:
            _finish(y, valid, place, out)


@_vectorised
def _roots(raw, valid, masked, place, out, factors, scaled):  # type: ignore[no-untyped-def]
    """The same of square roots, for the one band of SAR."""
    top, left, row, column, high, wide = place
    scale, offset, low, span = factors[0, 0], factors[1, 0], factors[2, 0], factors[3, 0]
    for y in range(high):
        there, here = raw[0, top + y, left : left + wide], out[0, row + y, column : column + wide]
        for x in range(wide):
            value = there[x]
            if scaled:
                value = value * scale + offset
            here[x] = min(max((np.sqrt(max(value, _ZERO)) - low) / span, _ZERO), _ONE) + _ZERO
        if masked:
            _finish(y, valid, place, out)
