"""A contact sheet of a corpus for a person to check: images with the boxes that their texts name, and the texts."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError

from babelrs_geo.datasets.instruct.corpus import IMAGE, Conversation, Corpus
from babelrs_geo.datasets.instruct.labelled import SIDE
from babelrs_geo.datasets.instruct.questions import boxes_in
from babelrs_geo.drafts import draft
from babelrs_geo.errors import OutputError, SceneError

ASKED, ANSWERED = (255, 140, 0), (0, 200, 80)
"""Colours of boxes in questions and in answers."""

_WIDE, _HIGH, _TEXT, _GAP = 360, 280, 330, 12  # pixels
_COLUMNS, _LETTERS, _LINES = 3, 42, 14
_LOOKED_AT = 20_000  # records among which the samples are chosen
_INK, _GREY = (20, 20, 20), (120, 120, 120)


def check_sheet(path: Path, *, overwrite: bool) -> None:
    """Raise OutputError where `write_sheet` could not, or should not, write. Ask before the work."""
    if path.suffix != ".png":
        raise OutputError(f"{path} does not end in .png; name a file such as sheet.png")
    if path.is_dir() or (path.exists() and not overwrite):
        raise OutputError(f"{path} exists; pass --overwrite to replace it, or another file with --sheet")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"{path} cannot be written: its folder is missing; make it, or choose another")


def write_sheet(corpus: Corpus, path: Path, samples: int = 24) -> int:
    """Draw some conversations as a PNG, each sensor and task in turn, and return how many.

    Boxes of questions are orange, of answers green; text beyond the room is cut. Raises SceneError where an image
    cannot be read, OutputError where the sheet cannot be written.
    """
    chosen = list(islice(_chosen(corpus, samples), samples))
    columns = min(_COLUMNS, len(chosen))
    cell = (_WIDE + _TEXT + 2 * _GAP, _HIGH + _GAP)
    rows = -(-len(chosen) // columns)
    sheet = Image.new("RGB", (columns * cell[0] + _GAP, rows * cell[1] + _GAP), "white")
    for number, conversation in enumerate(chosen):
        row, column = divmod(number, columns)
        _draw(sheet, conversation, (_GAP + column * cell[0], _GAP + row * cell[1]))
    with draft(path) as hidden:
        sheet.save(hidden, "PNG")
    return len(chosen)


def _chosen(corpus: Corpus, samples: int) -> Iterator[Conversation]:
    """One of each sensor and task, then a second of each, and so on: of images not shown yet, where there are some."""
    groups: dict[tuple[str, str], list[Conversation]] = {}
    for number in range(min(len(corpus), _LOOKED_AT)):
        each = corpus[number]
        groups.setdefault((each.task or "", each.sensor or ""), []).append(each)
    shown: set[tuple[Path, ...]] = set()
    for _ in range(samples):
        for key in sorted(groups):
            new = (k for k, each in enumerate(groups[key]) if each.images not in shown)
            each = groups[key].pop(next(new, 0))
            shown.add(each.images)
            yield each
        groups = {key: group for key, group in groups.items() if group}


def _draw(sheet: Image.Image, conversation: Conversation, corner: tuple[int, int]) -> None:
    """One conversation: its first image with boxes, and what is said."""
    x, y = corner
    if conversation.images:
        sheet.paste(_picture(conversation), corner)
    draw = ImageDraw.Draw(sheet)
    lines = [(f"{conversation.sensor or 'any sensor'} · {conversation.task or 'any task'}", _GREY)]
    for turn in conversation.turns:
        speaker, plain = turn["from"], " ".join(turn["value"].replace(IMAGE, "").split())
        ink = _GREY if speaker == "system" else _INK
        wrapped = textwrap.wrap(f"{speaker}: {plain}", _LETTERS) or [f"{speaker}:"]
        lines += [(line, ink) for line in [*wrapped, ""]]
    if len(lines) > _LINES:
        lines = [*lines[: _LINES - 1], ("...", _GREY)]
    font = ImageFont.load_default(15)
    for number, (line, ink) in enumerate(lines):
        draw.text((x + _WIDE + _GAP, y + 20 * number), line, fill=ink, font=font)


def _picture(conversation: Conversation) -> Image.Image:
    path = conversation.images[0]
    try:
        with Image.open(path) as image:
            picture = image.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise SceneError(
            f"{path} cannot be read as an image ({error}); {conversation.where} names it"
        ) from error
    scale = min(_WIDE / picture.width, _HIGH / picture.height)
    picture = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
    draw = ImageDraw.Draw(picture)
    for turn in conversation.turns:
        colour = ANSWERED if turn["from"] == "gpt" else ASKED
        for x0, y0, x1, y1 in boxes_in(turn["value"]):
            left, right = (v * picture.width / SIDE for v in (x0, x1))
            top, bottom = (v * picture.height / SIDE for v in (y0, y1))
            if right >= left and bottom >= top:  # a corpus of others may have them crossed
                draw.rectangle((left, top, right, bottom), outline=colour, width=2)
    return picture
