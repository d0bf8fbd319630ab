"""The steps of a run: losses, gradients, rates and running mean, each a function of the global step."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from babelrs_geo.datasets.seeding import number
from babelrs_geo.errors import TrainingError
from babelrs_geo.models.detector import Detector
from babelrs_geo.training.data import Batch, Batches
from babelrs_geo.training.recipe import Recipe
from babelrs_geo.training.schedules import layer_decay_groups, parameter_groups, schedule, step_schedule

_SHARED = ("backbone.", "neck.")


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
        """The means, and begin anew."""
        means = {name: float(value) / self.counts[name] for name, value in self.sums.items()}
        self.sums, self.counts = {}, {}
        return means

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"sums": {k: float(v) for k, v in self.sums.items()}, "counts": dict(self.counts)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """From a checkpoint."""
        self.sums = {k: torch.tensor(v, dtype=torch.float64) for k, v in state["sums"].items()}
        self.counts = dict(state["counts"])


class DetectorTraining(LightningModule):
    """A detector that is trained as a recipe says.

    `kept` are the weights that a run is for: the running mean where the recipe keeps one, else the model's own.
    """

    def __init__(self, model: Detector, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.model = model
        self.mean = copy.deepcopy(model).requires_grad_(False) if recipe.averaged else None
        self.tally = Tally()
        self._marked = time.perf_counter()
        self._waited = 0.0

    @property
    def kept(self) -> Detector:
        """The weights that are judged and written."""
        return self.model if self.mean is None else self.mean

    def configure_optimizers(self) -> Optimizer:
        """AdamW over the recipe's groups; rates are set step by step."""
        first, decay = self.recipe.phases[0], self.recipe.layer_decay
        groups = layer_decay_groups(self.model, decay) if decay else parameter_groups(self.model, first)
        return torch.optim.AdamW(groups, lr=first.lr)

    def set_rates(self, optimizer: Optimizer, step: int) -> float:
        """Each group's learning rate at a global step; returns the highest."""
        phase = self.recipe.phase(step)
        for group in optimizer.param_groups:
            if self.recipe.layer_decay:
                group["lr"] = group["base"] * step_schedule(step, self.recipe.schedule)
            else:
                base = phase.prior_lr if group["prior"] else phase.lr
                group["lr"] = base * schedule(step, phase)
        return max(group["lr"] for group in optimizer.param_groups)

    def on_train_start(self) -> None:
        """The clock starts."""
        self._marked = time.perf_counter()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of a batch: the sum over the sensors."""
        step, every = self.global_step, self.recipe.run.gradients_every
        torch.manual_seed(number(self.recipe.seed, step, self.global_rank))
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, Optimizer)
        rate = self.set_rates(optimizer, step)
        losses = self.model.losses({s: (part["image"], part["targets"]) for s, part in batch.items()})
        total = torch.stack(list(losses.values())).sum()
        sensors = {s: sum_of(losses, s) for s in batch}
        if not torch.isfinite(total):
            told = "; ".join(
                f"{s} {float(v.detach()):g} ({', '.join(batch[s]['names'])})" for s, v in sensors.items()
            )
            raise TrainingError(
                f"step {step}: the loss is {float(total.detach()):g}, by sensor and files {told}; look at these "
                "files, or lower the learning rate and go on from the last checkpoint"
            )
        self.tally.add(losses | {f"{s}_loss": v for s, v in sensors.items()} | {"loss": total, "lr": rate})
        if every and step % every == 0:
            self.tally.add(self.compare_gradients(sensors))
        return total

    def compare_gradients(self, losses: Mapping[str, Tensor]) -> dict[str, float]:
        """Norm of each sensor's gradient over the backbone and the neck, and the cosine between each two.

        Of this process's images alone. What is left for the backward pass is untouched.
        """
        shared = [p for n, p in self.model.named_parameters() if n.startswith(_SHARED) and p.requires_grad]
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        scale = 1.0 if scaler is None else scaler.get_scale()  # or half precision would lose small gradients
        vectors = {}
        for sensor, loss in losses.items():
            parts = torch.autograd.grad(loss * scale, shared, retain_graph=True, allow_unused=True)
            filled = [torch.zeros_like(p) if g is None else g for p, g in zip(shared, parts, strict=True)]
            vectors[sensor] = torch.cat([g.flatten() for g in filled]).float() / scale
        told = {f"{s}_gradient": float(v.norm()) for s, v in vectors.items()}
        for one, other in itertools.combinations(vectors, 2):
            cosine = nn.functional.cosine_similarity(vectors[one], vectors[other], dim=0)
            told[f"cosine_{one}_{other}"] = float(cosine)
        return told

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the total norm. TrainingError where it is no number; in half precision such a step is left out."""
        norm = clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        if not torch.isfinite(norm) and self.recipe.precision != "16":
            raise TrainingError(
                f"step {self.global_step}: the gradient's norm is {float(norm):g}; lower the learning rate and go on "
                "from the last checkpoint"
            )
        self.tally.add({"gradient": norm})

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The step, and the running mean's after it: checkpoints find both done."""
        super().optimizer_step(*args, **kwargs)
        if self.mean is not None:
            done = self.global_step + 1
            decay = min(self.recipe.phase(done - 1).mean_decay, done / (done + 10))
            with torch.no_grad():
                for kept, new in zip(self.mean.parameters(), self.model.parameters(), strict=True):
                    kept.lerp_(new.detach(), 1 - decay)

    def row(self, steps: int, batches: Batches) -> dict[str, float]:
        """Means since the last row, the seconds a step and the share of them that was spent waiting for data.

        Processes that train together average theirs.
        """
        now = time.perf_counter()
        seconds, waited = now - self._marked, batches.waited - self._waited
        self._marked, self._waited = now, batches.waited
        means = self.tally.take() | {
            "seconds_a_step": seconds / steps,
            "data_wait": waited / max(seconds, 1e-9),
        }
        if self.trainer.world_size > 1:
            values = torch.tensor(list(means.values()), dtype=torch.float64, device=self.device)
            torch.distributed.all_reduce(values)
            means = dict(zip(means, (values / self.trainer.world_size).tolist(), strict=True))
        return means

    def skip_clock(self, seconds: float) -> None:
        """Leave out time that was not spent training."""
        self._marked += seconds

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What the next row of the log has so far."""
        checkpoint["tally"] = self.tally.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with that row."""
        self.tally.restore(checkpoint["tally"])


def sum_of(losses: Mapping[str, Tensor], sensor: str) -> Tensor:
    """A sensor's part of the loss."""
    return torch.stack([v for name, v in losses.items() if name.startswith(f"{sensor}_")]).sum()
