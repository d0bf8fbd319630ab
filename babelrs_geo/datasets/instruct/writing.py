"""From labelled images to a corpus on the disk: a JSONL file, the meta JSON that names it, and pictures of chips.

The records of an image follow from the seed, the image's name and labels, and its source's concepts: not from other
images, their order, or which other tasks are asked for. Images come in an order drawn by the seed, so that the first
part of the file is as mixed as all of it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from babelrs_geo.datasets.instruct.corpus import IMAGE
from babelrs_geo.datasets.instruct.crops import Crop, cropped
from babelrs_geo.datasets.instruct.labelled import LabelledImage, Picture, chips, frames, is_chips, sensors
from babelrs_geo.datasets.instruct.questions import OF_INCOMPLETE, TASKS
from babelrs_geo.drafts import draft
from babelrs_geo.errors import LabelError, OutputError, ParameterError

_ROUNDS = 8  # times that each task is asked of an image at most


@dataclass(frozen=True, kw_only=True)
class InstructOptions:
    """What is asked. Raises ParameterError where a value is out of range."""

    tasks: tuple[str, ...] = tuple(TASKS)
    """Names of `TASKS`."""
    per_image: int = 4
    """Questions about an image at most; one without objects may have fewer."""
    turns: int = 1
    """Questions of a record: an image is then looked at once for several. Answers are seen by the turns that follow."""
    seed: int = 0
    crop: int | None = None
    """Side in pixels of squares that are asked about in place of frames; None: whole frames."""
    crops: int = 4
    """Squares of a frame."""
    most_boxes: int = 20
    """Boxes of an answer. Where there are more objects, the question is about that many largest."""
    split: str | Mapping[str, str] = "train"
    """For all sensors, or by sensor."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Classes by the concept to call them, in place of what the table of concepts says."""

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is read."""
        unknown = set(self.tasks) - set(TASKS)
        if unknown or not self.tasks:
            told = ", ".join(sorted(unknown)) or "nothing"
            raise ParameterError(f"tasks has {told}; expected some of {', '.join(TASKS)}")
        for name, least in (("per_image", 1), ("turns", 1), ("crop", 16), ("crops", 1), ("most_boxes", 2)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ParameterError(f"{name} is {getattr(self, name)}; expected {least} or more")

    def split_of(self, sensor: str) -> str:
        """The split of one sensor. ParameterError where none is given."""
        if isinstance(self.split, str):
            return self.split
        if sensor not in self.split:
            raise ParameterError(
                f"no split is given for {sensor}, only for {', '.join(self.split)}; name one"
            )
        return self.split[sensor]


@dataclass(frozen=True)
class Written:
    """What a corpus came to."""

    meta: Path
    records: Counter[tuple[str, str]]
    """Questions by sensor and task."""
    images: Counter[str]
    """By sensor."""
    incomplete: int
    """Images with objects that are cut off and not labelled: fewer tasks are asked of them."""


Progress = Callable[[int, int], None]
Record = dict[str, Any]


def ask(image: LabelledImage, root: Path, options: InstructOptions) -> list[Record]:
    """The questions about one image, a record each; its path is written as below `root`."""
    key = f"{options.seed}/{image.source.sensor}/{image.name}"
    tasks = [t for t in TASKS if t in options.tasks and (image.complete or t in OF_INCOMPLETE)]
    Random(key).shuffle(tasks)
    where = image.path.relative_to(root).as_posix()
    records: list[Record] = []
    told: set[tuple[str, str]] = set()
    for turn, task in ((k, t) for k in range(_ROUNDS) for t in tasks):
        if len(records) == options.per_image:
            break
        asked = TASKS[task](image, Random(f"{key}/{task}/{turn}"), options.most_boxes)
        if asked is None or (task, asked.subject) in told:
            continue
        told.add((task, asked.subject))
        turns = [
            {"from": "human", "value": f"{IMAGE}\n{asked.question}"},
            {"from": "gpt", "value": asked.answer},
        ]
        records.append({"image": where, "conversations": turns, "task": task, "sensor": image.source.sensor})
    return records


def joined(records: Sequence[Record], turns: int) -> Iterator[Record]:
    """Records of one image, so many to a conversation; its task is named where all share one."""
    for first in range(0, len(records), turns):
        group = records[first : first + turns]
        shared = {key: value for key, value in group[0].items() if all(r[key] == value for r in group[1:])}
        said = [dict(turn) for record in group for turn in record["conversations"]]
        for turn in said[1:]:  # the image stands before the first
            turn["value"] = turn["value"].removeprefix(f"{IMAGE}\n")
        yield shared | {"conversations": said}


def find(
    data: Sequence[str | os.PathLike[str]], pictures: Path, options: InstructOptions
) -> tuple[list[LabelledImage], list[Picture | Crop], Path]:
    """All images of folders in SOI-Det's layout, or squares of them, and of chips; the pictures to write below
    `pictures`; and the folder below which all of them lie.

    Raises LabelError and SceneError as the readers of `labelled` do, ParameterError where two folders that pictures are
    written of are called alike, one is given twice, or chips are to be cut again.
    """
    folders = [Path(path).resolve() for path in data]
    if len(set(folders)) < len(folders):
        raise ParameterError("a folder of data is given twice; give each once")
    cut = [folder for folder in folders if is_chips(folder)]
    if options.crop is not None and cut:
        raise ParameterError(f"{cut[0]} holds chips, which are cut already; leave crop out")
    drawn_of = cut if options.crop is None else folders
    if len({folder.name for folder in drawn_of}) < len(drawn_of):
        raise ParameterError("two folders have one name, under which pictures are kept; rename one")
    images: list[LabelledImage] = []
    todo: list[Picture | Crop] = []
    for folder in folders:
        for sensor in sensors(folder):
            split = options.split_of(sensor)
            if folder in cut:
                own, drawn = chips(folder, sensor, split, pictures / folder.name, options.renamed)
                todo += drawn
            else:
                own = frames(folder, sensor, split, options.renamed)
                if options.crop is not None:
                    place = pictures / folder.name
                    own, squares = cropped(own, options.crop, options.crops, options.seed, place)
                    todo += squares
            images += own
    unknown = set(options.renamed) - {name for image in images for name in image.source.classes}
    if unknown:
        raise LabelError(f"no labels have class {', '.join(sorted(unknown))}, which was to be renamed")
    tops = [pictures / folder.name if folder in drawn_of else folder for folder in folders]
    return images, todo, Path(os.path.commonpath(tops))


def check_output(output: Path, *, overwrite: bool) -> None:
    """Raise OutputError where `write_corpus` could not, or should not, write. Ask before the work."""
    if output.suffix != ".jsonl":
        raise OutputError(f"{output} does not end in .jsonl; name a file such as corpus.jsonl")
    for path in (output, meta_path(output)):
        if path.is_dir() or (path.exists() and not overwrite):
            raise OutputError(f"{path} exists; pass --overwrite to replace it, or another file with -o")
    parent = output.absolute().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{output} cannot be written: {parent} is missing or not writable; choose another")


def meta_path(output: Path) -> Path:
    """Where the meta JSON of a JSONL file goes: `corpus.meta.json` beside `corpus.jsonl`."""
    return output.with_suffix(".meta.json")


def write_corpus(
    data: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    options: InstructOptions | None = None,
    progress: Progress | None = None,
) -> Written:
    """Ask about all images of some labelled data, and write what was asked and answered.

    `output` is the JSONL file; beside it go its meta JSON, last, and for chips and squares a folder of pictures,
    `<stem>_images/`. Files are whole or absent. Raises as `find` does, and OutputError where the disk refuses.
    """
    options = options or InstructOptions()
    target = Path(output).resolve()
    images, todo, root = find(data, target.with_name(f"{target.stem}_images"), options)
    images.sort(key=lambda image: _order(image, options.seed))
    total = len(todo) + len(images)
    done = 0
    for picture in todo:
        picture.write()
        done += 1
        if progress is not None:
            progress(done, total)
    counts: Counter[tuple[str, str]] = Counter()

    def lines() -> Iterator[str]:
        for number, image in enumerate(images, done + 1):
            asked = ask(image, root, options)
            counts.update((record["sensor"], record["task"]) for record in asked)
            for record in joined(asked, options.turns):
                yield json.dumps(record, ensure_ascii=False) + "\n"
            if progress is not None:
                progress(number, total)

    written = _write(target, lines())
    own = root.is_relative_to(target.parent)  # then the corpus and its images may be moved together
    entry = {
        "root": root.relative_to(target.parent).as_posix() if own else str(root),
        "annotation": target.name,
        "data_augment": False,
        "repeat_time": 1,
        "length": written,
    }
    meta = meta_path(target)
    _write(meta, [json.dumps({target.stem: entry}, indent=2, ensure_ascii=False) + "\n"])
    return Written(
        meta,
        counts,
        Counter(image.source.sensor for image in images),
        sum(not image.complete for image in images),
    )


def _order(image: LabelledImage, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}/{image.source.sensor}/{image.name}".encode()).digest()


def _write(path: Path, lines: Iterable[str]) -> int:
    """A text file, whole or not at all; returns how many lines it got."""
    count = 0
    with draft(path) as hidden, hidden.open("w", encoding="utf-8") as file:
        for line in lines:
            file.write(line)
            count += 1
    return count
