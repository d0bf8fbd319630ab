"""Published checkpoints: their names beside ours, their shapes, and the way from one to the other.

Everything here is about state dicts; `importing` reads and writes the files. In the tables a left name is the
published one; `{n}` stands for a number, `{p}` for weight or bias, `{x}` for the rest of a name. `{qkv}`
stands for q, k and v, which the left side keeps in one tensor, stacked along the first axis in that order.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from babelrs_geo.errors import WeightsError
from babelrs_geo.models.vit import ViTConfig

State = dict[str, Tensor]
Table = tuple[tuple[str, str], ...]

DETECTOR: Table = (
    ("backbone.{x}", "backbone.{x}"),
    ("neck.{x}", "neck.{x}"),
    ("sar_bbox_head.{x}", "sar_bbox_head.{x}"),
    ("rgb_rpn_head.{x}", "rgb_rpn_head.{x}"),
    ("rgb_roi_head.{x}", "rgb_roi_head.{x}"),
    ("ifr_rpn_head.{x}", "ifr_rpn_head.{x}"),
    ("ifr_roi_head.{x}", "ifr_roi_head.{x}"),
)
"""The fine-tuned detector's 630 tensors: `Detector` bears their names."""

ENCODER: Table = (
    ("embeddings.patch_embedding.{p}", "backbone.embeddings.patch_embedding.{p}"),
    ("embeddings.position_embedding", "backbone.embeddings.position_embedding"),
    ("encoder.layers.{n}.{x}", "backbone.layers.{n}.{x}"),
)
"""The pretrained ViT's 340 tensors and the detector's backbone; `UNUSED` has no place there."""
UNUSED = ("embeddings.class_embedding",)

BACKBONE: Table = (("{x}", "backbone.{x}"),)
"""A pretrained backbone, stem and all, and the detector's."""

_VISION: Table = (
    ("embeddings.class_embedding", "embeddings.cls_token"),
    ("embeddings.position_embedding", "embeddings.position_embeddings"),
    ("embeddings.patch_embedding.{p}", "embeddings.patch_embeddings.projection.{p}"),
    ("encoder.layers.{n}.norm1.{p}", "encoder.layer.{n}.layernorm_before.{p}"),
    ("encoder.layers.{n}.attn.qkv.{p}", "encoder.layer.{n}.attention.{qkv}_proj.{p}"),
    ("encoder.layers.{n}.attn.proj.{p}", "encoder.layer.{n}.attention.projection_layer.{p}"),
    ("encoder.layers.{n}.ls1", "encoder.layer.{n}.lambda_1"),
    ("encoder.layers.{n}.norm2.{p}", "encoder.layer.{n}.layernorm_after.{p}"),
    ("encoder.layers.{n}.mlp.fc1.{p}", "encoder.layer.{n}.mlp.fc1.{p}"),
    ("encoder.layers.{n}.mlp.fc2.{p}", "encoder.layer.{n}.mlp.fc2.{p}"),
    ("encoder.layers.{n}.ls2", "encoder.layer.{n}.lambda_2"),
)

PIVOT: Table = (
    *((f"vision_model.{theirs}", f"model.vision_tower.{ours}") for theirs, ours in _VISION),
    ("mlp1.0.{p}", "model.multi_modal_projector.layer_norm.{p}"),
    ("mlp1.1.{p}", "model.multi_modal_projector.linear_1.{p}"),
    ("mlp1.3.{p}", "model.multi_modal_projector.linear_2.{p}"),
    ("language_model.model.{x}", "model.language_model.{x}"),
    ("language_model.lm_head.weight", "lm_head.weight"),
)
"""InternVL2.5 in its original layout and in transformers' own, which is the one we keep."""

_SERIES_4: Table = (
    ("vision_tower.{x}", "model.vision_tower.{x}"),
    ("multi_modal_projector.{x}", "model.multi_modal_projector.{x}"),
    ("language_model.model.{x}", "model.language_model.{x}"),
    ("language_model.lm_head.weight", "lm_head.weight"),
)
_SERIES_5: Table = (("model.{x}", "model.{x}"), ("lm_head.weight", "lm_head.weight"))

LAYOUTS: Mapping[str, tuple[str, Table]] = {
    "original": ("vision_model.", PIVOT),
    "transformers": ("model.vision_tower.", _SERIES_5),
    "transformers 4": ("vision_tower.", _SERIES_4),
}
"""Layouts of a vision-language checkpoint: what their encoder's names begin with, and their table."""

