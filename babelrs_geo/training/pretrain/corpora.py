"""What is learnt from: conversations as tokens and tiles, in batches that are functions of the global step."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Generator, Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from babelrs_geo.datasets.instruct import Conversation, Corpus
from babelrs_geo.datasets.samplers import Mixture, Numbered, QuotaSampler
from babelrs_geo.datasets.seeding import generator
from babelrs_geo.errors import LabelError, SceneError
from babelrs_geo.models.conversation import Encoded, collate, encode
from babelrs_geo.models.dynamic_tiles import TileOptions, cut
from babelrs_geo.models.pivot import PivotConfig
from babelrs_geo.training.loading import Batches, begin_work
from babelrs_geo.training.origin import RunData
from babelrs_geo.training.pretrain.recipe import PretrainRecipe, ViewPart

_TRIES = 10  # conversations tried for one place, as in the original


@dataclass(frozen=True, eq=False)
class Learnt:
    """Conversations about the same images as they are learnt from."""

    encoded: tuple[Encoded, ...]
    tiles: Tensor
    """(T, 3, S, S) uint8: those of their images in turn, or a white one where there is none."""
    real: bool
    """False for the white one."""
    about: tuple[Conversation, ...]


Micro = dict[str, Any]
"""What is computed at once: the tensors of a `TextBatch` by name; `tiles`, and `which` of them stand where; `sensors`,
`tasks` and `names` of the conversations."""


def corpora(paths: Sequence[Path]) -> list[Corpus]:
    """Corpora by their meta JSON, or by a JSONL file that `babelrs-geo instruct` wrote. Raises LabelError."""
    found = []
    for path in paths:
        meta = path.with_suffix(".meta.json") if path.suffix == ".jsonl" else path
        if meta != path and not meta.is_file():
            raise LabelError(
                f"{path} has no {meta.name} beside it; give a corpus's meta JSON, which names it"
            )
        found.append(Corpus(meta))
    return found


def joined(parts: Sequence[Corpus]) -> Numbered:
    """Corpora as one."""
    return ConcatDataset([cast("Dataset[Any]", part) for part in parts])


def fingerprint(parts: Sequence[Corpus]) -> str:
    """SHA-256 of the records that are learnt from, and of the sizes of their images' files."""
    digest = hashlib.sha256()
    sizes: dict[Path, int] = {}
    for corpus in parts:
        for number in range(len(corpus)):
            each = corpus[number]
            for path in each.images:
                if path not in sizes:
                    sizes[path] = path.stat().st_size if path.is_file() else -1
            about = [list(map(dict, each.turns)), [sizes[p] for p in each.images], each.task, each.sensor]
            digest.update(json.dumps(about, sort_keys=True).encode())
    return digest.hexdigest()


def picture(path: Path, where: str) -> NDArray[np.uint8]:
    """An image as (3, height, width). Raises SceneError."""
    try:
        with Image.open(path) as image:
            return np.ascontiguousarray(np.asarray(image.convert("RGB")).transpose(2, 0, 1))
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise SceneError(
            f"{path} cannot be read as an image ({error}); {where} names it, copy it again"
        ) from error


