"""Which images make a batch of several sources (BabelRS section 4; section 9 of the original's samplers).

Each source is an endless stream of random permutations of its images, and every batch takes a fixed quota of
each: what the paper calls random sampling across the datasets. Several processes share the streams, each
taking every `world`-th image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from babelrs_geo.errors import ParameterError


def quota(batch: int, ratio: Sequence[int]) -> tuple[int, ...]:
    """Images of each source in a batch, in proportion to `ratio`; what does not divide goes to the first."""
    if batch < 1 or not ratio or min(ratio) < 0 or sum(ratio) < 1:
        raise ParameterError(
            f"a batch of {batch} in the ratio {tuple(ratio)}; give a positive batch and shares of zero or more"
        )
    counts = [batch * share // sum(ratio) for share in ratio]
    return (counts[0] + batch - sum(counts), *counts[1:])


@dataclass(frozen=True)
class QuotaBatches:
    """Endless batches of indices into the concatenated sources, the first source's first: a batch sampler.

    The same seed gives the same batches. Raises ParameterError for an empty source or a rank outside the world.
    """

    sizes: tuple[int, ...]
    """Images of each source."""
    batch: int = 4
    """Images in a batch of one process."""
    ratio: tuple[int, ...] = (2, 1, 1)
    """Shares of the sources in a batch: SAR, RGB, infrared."""
    seed: int = 0
    rank: int = 0
    world: int = 1
    """Processes that train together, of which this is number `rank`."""
    start: int = 0
    """Batches to leave out, for a run that goes on."""

    def __post_init__(self) -> None:
        if len(self.sizes) != len(self.ratio) or min(self.sizes, default=0) < 1:
            raise ParameterError(
                f"sources of {self.sizes} images in the ratio {self.ratio}; give one share a source, none empty"
            )
        if not 0 <= self.rank < self.world or self.start < 0:
            raise ParameterError(
                f"rank {self.rank} of {self.world} from batch {self.start}; ranks and batches count from zero"
            )
        quota(self.batch, self.ratio)

    def __iter__(self) -> Iterator[list[int]]:
        counts = quota(self.batch, self.ratio)
        streams = [
            islice(
                _permutations(size, self.seed), self.rank + self.world * self.start * count, None, self.world
            )
            for size, count in zip(self.sizes, counts, strict=True)
        ]
        offsets = [sum(self.sizes[:k]) for k in range(len(self.sizes))]
        while True:
            yield [
                offset + next(stream)
                for stream, offset, count in zip(streams, offsets, counts, strict=True)
                for _ in range(count)
            ]


def _permutations(size: int, seed: int) -> Iterator[int]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(size, generator=generator).tolist()
