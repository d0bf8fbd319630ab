r"""Corpora of conversations about images, in the form that InternVL is trained with (BabelRS sections 12 and 14).

A meta JSON names the parts of a corpus:

    {"ships": {"root": "images", "annotation": "ships.jsonl", "data_augment": false, "repeat_time": 1, "length": 9}}

and a part is a JSONL file, one record a line:

    {"image": "a/1.png", "conversations": [{"from": "human", "value": "<image>\nHow many ships?"},
                                           {"from": "gpt", "value": "2"}]}

`image` is a path below `root`, a list of them, or missing where a record is text alone. Relative paths in the meta
JSON start at its own folder. A part with `repeat_time` below 1 is its file's first records, so many hundredths of
them; a whole number above 1 is the file so many times over. `max_dynamic_patch` limits the tiles of its images.
`length` says how long the file was when the meta JSON was written, and nothing depends on it.

Beyond the original, a record may say what it asks and of which sensor (`task`, `sensor`), and so may its part, for all
records that do not. Keys that are not named here are left alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from babelrs_geo.errors import LabelError

IMAGE = "<image>"
"""Where an image stands in a human turn."""
SPEAKERS = ("system", "human", "gpt")


Turn = Mapping[str, str]
"""What one side says: `from` is one of `SPEAKERS`, `system` first or not at all; `value` is the text."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """One record. Images are paths: whoever encodes it opens them."""

    turns: tuple[Turn, ...]
    images: tuple[Path, ...] = ()
    """In the order of the `<image>` in the human turns. One image may have none: it then stands before the first."""
    task: str | None = None
    sensor: str | None = None
    most_tiles: int | None = None
    """Of its part, in place of the run's own."""
    augment: bool = False
    """Whether its part asks for augmented images."""
    source: Path | None = None
    """The JSONL file."""
    line: int = 0
    """Its line there, from 1."""

    @property
    def where(self) -> str:
        """File and line, for messages."""
        return "a conversation" if self.source is None else f"{self.source}:{self.line}"


@dataclass(frozen=True, eq=False)
class Part:
    """One JSONL file of a corpus."""

    name: str
    root: Path
    annotation: Path
    repeat: float
    most_tiles: int | None
    augment: bool
    task: str | None
    sensor: str | None
    offsets: NDArray[np.int64]
    """Bytes at which the records begin that are used, before they are repeated."""
    lines: NDArray[np.int64]
    """And their lines, from 1."""

    def __len__(self) -> int:
        return len(self.offsets) * max(1, int(self.repeat))

    def read(self, number: int) -> Conversation:
        """A record. Raises LabelError, naming file and line, where it is none."""
        place = number % len(self.offsets)
        line = int(self.lines[place])
        with self.annotation.open("rb") as file:
            file.seek(self.offsets[place])
            text = file.readline()
        try:
            return self._parse(json.loads(text), line)
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are
            raise LabelError(
                f"{self.annotation}:{line} is no record ({' '.join(str(error).split())}); mend or drop it"
            ) from None

    def _parse(self, record: Any, line: int) -> Conversation:
        """Raises ValueError with what is wrong."""
        if not isinstance(record, dict):
            raise ValueError("expected an object with image and conversations")
        turns, images = _turns(record), _images(record)
        marks = sum(turn["value"].count(IMAGE) for turn in turns if turn["from"] == "human")
        if marks != len(images) and not (len(images) == 1 and marks == 0):
            raise ValueError(f"{len(images)} images, but {marks} times {IMAGE} in the human turns")
        return Conversation(
            turns,
            tuple(self.root / image for image in images),
            task=record.get("task", self.task),
            sensor=record.get("sensor", self.sensor),
            most_tiles=self.most_tiles,
            augment=self.augment,
            source=self.annotation,
            line=line,
        )


def _turns(record: Mapping[str, Any]) -> tuple[Turn, ...]:
    given = record.get("conversations")
    if not isinstance(given, list) or not given:
        raise ValueError("conversations is no list of turns")
    turns: list[Turn] = []
    for turn in given:
        speaker, text = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        if speaker not in SPEAKERS or not isinstance(text, str):
            raise ValueError(f"a turn is not from {', '.join(SPEAKERS)} with a text as value")
        if speaker == "system" and turns:
            raise ValueError("system speaks after another; expected it first")
        turns.append({"from": speaker, "value": text})
    if not {"human", "gpt"} <= {turn["from"] for turn in turns}:
        raise ValueError("expected a turn from human and one from gpt at least")
    return tuple(turns)


