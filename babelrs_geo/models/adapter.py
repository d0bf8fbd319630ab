"""ViT-Adapter backbone: a vision transformer and a convolutional pyramid that exchange features (BabelRS
section 3).

Legend: B images of H x W pixels, D channels, h = H/16, w = W/16 the transformer's grid, heads M, points P.
`x` are transformer tokens (B, h*w, D); `c` are pyramid tokens (B, 4hw + hw + hw/4, D) of strides 8, 16 and
32, concatenated in that order. Output: four maps (B, D, H/s, W/s) for s = 4, 8, 16, 32.

The same classes make the paper's backbone (`PriorKind` "convolutional", D = 1024, 24 blocks) and the compact
one, whose pyramid starts from an ImageNet EfficientNet-Lite0 instead. The deformable attention keeps the
behaviour of the implementation the published weights were trained with: its residual is the normalised query.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from babelrs_geo.errors import ParameterError
from babelrs_geo.models.efficientnet import SHOWN, EfficientNetLite0
from babelrs_geo.models.vit import PatchEmbeddings, ViTConfig, make_blocks

PriorKind = Literal["convolutional", "efficientnet_lite0"]


@dataclass(frozen=True)
class AdapterConfig:
    """Size of the backbone. Defaults are the paper's."""

    vit: ViTConfig = field(default_factory=ViTConfig)
    stages: tuple[int, ...] = (3, 6, 9, 6)
    """Transformer blocks in each interaction; their sum is the depth."""
    heads: int = 16
    points: int = 4
    ffn_ratio: float = 0.25
    gamma: float = 0.1
    """Initial gain of what the pyramid injects into the transformer."""
    dropout: float = 0.1
    prior: PriorKind = "convolutional"
    prior_width: int = 64
    extra_extractors: int = 2
    deform_ratio: float = 1.0
    """Width of the deformable attention's values relative to D."""

    def __post_init__(self) -> None:
        if sum(self.stages) != self.vit.depth:
            raise ParameterError(
                f"stages are {', '.join(map(str, self.stages))}; expected blocks that add up to vit.depth, "
                f"{self.vit.depth}"
            )


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W); statistics in float32, result in the input's type."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            rows = x.permute(0, 2, 3, 1)  # free for channels-last maps
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return F.layer_norm(rows, self.normalized_shape, weight, bias, self.eps).permute(0, 3, 1, 2)


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention (Deformable DETR, eq. 3), never in less than float32.

    Every query looks at P points around its own place on each level of the values, at learned offsets.
    """

    def __init__(self, dim: int, heads: int, points: int, levels: int, ratio: float = 1.0) -> None:
        super().__init__()
        self.heads, self.points, self.levels = heads, points, levels
        inner = int(dim * ratio)
        self.sampling_offsets = nn.Linear(dim, heads * levels * points * 2)
        self.attention_weights = nn.Linear(dim, heads * levels * points)
        self.value_proj = nn.Linear(dim, inner)
        self.output_proj = nn.Linear(inner, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Offsets start as a star of unit directions, one a head, growing with the point's index."""
        angle = torch.arange(self.heads) * (2 * math.pi / self.heads)
        star = torch.stack([angle.cos(), angle.sin()], -1)
        star = star / star.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.points + 1).view(1, 1, -1, 1)
        bias = star.view(self.heads, 1, 1, 2).expand(-1, self.levels, self.points, -1) * steps
        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(bias.flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self, query: Tensor, places: Tensor, value: Tensor, shapes: Sequence[tuple[int, int]]
    ) -> Tensor:
        """Query (B, Q, D), places (Q, 2) as x, y in [0, 1], value (B, S, D) over levels of `shapes` (h, w)."""
        exact = torch.promote_types(query.dtype, torch.float32)
        with torch.autocast(query.device.type, enabled=False):
            return self._attend(query.to(exact), places, value.to(exact), shapes)

    def _attend(
        self, query: Tensor, places: Tensor, value: Tensor, shapes: Sequence[tuple[int, int]]
    ) -> Tensor:
        b, q, _ = query.shape
        m, p = self.heads, self.points
        v = self.value_proj(value)
        depth = v.shape[-1] // m
        v = v.view(b, -1, m, depth).transpose(1, 2)  # (B, M, S, depth)
        offsets = self.sampling_offsets(query).view(b, q, m, self.levels, p, 2)
        weights = self.attention_weights(query).view(b, q, m, self.levels * p).softmax(-1)
        weights = weights.view(b, q, m, self.levels, p)
        out = query.new_zeros(b, m, depth, q)
        start = 0
        for level, (h, w) in enumerate(shapes):
            maps = v[:, :, start : start + h * w].transpose(2, 3).reshape(b * m, depth, h, w)
            start += h * w
            size = query.new_tensor([w, h])
            at = places.view(1, q, 1, 1, 2) + offsets[:, :, :, level] / size  # (B, Q, M, P, 2) in [0, 1]
            grid = (2 * at - 1).transpose(1, 2).reshape(b * m, q, p, 2)
            seen = F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
            share = weights[:, :, :, level].transpose(1, 2).reshape(b * m, 1, q, p)
            out = out + (seen * share).sum(-1).view(b, m, depth, q)
        return self.output_proj(out.permute(0, 3, 1, 2).reshape(b, q, m * depth))


