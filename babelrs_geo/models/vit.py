"""The plain vision transformer: under the adapter, and alone in language pretraining. InternViT's pre-norm blocks,
without final norm.

Shapes: B images, N tokens (row-major over the patch grid; the class token, where there is one, before them), D
channels. Reference: BabelRS, arXiv 2603.01758; the block is InternViT's (LayerNorm eps 1e-6, layer scale, fused
q, k, v, exact GELU).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from babelrs_geo.errors import ParameterError


@dataclass(frozen=True)
class ViTConfig:
    """Size of the transformer. Defaults are the paper's InternViT-300M at 800 px."""

    image_size: int = 800
    """Side in pixels for which position embeddings are stored; other sizes interpolate them."""
    patch: int = 16
    dim: int = 1024
    depth: int = 24
    heads: int = 16
    mlp_ratio: float = 4.0
    layer_scale: float = 0.1
    """Initial value of the per-channel gain on each residual branch."""
    position_std: float = 1.0
    """Deviation of the position embeddings before training: 1 as in InternViT, which is always pretrained."""
    class_token: bool = False
    """A learned token before those of the patches, as in pretraining; the detector has none."""
    drop_path: float = 0.0
    """Chance that training drops the last block's branches for an image; it grows linearly from 0 at the first."""

    def __post_init__(self) -> None:
        if self.heads < 1 or self.dim % self.heads:
            raise ParameterError(f"vit.heads is {self.heads}; expected a divisor of vit.dim, {self.dim}")


SMALL_MAP = 2**24
"""Up to this many attention weights an image (heads * N * N) the explicit form is used in bf16 on CPUs, where it
takes 0.64 of the fused kernel's time forward and half of it with backward. In float32 the fused one is faster: by
half alone, by a twentieth in the compact backbone (one core, 3 heads, 1600 tokens).
"""


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of (B, heads, N, d) tensors."""
    few = q.shape[1] * q.shape[2] ** 2 <= SMALL_MAP
    if few and q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head self-attention over tokens (B, N, D)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        mixed = attention(q, k, v)  # (B, heads, N, D / heads)
        return self.proj(mixed.transpose(1, 2).reshape(b, n, d))


class MLP(nn.Module):
    """Two linear layers around an exact GELU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """x + ls1 * attention(norm1(x)), then x + ls2 * mlp(norm2(x)).

    In training each branch is left out for a share `drop_path` of the images, and the others' made up for it.
    """

    def __init__(self, config: ViTConfig, drop_path: float = 0.0) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(config.dim, eps=1e-6)
        self.attn = Attention(config.dim, config.heads)
        self.ls1 = nn.Parameter(torch.full((config.dim,), config.layer_scale))
        self.norm2 = nn.LayerNorm(config.dim, eps=1e-6)
        self.mlp = MLP(config.dim, int(config.dim * config.mlp_ratio))
        self.ls2 = nn.Parameter(torch.full((config.dim,), config.layer_scale))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._drop(self.ls1 * self.attn(self.norm1(x)))
        return x + self._drop(self.ls2 * self.mlp(self.norm2(x)))

    def _drop(self, branch: Tensor) -> Tensor:
        if not (self.training and self.drop_path):
            return branch
        from torchvision.ops import stochastic_depth

        dropped: Tensor = stochastic_depth(branch, self.drop_path, "row")
        return dropped


def make_blocks(config: ViTConfig) -> nn.ModuleList:
    """The transformer's blocks, their drop path growing from the first to the last."""
    rates = torch.linspace(0, config.drop_path, config.depth, device="cpu").tolist()
    return nn.ModuleList(Block(config, rate) for rate in rates)


class PatchEmbeddings(nn.Module):
    """Image (B, 3, H, W) to tokens (B, H/patch * W/patch, D) with learned positions.

    Slot 0 of the position table belongs to the class token and is unused without one.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.grid = config.image_size // config.patch
        self.patch_embedding = nn.Conv2d(3, config.dim, config.patch, config.patch)
        self.position_embedding = nn.Parameter(
            torch.randn(1, self.grid**2 + 1, config.dim) * config.position_std
        )
        self.class_embedding = nn.Parameter(torch.randn(1, 1, config.dim)) if config.class_token else None

    def positions(self, height: int, width: int) -> Tensor:
        """Position embeddings (1, height * width, D), bicubically interpolated where the grid is another."""
        stored = self.position_embedding[:, 1:]
        if (height, width) == (self.grid, self.grid):
            return stored
        maps = stored.reshape(1, self.grid, self.grid, -1).permute(0, 3, 1, 2).float()
        maps = F.interpolate(maps, size=(height, width), mode="bicubic", align_corners=False)
        return maps.flatten(2).transpose(1, 2).to(stored.dtype)

    def forward(self, image: Tensor) -> Tensor:
        maps = self.patch_embedding(image)
        tokens = maps.flatten(2).transpose(1, 2) + self.positions(*maps.shape[2:])
        if self.class_embedding is None:
            return tokens
        first = self.class_embedding + self.position_embedding[:, :1]
        return torch.cat([first.expand(len(tokens), -1, -1), tokens], dim=1)


class VisionTransformer(nn.Module):
    """The transformer alone, under the names of the published encoder: InternViT's 340 tensors."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False
        self.embeddings = PatchEmbeddings(config)
        self.encoder = nn.ModuleDict({"layers": make_blocks(config)})

    def forward(self, image: Tensor) -> Tensor:
        return self.tokens(image, [self.config.depth])[0]

    def tokens(self, image: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Tokens (B, N, D) after each of `layers`, class token first; 0 is the embedding. Later blocks do not run."""
        x = self.embeddings(image)
        seen = [x]
        for block in cast(nn.ModuleList, self.encoder["layers"])[: max(layers)]:
            again = self.checkpointing and torch.is_grad_enabled()
            x = cast(Tensor, checkpoint(block, x, use_reentrant=False)) if again else block(x)
            seen.append(x)
        return [seen[layer] for layer in layers]

    def reached(self, layer: int) -> set[str]:
        """Names of the parameters that tokens after a layer depend on."""
        late = tuple(f"encoder.layers.{n}." for n in range(layer, self.config.depth))
        return {name for name, _ in self.named_parameters() if not name.startswith(late)}

    def checkpoint_gradients(self, on: bool = True) -> None:
        """Compute blocks again in the backward pass: a third more work for much less memory, the same gradients."""
        self.checkpointing = on
