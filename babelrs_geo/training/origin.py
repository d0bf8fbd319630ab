"""What weights come of: the data they learnt from, the weights they began with, the time it took and where."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset, Subset

from babelrs_geo.datasets.frames import FrameDataset
from babelrs_geo.datasets.samplers import Numbered
from babelrs_geo.datasets.soi import content
from babelrs_geo.models import checkpoints, zoo


@dataclass(frozen=True)
class Origin:
    """Of one run's weights."""

    data_sha256: str
    """`fingerprint` of what was learnt from."""
    seconds: Mapping[str, float]
    """Wall time of the steps, waiting for images included, by what computed them."""
    before: Mapping[str, Any] | None
    """`weights_before`."""

    def to_dict(self) -> dict[str, Any]:
        """For the header's `training`: `minutes` are of this run alone, `before` has its own."""
        minutes = {machine: round(seconds / 60, 3) for machine, seconds in self.seconds.items()}
        told = {
            "data_sha256": self.data_sha256,
            "minutes": sum(minutes.values()),
            "minutes_by_machine": minutes,
        }
        return told if self.before is None else told | {"before": dict(self.before)}


def fingerprint(samples: Iterable[Numbered]) -> str:
    """SHA-256 of labelled images: frames of benchmarks as their files and boxes, all else as the model is shown it."""
    digest = hashlib.sha256()
    for each in samples:
        for part in _contents(each):
            digest.update(part)
    return digest.hexdigest()


def _contents(samples: Any) -> Iterator[bytes]:
    if isinstance(samples, ConcatDataset):
        for part in samples.datasets:
            yield from _contents(part)
        return
    if isinstance(samples, Subset):
        samples, chosen = samples.dataset, list(samples.indices)
    else:
        chosen = list(range(len(samples)))
    for i in chosen:
        if isinstance(samples, FrameDataset):
            yield content(samples.records[i])
        else:
            sample = samples[i]
            yield sample["image"].numpy().tobytes() + sample["valid"].numpy().tobytes()
            yield np.asarray(sample["boxes"], np.float64).tobytes() + sample["labels"].numpy().tobytes()


def weights_before(start: str | None) -> dict[str, Any] | None:
    """Name, SHA-256 and training of the weights that a run starts from; None for ImageNet's, or none at all.

    They may have such weights themselves, under `before`. Raises WeightsError where there are none of that name.
    """
    if start in (None, "imagenet"):
        return None
    path = zoo.find(str(start))
    about = checkpoints.read(path)
    return {"name": about.name, "sha256": checkpoints.sha256(path), **about.training}
