"""What weights come of: the data they learnt from, the weights they began with, the time it took and where."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule
from torch.utils.data import ConcatDataset, Subset

from babelrs_geo.datasets.chips import ChipDataset
from babelrs_geo.datasets.frames import FrameDataset
from babelrs_geo.datasets.samplers import Numbered
from babelrs_geo.datasets.soi import content
from babelrs_geo.errors import ParameterError
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
    for part, i in _each(samples):
        if isinstance(part, FrameDataset):
            yield content(part.records[i])
        else:
            sample = part[i]
            yield sample["image"].numpy().tobytes() + sample["valid"].numpy().tobytes()
            yield np.asarray(sample["boxes"], np.float64).tobytes() + sample["labels"].numpy().tobytes()


def outline(samples: Numbered) -> str:
    """How many images, and a hash of what is known of them before one is read: labels, and sizes of files."""
    digest = hashlib.sha256()
    for part, i in _each(samples):
        if isinstance(part, FrameDataset):
            record = part.records[i]
            digest.update(record.boxes.tobytes() + record.labels.tobytes() + _bytes(record.path))
        elif isinstance(part, ChipDataset):
            row = part.table.iloc[i]
            digest.update(f"{row['chip']} {row['objects']} ".encode() + _bytes(part.folder / row["path"]))
    return f"{len(samples)} images ({digest.hexdigest()[:12]})"


def _each(samples: Any) -> Iterator[tuple[Any, int]]:
    """The dataset that each sample is of, and its number there."""
    if isinstance(samples, ConcatDataset):
        for part in samples.datasets:
            yield from _each(part)
    elif isinstance(samples, Subset):
        yield from ((samples.dataset, i) for i in samples.indices)
    else:
        yield from ((samples, i) for i in range(len(samples)))


def _bytes(path: Path) -> bytes:
    return str(path.stat().st_size if path.is_file() else -1).encode()


class RunData(LightningDataModule):
    """The data of a run, which goes on with the same alone: checkpoints hold what they are."""

    @cached_property
    def contents(self) -> dict[str, str]:
        """What tells each of them from others, by its name."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"contents": self.contents}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """ParameterError where the checkpoint is of other data."""
        for name, before in state_dict["contents"].items():
            if self.contents.get(name) != before:
                raise ParameterError(
                    f"the run began with {before} as {name}, and --data has {self.contents.get(name, 'none')}; go on "
                    "with the data it began with, or choose another folder"
                )


def weights_before(start: str | None) -> dict[str, Any] | None:
    """Name, SHA-256 and training of the weights that a run starts from; None for ImageNet's, or none at all.

    They may have such weights themselves, under `before`. Raises WeightsError where there are none of that name.
    """
    if start in (None, "imagenet"):
        return None
    path = zoo.find(str(start))
    about = checkpoints.read(path)
    return {"name": about.name, "sha256": checkpoints.sha256(path), **about.training}
