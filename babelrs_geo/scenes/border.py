"""A scene's black collar, searched when a pixel turns up that may be of it, and then taken out of what is valid."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from babelrs_geo.scenes.blocks import Mosaic
from babelrs_geo.scenes.collar import SMEAR, Collar, find
from babelrs_geo.scenes.reader import Reader
from babelrs_geo.sensors import magnitude

Window = tuple[int, int, int, int]


class Border:
    """What is collar of the scene that `reader` reads, by some of its bands. Picklable; safe to call from many threads.

    Most scenes have no black pixel: their border is not looked at.
    """

    def __init__(self, reader: Reader, bands: tuple[int, ...]) -> None:
        self._reader = reader
        self._bands = bands
        self._collar: Collar | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def collar(self) -> Collar:
        """The collar, searched for if it has not been yet."""
        facts = self._reader.facts
        with self._lock:
            if self._collar is None:

                def black(window: Window, shape: tuple[int, int]) -> NDArray[np.bool_]:
                    if facts.is_tiled and shape == (window[3], window[2]):  # pieces that tiles will need, too
                        raw, valid = self._reader.mosaic(self._bands, window, announced=False).whole()
                    else:
                        raw, valid = self._reader.look(self._bands, window, shape=shape)
                    return ~valid | (raw == 0).all(axis=0)

                self._collar = find(facts.width, facts.height, self._black, black)
            return self._collar

    def without(
        self, raw: NDArray[Any], valid: NDArray[np.bool_], rows: NDArray[np.int64], columns: NDArray[np.int64]
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Numbers of the bands and validity, collar not valid; complex numbers as magnitudes. Rows (h,), columns (w,):
        places in the scene.
        """
        raw = magnitude(raw)
        dark: NDArray[Any] = raw if raw.dtype.kind == "u" else np.abs(raw)
        if self._collar is None and dark.max(axis=0).min() > self._black:
            return raw, valid
        collar = self.collar()
        near = collar.covers(rows, columns)
        if near is not None:
            valid &= ~(near & (dark <= collar.tolerance).all(axis=0))
        return raw, valid

    def is_beyond(self, window: Window, mosaic: Mosaic) -> bool:
        """True where no pixel of the window can be of the collar, from facts of its pieces alone."""
        if self._collar is not None:
            return not self._collar.meets(window)
        return all(patch.piece.darkest > self._black for patch in mosaic.patches)

    @property
    def _black(self) -> int:
        """The largest number that is black: above 0 where lossy compression smears it."""
        facts = self._reader.facts
        smeared = facts.lossy and facts.bands.dtype == "uint8" and facts.georef.kind != "none"
        return SMEAR if smeared else 0
