"""Bring a window to another scale so that tiles agree on the pixels they share.

Every output pixel is a function of its place in the whole resampled scene and of nothing else: weights come
from global indices and sums run in one order, so two windows hold the same bits where they overlap. The
filter is a triangle (bilinear when enlarging, antialiased bilinear when reducing), and pixels that are not
valid take no part: `sum(w v x) / sum(w v)`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from babelrs_geo.kernels import compiled

_STRIP_PIXELS = 1 << 23  # read at once where a far smaller scale has no overview to come from

Window = tuple[int, int, int, int]
Read = tuple[NDArray[Any], NDArray[np.bool_]]


@dataclass(frozen=True)
class Taps:
    """For a run of output pixels along one axis: which input pixels they take, and how much of each."""

    first: int
    """First input pixel needed."""
    last: int
    """The input pixel after the last one needed."""
    index: NDArray[np.int64]
    """(n, k) input pixels, relative to `first`."""
    weight: NDArray[np.float32]
    """(n, k) weights; each row sums to 1 but for rounding."""


@dataclass(frozen=True)
class Source:
    """What a window at another scale is made of."""

    parts: tuple[Window, ...]
    """`(x, y, w, h)` in pixels of what is read: strips, downward."""
    means: int
    """Pixels a side that are first brought to their mean; 1 for none."""
    down: Taps
    across: Taps

    @classmethod
    def of(cls, window: Window, shape: tuple[int, int], read: tuple[int, int]) -> Source:
        """What a window of a scene of `shape` rows and columns needs of the same scene in `read` rows and columns."""
        x, y, w, h = window
        high, wide = read
        factors = high / shape[0], wide / shape[1]
        left = min(factors)
        k = (
            int(left / 2) if left > 4 else 1
        )  # the filter then spans few pixels, and memory stays that of strips
        down = taps(y, y + h, factors[0] / k, -(-high // k))
        across = taps(x, x + w, factors[1] / k, -(-wide // k))
        x0, x1 = across.first * k, min(across.last * k, wide)
        step = max(1, _STRIP_PIXELS // ((x1 - x0) * k)) * k
        end = min(down.last * k, high)
        parts = tuple((x0, y0, x1 - x0, min(step, end - y0)) for y0 in range(down.first * k, end, step))
        return cls(parts, k, down, across)

    def resample(self, strips: Iterable[Read]) -> Read:
        """The window from its `parts`, which may come one by one."""
        small = [shrink(*strip, self.means) if self.means > 1 else strip for strip in strips]
        raw = np.concatenate([s[0] for s in small], axis=1)
        valid = np.concatenate([s[1] for s in small], axis=0)
        return resample(raw, valid, self.down, self.across)


def taps(start: int, stop: int, factor: float, size: int) -> Taps:
    """Taps of output pixels `start` to `stop`, each `factor` input pixels wide; the input has `size`."""
    reach = max(factor, 1.0)
    centre = (np.arange(start, stop) + 0.5) * factor
    low = np.floor(centre - reach).astype(np.int64)
    index = low[:, None] + np.arange(int(np.ceil(2 * reach)) + 1)
    weight = np.maximum(0.0, 1.0 - np.abs(index + 0.5 - centre[:, None]) / reach)
    weight[(index < 0) | (index >= size)] = 0.0
    # where sizes were rounded, an output pixel may lie past the last input centre: it takes the nearest
    lost = weight.sum(axis=1) <= 0.0
    weight[lost, 0], index[lost, 0] = 1.0, size - 1
    index = np.clip(index, 0, size - 1)
    weight /= weight.sum(axis=1, keepdims=True)
    used = index[weight > 0.0]
    first, last = int(used.min()), int(used.max()) + 1
    return Taps(first, last, np.clip(index - first, 0, last - first - 1), weight.astype(np.float32))


def resample(
    raw: NDArray[Any], valid: NDArray[np.bool_], down: Taps, across: Taps
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """`(band, y, x)` and `(y, x)`, cut to the taps' input ranges, to the taps' output pixels.

    Floats come back (float64 for types that float32 would round); a pixel is valid where at least half of its
    weight is.
    """
    kind = np.float32 if raw.dtype.itemsize <= 2 or raw.dtype == np.float32 else np.float64
    out = np.empty((raw.shape[0], len(down.index), len(across.index)), kind)
    share = np.empty(out.shape[1:], kind)
    _filter(valid.astype(kind), down.index, down.weight, across.index, across.weight, share)
    ok = share >= 0.5
    for band, plane in zip(raw, out, strict=True):
        seen = np.where(valid, band, 0).astype(kind)
        _filter(seen, down.index, down.weight, across.index, across.weight, plane)
        plane[ok] /= share[ok]
        plane[~ok] = 0.0
    return out, ok


def shrink(raw: NDArray[Any], valid: NDArray[np.bool_], k: int) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Means of k by k pixels, the last row and column of boxes perhaps smaller; valid where half the box or
    more is.
    """
    kind = np.float32 if raw.dtype.itemsize <= 2 or raw.dtype == np.float32 else np.float64
    rows, columns = np.arange(0, valid.shape[0], k), np.arange(0, valid.shape[1], k)

    def total(plane: NDArray[Any]) -> NDArray[Any]:
        return np.add.reduceat(np.add.reduceat(plane, rows, axis=0), columns, axis=1)

    share, whole = total(valid.astype(kind)), total(np.ones(valid.shape, kind))
    ok = (share * 2 >= whole) & (share > 0)
    out = np.zeros((raw.shape[0], *ok.shape), kind)
    for i, band in enumerate(raw):
        np.divide(total(np.where(valid, band, 0).astype(kind)), share, out=out[i], where=ok)
    return out, ok


@compiled
def _filter(plane, rows, row_weights, columns, column_weights, out):  # type: ignore[no-untyped-def]
    """Rows, then columns of one plane (y, x) into `out`, each sum in the order of its taps."""
    wide = np.zeros((rows.shape[0], plane.shape[1]), out.dtype)
    for i in range(rows.shape[0]):
        for j in range(rows.shape[1]):
            weight = out.dtype.type(row_weights[i, j])
            if weight != 0:
                source = rows[i, j]
                for c in range(plane.shape[1]):
                    wide[i, c] += weight * plane[source, c]
    for i in range(rows.shape[0]):
        for c in range(columns.shape[0]):
            total = out.dtype.type(0)
            for j in range(columns.shape[1]):
                total += out.dtype.type(column_weights[c, j]) * wide[i, columns[c, j]]
            out[i, c] = total
