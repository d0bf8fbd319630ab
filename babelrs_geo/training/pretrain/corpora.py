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
    """One conversation as it is learnt from."""

    encoded: Encoded
    tiles: Tensor
    """(T, 3, S, S) uint8: those of its images in turn, or a white one where it has none."""
    real: bool
    """False for the white one."""
    sensor: str | None
    task: str | None
    name: str
    """File and line."""


Micro = dict[str, Any]
"""What is computed at once: the tensors of a `TextBatch` by name, `tiles`, `real` (T,); `sensors`, `tasks`, `names`."""


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


@dataclass(frozen=True)
class Encoder:
    """A conversation and a generator to what is learnt; another conversation where too little of it fits."""

    conversations: Numbered
    tokenizer: Any
    config: PivotConfig
    view: ViewPart

    def __call__(self, conversation: Conversation, source: Generator) -> Learnt:
        """The conversation as tokens and tiles. Raises LabelError where none of many fits."""
        for _ in range(_TRIES):
            made = self.encoded(conversation)
            if made is not None:
                return made
            number = int(torch.randint(len(self.conversations), (), generator=source))
            conversation = self.conversations[number]
        raise LabelError(
            f"{_TRIES} conversations do not fit {self.view.longest} tokens, {conversation.where} the last; raise "
            "view.longest, or lower view.most_tiles"
        )

    def encoded(self, conversation: Conversation) -> Learnt | None:
        """None where its images or answers do not fit."""
        options = TileOptions(
            self.view.tile, conversation.most_tiles or self.view.most_tiles, self.view.thumbnail
        ).shared_by(len(conversation.images))
        tiles = [as_bytes(cut(picture(path, conversation.where), options)) for path in conversation.images]
        each = self.config.tokens(self.view.tile)
        text = encode(
            conversation.turns,
            self.tokenizer,
            [len(own) * each for own in tiles],
            self.view.longest,
            self.view.system,
        )
        if text is None:
            return None
        white = torch.full((1, 3, self.view.tile, self.view.tile), 255, dtype=torch.uint8)
        seen = torch.cat(tiles) if tiles else white
        return Learnt(text, seen, bool(tiles), conversation.sensor, conversation.task, conversation.where)


def as_bytes(tiles: Tensor) -> Tensor:
    """Tiles of 8-bit pictures in [0, 1] as the bytes that they are."""
    return (tiles * 255).round().to(torch.uint8)


@dataclass(frozen=True)
class Join:
    """Conversations of a step as its micro-batches."""

    micro: int
    padding: int

    def __call__(self, samples: Sequence[Learnt]) -> list[Micro]:
        """As many as it takes, one after the other."""
        return [self.join(samples[at : at + self.micro]) for at in range(0, len(samples), self.micro)]

    def join(self, samples: Sequence[Learnt]) -> Micro:
        """One micro-batch."""
        text = collate([each.encoded for each in samples], self.padding)
        return {
            **vars(text),
            "tiles": torch.cat([each.tiles for each in samples]),
            "real": torch.cat([torch.full((len(each.tiles),), each.real) for each in samples]),
            "sensors": [each.sensor for each in samples],
            "tasks": [each.task for each in samples],
            "names": [each.name for each in samples],
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
        self.encoder = Encoder(self.conversations, tokenizer, config, recipe.view)
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
        mixture = Mixture({"corpora": self.conversations}, {"corpora": self.encoder})
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
