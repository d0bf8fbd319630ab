"""Random choices as functions of what is drawn for: a seed, a step, a rank, a place in the batch.

TorchGeo's random samplers draw the scene from torch's global generator, whatever `generator` they were given, and
only the window within it from that one. `Seeded` wraps such a sampler so that an epoch's queries follow from a seed
and the epoch alone, and leaves the global generator as it was.

What a loader's workers draw globally (torch, NumPy and Python) torch seeds anew in every epoch, and all of it follows
from the loader's own generator: `DataLoader(..., generator=generator(seed, rank))`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler


def number(*key: int) -> int:
    """A 63-bit number that any change of the key changes; keys are whole numbers from 0."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(*key: int) -> torch.Generator:
    """A generator for one key."""
    return torch.Generator().manual_seed(number(*key))


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Global draws of torch (CPU) and of Python within the block follow from the key; both are restored after it.

    For transforms that take no generator, such as torchvision's.
    """
    held = random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(number(*key))
        random.seed(number(*key))
        try:
            yield
        finally:
            random.setstate(held)


class Seeded(Sampler[Any]):
    """A sampler (or batch sampler) of TorchGeo whose draws follow from `seed` and `epoch` alone.

    `set_epoch` is what Lightning calls at the start of each epoch.
    """

    def __init__(self, sampler: Sampler[Any], seed: int, epoch: int = 0) -> None:
        self.sampler, self.seed, self.epoch = sampler, seed, epoch

    def set_epoch(self, epoch: int) -> None:
        """Draw anew, for this epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        state = generator(self.seed, self.epoch, 0).get_state()
        own = getattr(self.sampler, "generator", None)
        if own is not None:
            own.manual_seed(number(self.seed, self.epoch, 1))
        queries = iter(self.sampler)
        while True:
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(state)
                try:
                    query = next(queries)
                except StopIteration:
                    return
                state = torch.get_rng_state()
            yield query