class Groups(Dataset[tuple[Conversation, ...]]):
    """Conversations by their images: up to `most` about the same ones together, as evenly as can be."""

    def __init__(self, conversations: Numbered, most: int) -> None:
        self.conversations = conversations
        self.rows: list[list[int]] = []
        alike: dict[Any, list[int]] = {}
        for number in range(len(conversations)):
            each = conversations[number] if most > 1 else None
            key = (each.images, each.most_tiles) if each is not None and each.images else number
            alike.setdefault(key, []).append(number)
        for rows in alike.values():
            self.rows += [part.tolist() for part in np.array_split(rows, -(-len(rows) // most))]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Conversation, ...]:
        return tuple(self.conversations[number] for number in self.rows[index])


@dataclass(frozen=True)
class Encoder:
    """A group of conversations and a generator to what is learnt; another group where too little of it fits."""

    groups: Groups
    tokenizer: Any
    config: PivotConfig
    view: ViewPart

    def __call__(self, group: Sequence[Conversation], source: Generator) -> Learnt:
        """The conversations as tokens and tiles. Raises LabelError where none of many fits."""
        for _ in range(_TRIES):
            made = self.encoded(group)
            if made is not None:
                return made
            last = group[-1]
            group = self.groups[int(torch.randint(len(self.groups), (), generator=source))]
        raise LabelError(
            f"{_TRIES} conversations do not fit {self.view.longest} tokens, {last.where} the last; raise "
            "view.longest, or lower view.most_tiles"
        )

    def encoded(self, group: Sequence[Conversation]) -> Learnt | None:
        """Those of which images and answers fit, which all have the same images; None where none does."""
        first = group[0]
        options = TileOptions(
            self.view.tile, first.most_tiles or self.view.most_tiles, self.view.thumbnail
        ).shared_by(len(first.images))
        tiles = [as_bytes(cut(picture(path, first.where), options)) for path in first.images]
        tokens = [len(own) * self.config.tokens(self.view.tile) for own in tiles]
        view = self.view
        texts = [encode(each.turns, self.tokenizer, tokens, view.longest, view.system) for each in group]
        fitting = [(text, each) for text, each in zip(texts, group, strict=True) if text is not None]
        if not fitting:
            return None
        white = torch.full((1, 3, self.view.tile, self.view.tile), 255, dtype=torch.uint8)
        seen = torch.cat(tiles) if tiles else white
        encoded, about = zip(*fitting, strict=True)
        return Learnt(encoded, seen, bool(tiles), about)


def as_bytes(tiles: Tensor) -> Tensor:
    """Tiles of 8-bit pictures in [0, 1] as the bytes that they are."""
    return (tiles * 255).round().to(torch.uint8)


@dataclass(frozen=True)
class Join:
    """Groups of conversations of a step as its micro-batches."""

    micro: int
    padding: int

    def __call__(self, samples: Sequence[Learnt]) -> list[Micro]:
        """As many as it takes, one after the other."""
        return [self.join(samples[at : at + self.micro]) for at in range(0, len(samples), self.micro)]

    def join(self, samples: Sequence[Learnt]) -> Micro:
        """One micro-batch."""
        text = collate([each for group in samples for each in group.encoded], self.padding)
        tiles = torch.arange(sum(len(group.tiles) for group in samples))
        own = tiles.split([len(group.tiles) for group in samples])
        which = [mine.repeat(len(g.encoded)) for g, mine in zip(samples, own, strict=True) if g.real]
        about = [each for group in samples for each in group.about]
        return {
            **vars(text),
            "tiles": torch.cat([group.tiles for group in samples]),
            "which": torch.cat([*which, tiles[:0]]),
            "sensors": [each.sensor for each in about],
            "tasks": [each.task for each in about],
            "names": [each.where for each in about],
        }


class CorpusData(RunData):
    """Corpora to learn from, shuffled together, and their batches. Raises LabelError."""

    def __init__(
        self, recipe: PretrainRecipe, config: PivotConfig, tokenizer: Any, paths: Sequence[Path]
    ) -> None:
        super().__init__()
        self.recipe = recipe
        self.corpora = corpora(paths)
        if not self.corpora:
            raise LabelError("there is nothing to learn from; name a corpus: --data corpus.meta.json")
        self.conversations = joined(self.corpora)
        self.groups = Groups(self.conversations, recipe.together)
        self.encoder = Encoder(self.groups, tokenizer, config, recipe.view)
        self.padding = int(tokenizer.pad_token_id)
        self.pinned = False
        self.batches: Batches | None = None

    @cached_property
    def fingerprint(self) -> str:
        """Of all that is learnt from."""
        return fingerprint(self.corpora)

    @cached_property
    def contents(self) -> dict[str, str]:
        """The corpora, which are learnt from together."""
        return {"corpora": f"{len(self.conversations)} conversations ({self.fingerprint[:12]})"}

    def train_dataloader(self) -> Batches:
        """Batches from the trainer's global step on."""
        trainer = self.trainer
        assert trainer is not None
        self.pinned = trainer.strategy.root_device.type == "cuda"
        rank, world = trainer.global_rank, trainer.world_size
        self.batches = Batches(lambda: self.loaders(trainer.global_step, rank, world))
        return self.batches

    def loaders(self, begin: int, rank: int = 0, world: int = 1) -> Iterator[DataLoader[Any]]:
        """Of the steps from a global step to the run's end; each is a list of `Micro`."""
        recipe = self.recipe
        mixture = Mixture({"corpora": self.groups}, {"corpora": self.encoder})
        quota = {"corpora": recipe.micro * recipe.accumulate}
        yield DataLoader(
            mixture,
            batch_sampler=QuotaSampler(mixture.sizes(), quota, recipe.seed, begin, recipe.steps, rank, world),
            collate_fn=Join(recipe.micro, self.padding),
            num_workers=recipe.run.workers,
            worker_init_fn=begin_work,
            generator=generator(recipe.seed, begin, rank),
            prefetch_factor=2 if recipe.run.workers else None,
            pin_memory=self.pinned,
        )
