"""What a run learns from: sources of samples by sensor, and batches that are functions of the global step.

A source is a folder of chips, a folder in SOI-Det's layout, or scenes that a YAML file names:

    sensor: rgb
    scenes: [a.tif, b.tif]      # beside the file, or absolute
    labels: labels.gpkg         # anything `vectors.read_labels` takes
    split: train
    size: 800                   # windows, and how far each lies from the next
    stride: 600

Lightning restores neither where a loader stood nor what its workers would have drawn. So the loader here is built
from the global step: whichever step a run goes on from, its batches are those it would have had.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import yaml
from torch import Generator, Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Sampler, Subset
from torchgeo.samplers import GridGeoSampler

from babelrs_geo.boxes import bounds, to_le90
from babelrs_geo.datasets.augment import Augment, augment
from babelrs_geo.datasets.chips import ChipDataset
from babelrs_geo.datasets.frames import FrameDataset
from babelrs_geo.datasets.ground import GroundOptions
from babelrs_geo.datasets.published import Published, train_sample
from babelrs_geo.datasets.samplers import Draw, Mixture, Numbered, Queries, QuotaSampler
from babelrs_geo.datasets.samples import Sample
from babelrs_geo.datasets.scenes import SceneDataset
from babelrs_geo.datasets.seeding import generator
from babelrs_geo.datasets.soi import FOLDERS, Record, read_split
from babelrs_geo.datasets.transforms import Augmentation
from babelrs_geo.errors import LabelError, ParameterError
from babelrs_geo.models.detector import DetectorConfig, HorizontalTarget, OrientedTarget
from babelrs_geo.models.plain import Count, from_plain
from babelrs_geo.training.loading import Batches, begin_work
from babelrs_geo.training.origin import RunData, outline
from babelrs_geo.training.recipe import DataPart, Phase, Recipe, SensorName

Target = HorizontalTarget | OrientedTarget
Learnt = dict[str, Any]
"""`image` (3, s, s), `target`, `sensor` and `name` of one image that is learnt from."""
Batch = dict[str, dict[str, Any]]
"""By sensor: `image` (n, 3, s, s), `targets` and `names`. One part of a step."""

_DRAWS = 100  # images tried before a batch's place is given up: then hardly one in a source has objects


@dataclass(frozen=True)
class Source:
    """Samples of one sensor, and what else is known of them."""

    samples: Numbered
    gsd: tuple[float, float] | None
    """Least and greatest metres a pixel, where the files say."""
    about: str
    """Where from, in words."""


def sources(
    paths: Sequence[Path],
    splits: Mapping[str, str],
    classes: Mapping[str, Sequence[str]],
    part: DataPart,
    *,
    learn: bool,
) -> dict[str, Source]:
    """Samples of each of the recipe's sensors that some of `paths` have in their split.

    With `learn`, images that the recipe does not learn from are left out. Raises LabelError for a path that is no
    source, and what the datasets raise.
    """
    found: dict[str, list[Source]] = {}
    for path in paths:
        for sensor in part.sensors:
            source = _source(path, sensor, splits.get(sensor, ""), classes[sensor])
            if source is not None:
                found.setdefault(sensor, []).append(_learnt(source, part) if learn else source)
    joined = {}
    for sensor, group in found.items():
        some = [s for s in group if len(s.samples)]
        if not some:
            continue
        ranges = [s.gsd for s in some if s.gsd]
        joined[sensor] = Source(
            some[0].samples
            if len(some) == 1
            else ConcatDataset([cast("Dataset[Any]", s.samples) for s in some]),
            (min(r[0] for r in ranges), max(r[1] for r in ranges)) if len(ranges) == len(some) else None,
            ", ".join(s.about for s in some),
        )
    return joined


def _source(path: Path, sensor: str, split: str, classes: Sequence[str]) -> Source | None:
    """One path's samples of a sensor; None where it has none in that split."""
    if path.is_file() and path.suffix in (".yaml", ".yml"):
        return _scenes(path, sensor, split, classes)
    if (path / "index.parquet").is_file() or (path / "tile.json").is_file():
        from babelrs_geo.chips import read_index

        index = read_index(path)
        if not ((index["sensor"] == sensor) & (index["split"] == split)).any():
            return None
        chips = ChipDataset(path, sensor, split, classes)
        sizes = chips.table["gsd"].to_numpy(np.float64)
        known = np.isfinite(sizes).all()
        return Source(chips, (float(sizes.min()), float(sizes.max())) if known else None, str(path))
    if any((path / folder).is_dir() for folder in FOLDERS.values()):
        if not (path / FOLDERS[sensor]).is_dir():
            return None
        return Source(FrameDataset(read_split(path, sensor, split, classes), classes), None, str(path))
    raise LabelError(
        f"{path} is no source of samples; give a folder of chips (babelrs-geo tile), a folder in SOI-Det's layout, or "
        "a YAML file that names scenes"
    )