def _images(record: Mapping[str, Any]) -> tuple[str, ...]:
    if "video" in record:
        raise ValueError("it is about a video; expected images or text")
    given = record.get("image") or []
    images = [given] if isinstance(given, str) else given
    if not isinstance(images, list) or not all(isinstance(image, str) and image for image in images):
        raise ValueError("image is neither a path nor a list of paths")
    return tuple(images)


class Corpus:
    """The conversations of a meta JSON, part after part: `Corpus("corpus.meta.json")[0]`.

    A map-style dataset for a `DataLoader`. It holds where records begin, sixteen bytes each, and reads them when
    asked. Raises LabelError where the meta JSON or a file it names cannot be used, or has no record.
    """

    def __init__(self, meta: str | os.PathLike[str]) -> None:
        self.meta = Path(meta)
        self.parts = tuple(_part(self.meta, name, entry) for name, entry in _read_meta(self.meta).items())
        self._ends = np.cumsum([len(part) for part in self.parts])
        if not len(self):
            raise LabelError(f"{self.meta} names no record; expected repeat_time large enough for one")

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, number: int) -> Conversation:
        part, within = self._place(number)
        return self.parts[part].read(within)

    def _place(self, number: int) -> tuple[int, int]:
        """Part and number within it."""
        at = number + len(self) if number < 0 else number
        if not 0 <= at < len(self):
            raise IndexError(f"record {number} of {len(self)}")
        part = int(np.searchsorted(self._ends, at, side="right"))
        return part, at - (int(self._ends[part - 1]) if part else 0)


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LabelError(f"{path} cannot be read ({error.strerror}); expected a corpus's meta JSON") from None
    except ValueError as error:
        raise LabelError(f"{path} is no JSON ({error}); expected a corpus's meta JSON") from None
    if not isinstance(document, dict) or not all(isinstance(entry, dict) for entry in document.values()):
        raise LabelError(f"{path} is no corpus's meta JSON; expected an object for each part, by its name")
    return document


def _part(meta: Path, name: str, entry: Mapping[str, Any]) -> Part:
    def wanted(key: str, fine: bool, expected: str) -> None:
        if not fine:
            raise LabelError(f"{meta}: {key} of {name!r} is {entry.get(key)!r}; expected {expected}")

    repeat, most = entry.get("repeat_time", 1), entry.get("max_dynamic_patch")
    number = isinstance(repeat, int | float) and not isinstance(repeat, bool) and repeat > 0
    wanted(
        "repeat_time",
        number and (repeat <= 1 or isinstance(repeat, int)),
        "a share up to 1, or a whole number above it",
    )
    wanted("max_dynamic_patch", most is None or (type(most) is int and most > 0), "a whole number from 1")
    for key in ("root", "annotation"):
        wanted(key, isinstance(entry.get(key), str), "a path")
    for key in ("task", "sensor"):
        wanted(key, isinstance(entry.get(key, ""), str), "a word")
    wanted("data_augment", isinstance(entry.get("data_augment", False), bool), "true or false")
    annotation = meta.parent / entry["annotation"]
    offsets, lines = _offsets(annotation, f"{meta} names it")
    used = int(len(offsets) * min(repeat, 1))
    return Part(
        name,
        meta.parent / entry["root"],
        annotation,
        float(repeat),
        most,
        entry.get("data_augment", False),
        entry.get("task"),
        entry.get("sensor"),
        offsets[:used],
        lines[:used],
    )


def _offsets(path: Path, why: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where the lines of a file begin, in bytes, and their numbers from 1; those without text left out."""
    try:
        with path.open("rb") as file:
            lengths = np.fromiter((len(x) if x.strip() else -len(x) for x in file), np.int64)
    except OSError as error:
        raise LabelError(f"{path} cannot be read ({error.strerror}); {why}") from None
    starts: NDArray[np.int64] = np.cumsum(np.abs(lengths)) - np.abs(lengths)
    return starts[lengths > 0], np.flatnonzero(lengths > 0) + 1
