"""What the steps of any run have in common: what is measured of them, and when they cannot go on."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from babelrs_geo.errors import TrainingError
from babelrs_geo.training.loading import Batches


class Tally:
    """Means of what is measured, from one row of the log to the next."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        """One measurement of each."""
        for name, value in values.items():
            value = torch.as_tensor(value).detach().double()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def take(self) -> dict[str, float]:
        """The means over all processes, and begin anew. Not every process needs to have measured the same."""
        state = self.state()
        states = [state]
        if torch.distributed.is_initialized():
            gathered: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(gathered, state)
            states = gathered
        self.sums, self.counts = {}, {}
        means = {}
        for name in dict.fromkeys(name for each in states for name in each["sums"]):
            having = [each for each in states if name in each["sums"]]
            means[name] = sum(e["sums"][name] for e in having) / sum(e["counts"][name] for e in having)
        return means

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"sums": {k: float(v) for k, v in self.sums.items()}, "counts": dict(self.counts)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """From a checkpoint."""
        self.sums = {k: torch.tensor(v, dtype=torch.float64) for k, v in state["sums"].items()}
        self.counts = dict(state["counts"])


class Measured(LightningModule):
    """A module whose steps are tallied, for rows of the log. A batch is all that one step of the optimizer learns
    from: a list of parts, whose gradients are computed one after the other.
    """

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False  # a step is whole: it is never stopped between its parts
        self.tally = Tally()
        self._marked = time.perf_counter()
        self._waited = 0.0

    def start_clock(self, batches: Batches) -> None:
        """Count from here: the first batches are drawn before training starts."""
        self._marked, self._waited = time.perf_counter(), batches.waited

    def row(self, steps: int, batches: Batches) -> dict[str, float]:
        """Means since the last row, the seconds a step and the share of them that was spent waiting for data.

        Processes that train together average theirs.
        """
        now = time.perf_counter()
        seconds, waited = now - self._marked, batches.waited - self._waited
        self._marked, self._waited = now, batches.waited
        self.tally.add({"seconds_a_step": seconds / steps, "data_wait": waited / max(seconds, 1e-9)})
        return self.tally.take()

    def skip_clock(self, seconds: float) -> None:
        """Leave out time that was not spent training."""
        self._marked += seconds

    @contextmanager
    def joined_up(self, last: bool) -> Iterator[None]:
        """Processes exchange gradients after the last part of a step only."""
        model: Any = self.get_submodule("model")
        strategy = self.trainer.strategy
        if hasattr(model, "set_requires_gradient_sync"):
            model.set_requires_gradient_sync(last)
        if isinstance(strategy, DDPStrategy) and not last:
            with strategy.block_backward_sync():
                yield
        else:
            yield

    def clipped(self, parameters: Iterable[Tensor], most: float, *, refused: bool = True) -> None:
        """Clip the total norm of the gradient, and tally what it was. With `refused`, TrainingError if no number."""
        norm: Any = clip_grad_norm_(parameters, most)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of sharded parameters
        if refused and not torch.isfinite(norm):
            raise TrainingError(
                f"step {self.global_step}: the gradient's norm is {float(norm):g}; lower the learning rate and go on "
                "from the last checkpoint"
            )
        self.tally.add({"gradient": norm})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What the next row of the log has so far."""
        checkpoint["tally"] = self.tally.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with that row."""
        self.tally.restore(checkpoint["tally"])
