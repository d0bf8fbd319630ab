"""Language as the pivot: one vision encoder that answers questions about SAR, infrared and RGB (BabelRS, CSIA).

    image tiles -> encoder -> maps of its layers, fused (LVSA) -> pixel shuffle -> projector -> language model

The encoder is InternViT alone, or the detector's whole backbone: stem, transformer and what joins them. The
latter is seen by its transformer's tokens after they met the convolutional pyramid, the ones that go into the
detector's maps; so the gradient reaches stem and transformer.

Shapes: T tiles of S x S pixels, each of N = (S / patch)^2 places; D the encoder's width, C the language
model's; B conversations of L tokens. Reference: arXiv 2603.01758; names are those of InternVL's checkpoints.
The encoder is our own `VisionTransformer`, not transformers' InternVL tower: its blocks are the detector's own,
so that what is pretrained goes over bit for bit, and transformers' has no drop path.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from babelrs_geo.errors import ParameterError
from babelrs_geo.models import language
from babelrs_geo.models.adapter import AdapterConfig, ViTAdapter
from babelrs_geo.models.annealing import PAPER, TAU, LayerAnnealing, Taps
from babelrs_geo.models.conversation import IGNORED, IMAGE_TOKEN, SYSTEM, TURN_END, TextBatch, prompt
from babelrs_geo.models.official import INTERNVIT
from babelrs_geo.models.plain import from_plain
from babelrs_geo.models.vit import VisionTransformer, ViTConfig

Part = Literal["encoder", "projector", "tokens", "language"]
"""What can be frozen: the encoder, the projector, the language model's tables of tokens, and the rest of it."""
PARTS: tuple[Part, ...] = ("encoder", "projector", "tokens", "language")

STEP = "annealing.step"
"""The clock of LVSA among the tensors of a `PivotModel`."""


