"""Pretrained pivots on disk: encoder, projector, language model and the clock of annealing in one file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from babelrs_geo.errors import WeightsError
from babelrs_geo.models import checkpoints, language, official
from babelrs_geo.models.annealing import Taps, taps_of
from babelrs_geo.models.checkpoints import Start, differences
from babelrs_geo.models.pivot import STEP, PivotConfig, PivotModel
from babelrs_geo.models.vit import ViTConfig


@dataclass(frozen=True)
class Origin:
    """What the file says of itself beside its architecture."""

    name: str
    licence: str
    training: Mapping[str, Any] = field(default_factory=dict)


def save_pivot(
    path: str | os.PathLike[str], model: PivotModel, origin: Origin, *, half: bool = False
) -> None:
    """Write a model with its header, low-rank updates added in; the file appears whole or not at all.

    `half` stores float16 in place of the tensors' own type. Raises OutputError.
    """
    lm = language.plain_state(model.language_model)
    state = {k: v.detach() for k, v in model.state_dict().items() if not k.startswith("language_model.")}
    state |= {f"language_model.{k}": v for k, v in lm.items()}
    state = {k: v.half() if half and v.is_floating_point() else v for k, v in state.items()}
    start = Start("pivot", origin.name, model.config.to_dict(), origin.licence, dict(origin.training))
    checkpoints.write(path, state, {checkpoints.KEY: start.to_json()})


def load_pivot(
    path: str | os.PathLike[str], taps: Taps | None = None, tau: int | None = None
) -> tuple[PivotModel, Start]:
    """A model in float32 and what its file says: one of ours, or an imported InternVL2.5-1B at step 0.

    `taps` and `tau` replace the layers that are fused, the paper's for an imported one, and their annealing.
    Raises WeightsError for another kind of file, or one whose tensors do not fit its architecture.
    """
    start = checkpoints.read(path)
    if not isinstance(start, Start) or start.kind not in ("pivot", "vision-language"):
        raise WeightsError(
            f"{path} holds no language model; give what was pretrained, or an imported InternVL2.5-1B"
        )
    state = checkpoints.tensors(path)
    if start.kind == "vision-language":
        config = of_published(official.PivotSizes.from_dict(start.architecture))
        state = official.renamed(state, official.PIVOT, back=True)
        state[STEP] = torch.zeros((), dtype=torch.int64)
    else:
        config = PivotConfig.from_dict(start.architecture)
    model = PivotModel(replace(config, taps=taps or config.taps, tau=tau or config.tau))
    wanted = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    tied = bool(config.language.get("tie_word_embeddings")) and "language_model.lm_head.weight" not in state
    if tied:
        del wanted["language_model.lm_head.weight"]
    odd = differences(wanted, {k: tuple(v.shape) for k, v in state.items()})
    if odd:
        raise WeightsError(f"{path} does not fit its own architecture: {odd}; get a whole copy")
    model.load_state_dict(
        {k: v.float() if v.is_floating_point() else v for k, v in state.items()}, strict=False
    )
    return model, start


def of_published(sizes: official.PivotSizes) -> PivotConfig:
    """The configuration of an InternVL with a Qwen2 of these sizes."""
    lm = {
        "hidden_size": sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "intermediate_size": sizes.intermediate,
        "vocab_size": sizes.vocabulary,
        "tie_word_embeddings": sizes.tied,
    }
    vision: ViTConfig = replace(sizes.vision, class_token=True, drop_path=official.INTERNVIT.drop_path)
    return PivotConfig(encoder=vision, language={**language.QWEN2_5, **lm}, taps=taps_of(vision))