@dataclass(frozen=True)
class _Named:
    """What a YAML file that names scenes says."""

    sensor: SensorName
    scenes: tuple[str, ...]
    labels: str
    split: str
    size: Count
    stride: Count


def _scenes(path: Path, sensor: str, split: str, classes: Sequence[str]) -> Source | None:
    """Windows of scenes that a YAML file names."""
    try:
        named = from_plain(_Named, yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ParameterError) as error:
        raise LabelError(f"{path} does not name scenes ({' '.join(str(error).split())})") from error
    if named.sensor != sensor or named.split != split:
        return None
    scenes = SceneDataset(
        [path.parent / name for name in named.scenes],
        sensor,
        str(path.parent / named.labels),
        classes,
        GroundOptions(least=named.size),
    )
    windows = Queries(scenes, GridGeoSampler(scenes, named.size, named.stride))
    if not len(windows):
        raise LabelError(f"{path}: no window of {named.size} px lies in its scenes; give a smaller size")
    metres = [s.gsd for s in scenes.scenes]
    known = [m for m in metres if m is not None]
    gsd = (min(known), max(known)) if len(known) == len(metres) else None
    return Source(windows, gsd, str(path))


def _learnt(source: Source, part: DataPart) -> Source:
    """Without images that are not learnt from."""
    samples = source.samples
    kept: Sequence[int] = range(0, len(samples), part.every)
    if part.background and part.least <= 1:
        pass
    elif isinstance(samples, FrameDataset):
        records = samples.records
        kept = [i for i in kept if _fits(len(records[i].boxes), _size(records[i].path), part)]
    elif isinstance(samples, ChipDataset):
        rows = samples.table[["objects", "width", "height"]].to_numpy()
        kept = [i for i in kept if _fits(rows[i][0], rows[i][1:], part)]
    else:
        kept = [i for i in kept if _fits(len(samples[i]["labels"]), samples[i]["image"].shape[1:], part)]
    if len(kept) == len(samples):
        return source
    return Source(Subset(samples, kept), source.gsd, source.about)  # type: ignore[arg-type]


def _fits(objects: int, size: Sequence[int], part: DataPart) -> bool:
    return (part.background or objects > 0) and min(size) >= part.least


def _size(path: Path) -> tuple[int, int]:
    from PIL import Image

    with Image.open(path) as image:
        return image.size


