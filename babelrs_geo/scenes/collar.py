"""The black collar that many orthomosaics have without declaring it: solid black connected to the border.

Found once a scene, on a lattice of cells: single pixels up to 8192 pixels a side, larger cells (one sample
each, read from an overview where there is one) beyond. Black cells are flooded from the border inward,
4-connected, a block at a time, so that only the border and the collar itself are ever read, and memory is at
most 64 MB and a few strips whatever the scene's size. Only cells whose neighbours are black too carry the
flood: a dark sea where some pixels happen to be 0 is no collar, nor does the flood leak along a shadow.

A pixel then belongs to the collar if it is black itself *and* within reach of the flood: as many cells as
were asked to be black around, so that the collar's edge is exact, or eight pixels (a JPEG block) where lossy
compression smeared it, and black then means up to 8 of 255. That depends on the pixel alone, never on the
window it is read in: tiles agree. Without a georeference only exact zeros count, whatever the compression: a
picture of a dark sea is no mosaic, and must keep its values.
"""

from __future__ import annotations

import heapq
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from babelrs_geo.kernels import compiled

LATTICE = 8192  # cells a side at most
SMEAR = 8  # pixels a lossy block reaches, and the 8-bit values it smears black to
_BLOCK = 508  # pixels a side that are read at once, with their margin no more than one block of most files, or 32 cells
_BLACK, _FLOODED, _NEAR = 1, 2, 4  # solid black not reached yet, or reached; within reach of the latter

ReadBlack = Callable[[tuple[int, int, int, int], tuple[int, int]], NDArray[np.bool_]]


