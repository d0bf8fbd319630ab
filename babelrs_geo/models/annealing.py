"""Layer-wise visual-semantic annealing (LVSA): intermediate layers eased into what the language model sees.

BabelRS, arXiv 2603.01758, section 3.3: fused = (1 - a) F_last + a * mean of the selected layers' maps, where
a = min(step / tau, 1) and the clock is the optimizer's step. The selected layers count the last one too. At
first the language model sees what it knows, the last layer; from step tau on every selected layer has a direct
path to the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from babelrs_geo.errors import ParameterError
from babelrs_geo.models.adapter import AdapterConfig
from babelrs_geo.models.vit import ViTConfig

TAU = 6000
"""Steps until all selected layers count the same, in the paper."""


@dataclass(frozen=True)
class Taps:
    """Which layers are fused: `layers` counted from 1 after each block, in ascending order; the last is F_last."""

    layers: tuple[int, ...]

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.layers, self.layers[1:], strict=False))
        if not self.layers or self.layers[0] < 1 or not rising:
            raise ParameterError(
                f"layers to fuse are {self.layers}; expected numbers from 1 on, each larger than the one before"
            )

    @property
    def last(self) -> int:
        """The layer that is seen from the start; blocks after it are not trained."""
        return self.layers[-1]


PAPER = Taps((3, 9, 18, 24))
"""As the paper writes: after the 3rd, 9th, 18th and last block, where the detector's adapter looks too."""
ORIGINAL = Taps((2, 8, 17, 23))
"""As the original code has it, one block earlier: its last block is never trained."""


def taps_of(encoder: ViTConfig | AdapterConfig, name: str = "paper") -> Taps:
    """The layers fused in an encoder: `paper`, `original` (one block earlier), or `last` (no annealing).

    In an adapter they are those after which transformer and pyramid exchange features, which for the paper's
    are its 3, 9, 18 and 24; a transformer alone has these at an eighth, three eighths, three quarters and all
    of its depth. Raises ParameterError for another name, or where a shallow one has no such layers.
    """
    if isinstance(encoder, AdapterConfig):
        ends = tuple(sum(encoder.stages[: i + 1]) for i in range(len(encoder.stages)))
    else:
        shares = (1 / 8, 3 / 8, 3 / 4, 1)
        ends = tuple(sorted({max(1, round(encoder.depth * share)) for share in shares}))
    if name == "last":
        return Taps(ends[-1:])
    if name not in ("paper", "original"):
        raise ParameterError(f'layers to fuse are called "{name}"; expected paper, original or last')
    return Taps(ends if name == "paper" else tuple(end - 1 for end in ends))


class LayerAnnealing(nn.Module):
    """Fuses maps of several layers; knows the step, which is saved with the weights.

    `fuse = LayerAnnealing(4)`, then `fuse.set_step(n)` before each step of the optimizer and `fuse(maps)`.
    """

    step: Tensor

    def __init__(self, layers: int, tau: int = TAU) -> None:
        super().__init__()
        if tau < 1:
            raise ParameterError(f"tau is {tau}; expected a number of steps from 1 on")
        self.layers, self.tau = layers, tau
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def set_step(self, step: int) -> None:
        """Set the clock: the number of optimizer steps that are done, the same in all of their micro-batches."""
        self.step.fill_(step)

    def alpha(self) -> Tensor:
        """How far annealing has come, a scalar in [0, 1]."""
        return (self.step / self.tau).clamp(0, 1)

    def weights(self) -> Tensor:
        """The share of each layer (layers,): they sum to 1, and the last has the rest."""
        alpha = self.alpha()
        shares = (alpha / self.layers).repeat(self.layers)
        return torch.cat([shares[:-1], shares[-1:] + (1 - alpha)])

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps of one shape, the last layer's last, to one."""
        if len(maps) != self.layers:
            raise ParameterError(f"{len(maps)} maps were given to fuse; expected {self.layers}")
        weights = self.weights()  # scalars of float32 leave the maps in their own type
        fused = maps[-1] * weights[-1]
        for weight, each in zip(weights[:-1], maps[:-1], strict=True):
            fused = fused + weight * each
        return fused
