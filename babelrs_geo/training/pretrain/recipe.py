"""What a run of pretraining is: a recipe, of which `recipes/*.yaml` come with the package.

A recipe fixes every number that the weights depend on; `run`, the part that they do not depend on, may change when a
run goes on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from babelrs_geo.errors import ParameterError
from babelrs_geo.models.annealing import TAU
from babelrs_geo.models.conversation import LONGEST, SYSTEM
from babelrs_geo.models.dynamic_tiles import TileOptions
from babelrs_geo.models.language import QWEN2_5, LoRA
from babelrs_geo.models.pivot import PARTS
from babelrs_geo.models.plain import Count, OneOf, Range, Whole
from babelrs_geo.training import settings
from babelrs_geo.training.schedules import Rate
from babelrs_geo.training.settings import RunPart

FOLDER = Path(__file__).parent / "recipes"
Decay = Annotated[float, Range(least=0, below=1)]
GROUPS = ("stem", "encoder", "projector", "tokens", "language")
"""What may have a learning rate of its own: `stem` is the convolutional pyramid of a detector's backbone."""


@dataclass(frozen=True, kw_only=True)
class EncoderPart:
    """What looks at images."""

    base: Literal["internvit", "compact", "full"] = "compact"
    """The published transformer alone, or a detector's backbone, stem and all: the compact one's or the full one's."""
    architecture: Mapping[str, Any] = field(default_factory=dict)
    """Numbers that differ from the base's, nested as in `ViTConfig` or `AdapterConfig`."""
    start: Literal["imagenet"] | None = None
    """Of the compact one's stem; None: at random."""
    freeze_stem: Whole = 0
    """First stages of an ImageNet-trained stem that are kept as they are."""


@dataclass(frozen=True, kw_only=True)
class LanguagePart:
    """What asks and answers."""

    source: str | None = None
    """`smollm2`, a folder of transformers, or a GGUF file; None: made from `architecture`, with random weights."""
    architecture: Mapping[str, Any] = field(default_factory=lambda: dict(QWEN2_5))
    tokenizer: str | None = None
    """A folder, where the source brings none."""
    truncate: Count | None = None
    """Blocks to keep, the first ones; all if None."""
    lora: LoRA | None = None
    """Low-rank updates in place of the model's own weights."""


@dataclass(frozen=True, kw_only=True)
class PivotPart:
    """The network and where it begins."""

    start: str | None = None
    """All of it, by name or file: what was pretrained, or an imported InternVL2.5. `encoder` then says nothing, and
    `language` the tokenizer.
    """
    encoder: EncoderPart = field(default_factory=EncoderPart)
    language: LanguagePart = field(default_factory=LanguagePart)
    taps: Literal["paper", "original", "last"] = "paper"
    """Layers that are fused: as the paper writes, as the original code has it, or the last alone."""
    tau: Count = TAU
    freeze: tuple[Annotated[str, OneOf(PARTS)], ...] = ()
    """Parts that are kept as they are: encoder, projector, tokens, language."""
    checkpoint_gradients: bool = False
    """Less memory for a third more work."""


@dataclass(frozen=True, kw_only=True)
class ViewPart:
    """How a conversation becomes tokens and tiles."""

    tile: Count = 448
    """Side in pixels."""
    most_tiles: Count = 6
    """Of an image, or shared by the images of a conversation."""
    thumbnail: bool = True
    longest: Count = LONGEST
    """Tokens."""
    system: str | None = SYSTEM
    """Opens conversations that have no system turn; None for none."""

    @property
    def tiles(self) -> TileOptions:
        """For one image."""
        return TileOptions(self.tile, self.most_tiles, self.thumbnail)


@dataclass(frozen=True, kw_only=True)
class AskPart:
    """What is asked of images that are not learnt from."""

    tasks: tuple[str, ...] = ("classes", "count", "presence", "sensor")
    """Those with short answers."""
    most: Count = 50
    """Questions of each sensor and task."""
    longest: Count = 24
    """Tokens of an answer."""
    batch: Count = 8
    """Questions that are answered at once."""


@dataclass(frozen=True, kw_only=True)
class AboutPart:
    """What the weights say of themselves."""

    licence: str = "Not stated: the terms of the training data apply."
    data: str = ""
    """What is learnt from, in words."""


@dataclass(frozen=True, kw_only=True)
class PretrainRecipe:
    """A run of pretraining."""

    name: str
    steps: Count
    """Of the optimizer, which is LVSA's clock."""
    lr: Rate
    micro: Count = 1
    """Conversations, or groups of `together`, that a process computes at once. The loss is the mean over their answers'
    tokens.
    """
    together: Count = 1
    """Up to so many conversations about the same images are learnt from together: the images, which cost most, are then
    seen once for all of them.
    """
    accumulate: Count = 1
    """Micro-batches of a process in a step; their losses count the same."""
    processes: Count | None = None
    """For how many the batch is meant; any if None."""
    rates: Mapping[Annotated[str, OneOf(GROUPS)], Rate] = field(default_factory=dict)
    """Learning rates of `GROUPS`, where they differ from `lr`."""
    warmup: Decay = 0.1
    """Share of the steps over which the rates rise from 0; then they fall as a cosine to 0."""
    weight_decay: Rate = 0.01
    decay: Literal["all", "matrices"] = "all"
    """Of all parameters as in the original, or not of vectors and biases."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: Annotated[float, Range(above=0)] = 1e-8
    clip: Annotated[float, Range(above=0)] = 1.0
    """Greatest total norm of the gradient."""
    precision: Literal["32", "bf16"] = "bf16"
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """Whether each of several processes has the whole model, or a part of it."""
    seed: int = 0
    model: PivotPart = field(default_factory=PivotPart)
    view: ViewPart = field(default_factory=ViewPart)
    ask: AskPart = field(default_factory=AskPart)
    header: AboutPart = field(default_factory=AboutPart)
    run: RunPart = field(default_factory=RunPart)

    def __post_init__(self) -> None:
        """Raise ParameterError for what cannot work."""
        if self.strategy == "fsdp" and self.model.language.lora is not None:
            raise ParameterError("model.language.lora and strategy fsdp do not go together; take ddp")

    @property
    def warmup_steps(self) -> int:
        """Steps of the warm-up, rounded up as in the original."""
        return math.ceil(self.steps * self.warmup)


def names() -> list[str]:
    """Recipes that come with the package."""
    return settings.names(FOLDER)


def read(
    name_or_path: str | Path, changes: Sequence[str] = (), values: Mapping[str, Any] | None = None
) -> PretrainRecipe:
    """A recipe by name or file, with changes, as `settings.read`. Raises ParameterError."""
    return settings.read(PretrainRecipe, FOLDER, name_or_path, changes, values)