@dataclass(frozen=True)
class Collar:
    """Where the collar may lie: cells near the flood, packed. Ask `covers`; the pixel itself must be black
    besides.
    """

    cell: int
    """Scene pixels a side of a cell."""
    shape: tuple[int, int]
    """Rows and columns of cells."""
    tolerance: int
    """The largest number that is black."""
    packed: bytes
    """Cells near the flood, bits row by row, deflated; empty where there is no collar."""

    def covers(self, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.bool_] | None:
        """For scene rows (H,) and columns (W,): True (H,W) where a black pixel would be collar; None:
        nowhere.
        """
        if not self.packed:
            return None
        r, c = rows // self.cell, columns // self.cell
        first, last = int(c.min()) // 8, int(c.max()) // 8 + 1
        cells = self._cells[r.min() : r.max() + 1, first:last]
        if not cells.any():
            return None
        bits = np.unpackbits(cells, axis=1)
        return bits[np.ix_(r - r.min(), c - first * 8)].astype(bool)

    def meets(self, window: tuple[int, int, int, int]) -> bool:
        """False where no pixel of a window `(x, y, w, h)` of the scene can be collar."""
        if not self.packed:
            return False
        x, y, w, h = window
        rows = slice(y // self.cell, (y + h - 1) // self.cell + 1)
        columns = slice(x // self.cell // 8, (x + w - 1) // self.cell // 8 + 1)
        return bool(self._cells[rows, columns].any())

    @property
    def _cells(self) -> NDArray[np.uint8]:
        held: NDArray[np.uint8] | None = self.__dict__.get("_unpacked")
        if held is None:
            held = np.frombuffer(zlib.decompress(self.packed), np.uint8).reshape(self.shape[0], -1)
            self.__dict__["_unpacked"] = held
        return held

    def __getstate__(self) -> dict[str, object]:
        return {k: v for k, v in self.__dict__.items() if k != "_unpacked"}


def find(width: int, height: int, tolerance: int, read_black: ReadBlack) -> Collar:
    """Flood the black from the border.

    `read_black(window in scene pixels, cells' shape)` says which cells are black; `tolerance` above 0 says
    that the edge is smeared.
    """
    cell = -(-max(width, height) // LATTICE)
    solid = 2 if cell == 1 else 1  # so a collar is at least 3 pixels wide at the border
    rows, columns = -(-height // cell), -(-width // cell)
    block = max(_BLOCK // cell, 32)
    state = np.zeros((rows, columns), np.uint8)  # pages that are never touched take no memory
    down, across = -(-rows // block), -(-columns // block)
    border = {
        (r, c) for r in range(down) for c in range(across) if r in (0, down - 1) or c in (0, across - 1)
    }
    queue, queued, seen, wet = sorted(border), set(border), set(), set()
    while queue:  # row-major, so that GDAL's cache serves files stored in strips
        r, c = heapq.heappop(queue)
        queued.discard((r, c))
        r0, c0 = r * block, c * block
        r1, c1 = min(r0 + block, rows), min(c0 + block, columns)
        if (r, c) not in seen:
            seen.add((r, c))
            ra, ca, rb, cb = (
                max(r0 - solid, 0),
                max(c0 - solid, 0),
                min(r1 + solid, rows),
                min(c1 + solid, columns),
            )
            window = (
                ca * cell,
                ra * cell,
                min(cb * cell, width) - ca * cell,
                min(rb * cell, height) - ra * cell,
            )
            light = ~read_black(window, (rb - ra, cb - ca))
            if not light.all():  # else nothing is black, as it was
                state[r0:r1, c0:c1] = ~_dilated(light, solid)[r0 - ra : r1 - ra, c0 - ca : c1 - ca]
        if not (state[r0:r1, c0:c1] == _BLACK).any():
            continue  # most scenes have no collar, and never need the kernel
        wet.add((r, c))
        up, low, left, right = _grow(state, r0, r1, c0, c1)
        for ok, place in ((up, (r - 1, c)), (low, (r + 1, c)), (left, (r, c - 1)), (right, (r, c + 1))):
            if ok and place not in queued and 0 <= place[0] < down and 0 <= place[1] < across:
                heapq.heappush(queue, place)
                queued.add(place)
    reach = solid + (-(-SMEAR // cell) if tolerance else int(cell > 1))
    found = False
    for r, c in wet:
        part = state[_around(r, block, reach), _around(c, block, reach)]
        flooded = (part & _FLOODED) > 0
        if flooded.any():
            found = True
            part[_dilated(flooded, reach)] |= _NEAR
    if not found:
        return Collar(cell, (rows, columns), tolerance, b"")
    packed, none = [], np.zeros((1, -(-columns // 8)), np.uint8).tobytes()
    near = {r + step for r, _ in wet for step in (-1, 0, 1)}
    for r in range(down):
        lines = state[r * block : (r + 1) * block]
        packed.append(np.packbits(lines & _NEAR, axis=1).tobytes() if r in near else none * len(lines))
    return Collar(cell, (rows, columns), tolerance, zlib.compress(b"".join(packed), 1))


def _around(number: int, block: int, margin: int) -> slice:
    """The cells of a row or column of blocks, with a margin."""
    return slice(max(number * block - margin, 0), (number + 1) * block + margin)


def _dilated(mask: NDArray[np.bool_], times: int) -> NDArray[np.bool_]:
    """Each True cell and its neighbours up to `times` away, along rows, columns and diagonals."""
    for _ in range(times):
        tall = mask.copy()
        tall[1:] |= mask[:-1]
        tall[:-1] |= mask[1:]
        mask = tall.copy()
        mask[:, 1:] |= tall[:, :-1]
        mask[:, :-1] |= tall[:, 1:]
    return mask


@compiled
def _grow(state, r0, r1, c0, c1):  # type: ignore[no-untyped-def]  # numba infers
    """Flood the black cells of one block from the scene's border and from flooded cells just outside the
    block.

    Returns whether the flood grew along its upper, lower, left and right edge: those neighbours must be
    looked at (again).
    """
    rows, columns = state.shape
    stack = np.empty(((r1 - r0) * (c1 - c0), 2), np.int32)
    top = 0
    for r in range(r0, r1):
        step = 1 if r == r0 or r == r1 - 1 else max(1, c1 - 1 - c0)
        for c in range(c0, c1, step):
            if state[r, c] != 1:
                continue
            seed = r == 0 or c == 0 or r == rows - 1 or c == columns - 1
            seed = (
                seed
                or (r == r0 and r > 0 and state[r - 1, c] == 2)
                or (r == r1 - 1 and r1 < rows and state[r1, c] == 2)
            )
            seed = (
                seed
                or (c == c0 and c > 0 and state[r, c - 1] == 2)
                or (c == c1 - 1 and c1 < columns and state[r, c1] == 2)
            )
            if seed:
                state[r, c] = 2
                stack[top, 0], stack[top, 1] = r, c
                top += 1
    up = low = left = right = False
    while top > 0:
        top -= 1
        r, c = stack[top, 0], stack[top, 1]
        up, low, left, right = up or r == r0, low or r == r1 - 1, left or c == c0, right or c == c1 - 1
        for k in range(4):
            p = r + (k == 0) - (k == 1)
            q = c + (k == 2) - (k == 3)
            if r0 <= p < r1 and c0 <= q < c1 and state[p, q] == 1:
                state[p, q] = 2
                stack[top, 0], stack[top, 1] = p, q
                top += 1
    return up, low, left, right