INTERNVIT = ViTConfig(image_size=448, patch=14, class_token=True, drop_path=0.1)
"""The published encoder before the detector: 448 px, patches of 14, 304,012,288 values with its class token, and the
drop path of its pretraining.
"""

LICENCE = "CC BY-NC 4.0"
"""Of the published BabelRS weights: attribution, no commercial use."""
LICENCE_PIVOT = "MIT (InternVL2.5), Apache-2.0 (its language model Qwen2.5)"

SCORE = 0.3
"""Least score reported by imported detectors, for every class: a plain default, tuned on nothing."""
GSD = {"sar": (0.1, 25.0), "rgb": (0.1, 2.0), "ir": (0.05, 0.3)}
"""Metres a pixel that imported detectors are taken to know: an assumption from what their training sets hold
(SARDet-100K 0.1 to 25 m, DOTA mostly 0.1 to 2 m, DroneVehicle flown at 80 to 120 m); none is published.
"""
RADIOMETRY = {
    "sar": "8-bit amplitude / 255, three equal channels",
    "ir": "8-bit brightness (hot is bright) / 255, three equal channels",
    "rgb": "8-bit red, green, blue / 255",
}


@dataclass(frozen=True)
class PivotSizes:
    """Sizes of an InternVL with a Qwen2 language model. Defaults are InternVL2.5-1B's."""

    vision: ViTConfig = field(default_factory=lambda: INTERNVIT)
    hidden: int = 896
    layers: int = 24
    heads: int = 14
    kv_heads: int = 2
    intermediate: int = 4864
    vocabulary: int = 151_674
    tied: bool = False
    """The output layer is the table of token embeddings, and not in the file."""

    def to_dict(self) -> dict[str, Any]:
        """The sizes as plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PivotSizes:
        """The sizes from `to_dict`."""
        return cls(**{**values, "vision": ViTConfig(**values["vision"])})

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor in transformers' layout."""
        d, h, f = 4 * self.vision.dim, self.hidden, self.intermediate
        kv = h // self.heads * self.kv_heads
        vision = {f"vision_model.{k}": v for k, v in encoder_shapes(self.vision).items()}
        out = _shapes(renamed(_empty(vision), PIVOT))
        projector = "model.multi_modal_projector."
        out |= {f"{projector}layer_norm.{p}": (d,) for p in ("weight", "bias")}
        out |= {f"{projector}linear_1.weight": (h, d), f"{projector}linear_1.bias": (h,)}
        out |= {f"{projector}linear_2.weight": (h, h), f"{projector}linear_2.bias": (h,)}
        out["model.language_model.embed_tokens.weight"] = (self.vocabulary, h)
        for n in range(self.layers):
            block = f"model.language_model.layers.{n}."
            for name, rows in (("q", h), ("k", kv), ("v", kv)):
                out |= {f"{block}self_attn.{name}_proj.weight": (rows, h)}
                out |= {f"{block}self_attn.{name}_proj.bias": (rows,)}
            out |= {f"{block}self_attn.o_proj.weight": (h, h)}
            out |= {f"{block}mlp.{name}_proj.weight": (f, h) for name in ("gate", "up")}
            out |= {f"{block}mlp.down_proj.weight": (h, f)}
            out |= {f"{block}{name}_layernorm.weight": (h,) for name in ("input", "post_attention")}
        out["model.language_model.norm.weight"] = (h,)
        return out if self.tied else out | {"lm_head.weight": (self.vocabulary, h)}


