"""What an oracle detector sees; without torch, for processes that must start at once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def patches(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Bounds (N, 4) x, y, width, height of the connected parts (8 neighbours) of a mask."""
    rows, columns = np.nonzero(mask)
    labels = np.zeros(np.add(mask.shape, 2), np.int64)
    inside = labels[1:-1, 1:-1]
    inside[mask] = np.arange(1, len(rows) + 1)
    while True:  # every pixel takes the highest number among its neighbours, until none changes
        across = np.maximum(np.maximum(labels[:, :-2], labels[:, 1:-1]), labels[:, 2:])
        highest = np.maximum(np.maximum(across[:-2], across[1:-1]), across[2:])
        spread = np.where(mask, highest, 0)
        if (spread == inside).all():
            break
        inside[:] = spread
    names, part = np.unique(inside[mask], return_inverse=True)
    low, high = np.full((len(names), 2), 1 << 30), np.full((len(names), 2), -1)
    points = np.stack([columns, rows], axis=1)
    np.minimum.at(low, part, points)
    np.maximum.at(high, part, points + 1)
    return np.concatenate([low, high - low], axis=1).astype(np.float64)
