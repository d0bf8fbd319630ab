"""Conversations as tokens: the ChatML template, what a language model learns of it, and what it is asked.

A record's turns, `{"from": "system" | "human" | "gpt", "value": text}`, become

    <|im_start|>system ...<|im_end|> <|im_start|>user ...<|im_end|> <|im_start|>assistant ...<|im_end|>

with a line break after each role and each turn. `<image>` in a human turn stands for an image: `<img>`, one
`<IMG_CONTEXT>` for each of its tokens, `</img>`. Loss is on answers and the <|im_end|> after them. The original
is InternVL's template `internvl2_5`, turn by turn: each is tokenised by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from babelrs_geo.errors import LabelError, ParameterError

IMAGE = "<image>"
IMAGE_START, IMAGE_TOKEN, IMAGE_END = "<img>", "<IMG_CONTEXT>", "</img>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
SPECIAL = (
    TURN_START, TURN_END, IMAGE_START, IMAGE_END, IMAGE_TOKEN,
    "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>",
)  # fmt: skip
"""Tokens that a tokenizer must have; those it lacks are added."""
ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
IGNORED = -100
"""The label of a token without loss."""
LONGEST = 3072
"""Tokens a sample in the paper."""
SYSTEM = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
"""The system turn that InternVL2.5 was trained with, where a record has none of its own."""

Turn = Mapping[str, str]


@dataclass(frozen=True)
class Encoded:
    """One conversation, without padding: every tensor is (L,)."""

    input_ids: Tensor
    labels: Tensor
    """The token itself where it counts, `IGNORED` elsewhere; not shifted."""


@dataclass(frozen=True)
class TextBatch:
    """Conversations padded on the right to one length: every tensor is (B, L)."""

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor
    """True where there is a token."""
    position_ids: Tensor
    """0, 1, 2, ...; 1 in the padding."""

    def to(self, device: str | torch.device) -> TextBatch:
        """The batch on another device."""
        moved = (each.to(device) for each in vars(self).values())
        return TextBatch(*moved)


def add_tokens(tokenizer: Any) -> int:
    """Add the special tokens that a tokenizer lacks; give their number. The model's table must then follow.

    Raises ParameterError where no token can serve as padding.
    """
    known = tokenizer.get_vocab()
    missing = [token for token in SPECIAL if token not in known]
    if missing:
        tokenizer.add_tokens(missing, special_tokens=True)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ParameterError("the tokenizer has neither a padding nor an end token; give it pad_token")
        tokenizer.pad_token = tokenizer.eos_token
    return len(missing)


def encode(
    turns: Sequence[Turn],
    tokenizer: Any,
    image_tokens: Sequence[int] = (),
    longest: int = LONGEST,
    system: str | None = SYSTEM,
) -> Encoded | None:
    """A record as tokens and labels; `image_tokens` are the numbers of tokens of its images.

    Where there is one image and no `<image>`, it stands before the first question. `system` opens records
    that have no system turn, None for none. What exceeds `longest` is cut off; None is given where the cut
    takes image tokens, or all answers: another sample must be drawn. Raises LabelError for a record whose
    turns or images cannot be read.
    """
    ids: list[int] = []
    labels: list[int] = []
    asked = len(_ids(tokenizer, f"{TURN_START}assistant\n"))
    for role, text in _texts(turns, image_tokens, system):
        own = _ids(tokenizer, f"{TURN_START}{role}\n{text}{TURN_END}\n")
        ids += own
        if role == "assistant":
            labels += (
                [IGNORED] * asked + own[asked:-1] + [IGNORED]
            )  # the line break after a turn is not learnt
        else:
            labels += [IGNORED] * len(own)
    ends = tokenizer.convert_tokens_to_ids(IMAGE_END)
    if ids[longest:].count(ends) or all(label == IGNORED for label in labels[1:longest]):
        return None
    return Encoded(torch.tensor(ids[:longest]), torch.tensor(labels[:longest]))


def prompt(
    question: str, tokenizer: Any, image_tokens: Sequence[int] = (), system: str | None = SYSTEM
) -> Tensor:
    """Tokens (L,) that ask a question of images, up to where the answer begins."""
    turns = _texts([{"from": "human", "value": question}], image_tokens, system, answered=False)
    text = [f"{TURN_START}{role}\n{value}{TURN_END}\n" for role, value in turns]
    parts = [_ids(tokenizer, each) for each in (*text, f"{TURN_START}assistant\n")]
    return torch.tensor([token for part in parts for token in part])


def collate(samples: Sequence[Encoded], padding: int, length: int | None = None) -> TextBatch:
    """Samples of any length as one batch, padded with the token `padding` to the longest, or to `length`."""
    length = length or max(len(each.input_ids) for each in samples)

    def padded(rows: list[Tensor], value: int) -> Tensor:
        return torch.stack(
            [torch.nn.functional.pad(row, (0, length - len(row)), value=value) for row in rows]
        )

    mask = padded([torch.ones_like(each.input_ids) for each in samples], 0).bool()
    return TextBatch(
        padded([each.input_ids for each in samples], padding),
        padded([each.labels for each in samples], IGNORED),
        mask,
        positions(mask),
    )


def positions(mask: Tensor) -> Tensor:
    """Position ids of a mask (B, L): tokens counted from 0 in each row, 1 where there is none."""
    return (mask.long().cumsum(-1) - 1).masked_fill(~mask, 1)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _texts(
    turns: Sequence[Turn], image_tokens: Sequence[int], system: str | None, *, answered: bool = True
) -> list[tuple[str, str]]:
    """Roles and texts, images written out."""
    said = _read(turns, answered)
    if said[0][0] != "system" and system is not None:
        said.insert(0, ("system", system))
    questions = [i for i, (role, _) in enumerate(said) if role == "user"]
    marks = sum(said[i][1].count(IMAGE) for i in questions)
    if len(image_tokens) == 1 and marks == 0:
        said[questions[0]] = ("user", f"{IMAGE}\n{said[questions[0]][1]}")
        marks = 1
    if marks != len(image_tokens):
        raise LabelError(
            f"a conversation has {marks} {IMAGE} for {len(image_tokens)} images; expected one for each"
        )
    left = list(image_tokens)
    for i in questions:
        first, *rest = said[i][1].split(IMAGE)
        said[i] = ("user", first + "".join(_image(left.pop(0)) + text for text in rest))
    return said


def _image(tokens: int) -> str:
    return f"{IMAGE_START}{IMAGE_TOKEN * tokens}{IMAGE_END}"


def _read(turns: Sequence[Turn], answered: bool) -> list[tuple[str, str]]:
    try:
        said = [(ROLES[turn["from"]], turn["value"]) for turn in turns]
    except (KeyError, TypeError) as cause:
        raise LabelError(
            f"a turn of a conversation cannot be read ({cause!r}); expected from (system, human or gpt) and value"
        ) from cause
    if not all(isinstance(text, str) for _, text in said):
        raise LabelError("a turn's value is no text; expected a string")
    roles = [role for role, _ in said]
    wanted = {"user", "assistant"} if answered else {"user"}
    if not wanted <= set(roles) or "system" in roles[1:]:
        raise LabelError(
            f"a conversation's turns are {', '.join(roles) or 'none'}; expected a question (human) and an answer "
            "(gpt) at least, after a system turn or none"
        )
    return said
