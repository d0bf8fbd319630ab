"""EfficientNet-Lite0 as a feature extractor: the convolutional prior of the compact detector.

The network of Tan and Le (arXiv 1905.11946) without squeeze-and-excitation, with ReLU6 and TensorFlow's padding, up to
its last block. Each batch norm is folded into the convolution before it: a detector's batches are too small for batch
statistics, so that the norms would stay fixed anyway, and folded they cost nothing. Parameters have timm's names.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)
"""Expansion, kernel, stride, channels and blocks of each stage."""
SHOWN = {1: 24, 2: 40, 4: 112, 6: 320}
"""Stages whose maps are given, at strides 4, 8, 16 and 32, and their channels."""


class _Convolution(nn.Conv2d):
    """A convolution that puts out a pixel for each stride begun: padded evenly, the odd pixel right and below."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        padding = kernel // 2 if stride == 1 else 0
        super().__init__(inputs, outputs, kernel, stride, padding, groups=groups)
        nn.init.normal_(self.weight, std=math.sqrt(2 * groups / (kernel**2 * outputs)))
        assert self.bias is not None
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride[0] > 1:
            kernel, stride = self.kernel_size[0], self.stride[0]
            below, right = (max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in x.shape[-2:])
            x = F.pad(x, (right // 2, right - right // 2, below // 2, below - below // 2))
        return super().forward(x)


class _Block(nn.Module):
    """Widen, look around channel by channel, narrow; added to the input where the shapes allow."""

    def __init__(self, expansion: int, kernel: int, stride: int, inputs: int, outputs: int) -> None:
        super().__init__()
        wide = expansion * inputs
        self.residual = stride == 1 and inputs == outputs
        self.widens = expansion > 1
        if self.widens:
            self.conv_pw = _Convolution(inputs, wide, 1)
            self.conv_dw = _Convolution(wide, wide, kernel, stride, wide)
            self.conv_pwl = _Convolution(wide, outputs, 1)
        else:
            self.conv_dw = _Convolution(wide, wide, kernel, stride, wide)
            self.conv_pw = _Convolution(wide, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.widens:
            y = self.conv_pwl(F.relu6(self.conv_dw(F.relu6(self.conv_pw(x)))))
        else:
            y = self.conv_pw(F.relu6(self.conv_dw(x)))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """Images (B, 3, H, W) to maps of `SHOWN` channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem = _Convolution(3, 32, 3, 2)
        channels, stages = 32, []
        for expansion, kernel, stride, outputs, count in STAGES:
            blocks = []
            for n in range(count):
                blocks.append(_Block(expansion, kernel, stride if n == 0 else 1, channels, outputs))
                channels = outputs
            stages.append(nn.Sequential(*blocks))
        self.blocks = nn.ModuleList(stages)

    def forward(self, image: Tensor) -> list[Tensor]:
        x, maps = F.relu6(self.conv_stem(image)), []
        for number, stage in enumerate(self.blocks):
            x = stage(x)
            if number in SHOWN:
                maps.append(x)
        return maps

    @torch.no_grad()
    def fold(self, tensors: list[Tensor], eps: float = 1e-3) -> list[Tensor]:
        """Take each convolution and the batch norm after it, in their order, from `tensors`: weight, then scale, shift,
        mean and variance of the norm. Gives the tensors that are left. Raises ValueError where shapes differ.
        """
        convolutions = [each for each in self.modules() if isinstance(each, _Convolution)]
        if len(tensors) < 5 * len(convolutions):
            raise ValueError(f"{len(tensors)} tensors, expected at least {5 * len(convolutions)}")
        for n, conv in enumerate(convolutions):
            weight, scale, shift, mean, variance = tensors[5 * n : 5 * n + 5]
            if (
                weight.shape != conv.weight.shape
                or len({t.shape for t in (scale, shift, mean, variance)}) > 1
            ):
                raise ValueError(f"tensor {5 * n} has shape {tuple(weight.shape)}")
            gain = scale * torch.rsqrt(variance + eps)
            conv.weight.copy_(weight * gain[:, None, None, None])
            assert conv.bias is not None
            conv.bias.copy_(shift - mean * gain)
        return tensors[5 * len(convolutions) :]
