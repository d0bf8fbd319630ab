"""Conversations as tokens: the original's on its own example, and laws on any."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden import Golden, document, needs_golden
from hypothesis import given
from hypothesis import strategies as st
from tiny_pivot import byte_tokenizer

from babelrs_geo.errors import LabelError, ParameterError
from babelrs_geo.models import conversation
from babelrs_geo.models.conversation import (
    IGNORED,
    SPECIAL,
    SYSTEM,
    add_tokens,
    collate,
    encode,
    positions,
    prompt,
)

TOKENIZER = byte_tokenizer()
END, CONTEXT = (TOKENIZER.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<IMG_CONTEXT>"))
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(
    lambda text: not any(token in text for token in (*SPECIAL, "<image>"))
)


def turns(*texts: str) -> list[dict[str, str]]:
    """Questions and answers by turns."""
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def spelt(*texts: str | int, tokens: int = 0) -> list[int]:
    """Bytes of texts, numbers as they are: what the tokenizer of bytes makes of a conversation, written by hand."""
    return [each for text in texts for each in ([text] if isinstance(text, int) else text.encode())]


def test_the_tokenizer_is_the_originals_stand_in() -> None:
    assert TOKENIZER("aé\n", add_special_tokens=False)["input_ids"] == [*"aé\n".encode()]
    assert [TOKENIZER.convert_tokens_to_ids(t) for t in ("<|endoftext|>", *SPECIAL[:5])] == [
        256, 257, 258, 259, 260, 261,
    ]  # fmt: skip


def test_a_conversation_token_by_token() -> None:
    made = encode(turns("<image>\nHow many?", "2"), TOKENIZER, [3], system="s")
    assert made is not None
    expected = spelt(
        257, "system\ns", 258, "\n", 257, "user\n", 259, 261, 261, 261, 260, "\nHow many?", 258, "\n"
    )
    expected += spelt(257, "assistant\n2", 258, "\n")
    assert made.input_ids.tolist() == expected
    assert made.labels.tolist() == [IGNORED] * (len(expected) - 3) + [*b"2", 258, IGNORED]


@pytest.mark.shared
@needs_golden
def test_tokens_labels_masks_and_positions_are_the_originals() -> None:
    told, data = document("vlm_data"), Golden("vlm_data")
    base = told["special_base"]
    for i, token in enumerate(told["special_tokens"]):
        assert TOKENIZER.convert_tokens_to_ids(token) == base + i
    assert told["default_system_message"] == SYSTEM
    tokens = [told["num_image_tokens"]]
    own = encode(told["conversation"], TOKENIZER, tokens, longest=told["model_max_length"])
    assert own is not None
    batch = collate([own], told["pad_id"], told["model_max_length"])
    for name, tensor in vars(batch).items():
        assert torch.equal(tensor[0], data[name]), name
    said = [{"from": "system", "value": "SYS"}, *told["conversation"]]
    own = encode(said, TOKENIZER, tokens)
    assert own is not None
    assert torch.equal(own.input_ids, data["sys_input_ids"]) and torch.equal(own.labels, data["sys_labels"])
    # the original's prompt still has its image to write out
    written = told["inference_prompt_example"].replace("<image>", f"<img>{'<IMG_CONTEXT>' * 8}</img>")
    asked = prompt("<image>\nQ", TOKENIZER, [8])
    assert asked.tolist() == TOKENIZER(written, add_special_tokens=False)["input_ids"]


@given(st.lists(TEXT, min_size=1, max_size=3), st.lists(TEXT, min_size=3, max_size=3), st.none() | TEXT)
def test_labels_are_the_answers_and_the_ends_of_their_turns(
    questions: list[str], answers: list[str], system: str | None
) -> None:
    said = [text for pair in zip(questions, answers, strict=False) for text in pair]
    made = encode(turns(*said), TOKENIZER, [2], system=system)
    assert made is not None
    counted = made.labels != IGNORED
    assert torch.equal(made.labels[counted], made.input_ids[counted])
    expected = [each for answer in said[1::2] for each in (*answer.encode(), END)]
    assert made.labels[counted].tolist() == expected
    assert int((made.input_ids == CONTEXT).sum()) == 2
    assert TOKENIZER.decode(made.input_ids).count("<|im_start|>") == len(said) + (system is not None)


@given(st.integers(1, 60), st.integers(0, 4))
def test_what_is_cut_off_never_takes_an_image_or_all_answers(longest: int, images: int) -> None:
    said = turns("<image>" * images + "Q", "answer")
    whole = encode(said, TOKENIZER, [3] * images, system=None)
    made = encode(said, TOKENIZER, [3] * images, longest, system=None)
    assert whole is not None
    start = int((whole.labels != IGNORED).nonzero()[0])
    assert (made is None) == (longest <= start)
    if made is not None:
        assert torch.equal(made.input_ids, whole.input_ids[:longest])
        assert torch.equal(made.labels, whole.labels[:longest])
        assert int((made.input_ids == CONTEXT).sum()) == 3 * images


def test_an_answer_before_a_late_image_does_not_save_a_sample() -> None:
    said = turns("Q", "A", "<image>", "B")
    whole = encode(said, TOKENIZER, [4], system=None)
    assert whole is not None
    end = whole.input_ids.tolist().index(TOKENIZER.convert_tokens_to_ids("</img>"))
    assert encode(said, TOKENIZER, [4], end, system=None) is None
    assert encode(said, TOKENIZER, [4], end + 1, system=None) is not None


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_a_batch_is_padded_on_the_right(lengths: list[int]) -> None:
    samples = [conversation.Encoded(torch.arange(1, n + 1), torch.arange(n)) for n in lengths]
    batch = collate(samples, 99)
    for row, n in enumerate(lengths):
        assert batch.input_ids[row, :n].tolist() == [*range(1, n + 1)]
        assert (batch.input_ids[row, n:] == 99).all() and (batch.labels[row, n:] == IGNORED).all()
        assert batch.attention_mask[row].sum() == n and batch.attention_mask[row, :n].all()
        assert batch.position_ids[row].tolist() == [*range(n), *[1] * (max(lengths) - n)]
    assert torch.equal(positions(batch.attention_mask), batch.position_ids)
    assert batch.to("cpu").input_ids is batch.input_ids


def test_images_stand_where_they_are_written() -> None:
    one = encode(turns("Where?", "A"), TOKENIZER, [2], system=None)
    other = encode(turns("<image>\nWhere?", "A"), TOKENIZER, [2], system=None)
    assert one is not None and other is not None and torch.equal(one.input_ids, other.input_ids)
    both = encode(turns("a<image>b<image>", "A", "c<image>", "B"), TOKENIZER, [1, 2, 3], system=None)
    assert both is not None
    text = TOKENIZER.decode(both.input_ids).replace("<IMG_CONTEXT>", ".")
    assert "a<img>.</img>b<img>..</img><|im_end|>" in text and "c<img>...</img><|im_end|>" in text
    # with a system turn of the record's own, too
    said = [{"from": "system", "value": "s"}, *turns("Where?", "A")]
    own = encode(said, TOKENIZER, [2])
    assert own is not None and TOKENIZER.decode(own.input_ids).startswith("<|im_start|>system\ns<|im_end|>")
    assert int((own.input_ids == CONTEXT).sum()) == 2


def test_a_prompt_ends_where_the_answer_begins() -> None:
    asked = prompt("Q?", TOKENIZER, [2], system="s").tolist()
    whole = encode(turns("Q?", "A"), TOKENIZER, [2], system="s")
    assert whole is not None
    assert asked == whole.input_ids.tolist()[: len(asked)]
    assert whole.labels.tolist()[len(asked)] == ord("A")


@pytest.mark.parametrize(
    ("said", "images", "words"),
    [
        ([{"from": "robot", "value": "x"}], [], "cannot be read"),
        ([{"from": "human"}], [], "cannot be read"),
        ([{"from": "human", "value": 3}, {"from": "gpt", "value": "x"}], [], "is no text"),
        (turns("x"), [], "turns are user; expected a question"),
        ([], [], "turns are none"),
        ([*turns("x", "y"), {"from": "system", "value": "s"}], [], "after a system turn or none"),
        (turns("<image> x", "y"), [], "1 <image> for 0 images"),
        (turns("<image> x", "y"), [1, 1], "1 <image> for 2 images"),
        (turns("x", "y"), [1, 1], "0 <image> for 2 images"),
    ],
)
def test_records_that_cannot_be_read_are_named(said: Any, images: list[int], words: str) -> None:
    with pytest.raises(LabelError, match=words):
        encode(said, TOKENIZER, images)


def test_tokens_are_added_once() -> None:
    tokenizer = byte_tokenizer()
    assert add_tokens(tokenizer) == 0
    bare = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ParameterError, match="neither a padding nor an end token"):
        add_tokens(bare)
    bare.eos_token = "<|im_end|>"
    assert add_tokens(bare) == 0 and bare.pad_token == "<|im_end|>"
