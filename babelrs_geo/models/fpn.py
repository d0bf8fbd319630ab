"""The neck that all sensors share (BabelRS section 3, "MultitaskFPN"), with one call a kind of head.

Legend: four maps of strides 4, 8, 16, 32 in; five maps of C channels out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn


class _Conv(nn.Module):
    """A convolution under the name `conv`, as checkpoints spell it."""

    def __init__(self, cin: int, cout: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, kernel, stride, kernel // 2)
        nn.init.xavier_uniform_(self.conv.weight)
        nn.init.zeros_(cast(Tensor, self.conv.bias))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class SharedFPN(nn.Module):
    """Feature pyramid; further levels are strided convolutions of the last output, without activation."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList(_Conv(in_channels, channels, 1) for _ in range(4))
        self.fpn_convs = nn.ModuleList(_Conv(channels, channels, 3, 1 if i < 4 else 2) for i in range(6))

    def forward(self, maps: Sequence[Tensor], start: int = 0) -> list[Tensor]:
        """Five maps from level `start` on: 0 gives strides 4 to 64 (oriented heads), 1 gives 8 to 128 (GFL)."""
        laterals = [conv(m) for conv, m in zip(self.lateral_convs[start:], maps[start:], strict=True)]
        for i in range(len(laterals) - 1, 0, -1):
            laterals[i - 1] = laterals[i - 1] + F.interpolate(laterals[i], size=laterals[i - 1].shape[2:])
        out = [conv(m) for conv, m in zip(self.fpn_convs[start:4], laterals, strict=True)]
        for conv in self.fpn_convs[4 : 5 + start]:
            out.append(conv(out[-1]))
        return out
