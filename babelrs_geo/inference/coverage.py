"""How each tile of a grid ended, and the part of a scene that was asked for."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

DETECTED = (
    "detected"  # looked at, and the centre of at least one detection lies in the tile's inner rectangle
)
EMPTY = "empty"  # looked at, nothing there
INVALID = "invalid"  # not one valid pixel: nodata, collar, masked
FAILED = "failed"  # its pixels could not be read
OUTSIDE = "outside"  # outside the area asked for
STATES = (DETECTED, EMPTY, INVALID, FAILED, OUTSIDE)


class Area(Protocol):
    """The part of a scene that was asked for."""

    def touches(self, rects: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which rectangles (N, 4) `x, y, width, height` in scene pixels share ground with the area."""

    def holds(self, px: NDArray[np.float64], py: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Which points, in scene pixels, lie in the area."""


@dataclass(frozen=True)
class Coverage:
    """How each tile of the grid ended: every tile is here exactly once, in the grid's row-major order."""

    inners: NDArray[np.int64]
    """(N, 4) `x, y, width, height` in scene pixels: the tiles' own ground, a partition of the scene."""
    states: tuple[str, ...]
    """(N,) one of `STATES`."""
    reasons: tuple[str, ...]
    """(N,) why a tile failed, in one line; empty for all others."""

    def __len__(self) -> int:
        """Tiles in the grid."""
        return len(self.states)

    def counts(self) -> dict[str, int]:
        """Tiles by state, every state named, in the order of `STATES`."""
        found = Counter(self.states)
        return {state: found[state] for state in STATES}

    @property
    def looked_at(self) -> int:
        """Tiles that went through the detector."""
        return sum(state in (DETECTED, EMPTY) for state in self.states)
