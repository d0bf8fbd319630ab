"""How well a pivot answers short questions about images that it did not learn from, and how well without seeing them.

Language alone answers much: most questions whether there is a ship are asked where there is one. So each question is
asked three times, of its own image (`seen`), of a grey one (`blank`), and of another image of the same sensor
(`shuffled`). What the encoder is good for is the difference.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from babelrs_geo.datasets.instruct import Conversation
from babelrs_geo.datasets.samplers import Numbered
from babelrs_geo.errors import LabelError
from babelrs_geo.models.dynamic_tiles import TileOptions, cut
from babelrs_geo.models.pivot import PivotModel
from babelrs_geo.training.pretrain.corpora import picture
from babelrs_geo.training.pretrain.recipe import AskPart, ViewPart

WAYS = ("seen", "blank", "shuffled")


@dataclass(frozen=True)
class Question:
    """One of them, with the right answer."""

    text: str
    answer: str
    path: Path
    other: Path
    """Another image of the sensor; the same where there is one image only."""
    sensor: str
    task: str
    where: str
    """File and line."""
    most_tiles: int | None


def questions(conversations: Numbered, ask: AskPart) -> list[Question]:
    """The first question of each conversation about one image, up to `ask.most` of each sensor and task.

    LabelError where there is none of the tasks.
    """
    chosen: list[Conversation] = []
    counts: dict[tuple[str | None, str | None], int] = {}
    for at in range(len(conversations)):
        each: Conversation = conversations[at]
        kind = (each.sensor, each.task)
        if each.sensor and each.task in ask.tasks and len(each.images) == 1:
            counts[kind] = counts.get(kind, 0) + 1
            if counts[kind] <= ask.most:
                chosen.append(each)
    if not chosen:
        raise LabelError(
            f"what is to be judged on has no question of {', '.join(ask.tasks)} about one image of a known sensor; "
            "make some: babelrs-geo instruct ... --split val"
        )
    images: dict[str | None, list[Path]] = {}
    for each in chosen:
        own = images.setdefault(each.sensor, [])
        if each.images[0] not in own:
            own.append(each.images[0])
    return [_question(each, images[each.sensor]) for each in chosen]


def _question(each: Conversation, images: Sequence[Path]) -> Question:
    says = {
        speaker: next(turn["value"] for turn in each.turns if turn["from"] == speaker)
        for speaker in ("human", "gpt")
    }
    path = each.images[0]
    other = images[(images.index(path) + 1) % len(images)]
    sensor, task = each.sensor or "", each.task or ""
    return Question(says["human"], says["gpt"], path, other, sensor, task, each.where, each.most_tiles)


Answered = dict[str, Any]
"""A question with its right answer and the three that were given, as plain values."""


@dataclass(frozen=True, eq=False)
class Asker:
    """Asks a model."""

    tokenizer: Any
    view: ViewPart
    ask: AskPart
    context: Callable[[], AbstractContextManager[Any]]
    """Of the precision."""

    def __call__(self, model: PivotModel, asked: Sequence[Question]) -> list[Answered]:
        """What the model answers."""
        told: list[Answered] = []
        tiles = lru_cache(maxsize=4 * self.ask.batch)(self._tiles)
        for at in range(0, len(asked), self.ask.batch):
            group = asked[at : at + self.ask.batch]
            said = {}
            for way in WAYS:
                shown = [self._shown(way, each, tiles) for each in group]
                with torch.no_grad(), self.context():
                    said[way] = model.answer(
                        self.tokenizer, [q.text for q in group], shown, self.ask.longest, self.view.system
                    )
            for k, each in enumerate(group):
                about = {"sensor": each.sensor, "task": each.task, "image": str(each.path)}
                texts = {"question": each.text, "answer": each.answer}
                told.append({**about, **texts, **{way: said[way][k] for way in WAYS}})
        return told

    def _shown(self, way: str, each: Question, tiles: Callable[..., Tensor]) -> Tensor:
        if way == "shuffled":
            return tiles(each.other, each.where, each.most_tiles)
        seen = tiles(each.path, each.where, each.most_tiles)
        if way == "seen":
            return seen
        return torch.full_like(seen, 0.5)

    def _tiles(self, path: Path, where: str, most: int | None) -> Tensor:
        options = TileOptions(self.view.tile, most or self.view.most_tiles, self.view.thumbnail)
        return cut(picture(path, where), options)


def judge(
    model: PivotModel, asker: Asker, asked: Sequence[Question], *, shared: bool, rank: int = 0, world: int = 1
) -> list[Answered]:
    """What is answered to all questions, on every process; where `shared`, each answers its share."""
    mine = list(asked)[rank::world] if shared else list(asked)
    told = asker(model, mine)
    if world == 1 or not shared:
        return told
    gathered: list[Any] = [None] * world
    torch.distributed.all_gather_object(gathered, told)
    return [gathered[k % world][k // world] for k in range(len(asked))]


def figures(told: Sequence[Answered]) -> dict[str, float]:
    """Shares of right answers: `sar_count`, `sar_count_blank`, `sar_count_shuffled`; `sar` is the mean over its tasks,
    `all` that over the sensors.
    """
    kinds: dict[tuple[str, str], list[Answered]] = {}
    for each in told:
        kinds.setdefault((each["sensor"], each["task"]), []).append(each)
    found: dict[str, float] = {}
    for way in WAYS:
        end = "" if way == "seen" else f"_{way}"
        by_sensor: dict[str, list[float]] = {}
        for (sensor, task), group in sorted(kinds.items()):
            right = fmean(same(each["answer"], each[way]) for each in group)
            found[f"{sensor}_{task}{end}"] = right
            by_sensor.setdefault(sensor, []).append(right)
        for sensor, shares in by_sensor.items():
            found[f"{sensor}{end}"] = fmean(shares)
        found[f"all{end}"] = fmean(map(fmean, by_sensor.values()))
    return found


def same(answer: str, said: str) -> bool:
    """Whether an answer was given, whatever its case, spaces and stops."""
    return plain(answer) == plain(said)


def plain(text: str) -> str:
    """Words alone, in small letters."""
    return " ".join(re.findall(r"\w+", text.casefold()))