class DepthwiseOnPyramid(nn.Module):
    """Depthwise 3x3 convolution on each of the three maps inside `c`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)

    def forward(self, c: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
        out = []
        for part, (h, w) in zip(c.split([h * w for h, w in shapes], dim=1), shapes, strict=True):
            maps = part.transpose(1, 2).reshape(part.shape[0], -1, h, w)
            out.append(self.dwconv(maps).flatten(2).transpose(1, 2))
        return torch.cat(out, dim=1)


class ConvFFN(nn.Module):
    """Linear, depthwise convolution, GELU, linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = DepthwiseOnPyramid(hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, c: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
        return self.fc2(F.gelu(self.dwconv(self.fc1(c), shapes)))


@dataclass(frozen=True)
class Geometry:
    """Places of tokens for one input size: level shapes (h, w) and token centres (n, 2) as x, y in [0, 1]."""

    pyramid: tuple[tuple[int, int], ...]
    grid: tuple[int, int]
    pyramid_places: Tensor
    grid_places: Tensor

    @classmethod
    def of(cls, height: int, width: int, like: Tensor) -> Geometry:
        """Geometry of an image of `height` x `width` pixels, both multiples of 32."""
        pyramid = tuple((height // s, width // s) for s in (8, 16, 32))
        places = [_centres(h, w, like) for h, w in pyramid]
        return cls(pyramid, pyramid[1], torch.cat(places), places[1])


def _centres(h: int, w: int, like: Tensor) -> Tensor:
    y = (torch.arange(h, device=like.device, dtype=torch.float32) + 0.5) / h
    x = (torch.arange(w, device=like.device, dtype=torch.float32) + 0.5) / w
    yy, xx = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([xx.flatten(), yy.flatten()], -1)


class Injector(nn.Module):
    """Pyramid into transformer: x + gamma * attention(x over c)."""

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        dim = config.vit.dim
        self.query_norm = nn.LayerNorm(dim)
        self.feat_norm = nn.LayerNorm(dim)
        self.attn = DeformableAttention(dim, config.heads, config.points, 3, config.deform_ratio)
        self.gamma = nn.Parameter(torch.full((dim,), config.gamma))
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, c: Tensor, at: Geometry) -> Tensor:
        seen = self.attn(self.query_norm(x), at.grid_places, self.feat_norm(c), at.pyramid)
        return x + self.gamma * self.drop(seen)


class Extractor(nn.Module):
    """Transformer into pyramid. The residual is the normalised query, as in the published weights'
    training.
    """

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        dim = config.vit.dim
        self.query_norm = nn.LayerNorm(dim)
        self.feat_norm = nn.LayerNorm(dim)
        self.attn = DeformableAttention(dim, config.heads, config.points, 1, config.deform_ratio)
        self.drop = nn.Dropout(config.dropout)
        self.ffn_norm = nn.LayerNorm(dim)
        self.ffn = ConvFFN(dim, int(dim * config.ffn_ratio))

    def forward(self, c: Tensor, x: Tensor, at: Geometry) -> Tensor:
        query = self.query_norm(c)
        c = query + self.drop(self.attn(query, at.pyramid_places, self.feat_norm(x), [at.grid]))
        return c + self.ffn(self.ffn_norm(c), at.pyramid)


class Interaction(nn.Module):
    """Inject, run some transformer blocks, extract.

    With `checkpointing`, what is inside is computed again in the backward pass instead of being kept.
    """

    def __init__(self, config: AdapterConfig, extra: int) -> None:
        super().__init__()
        self.checkpointing = False
        self.injector = Injector(config)
        self.extractor = Extractor(config)
        self.extra_extractors = nn.ModuleList(Extractor(config) for _ in range(extra))

    def forward(
        self, x: Tensor, c: Tensor, blocks: Sequence[nn.Module], at: Geometry
    ) -> tuple[Tensor, Tensor]:
        x = self.advance(x, c, blocks, at)[-1]
        return x, self.extract(c, x, at)

    def advance(self, x: Tensor, c: Tensor, blocks: Sequence[nn.Module], at: Geometry) -> list[Tensor]:
        """Inject, then the tokens after each block."""
        x = self._run(self.injector, x, c, at)
        seen = []
        for block in blocks:
            x = self._run(block, x)
            seen.append(x)
        return seen

    def extract(self, c: Tensor, x: Tensor, at: Geometry) -> Tensor:
        """The pyramid's tokens after they have seen the transformer's."""
        for extractor in (self.extractor, *self.extra_extractors):
            c = self._run(extractor, c, x, at)
        return c

    def _run(self, part: nn.Module, *inputs: Any) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(part, *inputs, use_reentrant=False))
        return part(*inputs)


class ConvolutionalPrior(nn.Module):
    """The paper's spatial prior: a small convolutional pyramid at strides 4, 8, 16 and 32, each brought to
    D.
    """

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        k, dim = config.prior_width, config.vit.dim

        def unit(cin: int, cout: int, stride: int) -> list[nn.Module]:
            return [nn.Conv2d(cin, cout, 3, stride, 1, bias=False), ChannelNorm(cout), nn.ReLU()]

        self.stem = nn.Sequential(*unit(3, k, 2), *unit(k, k, 1), *unit(k, k, 1), nn.MaxPool2d(3, 2, 1))
        self.conv2 = nn.Sequential(*unit(k, 2 * k, 2))
        self.conv3 = nn.Sequential(*unit(2 * k, 4 * k, 2))
        self.conv4 = nn.Sequential(*unit(4 * k, 4 * k, 2))
        self.fc1, self.fc2 = nn.Conv2d(k, dim, 1), nn.Conv2d(2 * k, dim, 1)
        self.fc3, self.fc4 = nn.Conv2d(4 * k, dim, 1), nn.Conv2d(4 * k, dim, 1)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        c1 = self.stem(image)
        c2 = self.conv2(c1)
        c3 = self.conv3(c2)
        return self.fc1(c1), self.fc2(c2), self.fc3(c3), self.fc4(self.conv4(c3))


class EfficientNetPrior(nn.Module):
    """Spatial prior of the compact detector: EfficientNet-Lite0.

    Runs outside autocast: its depthwise convolutions are bound by memory and slower in bf16 on CPUs
    (measured).
    """

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        self.trunk = EfficientNetLite0()
        self.fc1, self.fc2, self.fc3, self.fc4 = (nn.Conv2d(n, config.vit.dim, 1) for n in SHOWN.values())

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with torch.autocast(image.device.type, enabled=False):
            c1, c2, c3, c4 = self.trunk(image.float())
        return self.fc1(c1), self.fc2(c2), self.fc3(c3), self.fc4(c4)


class ViTAdapter(nn.Module):
    """The backbone: image (B, 3, H, W), H and W multiples of 32, to four maps of D channels."""

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        dim = config.vit.dim
        self.config = config
        self.embeddings = PatchEmbeddings(config.vit)
        self.layers = make_blocks(config.vit)
        lite = config.prior == "efficientnet_lite0"
        self.spm: nn.Module = EfficientNetPrior(config) if lite else ConvolutionalPrior(config)
        self.level_embed = nn.Parameter(torch.randn(3, dim))
        last = len(config.stages) - 1
        self.interactions = nn.ModuleList(
            Interaction(config, config.extra_extractors if i == last else 0)
            for i in range(len(config.stages))
        )
        self.up = nn.ConvTranspose2d(dim, dim, 2, 2)
        for i in range(1, 5):
            setattr(self, f"norm{i}", ChannelNorm(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise what the adapter adds; the transformer's blocks and an ImageNet prior keep their own
        start.
        """
        parts: list[nn.Module] = [self.interactions, self.up]
        parts += (
            [self.spm]
            if self.config.prior == "convolutional"
            else [m for n, m in self.spm.named_children() if n != "trunk"]
        )
        for part in parts:
            for module in part.modules():
                if isinstance(module, nn.Linear):
                    nn.init.trunc_normal_(module.weight, std=0.02)
                    nn.init.zeros_(module.bias)
                elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                    fan_out = (
                        module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
                    )
                    nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
            for module in part.modules():
                if isinstance(module, DeformableAttention):
                    module.reset_parameters()

    def forward(self, image: Tensor) -> list[Tensor]:
        at = Geometry.of(image.shape[2], image.shape[3], image)
        c1, c = self._pyramid(image)
        x = self.embeddings(image)
        for interaction, blocks in self._stages():
            x, c = interaction(x, c, blocks, at)
        return self._maps(c1, c, x, at)

    def tokens(self, image: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """The transformer's tokens (B, h*w, D) after each of `layers`; 0 is the embedding.

        They have seen the pyramid as in the detector. What leads to later blocks or to maps alone does not run.
        """
        at = Geometry.of(image.shape[2], image.shape[3], image)
        _, c = self._pyramid(image)
        seen = [self.embeddings(image)]
        last = max(layers)
        for interaction, blocks in self._stages():
            if last < len(seen):
                break
            seen += interaction.advance(seen[-1], c, blocks[: last + 1 - len(seen)], at)
            if last >= len(seen):
                c = interaction.extract(c, seen[-1], at)
        return [seen[layer] for layer in layers]

    def reached(self, layer: int) -> set[str]:
        """Names of the parameters that tokens after a layer depend on."""
        unused = ["up.", "norm1.", "norm2.", "norm3.", "norm4.", "spm.fc1."]
        unused += [f"layers.{n}." for n in range(layer, self.config.vit.depth)]
        end = 0
        for i, count in enumerate(self.config.stages):
            if layer <= end:
                unused.append(f"interactions.{i}.")
            end += count
            if layer <= end:
                unused += [f"interactions.{i}.extractor.", f"interactions.{i}.extra_extractors."]
        return {name for name, _ in self.named_parameters() if not name.startswith(tuple(unused))}

    def checkpoint_gradients(self, on: bool = True) -> None:
        """Compute blocks again in the backward pass: a third more work for much less memory, the same gradients."""
        for interaction, _ in self._stages():
            interaction.checkpointing = on

    def _stages(self) -> Iterator[tuple[Interaction, list[nn.Module]]]:
        start = 0
        for interaction, count in zip(self.interactions, self.config.stages, strict=True):
            yield cast(Interaction, interaction), list(self.layers[start : start + count])
            start += count

    def _pyramid(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The prior's finest map, and its other three as tokens of their level."""
        c1, *pyramid = self.spm(image)
        levels = self.level_embed.unsqueeze(1)  # (3, 1, D)
        parts = [m.flatten(2).transpose(1, 2) + e for m, e in zip(pyramid, levels, strict=True)]
        return c1, torch.cat(parts, dim=1)

    def _maps(self, c1: Tensor, c: Tensor, x: Tensor, at: Geometry) -> list[Tensor]:
        """Add the transformer's map, resized, to each level of the pyramid and normalise."""
        parts = c.split([h * w for h, w in at.pyramid], dim=1)
        c2, c3, c4 = (t.transpose(1, 2).unflatten(2, s) for t, s in zip(parts, at.pyramid, strict=True))
        tokens = x.to(c1.dtype).transpose(1, 2).unflatten(2, at.grid)
        pyramid = (self.up(c2) + c1, c2, c3, c4)
        out = []
        for i, (level, scale) in enumerate(zip(pyramid, (4.0, 2.0, 1.0, 0.5), strict=True), start=1):
            resized = tokens if scale == 1 else F.interpolate(tokens, scale_factor=scale, mode="bilinear")
            out.append(getattr(self, f"norm{i}")(level + resized))
        return out
