"""The steps of a run: losses, gradients, rates and running mean, each a function of the global step."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn

from babelrs_geo.datasets.seeding import number
from babelrs_geo.errors import TrainingError
from babelrs_geo.models.detector import Detector
from babelrs_geo.training.data import Batch
from babelrs_geo.training.measured import Measured
from babelrs_geo.training.recipe import Recipe
from babelrs_geo.training.schedules import layer_decay_groups, parameter_groups, schedule, step_schedule

_SHARED = ("backbone.", "neck.")


class DetectorTraining(Measured):
    """A detector that is trained as a recipe says.

    `kept` are the weights that a run is for: the running mean where the recipe keeps one, else the model's own.
    """

    def __init__(self, model: Detector, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.model = model
        self.mean = copy.deepcopy(model).requires_grad_(False) if recipe.averaged else None

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
        """Each group's learning rate and weight decay at a global step; returns the highest rate."""
        phase = self.recipe.phase(step)
        for group in optimizer.param_groups:
            if self.recipe.layer_decay:
                group["lr"] = group["base"] * step_schedule(step, self.recipe.schedule)
            else:
                base = phase.prior_lr if group["prior"] else phase.lr
                group["lr"] = base * schedule(step, phase)
                group["weight_decay"] = phase.weight_decay if group["params"][0].ndim > 1 else 0.0
        return max(group["lr"] for group in optimizer.param_groups)

    def training_step(self, batch: list[Batch], batch_idx: int) -> None:
        """One step of the optimizer, from the gradients of all parts of a batch."""
        step, world = self.global_step, self.trainer.world_size
        optimizer: Any = self.optimizers()
        rate = self.set_rates(optimizer, step)
        for turn, part in enumerate(batch):
            # as the process would draw whose images these are, were there as many as the recipe is written for
            torch.manual_seed(number(self.recipe.seed, step, self.global_rank + turn * world))
            with self.joined_up(turn == len(batch) - 1):
                self._learn(part, len(batch))
        self.tally.add({"lr": rate})
        optimizer.step()
        optimizer.zero_grad()
        if self.mean is not None:
            decay = min(self.recipe.phase(step).mean_decay, (step + 1) / (step + 11))
            average = get_ema_multi_avg_fn(decay)
            average([*self.mean.parameters()], [*self.model.parameters()], self.global_step)

    def _learn(self, batch: Batch, count: int) -> None:
        """Gradients of one of so many parts, added to those that there are; the loss is the sum over the sensors."""
        step, every = self.global_step, self.recipe.run.gradients_every
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
        self.tally.add(losses | {f"{s}_loss": v for s, v in sensors.items()} | {"loss": total})
        if every and step % every == 0:
            self.tally.add(self.compare_gradients(sensors))
        self.manual_backward(total / count)

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

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip the total norm; in half precision a step whose norm is no number is left out."""
        self.clipped(self.model.parameters(), self.recipe.clip, refused=self.recipe.precision != "16")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also checkpoints of before, whose steps Lightning itself had counted."""
        super().on_load_checkpoint(checkpoint)
        loop = checkpoint["loops"]["fit_loop"]
        for counts in loop["epoch_loop.manual_optimization.optim_step_progress"].values():
            counts.update(dict.fromkeys(counts, checkpoint["global_step"]))


def sum_of(losses: Mapping[str, Tensor], sensor: str) -> Tensor:
    """A sensor's part of the loss."""
    return torch.stack([v for name, v in losses.items() if name.startswith(f"{sensor}_")]).sum()