@dataclass(frozen=True)
class PivotConfig:
    """Architecture. Defaults are the paper's InternVL2.5-1B."""

    encoder: ViTConfig | AdapterConfig = field(default_factory=lambda: INTERNVIT)
    language: Mapping[str, Any] = field(default_factory=lambda: dict(language.QWEN2_5))
    """The language model's configuration in transformers, with its `model_type`."""
    taps: Taps = PAPER
    tau: int = TAU
    """Optimizer steps until all fused layers count the same."""
    shuffle: int = 2
    """Side of the squares of places that become one token of the language model."""
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    """Normalisation of 8-bit values; ImageNet's for every sensor."""

    def __post_init__(self) -> None:
        if self.taps.last > self.vit.depth:
            raise ParameterError(
                f"layers {self.taps.layers} are to be fused in an encoder of {self.vit.depth}; choose none beyond"
            )

    @property
    def vit(self) -> ViTConfig:
        """The transformer in the encoder."""
        return self.encoder.vit if isinstance(self.encoder, AdapterConfig) else self.encoder

    def tokens(self, side: int) -> int:
        """Image tokens of a tile of `side` x `side` pixels. Raises ParameterError for a side that does not fit."""
        step = self.vit.patch * self.shuffle
        if isinstance(self.encoder, AdapterConfig):
            step = math.lcm(step, 32)  # the pyramid's coarsest stride
        if side < step or side % step:
            raise ParameterError(f"tiles have {side} px; this encoder takes multiples of {step} px")
        return (side // self.vit.patch // self.shuffle) ** 2

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain values."""
        values = dataclasses.asdict(self)
        values["encoder"] = {_kind(self.encoder): values["encoder"]}
        return values | {"taps": list(self.taps.layers)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PivotConfig:
        """The configuration from `to_dict`, also after a round through JSON."""
        ((kind, sizes),) = values["encoder"].items()
        encoder = from_plain(ViTConfig if kind == "transformer" else AdapterConfig, sizes)
        rest = {"encoder": encoder, "taps": Taps(tuple(values["taps"])), "language": dict(values["language"])}
        rest |= {name: tuple(values[name]) for name in ("mean", "std")}
        return cls(**{**values, **rest})


def _kind(encoder: ViTConfig | AdapterConfig) -> str:
    return "transformer" if isinstance(encoder, ViTConfig) else "adapter"


def pixel_shuffle(maps: Tensor, side: int = 2) -> Tensor:
    """Maps (T, H, W, D) to (T, H / side, W / side, side^2 * D): squares of places become one, InternVL's "v2".

    A place's channels are those of its square's rows, one after the other, each row from left to right.
    """
    t, h, w, d = maps.shape
    squares = maps.reshape(t, h // side, side, w // side, side, d).permute(0, 1, 3, 2, 4, 5)
    return squares.reshape(t, h // side, w // side, side * side * d)


@dataclass(frozen=True)
class PivotOutput:
    """What a batch gives."""

    loss: Tensor
    """Mean cross-entropy over all labelled tokens of the batch."""
    losses: Tensor
    """The same for each conversation (B,), detached; 0 where nothing is labelled."""
    labelled: Tensor
    """Number of labelled tokens of each conversation (B,)."""
    logits: Tensor
    """(B, K, vocabulary) at the places in `places`."""
    places: Tensor
    """(K,) of the L places: all, or those before a labelled token of any conversation."""


class PivotModel(nn.Module):
    """Encoder, projector and language model; parameter names are those of InternVL's checkpoints.

    Parameters of the encoder that the fused layers do not depend on are frozen: they would get no gradient.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: PivotConfig | None = None, language_model: nn.Module | None = None) -> None:
        """`language_model` is used in place of one that is made, with random weights, from the configuration."""
        super().__init__()
        c = config or PivotConfig()
        if language_model is not None:
            c = replace(c, language=language.config_of(language_model))
        self.config, encoder = c, c.encoder
        self.vision_model: VisionTransformer | ViTAdapter = (
            ViTAdapter(encoder) if isinstance(encoder, AdapterConfig) else VisionTransformer(encoder)
        )
        self.annealing = LayerAnnealing(len(c.taps.layers), c.tau)
        self.language_model = language.build(c.language) if language_model is None else language_model
        deep = c.vit.dim * c.shuffle**2
        width = self.table.weight.shape[1]
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(deep), nn.Linear(deep, width), nn.GELU(), nn.Linear(width, width)
        )
        for name, values in self.normalisation().items():
            self.register_buffer(name, values, persistent=False)
        self.frozen: frozenset[str] = frozenset()
        self.freeze(())

    def normalisation(self) -> dict[str, Tensor]:
        """The buffers `mean` and `std` (1, 3, 1, 1) for values in [0, 1]: configuration, not weights."""
        return {
            name: torch.tensor(getattr(self.config, name)).view(1, 3, 1, 1) / 255 for name in ("mean", "std")
        }

    @property
    def table(self) -> nn.Embedding:
        """The language model's table of tokens."""
        return cast(nn.Embedding, cast(Any, self.language_model).get_input_embeddings())

    def freeze(self, parts: Iterable[str]) -> None:
        """Train all but the named `Part`s. Raises ParameterError for another name.

        Under LoRA the language model's own weights stay frozen and its updates are the part `language`.
        """
        self.frozen = chosen = frozenset(parts)
        if chosen - set(PARTS):
            raise ParameterError(
                f"{', '.join(sorted(chosen - set(PARTS)))} cannot be frozen; choose from {', '.join(PARTS)}"
            )
        reached = self.vision_model.reached(self.config.taps.last)
        for name, parameter in self.vision_model.named_parameters():
            parameter.requires_grad_(name in reached and "encoder" not in chosen)
        self.mlp1.requires_grad_("projector" not in chosen)
        lm: Any = self.language_model
        low_rank = hasattr(lm, "peft_config")
        tables = {id(t.weight) for t in (lm.get_input_embeddings(), lm.get_output_embeddings()) if t}
        for name, parameter in lm.named_parameters():
            part = "tokens" if id(parameter) in tables else "language"
            frozen = low_rank and part == "language" and "lora_" not in name
            parameter.requires_grad_(part not in chosen and not frozen)

    def add_lora(self, options: language.LoRA) -> None:
        """Train low-rank updates of the language model's layers in their place; its tables of tokens as before."""
        self.language_model = language.with_lora(self.language_model, options)
        self.freeze(self.frozen)

    def checkpoint_gradients(self, on: bool = True) -> None:
        """Compute blocks of encoder and language model again in the backward pass, for much less memory."""
        self.vision_model.checkpoint_gradients(on)
        language.checkpoint_gradients(self.language_model, on)

    def fuse(self, tiles: Tensor) -> Tensor:
        """Tiles (T, 3, S, S) in [0, 1] to the encoder's fused map (T, N, D), class token included."""
        x = ((tiles - self.mean) / self.std).to(self.vision_model.embeddings.patch_embedding.weight.dtype)
        return self.annealing(self.vision_model.tokens(x, self.config.taps.layers))

    def see(self, tiles: Tensor) -> Tensor:
        """Tiles (T, 3, S, S) in [0, 1] to tokens of the language model (T, N / shuffle^2, C)."""
        self.config.tokens(tiles.shape[-1])  # refuses a size that does not fit
        fused = self.fuse(tiles)
        side = tiles.shape[-1] // self.config.vit.patch
        maps = fused[:, -side * side :].unflatten(1, (side, side))  # without the class token
        return self.mlp1(pixel_shuffle(maps, self.config.shuffle).flatten(1, 2))

    def embed(
        self, ids: Tensor, tiles: Tensor | None, image_token: int, which: Tensor | None = None
    ) -> Tensor:
        """Embeddings (B, L, C) of tokens, those of images in their places, in order.

        `which` (K,) says which tile stands in each place, where it is not each once: a tile that several conversations
        are about is seen once for all of them. One that stands nowhere is seen as well, so that every process has
        the same gradients, and does not count. Raises ParameterError where the number of `image_token`s is not that of
        the tiles' tokens.
        """
        embedded = self.table(ids)
        if tiles is None:
            return embedded
        seen = self.see(tiles).to(embedded.dtype)
        if which is not None:
            embedded = embedded + 0 * seen.sum()
            seen = seen[which]
        marked = ids == image_token
        seen = seen.flatten(0, 1)
        if not ids.is_meta and int(marked.sum()) != len(seen):
            raise ParameterError(
                f"a batch has {int(marked.sum())} image tokens and tiles for {len(seen)}; expected the same number"
            )
        return embedded.masked_scatter(marked.unsqueeze(-1), seen)

    def forward(
        self,
        text: TextBatch,
        tiles: Tensor | None,
        image_token: int,
        which: Tensor | None = None,
        *,
        all_logits: bool = False,
    ) -> PivotOutput:
        """Loss of conversations about tiles (T, 3, S, S), which lie in the order of their image tokens unless `which`
        (K,) says which comes where, as in `embed`.
        """
        embedded = self.embed(text.input_ids, tiles, image_token, which)
        following = F.pad(text.labels[:, 1:], (0, 1), value=IGNORED)
        counted = following != IGNORED
        if all_logits or counted.is_meta:
            places = torch.arange(counted.shape[1], device=counted.device)
        else:  # the output layer is wide: only where a label follows
            places = counted.any(0).nonzero().flatten()
        out = self.language_model(
            inputs_embeds=embedded,
            attention_mask=text.attention_mask,
            position_ids=text.position_ids,
            logits_to_keep=places,
            use_cache=False,
        )
        logits: Tensor = out.logits
        each = F.cross_entropy(
            logits.float().flatten(0, 1),
            following[:, places].flatten(),
            ignore_index=IGNORED,
            reduction="none",
        ).view(len(logits), -1)
        labelled = counted.sum(1)
        sums = each.sum(1)
        return PivotOutput(
            loss=sums.sum() / labelled.sum(),
            losses=(sums / labelled.clamp(min=1)).detach(),
            labelled=labelled,
            logits=logits,
            places=places,
        )

    @torch.no_grad()
    def answer(
        self,
        tokenizer: Any,
        questions: Sequence[str],
        tiles: Sequence[Tensor],
        longest: int = 64,
        system: str | None = SYSTEM,
    ) -> list[str]:
        """The likeliest answers, token by token, of at most `longest` tokens each.

        `tiles[i]` (T, 3, S, S), in [0, 1], shows the one image of question i.
        """
        rows = [
            prompt(text, tokenizer, [len(seen) * self.config.tokens(seen.shape[-1])], system)
            for text, seen in zip(questions, tiles, strict=True)
        ]
        device = self.table.weight.device
        wide = max(len(row) for row in rows)
        padding = int(tokenizer.pad_token_id)
        ids = torch.stack([F.pad(row, (wide - len(row), 0), value=padding) for row in rows]).to(device)
        mask = torch.stack([F.pad(torch.ones_like(row), (wide - len(row), 0)) for row in rows]).to(device)
        training = self.training
        self.eval()
        try:
            embedded = self.embed(ids, torch.cat(list(tiles)).to(device), image_token_of(tokenizer))
            said: Tensor = cast(Any, self.language_model).generate(
                inputs_embeds=embedded,
                attention_mask=mask,
                max_new_tokens=longest,
                do_sample=False,
                eos_token_id=tokenizer.convert_tokens_to_ids(TURN_END),
                pad_token_id=padding,
            )
        finally:
            self.train(training)
        # special tokens such as <box> belong to answers; what follows the end of the turn does not
        texts = tokenizer.batch_decode(said, skip_special_tokens=False)
        return [text.partition(TURN_END)[0].strip() for text in texts]


def image_token_of(tokenizer: Any) -> int:
    """The token that an image's tokens replace. Raises ParameterError where the tokenizer has none."""
    vocabulary = tokenizer.get_vocab()
    if IMAGE_TOKEN not in vocabulary:
        raise ParameterError(
            f"the tokenizer has no {IMAGE_TOKEN}; add what it lacks with conversation.add_tokens"
        )
    return int(vocabulary[IMAGE_TOKEN])
