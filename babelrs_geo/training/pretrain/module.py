"""The steps of pretraining: loss by sensor and task, LVSA's clock, rates, gradients by block."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from babelrs_geo.datasets.seeding import number
from babelrs_geo.errors import TrainingError
from babelrs_geo.models.conversation import TextBatch
from babelrs_geo.models.pivot import PivotModel
from babelrs_geo.training.loading import Batches
from babelrs_geo.training.measured import Measured
from babelrs_geo.training.pretrain.corpora import Micro
from babelrs_geo.training.pretrain.recipe import PretrainRecipe
from babelrs_geo.training.schedules import cosine

_TEXT = ("input_ids", "labels", "attention_mask", "position_ids")


class PivotTraining(Measured):
    """A pivot that is trained as a recipe says."""

    def __init__(self, model: PivotModel, recipe: PretrainRecipe, image_token: int) -> None:
        super().__init__()
        self.model, self.recipe, self.image_token = model, recipe, image_token

    def configure_model(self) -> None:
        """Share the parameters among processes, block by block, where the recipe says so."""
        if not isinstance(self.trainer.strategy, ModelParallelStrategy) or hasattr(self.model, "unshard"):
            return
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        assert self.device_mesh is not None
        mesh = self.device_mesh["data_parallel"]
        for module in self.model.modules():
            blocks = getattr(module, "layers", None)
            for block in blocks if isinstance(blocks, nn.ModuleList) else ():
                fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        register_fsdp_forward_method(self.model, "answer")

    def configure_optimizers(self) -> Optimizer:
        """AdamW over the parts that have a rate of their own; rates are set step by step."""
        recipe = self.recipe
        groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
        for _, part, parameter in self.parts():
            groups.setdefault((part, recipe.decay == "all" or parameter.ndim > 1), []).append(parameter)
        return torch.optim.AdamW(
            [
                {
                    "params": parameters,
                    "base": recipe.rates.get(part, recipe.lr),
                    "weight_decay": recipe.weight_decay if decayed else 0.0,
                }
                for (part, decayed), parameters in groups.items()
            ],
            lr=recipe.lr,
            betas=recipe.betas,
            eps=recipe.eps,
        )

    def parts(self) -> Iterator[tuple[str, str, nn.Parameter]]:
        """Each parameter that trains: its name, and which of `recipe.GROUPS` it is of."""
        lm: Any = self.model.language_model
        tables = {id(t.weight) for t in (lm.get_input_embeddings(), lm.get_output_embeddings()) if t}
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            if name.startswith("vision_model."):
                part = "stem" if name.startswith("vision_model.spm.") else "encoder"
            elif name.startswith("mlp1."):
                part = "projector"
            else:
                part = "tokens" if id(parameter) in tables else "language"
            yield name, part, parameter

    def training_step(self, batch: list[Micro], batch_idx: int) -> None:
        """One step of the optimizer."""
        step, every = self.global_step, self.recipe.run.gradients_every
        torch.manual_seed(number(self.recipe.seed, step, self.global_rank))
        self.model.annealing.set_step(step)
        optimizer: Any = self.optimizers()
        factor = cosine(step, self.recipe.steps, self.recipe.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * factor
        for place, micro in enumerate(batch):
            with self.joined_up(place == len(batch) - 1):
                self._learn(micro, len(batch))
        if every and step % every == 0:
            self.tally.add(self.gradients())
        self.clipped(self.model.parameters(), self.recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
        self.tally.add(
            {
                "lr": self.recipe.lr * factor,
                "alpha": self.model.annealing.alpha(),
                "tokens": torch.stack([micro["attention_mask"].sum() for micro in batch]).sum(),
            }
        )

    def _learn(self, micro: Micro, count: int) -> None:
        """Gradients of one of so many micro-batches, added to those that there are."""
        text = TextBatch(*(micro[name] for name in _TEXT))
        out = self.model(text, micro["tiles"].float() / 255, self.image_token, micro["which"])
        if not torch.isfinite(out.loss):
            told = "; ".join(
                f"{name} {float(loss):g}" for name, loss in zip(micro["names"], out.losses, strict=True)
            )
            raise TrainingError(
                f"step {self.global_step}: the loss is {float(out.loss.detach()):g}, by record {told}; look at these, "
                "or lower the learning rate and go on from the last checkpoint"
            )
        self.manual_backward(out.loss / count)
        self.tally.add({"loss": out.loss})
        for sensor, task, loss in zip(micro["sensors"], micro["tasks"], out.losses, strict=True):
            kinds = [sensor, task, f"{sensor}_{task}" if sensor and task else None]
            self.tally.add({f"{kind}_loss": loss for kind in kinds if kind})

    def gradients(self) -> dict[str, Tensor]:
        """Norms of the gradient, before it is clipped: of each block of the encoder, and of the other parts."""
        squares: dict[str, Tensor] = {}
        for name, part, parameter in self.parts():
            if parameter.grad is None:
                continue
            block = re.match(r"vision_model\.(?:encoder\.)?layers\.(\d+)\.", name)
            key = f"gradient_block_{int(block[1]) + 1:02d}" if block else f"gradient_{part}"
            norm: Any = parameter.grad.float().norm() ** 2
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            squares[key] = squares[key] + norm if key in squares else norm
        return {key: value.sqrt() for key, value in sorted(squares.items())}

    def row(self, steps: int, batches: Batches) -> dict[str, float]:
        """Also the tokens that all processes together learnt from a second, and the seconds that a step waited."""
        means = super().row(steps, batches)
        tokens = means.pop("tokens") * self.trainer.world_size
        return means | {
            "tokens_a_second": tokens / means["seconds_a_step"],
            "wait_seconds": means["data_wait"] * means["seconds_a_step"],
        }