def encoder_shapes(vit: ViTConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a published encoder, without prefix."""
    d, hidden, p = vit.dim, int(vit.dim * vit.mlp_ratio), vit.patch
    out: dict[str, tuple[int, ...]] = {
        "embeddings.class_embedding": (1, 1, d),
        "embeddings.position_embedding": (1, (vit.image_size // p) ** 2 + 1, d),
        "embeddings.patch_embedding.weight": (d, 3, p, p),
        "embeddings.patch_embedding.bias": (d,),
    }
    linear = {"attn.qkv": (3 * d, d), "attn.proj": (d, d), "mlp.fc1": (hidden, d), "mlp.fc2": (d, hidden)}
    for n in range(vit.depth):
        block = f"encoder.layers.{n}."
        out |= {f"{block}{name}": (d,) for name in ("ls1", "ls2")}
        out |= {f"{block}{norm}.{p}": (d,) for norm in ("norm1", "norm2") for p in ("weight", "bias")}
        for name, shape in linear.items():
            out |= {f"{block}{name}.weight": shape, f"{block}{name}.bias": shape[:1]}
    return out


def renamed(state: Mapping[str, Tensor], table: Table, *, back: bool = False) -> State:
    """The tensors under the right-hand names of a table, or `back` under the left-hand ones.

    A name that no row knows is kept as it is, for the comparison of names that follows to report. Raises
    WeightsError where two tensors would get one name.
    """
    rows = [((ours, theirs) if back else (theirs, ours)) for theirs, ours in table]
    patterns = [(_pattern(source), target) for source, target in rows]
    out: State = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        target, found = key, {}
        for pattern, to in patterns:
            match = pattern.fullmatch(key)
            if match:
                found = match.groupdict()
                target = to
                break
        for slot in ("n", "p", "x"):
            target = target.replace(f"{{{slot}}}", found.get(slot, "")) if found.get(slot) else target
        if "qkv" in found:
            parts.setdefault(target, {})[found["qkv"]] = value
            continue
        pieces = {target: value}
        if "{qkv}" in target:
            pieces = {target.replace("{qkv}", n): t for n, t in zip("qkv", value.chunk(3), strict=True)}
        for name, tensor in pieces.items():
            if name in out:
                raise WeightsError(f"two tensors of the file stand for {name}; get another copy of it")
            out[name] = tensor
    return out | {name: torch.cat([found[each] for each in "qkv"]) for name, found in parts.items()}


def _pattern(template: str) -> re.Pattern[str]:
    slots = {"n": r"\d+", "p": "weight|bias", "x": ".+", "qkv": "[qkv]"}
    text = re.escape(template)
    for slot, what in slots.items():
        text = text.replace(re.escape(f"{{{slot}}}"), f"(?P<{slot}>{what})")
    return re.compile(text)


def layout_names(sizes: PivotSizes, layout: str) -> dict[str, tuple[int, ...]]:
    """Every tensor of a vision-language checkpoint in one of `LAYOUTS`."""
    return _shapes(renamed(_empty(sizes.shapes()), LAYOUTS[layout][1], back=True))


def vision_of(pivot: Mapping[str, Tensor]) -> State:
    """The encoder within a vision-language state of ours, in the published names, without prefix."""
    vision = {k: v for k, v in pivot.items() if k.startswith("model.vision_tower.")}
    return {k.removeprefix("vision_model."): v for k, v in renamed(vision, PIVOT, back=True).items()}


def backbone_of(encoder: Mapping[str, Tensor], vit: ViTConfig, table: Table = ENCODER) -> State:
    """An encoder in the names on the left of `table` as the tensors `backbone.*` of a detector, in float32.

    Its position table and patch kernel are resized to those of `vit`: bicubic, in float32, the kernel without
    a correction of its sum (a kernel of 14 px becomes 1.31 times stronger at 16). The table is rounded back
    to the file's precision, as in the original.
    """
    kept = {k: v for k, v in encoder.items() if k not in UNUSED}
    out = {k: v.float() for k, v in renamed(kept, table).items()}
    for name, resize, side in (
        ("position_embedding", _positions, vit.image_size // vit.patch),
        ("patch_embedding.weight", _kernel, vit.patch),
    ):
        theirs = encoder.get(f"embeddings.{name}")
        if theirs is not None:
            out[f"backbone.embeddings.{name}"] = resize(theirs, side)
    return out


def _positions(table: Tensor, side: int) -> Tensor:
    """A position table (1, 1 + g * g, D) for a grid of side * side; the slot of the class token stays."""
    grid = math.isqrt(table.shape[1] - 1)
    if grid == side or grid**2 != table.shape[1] - 1:
        return table.float()
    maps = table[:, 1:].float().reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
    maps = F.interpolate(maps, size=(side, side), mode="bicubic", align_corners=False)
    resized = maps.flatten(2).transpose(1, 2).to(table.dtype)
    return torch.cat([table[:, :1], resized], dim=1).float()


def _kernel(weight: Tensor, side: int) -> Tensor:
    """A patch kernel (D, 3, p, p) with another side."""
    if weight.shape[-1] == side:
        return weight.float()
    return F.interpolate(weight.float(), size=(side, side), mode="bicubic", align_corners=False)


def _empty(shapes: Mapping[str, tuple[int, ...]]) -> State:
    return {k: torch.empty(shape, device="meta") for k, shape in shapes.items()}


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {k: tuple(v.shape) for k, v in state.items()}
