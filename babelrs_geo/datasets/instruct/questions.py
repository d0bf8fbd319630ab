"""What is asked about an image, and the answer: one function a task.

Each draws from the generator that it is given, and from nothing else. What is not labelled is never said to be absent:
only the concepts that an image's source labels are asked for. An answer must not follow from the question alone, or a
language model learns it without looking; so presence and absence are asked for equally often, of each concept as
near as the labels allow, and a question's wording is the same for one object and for many.

Boxes are `<box>[[x1, y1, x2, y2]]</box>`, several as `<box>[[...], [...]]</box>` from top to bottom, in whole numbers
from 0 to 1000 of the image's width and height.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from random import Random
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from babelrs_geo.concepts import counted, indefinite, listed, plural
from babelrs_geo.datasets.instruct.labelled import SIDE, LabelledImage

_IMAGES = {"sar": "a SAR image", "ir": "an infrared image", "rgb": "an optical image"}
_SENSORS = {
    "sar": "Synthetic aperture radar (SAR).",
    "ir": "A thermal infrared camera.",
    "rgb": "An optical camera (RGB).",
}
_CLASSES = (
    "Which kinds of objects can be seen in this image?",
    "What objects does this image show?",
    "Name the objects in this image.",
    "What is there to see in this image?",
)
_AMONG = (
    "Which of these can be seen in this image: {}?",
    "Which of the following does this image show: {}?",
    "Of {}, which are in this image?",
)
_COUNT = (
    "How many {} are in this image?",
    "How many {} can be seen in this image?",
    "Count the {} in this image.",
    "What is the number of {} in this image?",
)
_PRESENCE = (
    "Is there {one} in this image?",
    "Are there any {many} in this image?",
    "Can {one} be seen in this image?",
    "Does this image show any {many}?",
)
_PRESENCE_IN = (
    "Is there {one} in the area {box}?",
    "Are there any {many} in the area {box}?",
    "Does the area {box} contain {one}?",
    "Can {one} be seen within {box}?",
)
_REFER = (
    "What is in the area {}?",
    "What is the object in the area {}?",
    "What is the category visible in the area {}?",
    "Which kind of object does the box {} mark?",
)
_GROUND = (
    "Give the boxes of all {} in this image.",
    "Find all {} in this image and give their boxes.",
    "Locate all {} in this image.",
    "Where can {} be found in this image? Answer with boxes.",
)
_GROUND_LARGEST = (
    "Give the boxes of the {} largest {} in this image.",
    "Find the {} largest {} in this image and give their boxes.",
    "Locate the {} largest {} in this image.",
)
_CAPTION = (
    "Describe this image briefly.",
    "Write a short caption for this image.",
    "What does this image show? Answer in one sentence.",
    "Sum up this image in one sentence.",
)
_SENSOR = (
    "Which sensor took this image?",
    "What kind of sensor was this image taken with?",
    "How was this image taken?",
)

_AMONG_MOST = 5  # concepts that a question offers to choose from
_ABSENT = 0.2  # share of counting and of grounding that asks for what is not there, where objects are
_AREA = (0.15, 0.5)  # sides of an area that is asked about, as shares of the image's
_TRIES = 40  # places tried for such an area
_MARGIN = 3  # of 1000: how far an area without a concept stays from each object of it
_SHARED = 0.5  # overlap (IoU) from which a box could as well mean an object of another concept


class Asked(NamedTuple):
    """A question and its answer."""

    question: str
    answer: str
    subject: str
    """What it is about: no subject is asked for twice of an image."""


def boxes_text(boxes: NDArray[np.int64]) -> str:
    """Boxes (N, 4) as in text."""
    return "<box>[" + ", ".join(f"[{', '.join(map(str, box))}]" for box in boxes.tolist()) + "]</box>"


def boxes_in(text: str) -> list[tuple[int, int, int, int]]:
    """The boxes of a text, in their order."""
    found = re.findall(r"<box>(.*?)</box>", text)
    rows = [re.findall(r"\[(\d+), (\d+), (\d+), (\d+)\]", each) for each in found]
    return [(int(a), int(b), int(c), int(d)) for each in rows for a, b, c, d in each]


def classes(image: LabelledImage, rng: Random, most: int) -> Asked | None:
    """Which concepts there are, openly or out of some that are offered."""
    there, known = Counter(image.concepts), list(image.source.weights)
    if len(known) > 1 and (not there or rng.random() < 0.5):
        offered = rng.sample(known, min(len(known), _AMONG_MOST))
        seen = [thing for thing in offered if there[thing]]
        question = rng.choice(_AMONG).format(listed([plural(t) for t in offered], "and"))
        return Asked(question, _kinds(there, seen) if seen else "None of them.", "among")
    if not there:
        return None
    return Asked(rng.choice(_CLASSES), _kinds(there, there), "all")


def count(image: LabelledImage, rng: Random, most: int) -> Asked | None:
    """How many of a concept there are, none included."""
    thing = _there_or_not(image, rng)
    if thing is None:
        return None
    number = image.concepts.count(thing)
    return Asked(rng.choice(_COUNT).format(plural(thing)), str(number), thing)


def presence(image: LabelledImage, rng: Random, most: int) -> Asked | None:
    """Whether there is a concept, in the image or in an area of it."""
    there, absent = sorted(set(image.concepts)), _absent(image)
    # Images without objects are always answered with no: the others make up for it.
    yes = bool(there) and rng.random() < min(1.0, 0.5 / max(1 - image.source.empty, 1e-9))
    if absent and len(image.source.weights) > 1 and rng.random() < 0.5:
        thing = rng.choice(there) if yes else _draw_absent(image, absent, rng)
        text, subject = rng.choice(_PRESENCE), f"image {thing}"
        box = ""
    else:
        thing = rng.choice(there) if there else _draw_absent(image, absent, rng)
        # Both are looked for whatever the answer, or crowded images would be asked for presence alone.
        around, without = _areas(image, thing, rng)
        if without is None or (yes and around is None):
            return None
        box = boxes_text(np.array([around if yes else without]))
        text, subject = rng.choice(_PRESENCE_IN), box
    question = text.format(one=indefinite(thing), many=plural(thing), box=box)
    return Asked(question, "Yes." if yes else "No.", subject)


def refer(image: LabelledImage, rng: Random, most: int) -> Asked | None:
    """What an object is, by its box; not where that could as well mean an object of another concept."""
    clear = [i for i in range(len(image.concepts)) if not _ambiguous(image, i)]
    if not clear:
        return None
    thing = rng.choice(sorted({image.concepts[i] for i in clear}))
    chosen = rng.choice([i for i in clear if image.concepts[i] == thing])
    box = boxes_text(image.grid[[chosen]])
    return Asked(rng.choice(_REFER).format(box), _sentence(indefinite(thing)), box)


def ground(image: LabelledImage, rng: Random, most: int) -> Asked | None:
    """Where all objects of a concept are; where there are more than `most`, where the largest are."""
    thing = _there_or_not(image, rng)
    if thing is None:
        return None
    rows = np.array([i for i, other in enumerate(image.concepts) if other == thing], np.int64)
    question = rng.choice(_GROUND).format(plural(thing))
    if not len(rows):
        return Asked(question, f"There are no {plural(thing)} in this image.", thing)
    if len(rows) > most:
        box = image.boxes[rows]
        area = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])
        rows = rows[np.lexsort((rows, -area))[:most]]
        question = rng.choice(_GROUND_LARGEST).format(most, plural(thing))
    grid = image.grid[rows]
    return Asked(question, boxes_text(grid[np.lexsort(grid.T[[3, 2, 0, 1]])]), thing)


def caption(image: LabelledImage, rng: Random, most: int) -> Asked | None:
    """A sentence on sensor, kinds and numbers; of an image without objects, what is not in it."""
    there, kind = Counter(image.concepts), _IMAGES[image.source.sensor]
    question = rng.choice(_CAPTION)
    if there:
        things = listed([counted(thing, there[thing]) for thing in _by_number(there, there)])
        return Asked(question, _sentence(rng.choice((f"{kind} with {things}", f"{things} in {kind}"))), "")
    absent = _absent(image)
    if not absent:
        return None
    missing = sorted(rng.sample(absent, min(3, len(absent))))
    return Asked(question, _sentence(f"{kind} without {listed([plural(t) for t in missing], 'or')}"), "")


def sensor(image: LabelledImage, rng: Random, most: int) -> Asked | None:
    """Which sensor took the image."""
    return Asked(rng.choice(_SENSOR), _SENSORS[image.source.sensor], "")


Task = Callable[[LabelledImage, Random, int], Asked | None]
TASKS: dict[str, Task] = {
    "classes": classes,
    "count": count,
    "presence": presence,
    "refer": refer,
    "ground": ground,
    "caption": caption,
    "sensor": sensor,
}
"""By name. Each gives None where an image has nothing to ask for; the last argument is the most boxes of an answer."""

OF_INCOMPLETE = ("refer", "sensor")
"""Those whose answers hold whatever else shows in the image."""


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _by_number(there: Counter[str], things: Iterable[str]) -> list[str]:
    """The most frequent first, then by name."""
    return sorted(things, key=lambda thing: (-there[thing], thing))


def _kinds(there: Counter[str], things: Iterable[str]) -> str:
    return _sentence(
        listed([indefinite(t) if there[t] == 1 else plural(t) for t in _by_number(there, things)])
    )


def _absent(image: LabelledImage) -> list[str]:
    """Concepts that would be labelled, and are not there."""
    there = set(image.concepts)
    return [thing for thing in image.source.weights if thing not in there]


def _draw_absent(image: LabelledImage, absent: Sequence[str], rng: Random) -> str:
    """One of them, so that no answer follows from its name."""
    return rng.choices(absent, [image.source.weights[thing] for thing in absent])[0]


def _there_or_not(image: LabelledImage, rng: Random) -> str | None:
    """A concept of the image, or at times one that is not there."""
    there, absent = sorted(set(image.concepts)), _absent(image)
    if absent and (not there or rng.random() < _ABSENT):
        return _draw_absent(image, absent, rng)
    return rng.choice(there) if there else None


def _areas(
    image: LabelledImage, thing: str, rng: Random
) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    """An area that holds an object of a concept whole, and one of the same size that holds no part of any.

    None for what does not exist, or was not found. Where there is no such object, the area is as large as others.
    """
    boxes = image.grid[[i for i, other in enumerate(image.concepts) if other == thing]]
    least, greatest = (round(share * SIDE) for share in _AREA)
    width, height = rng.randint(least, greatest), rng.randint(least, greatest)
    around = None
    if len(boxes):
        x0, y0, x1, y1 = boxes[rng.randrange(len(boxes))].tolist()
        width, height = max(width, x1 - x0), max(height, y1 - y0)
        left = rng.randint(max(0, x1 - width), min(x0, SIDE - width))
        top = rng.randint(max(0, y1 - height), min(y0, SIDE - height))
        around = (left, top, left + width, top + height)
    low, high = boxes[:, :2] - _MARGIN, boxes[:, 2:] + _MARGIN
    for _ in range(_TRIES):
        left, top = rng.randint(0, SIDE - width), rng.randint(0, SIDE - height)
        area = np.array([left, top, left + width, top + height])
        if not ((low < area[2:]) & (high > area[:2])).all(1).any():
            return around, tuple(area.tolist())
    return around, None


def _ambiguous(image: LabelledImage, chosen: int) -> bool:
    """Whether an object's upright box is nearly that of an object of another concept, as both are in text."""
    others = image.grid[[i for i, t in enumerate(image.concepts) if t != image.concepts[chosen]]]
    box = image.grid[chosen]
    sides = np.minimum(others[:, 2:], box[2:]) - np.maximum(others[:, :2], box[:2])
    shared = np.prod(np.maximum(sides, 0), axis=1)
    union = np.prod(others[:, 2:] - others[:, :2], axis=1) + np.prod(box[2:] - box[:2]) - shared
    return bool((shared > _SHARED * union).any())