def as_bytes(image: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """An image (3, h, w) in [0, 1] as the published pipeline takes it: (h, w, 3) uint8."""
    return np.ascontiguousarray((image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


@dataclass(frozen=True)
class Look:
    """A sample and a generator to what is learnt from: one view, as the recipe says."""

    kind: Augment | Augmentation | Published
    samples: Numbered
    first: int
    """Of the sensor's classes in the shared label space."""

    def __call__(self, sample: Sample, source: Generator) -> Learnt:
        """The view. Raises LabelError where the published pipeline finds no object in many images."""
        sensor, name = sample["sensor"], sample["name"]
        boxes = np.asarray(sample["boxes"], np.float64)
        if isinstance(self.kind, Augmentation):
            seen = self.kind(sample, source)
            size = (self.kind.size, self.kind.size)
            target = to_target(
                sensor, np.asarray(seen["boxes"], np.float64), seen["labels"] + self.first, size
            )
            return {"image": seen["image"], "target": target, "sensor": sensor, "name": name}
        rng = np.random.default_rng(int(torch.randint(1 << 62, (), generator=source)))
        if isinstance(self.kind, Augment):
            image, seen_boxes, labels = augment(*_record(sample), self.kind, rng, self._another)
            size = (image.shape[1], image.shape[2])
            target = to_target(sensor, seen_boxes, torch.from_numpy(labels) + self.first, size)
            return {"image": image, "target": target, "sensor": sensor, "name": name}
        for _ in range(_DRAWS):
            labels = sample["labels"].numpy() + self.first
            made = train_sample(as_bytes(sample["image"]), boxes, labels, sensor != "sar", rng, self.kind)
            if made is not None:
                image, seen_boxes, labels, size = made
                target = to_target(sensor, seen_boxes, torch.from_numpy(labels), size)
                return {"image": image, "target": target, "sensor": sensor, "name": name}
            sample = self.samples[int(rng.integers(len(self.samples)))]
            boxes, name = np.asarray(sample["boxes"], np.float64), sample["name"]
        raise LabelError(
            f"{_DRAWS} images of {sensor}, {name} the last, show no object; learn from images that have some"
        )

    def _another(self, rng: np.random.Generator) -> tuple[Tensor, Record]:
        """Any image of the sensor, for what lies beyond a seam."""
        return _record(self.samples[int(rng.integers(len(self.samples)))])


def _record(sample: Sample) -> tuple[Tensor, Record]:
    """A sample as the crops take it."""
    boxes = np.asarray(sample["boxes"], np.float64)
    return sample["image"], Record(sample["sensor"], Path(sample["name"]), boxes, sample["labels"].numpy())


def to_target(sensor: str, boxes: np.ndarray[Any, Any], labels: Tensor, size: tuple[int, int]) -> Target:
    """Boxes (n, 5) cxcywhr and labels of the shared space as a head takes them; `size` without padding."""
    if sensor == "sar":
        return HorizontalTarget(torch.from_numpy(bounds(boxes)).float(), labels, size)
    return OrientedTarget(torch.from_numpy(to_le90(boxes)).float(), labels, size)


def join(samples: Sequence[Learnt]) -> Batch:
    """What is learnt from as a batch, nested by sensor."""
    groups: dict[str, list[Learnt]] = {}
    for sample in samples:
        groups.setdefault(sample["sensor"], []).append(sample)
    return {
        sensor: {
            "image": torch.stack([s["image"] for s in group]),
            "targets": [s["target"] for s in group],
            "names": [s["name"] for s in group],
        }
        for sensor, group in groups.items()
    }


@dataclass(frozen=True)
class Turns(Sampler[list[Draw]]):
    """The batches of several processes of a recipe, drawn by one that takes their turns."""

    shares: Sequence[QuotaSampler]

    def __len__(self) -> int:
        return len(self.shares[0])

    def __iter__(self) -> Iterator[list[Draw]]:
        for step in zip(*self.shares, strict=True):
            yield [draw for share in step for draw in share]


@dataclass(frozen=True)
class Join:
    """What is learnt from in a step as its parts of `count` images each."""

    count: int

    def __call__(self, samples: Sequence[Learnt]) -> list[Batch]:
        """One after the other."""
        return [join(samples[at : at + self.count]) for at in range(0, len(samples), self.count)]


class TrainingData(RunData):
    """Sources to learn from and to judge on, and their batches by quota.

    Raises LabelError where a sensor of the recipe has nothing to learn from.
    """

    def __init__(self, recipe: Recipe, config: DetectorConfig, paths: Sequence[Path]) -> None:
        super().__init__()
        self.recipe, self.config = recipe, config
        self.pinned = False
        part, classes = recipe.data, config.classes
        self.learn = sources(paths, part.train, classes, part, learn=True)
        judged = part.sensors if recipe.run.judge else ()
        self.judge = sources(paths, part.val, classes, part, learn=False) if judged else {}
        told = ", ".join(map(str, paths)) or "no --data"
        if lacking := [s for s in part.sensors if s not in self.learn]:
            raise LabelError(
                f"{told} has nothing to learn from of {', '.join(lacking)} in split {part.train[lacking[0]]}; add "
                f"some, or leave it out: --set data.sensors=[{', '.join(self.learn)}]"
            )
        if lacking := [s for s in judged if s not in self.judge]:
            raise LabelError(
                f"{told} has nothing to judge {', '.join(lacking)} on in split {part.val.get(lacking[0])}; cut "
                f"chips with a split for it, or name another: --set data.val.{lacking[0]}=..."
            )
        self.batches: Batches | None = None

    @cached_property
    def contents(self) -> dict[str, str]:
        """Those to learn from and to judge on."""
        parts = {"learn": self.learn, "judge": self.judge}
        return {f"{s} to {part}": outline(own.samples) for part, by in parts.items() for s, own in by.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As for any run's data; what a run was judged on does not matter where it goes on unjudged."""
        before = state_dict["contents"]
        if not self.recipe.run.judge:
            before = {name: told for name, told in before.items() if not name.endswith(" to judge")}
        super().load_state_dict({"contents": before})

    def mixture(self, phase: Phase) -> Mixture:
        """The sources as a phase looks at them."""
        learn = {sensor: self.learn[sensor].samples for sensor in self.recipe.data.sensors}
        looks = {
            sensor: Look(phase.views[sensor].chosen, samples, self.config.labels(sensor).start)
            for sensor, samples in learn.items()
        }
        return Mixture(learn, looks)

    def train_dataloader(self) -> Batches:
        """Batches from the trainer's global step on."""
        trainer = self.trainer
        assert trainer is not None
        self.pinned = trainer.strategy.root_device.type == "cuda"
        rank, world = trainer.global_rank, trainer.world_size
        self.batches = Batches(lambda: self.loaders(trainer.global_step, rank, world))
        return self.batches

    def loaders(self, begin: int, rank: int = 0, world: int = 1) -> Iterator[DataLoader[Any]]:
        """Of the steps from a global one to the run's end, phase after phase; each is a list of `Batch`."""
        before = 0
        for phase in self.recipe.phases:
            if begin < phase.steps:
                yield self._loader(phase, max(begin, before), rank, world)
            before = phase.steps

    def _loader(self, phase: Phase, start: int, rank: int, world: int) -> DataLoader[Any]:
        recipe, mixture = self.recipe, self.mixture(phase)
        quota, turns = recipe.quota(phase), recipe.turns(world)
        shares = [
            QuotaSampler(mixture.sizes(), quota, recipe.seed, start, phase.steps, each, world * turns)
            for each in range(rank, world * turns, world)
        ]
        workers = recipe.run.workers
        return DataLoader(
            mixture,
            batch_sampler=Turns(shares),
            collate_fn=Join(sum(quota.values())),
            num_workers=workers,
            worker_init_fn=begin_work,
            generator=generator(recipe.seed, start, rank),
            prefetch_factor=max(1, 4 // turns) if workers else None,
            pin_memory=self.pinned,
        )

    def transfer_batch_to_device(
        self, batch: list[Batch], device: torch.device, dataloader_idx: int
    ) -> list[Batch]:
        """The parts of a step on a device."""
        return [
            {
                sensor: {
                    "image": own["image"].to(device, non_blocking=True),
                    "targets": [
                        type(t)(t.boxes.to(device), t.labels.to(device), t.size) for t in own["targets"]
                    ],
                    "names": own["names"],
                }
                for sensor, own in part.items()
            }
            for part in batch
        ]


__all__: Sequence[Any] = [
    "Dataset",
    "Look",
    "Source",
    "TrainingData",
    "join",
    "sources",
    "to_target",
]
