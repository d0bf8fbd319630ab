"""Detections: what was found, as arrays side by side, in pixels of a tile or of a scene."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from babelrs_geo.errors import ParameterError


@dataclass(frozen=True, eq=False)
class Detections:
    """N boxes with a score and a class each; rows are selected as in NumPy, `found[found.scores > 0.5]`.

    Anything that NumPy reads is taken (CPU tensors included) and kept as the types below. `ParameterError` is
    raised where lengths differ, a value is not finite or a label names no class.
    """

    boxes: NDArray[np.float64]
    """(N, 5) `cx, cy, w, h, r`: pixels, and degrees counter-clockwise on the image (see `boxes`)."""
    scores: NDArray[np.float32]
    """(N,) confidence, higher is surer."""
    labels: NDArray[np.int64]
    """(N,) positions in `classes`."""
    classes: tuple[str, ...]
    """The names that labels point to; all that could have been found, not only what was."""
    oriented: bool
    """True if the boxes' angles mean something; False for horizontal boxes, whose r is 0."""

    def __post_init__(self) -> None:
        """Bring the fields to their types and refuse what does not fit together."""
        boxes = np.asarray(self.boxes, dtype=np.float64)
        scores = np.asarray(self.scores, dtype=np.float32)
        labels = np.asarray(self.labels, dtype=np.int64)
        if boxes.size == 0:
            boxes = boxes.reshape(0, 5)
        if boxes.ndim != 2 or boxes.shape[1] != 5:
            raise ParameterError(f"boxes have shape {boxes.shape}; expected (N, 5): cx, cy, w, h, r")
        if scores.shape != (len(boxes),) or labels.shape != (len(boxes),):
            raise ParameterError(
                f"{len(boxes)} boxes, scores {scores.shape} and labels {labels.shape}; give one per box"
            )
        classes = tuple(self.classes)
        if len(labels) and (labels.min() < 0 or labels.max() >= len(classes)):
            raise ParameterError(
                f"labels span {labels.min()} to {labels.max()} but there are {len(classes)} classes; "
                "labels are positions in `classes`"
            )
        if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
            raise ParameterError("a box or score is not finite; drop such detections before they get here")
        for name, value in (("boxes", boxes), ("scores", scores), ("labels", labels), ("classes", classes)):
            object.__setattr__(self, name, value)

    @classmethod
    def empty(cls, classes: Sequence[str], oriented: bool) -> Detections:
        """No detections of the given classes."""
        return cls(np.zeros((0, 5)), np.zeros(0, np.float32), np.zeros(0, np.int64), tuple(classes), oriented)

    @classmethod
    def concatenate(cls, parts: Sequence[Detections]) -> Detections:
        """All detections of `parts`, in their order; the parts must agree on classes and on the kind of
        box.
        """
        if not parts:
            raise ParameterError("nothing to concatenate; start from Detections.empty(classes, oriented)")
        first = parts[0]
        for part in parts[1:]:
            if part.classes != first.classes or part.oriented != first.oriented:
                raise ParameterError(
                    f"detections of {part.classes} (oriented: {part.oriented}) do not go with those of "
                    f"{first.classes} (oriented: {first.oriented}); concatenate results of one detector"
                )
        return cls(
            np.concatenate([part.boxes for part in parts]),
            np.concatenate([part.scores for part in parts]),
            np.concatenate([part.labels for part in parts]),
            first.classes,
            first.oriented,
        )

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, rows: ArrayLike | slice) -> Detections:
        """The rows that a boolean mask, an array of positions or a slice selects."""
        index: Any = rows if isinstance(rows, slice) else np.atleast_1d(np.asarray(rows))
        if not isinstance(index, slice) and index.size == 0 and index.dtype != bool:
            index = index.astype(np.int64)
        return self._with(self.boxes[index], self.scores[index], self.labels[index])

    def shift(self, dx: float, dy: float) -> Detections:
        """Moved by (dx, dy) pixels: from a tile to its scene by the tile's outer corner."""
        return self._with(self.boxes + np.array([dx, dy, 0, 0, 0]), self.scores, self.labels)

    def scale(self, sx: float, sy: float) -> Detections:
        """Coordinates multiplied by (sx, sy), both positive: back to the scene after a resampled read.

        Horizontal boxes stay exact. For an oriented box each axis is stretched as a vector is: exact where
        the factors agree or the box is upright. Otherwise a box becomes a parallelogram, and the rectangle on
        its stretched length with the same area is taken.
        """
        if not (sx > 0 and sy > 0):
            raise ParameterError(f"scale factors are {sx} and {sy}; both must be positive")
        cx, cy, w, h, r = self.boxes.T
        angle = np.deg2rad(r)
        if sx == sy:
            return self._with(self.boxes * np.array([sx, sy, sx, sx, 1]), self.scores, self.labels)
        long = w >= h
        turn = np.where(long, angle, angle + np.pi / 2)
        x, y = sx * np.cos(turn), sy * np.sin(turn)
        stretch = np.hypot(x, y)
        length, breadth = np.maximum(w, h) * stretch, np.minimum(w, h) * sx * sy / stretch
        upright = np.mod(r, 90) == 0
        moved = np.rad2deg(np.arctan2(y, x)) - np.where(long, 0.0, 90.0)
        boxes = np.column_stack(
            [
                cx * sx,
                cy * sy,
                np.where(long, length, breadth),
                np.where(long, breadth, length),
                np.where(upright, r, moved),
            ]
        )
        return self._with(boxes, self.scores, self.labels)

    def sort(self) -> Detections:
        """Best first, ties by label and then by coordinates: the same rows in any order sort the same."""
        return self[order(self)]

    @property
    def class_names(self) -> NDArray[np.str_]:
        """(N,) the class of each detection by name."""
        return np.array(self.classes, dtype=np.str_)[self.labels] if len(self) else np.zeros(0, np.str_)

    def _with(self, boxes: ArrayLike, scores: ArrayLike, labels: ArrayLike) -> Detections:
        return Detections(
            np.asarray(boxes), np.asarray(scores), np.asarray(labels), self.classes, self.oriented
        )


def order(found: Detections) -> NDArray[np.int64]:
    """Positions (N,) from best to worst score; ties by label, then cx, cy, w, h, r, smallest first.

    Only detections that are equal in everything keep the order they came in, and those cannot be told apart.
    """
    ranked = np.argsort(found.scores)[::-1]  # not stable, which is twice as fast
    scores = found.scores[ranked]
    equal = scores[1:] == scores[:-1]
    # coordinates matter among equal scores only, and sorting by seven keys is slow
    tied = np.flatnonzero(np.append(equal, False) | np.append(False, equal)) if len(found) else ranked
    rows = ranked[tied]
    cx, cy, w, h, r = found.boxes[rows].T
    ranked[tied] = rows[np.lexsort((rows, r, h, w, cy, cx, found.labels[rows], -found.scores[rows]))]
    return ranked.astype(np.int64, copy=False)
