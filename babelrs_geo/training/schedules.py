"""Which parameter learns how fast at which step: AdamW's groups, and the factors of their learning rates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

from torch import nn

from babelrs_geo.models.detector import Detector
from babelrs_geo.models.plain import Range, Whole

Rate = Annotated[float, Range(least=0)]


class Rates(Protocol):
    """How fast the compact detector learns: what `parameter_groups` needs to know."""

    @property
    def lr(self) -> float:
        """Learning rate of all but the prior's trunk."""

    @property
    def prior_lr(self) -> float:
        """Learning rate of the ImageNet-trained convolutions."""

    @property
    def weight_decay(self) -> float:
        """Of matrices and kernels."""


class Ramp(Protocol):
    """Steps of a run, or of its phase: what `schedule` needs to know."""

    @property
    def steps(self) -> int:
        """The step to end before."""

    @property
    def warmup(self) -> int:
        """First steps, over which the learning rate rises; 0: none."""

    @property
    def cooldown(self) -> int:
        """Last steps, over which the learning rate falls to zero; 0: none."""


def parameter_groups(model: Detector, options: Rates) -> list[dict[str, Any]]:
    """AdamW groups: the convolutional prior's trunk (`prior`) learns slower; vectors and biases are not decayed."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (name.startswith("backbone.spm.trunk."), parameter.ndim > 1)
            groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "prior": trunk,
            "base": options.prior_lr if trunk else options.lr,
            "weight_decay": options.weight_decay if matrix else 0.0,
        }
        for (trunk, matrix), parameters in groups.items()
    ]


def schedule(step: int, options: Ramp) -> float:
    """Factor of the learning rate at a step: linear warm-up, plateau, linear fall to zero."""
    rise, fall = max(1, options.warmup), max(1, options.cooldown)
    return min(1.0, (step + 1) / rise, max(0.0, (options.steps - step) / fall))


@dataclass(frozen=True)
class LayerDecay:
    """AdamW of the full detector's fine-tuning; the further from the heads, the slower. Defaults are the original's."""

    lr: Rate = 5e-5
    decay: Annotated[float, Range(above=0, most=1)] = 0.95
    """Factor of the learning rate from each transformer block to the one before it."""
    weight_decay: Rate = 0.05
    """Vectors and biases are spared; the heads' scalar scales, position and level embeddings are not."""


def layer_decay_groups(model: Detector, options: LayerDecay | None = None) -> list[dict[str, Any]]:
    """AdamW groups of parameters, each with `lr`, `base` (the same, to be scheduled), `weight_decay` and `names`.

    Embeddings learn slowest, then block after block; what has no place in the transformer learns at the full rate.
    """
    options = options or LayerDecay()
    top = model.config.backbone.vit.depth + 1
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        spared = parameter.ndim == 1 or name.endswith(".bias")
        place = _depth(name, top)
        lr = options.lr * options.decay ** (top - place)
        wanted = {"lr": lr, "base": lr, "weight_decay": 0.0 if spared else options.weight_decay}
        group = groups.setdefault((place, spared), {"params": [], "names": [], **wanted})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def _depth(name: str, top: int) -> int:
    """0 for embeddings, k + 1 for transformer block k, `top` for all else."""
    if name.startswith(("backbone.embeddings.", "backbone.level_embed")):
        return 0
    if name.startswith("backbone.layers."):
        return int(name.split(".")[2]) + 1
    return top


@dataclass(frozen=True)
class StepSchedule:
    """Warm-up and drops of the full detector's fine-tuning. Defaults are the original's for 12 rounds."""

    warmup: Whole = 500
    start: Annotated[float, Range(least=0, most=1)] = 1 / 3
    """Factor of the learning rate in the first step."""
    milestones: tuple[Whole, ...] = (22_312, 30_679)
    drop: Annotated[float, Range(above=0, most=1)] = 0.1
    """Factor at each milestone."""


def step_schedule(step: int, options: StepSchedule | None = None) -> float:
    """Factor of the learning rate at a step: linear warm-up, then a drop at each milestone."""
    options = options or StepSchedule()
    factor = options.drop ** sum(step >= milestone for milestone in options.milestones)
    if step < options.warmup:
        factor *= 1 - (1 - step / options.warmup) * (1 - options.start)
    return factor


def cosine(step: int, steps: int, warmup: int) -> float:
    """Factor of the learning rate at a step: from 0 linearly to 1 over the warm-up, then half a cosine to 0."""
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def freeze_prior(backbone: nn.Module, stages: int = 2) -> None:
    """Keep the first stages of an ImageNet-trained trunk as they are; its finest maps cost most and change
    least.
    """
    fixed = ("conv_stem", "bn1", *(f"blocks.{i}." for i in range(stages)))
    for name, parameter in backbone.get_submodule("spm.trunk").named_parameters():
        parameter.requires_grad_(not name.startswith(fixed))
