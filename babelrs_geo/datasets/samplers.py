"""Batches that mix sensors by quota, each image with a key from which all its random choices follow.

Which images make a batch is `sampling.QuotaBatches`: here they become `Draw`s, which say of which source, which one,
and the key (seed, step, rank, place in the batch). `Mixture` reads what is drawn. So

    loader = DataLoader(
        Mixture({"sar": chips_sar, "rgb": chips_rgb}, {"sar": Augmentation(...), "rgb": Augmentation(...)}),
        batch_sampler=QuotaSampler({"sar": len(chips_sar), "rgb": len(chips_rgb)}, {"sar": 2, "rgb": 1}, start=step),
        collate_fn=collate,
    )

gives the same batches whether it starts at step 0 or goes on at any other, with any number of workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, Protocol

import torch.distributed
from torch import Generator
from torch.utils.data import Dataset, Sampler

from babelrs_geo.datasets.sampling import QuotaBatches
from babelrs_geo.datasets.seeding import generator
from babelrs_geo.errors import ParameterError


class Draw(NamedTuple):
    """One image of a batch."""

    source: str
    """Which of the mixed datasets."""
    number: int
    """Which of its images."""
    key: tuple[int, int, int, int]
    """Seed, step, rank and place in the batch: what `seeding.generator` takes."""


class Numbered(Protocol):
    """A dataset whose samples have numbers: chips, frames, `Queries`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


Transform = Callable[[Any, Generator], Any]
"""A sample and a generator to a sample."""


@dataclass(frozen=True)
class QuotaSampler(Sampler[list[Draw]]):
    """Batches with a fixed quota of each source, a function of seed, step and rank.

    Each source is visited in one random permutation after another; ranks share them, so that no image comes twice
    before every other has come once. Raises ParameterError for sources without images, quotas of no source, or a
    rank outside the world.
    """

    sizes: Mapping[str, int]
    """Images of each source."""
    quota: Mapping[str, int]
    """Images of each source in a batch of one process, such as `{"sar": 2, "rgb": 1, "ir": 1}`."""
    seed: int = 0
    start: int = 0
    """The global step to begin with."""
    stop: int | None = None
    """The global step to end before; endless if None."""
    rank: int | None = None
    """Of this process; that of torch.distributed, or 0, if None."""
    world: int | None = None
    """Processes that train together; as torch.distributed says, or 1, if None."""

    def __post_init__(self) -> None:
        if set(self.sizes) != set(self.quota):
            raise ParameterError(
                f"quotas are of {', '.join(self.quota)} and images of {', '.join(self.sizes)}; give both for each"
            )
        if self.stop is not None and self.stop < self.start:
            raise ParameterError(
                f"steps from {self.start} to {self.stop} are none; let the last not be before"
            )
        self._batches()

    def _batches(self) -> QuotaBatches:
        together = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank, world = self.rank, self.world
        if rank is None:
            rank = torch.distributed.get_rank() if together else 0
        if world is None:
            world = torch.distributed.get_world_size() if together else 1
        return QuotaBatches(
            tuple(self.sizes[s] for s in self.quota),
            sum(self.quota.values()),
            tuple(self.quota.values()),
            self.seed,
            rank,
            world,
            self.start,
        )

    def __len__(self) -> int:
        if self.stop is None:
            raise TypeError("an endless sampler has no length; give it a step to stop at")
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[Draw]]:
        batches = self._batches()
        ends, total = {}, 0
        for source in self.quota:
            total += self.sizes[source]
            ends[source] = total
        sources = [source for source, count in self.quota.items() for _ in range(count)]
        length = None if self.stop is None else len(self)
        for step, batch in enumerate(islice(batches, length), self.start):
            yield [
                Draw(source, at - ends[source] + self.sizes[source], (self.seed, step, batches.rank, place))
                for place, (source, at) in enumerate(zip(sources, batch, strict=True))
            ]


class Mixture(Dataset[Any]):
    """Several sources as one dataset of `Draw`s; each sample goes through its source's transform, if any."""

    def __init__(
        self, sources: Mapping[str, Numbered], transforms: Mapping[str, Transform] | None = None
    ) -> None:
        self.sources, self.transforms = dict(sources), dict(transforms or {})
        if unknown := set(self.transforms) - set(self.sources):
            raise ParameterError(
                f"transforms were given for {', '.join(sorted(unknown))}, which is no source"
            )

    def sizes(self) -> dict[str, int]:
        """Images of each source, as `QuotaSampler` takes them."""
        return {name: len(source) for name, source in self.sources.items()}

    def __getitem__(self, draw: Draw) -> Any:
        sample = self.sources[draw.source][draw.number]
        transform = self.transforms.get(draw.source)
        return sample if transform is None else transform(sample, generator(*draw.key))


class Queries(Dataset[Any]):
    """The samples of a geo-dataset at the queries that a sampler gives once: TorchGeo's windows with numbers.

    `Queries(scenes, GridGeoSampler(scenes, 640))` makes scenes a source of a `Mixture`.
    """

    def __init__(self, dataset: Any, queries: Iterable[Any]) -> None:
        self.dataset, self.queries = dataset, list(queries)

    def __len__(self) -> int:
        return len(self.queries)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[self.queries[index]]
