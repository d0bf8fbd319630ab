"""A pivot with tiny numbers, and a tokenizer of bytes: what tests of language pretraining run on."""

from __future__ import annotations

from typing import Any

import torch
from tiny_model import TINY
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from babelrs_geo.models.annealing import Taps
from babelrs_geo.models.conversation import SPECIAL, TextBatch, collate, encode
from babelrs_geo.models.pivot import PivotConfig, image_token_of
from babelrs_geo.models.vit import ViTConfig

QWEN = {
    "model_type": "qwen2",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 272,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "tie_word_embeddings": False,
}
INTERNVIT = PivotConfig(
    encoder=ViTConfig(56, 14, 24, 4, 2, 2.0, position_std=0.02, class_token=True, drop_path=0.1),
    language=QWEN,
    taps=Taps((1, 2, 4)),
    tau=100,
)
COMPACT = PivotConfig(
    encoder=TINY.backbone,
    language={**QWEN, "tie_word_embeddings": True},
    taps=Taps((1, 2)),
    tau=100,
    mean=TINY.mean,
    std=TINY.std,
)


def byte_tokenizer() -> Any:
    """A tokenizer of transformers whose tokens are the bytes, 0 to 255, then <|endoftext|> and the special ones."""
    order = {character: byte for byte, character in bytes_to_unicode().items()}
    made = Tokenizer(models.BPE(vocab=order, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<|endoftext|>")
    # the order of the original's stand-in: <|im_start|> 257, <|im_end|> 258, <img> 259, ...
    start, end, image, image_end, context, *rest = SPECIAL
    tokenizer.add_tokens([start, end, image, image_end, context, *rest], special_tokens=True)
    return tokenizer


def batch_of(
    config: PivotConfig, *records: tuple[str, str, int], side: int
) -> tuple[TextBatch, torch.Tensor]:
    """Question, answer and number of tiles of each record, as a batch with random tiles."""
    tokenizer = byte_tokenizer()
    samples = []
    for question, answer, tiles in records:
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        sample = encode(turns, tokenizer, [tiles * config.tokens(side)], system="s")
        assert sample is not None
        samples.append(sample)
    return collate(samples, tokenizer.pad_token_id), torch.rand(sum(r[2] for r in records), 3, side, side)


IMAGE_TOKEN = image_token_of(byte_tokenizer())
