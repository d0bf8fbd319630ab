"""How a scene is cut: integer rectangles that overlap where they are read and partition where they are owned.

A `Grid` is a function of its four numbers alone. Along one axis of length `size` the outer tiles start every
`tile - overlap` pixels; the last one is shifted back so that it ends with the scene. The seam between two
neighbours lies in the middle of what they share, and the inner rectangles run from seam to seam. It follows
that

* the inners partition the scene, and every outer holds its inner and stays inside the scene;
* any interval no longer than `overlap` lies whole in at least one outer, so an object no larger than the
  overlap is seen whole at least once;
* a scene smaller than a tile is one tile of its own size.

No I/O, no geography: pixels only (x right, y down, `(0, 0)` the outer corner of the first pixel).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from operator import index
from typing import NamedTuple

from babelrs_geo.errors import ParameterError


class Rect(NamedTuple):
    """A rectangle of whole pixels: half-open, `x <= column < x1` and `y <= row < y1`."""

    x: int
    """First column."""
    y: int
    """First row."""
    width: int
    """Columns."""
    height: int
    """Rows."""

    @property
    def x1(self) -> int:
        """The column after the last one."""
        return self.x + self.width

    @property
    def y1(self) -> int:
        """The row after the last one."""
        return self.y + self.height

    @property
    def slices(self) -> tuple[slice, slice]:
        """Rows, then columns: `array[..., *rect.slices]` cuts the rectangle out of an array `(..., y, x)`."""
        return slice(self.y, self.y1), slice(self.x, self.x1)

    def contains(self, other: Rect) -> bool:
        """True where every pixel of `other` is also a pixel of this rectangle."""
        return self.x <= other.x and self.y <= other.y and other.x1 <= self.x1 and other.y1 <= self.y1


@dataclass(frozen=True, slots=True)
class Tile:
    """One place to look: what is read and what of it is owned. A tile whose inner leaves its outer cannot be
    built.
    """

    index: int
    """Place in the grid, row-major, from 0."""
    outer: Rect
    """What is read and shown to the model, in scene pixels."""
    inner: Rect
    """What this tile alone answers for, in scene pixels: the inners of a grid partition the scene."""

    def __post_init__(self) -> None:
        if self.index < 0:
            raise ParameterError(f"a tile's index is {self.index}, but must be 0 or more")
        if min(self.inner.width, self.inner.height) < 1 or min(self.outer.x, self.outer.y) < 0:
            raise ParameterError(
                f"tile {self.index} is empty or starts before the scene: {self.outer}, {self.inner}"
            )
        if not self.outer.contains(self.inner):
            raise ParameterError(
                f"tile {self.index} owns {self.inner}, which leaves what it reads, {self.outer}"
            )


@dataclass(frozen=True, slots=True)
class Grid:
    """The tiles of a scene `width` by `height` pixels, in row-major order: `len`, iteration and `grid[i]`
    work.

    Raises ParameterError where a number is no whole number, a size is below 1, or `overlap` is not in `[0,
    tile)`.
    """

    width: int
    """Scene columns."""
    height: int
    """Scene rows."""
    tile: int = 640
    """Side of an outer tile in pixels; a scene that is smaller gets one tile of its own size."""
    overlap: int = 128
    """Pixels that neighbours share at least; the largest object sure to be seen whole."""

    def __post_init__(self) -> None:
        for name in ("width", "height", "tile", "overlap"):
            value = getattr(self, name)
            try:
                object.__setattr__(self, name, index(value))
            except TypeError:
                raise ParameterError(f"{name} is {value!r}, but must be a whole number of pixels") from None
        for name in ("width", "height", "tile"):
            if getattr(self, name) < 1:
                raise ParameterError(f"{name} is {getattr(self, name)}, but must be at least 1 pixel")
        if self.overlap < 0:
            raise ParameterError(f"overlap is {self.overlap}, but must be 0 pixels or more")
        if self.overlap >= self.tile:
            raise ParameterError(
                f"overlap is {self.overlap} and tile {self.tile}: the overlap must be smaller than the tile; lower "
                "--overlap, or take larger tiles"
            )

    @property
    def columns(self) -> int:
        """Tiles in a row."""
        return _count(self.width, self.tile, self.overlap)

    @property
    def rows(self) -> int:
        """Tiles in a column."""
        return _count(self.height, self.tile, self.overlap)

    def __len__(self) -> int:
        return self.columns * self.rows

    def __iter__(self) -> Iterator[Tile]:
        return (self[i] for i in range(len(self)))

    def order(self, strip: int | None = None, *, paired: bool = False) -> Iterator[int]:
        """The indices of all tiles so that neighbours follow one another: row by row and, where the scene is wider
        than `strip` pixels, in vertical strips of that width or less. A reader that keeps what the next row shares
        with this one then needs memory for a strip alone.

        `paired` takes the last two rows column by column: the last one is shifted back, so that it shares more with
        the one before than other rows do, which nobody has to keep then.
        """
        parts = min(self.columns, -(-self.width // strip)) if strip else 1
        edges = [part * self.columns // parts for part in range(parts + 1)]
        pair = 2 if paired and self.rows > 1 else 0
        for left, right in pairwise(edges):
            for row in range(self.rows - pair):
                yield from range(row * self.columns + left, row * self.columns + right)
            for column in range(left, right) if pair else ():
                yield from ((self.rows - 2) * self.columns + column, (self.rows - 1) * self.columns + column)

    def __getitem__(self, i: int) -> Tile:
        """Tile `i`, counted from the end where negative. Raises IndexError beyond the grid."""
        n = len(self)
        i = index(i)
        if not -n <= i < n:
            raise IndexError(f"tile {i} of a grid of {n}")
        i %= n
        row, column = divmod(i, self.columns)
        x, w, ix, iw = _span(column, self.width, self.tile, self.overlap)
        y, h, iy, ih = _span(row, self.height, self.tile, self.overlap)
        return Tile(i, Rect(x, y, w, h), Rect(ix, iy, iw, ih))


def _count(size: int, tile: int, overlap: int) -> int:
    """Tiles along an axis of `size` pixels: one, and as many steps more as it takes to reach the end."""
    return 1 if size <= tile else 1 - (tile - size) // (tile - overlap)


def _span(i: int, size: int, tile: int, overlap: int) -> tuple[int, int, int, int]:
    """Start and length of outer `i` along an axis, then start and length of its inner."""
    last = _count(size, tile, overlap) - 1
    tile = min(tile, size)

    def start(j: int) -> int:
        return min(j * (tile - overlap), size - tile) if last else 0

    def seam(j: int) -> int:  # between outers j - 1 and j: the middle of what they share
        return (start(j - 1) + tile + start(j)) // 2

    low = seam(i) if i else 0
    high = seam(i + 1) if i < last else size
    return start(i), tile, low, high - low
