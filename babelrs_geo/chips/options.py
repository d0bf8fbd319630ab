"""How scenes are cut into chips: the numbers, checked."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from babelrs_geo.errors import ParameterError
from babelrs_geo.tiling import Grid

SPLITS = ("train", "val", "test")
COMPRESSIONS = ("zstd", "deflate", "lzw", "none")


@dataclass(frozen=True, kw_only=True)
class ChipOptions:
    """What decides which files a run writes. Raises ParameterError where a value is out of range."""

    size: int = 800
    """Side of a chip in scene pixels; a smaller scene gives a smaller chip."""
    overlap: int = 200
    """Pixels that neighbouring chips of one split share at least."""
    split: tuple[float, float, float] = (0.8, 0.1, 0.1)
    """Shares of the ground for train, val and test; they sum to 1."""
    block: int = 4
    """Chips a side of the blocks of ground that are handed to splits as a whole."""
    background: float = 1.0
    """Share of the chips without an object that is kept, where there are labels."""
    keep_truncated: float = 0.3
    """Objects of which a larger share cannot be seen in a chip, outside it or not valid, are dropped from it."""
    seed: int = 0
    """Of the splits and of the background chips."""
    compress: str = "zstd"
    """Compression of the chips, one of `COMPRESSIONS`; all are lossless."""

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is opened."""
        Grid(1, 1, self.size, self.overlap)  # refuses what no grid can have
        if len(self.split) != 3 or min(self.split) < 0 or abs(sum(self.split) - 1) > 1e-6:
            told = "/".join(f"{v:g}" for v in self.split)
            raise ParameterError(
                f"split is {told}, expected three shares of train/val/test that sum to 1, such as 0.8/0.1/0.1"
            )
        if self.block < 1:
            raise ParameterError(f"block is {self.block}, expected at least 1 chip a side")
        for name in ("background", "keep_truncated"):
            if not 0 <= getattr(self, name) <= 1:
                raise ParameterError(f"{name} is {getattr(self, name):g}, expected a share from 0 to 1")
        if self.compress not in COMPRESSIONS:
            raise ParameterError(f"compress is {self.compress!r}, expected one of {', '.join(COMPRESSIONS)}")

    def lot(self, text: str) -> float:
        """A number in [0, 1) that depends on nothing but the seed and the text."""
        digest = hashlib.sha256(f"{self.seed}:{text}".encode()).digest()
        return int.from_bytes(digest[:6], "big") / 2.0**48
