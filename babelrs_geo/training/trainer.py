"""Lightning's trainer as every run here uses it, and the folder that a run lives in."""

from __future__ import annotations

import logging
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only

from babelrs_geo.drafts import draft
from babelrs_geo.errors import ParameterError, WeightsError
from babelrs_geo.models.plain import from_plain, to_plain
from babelrs_geo.training.keeping import LAST, Keeper, Progress
from babelrs_geo.training.logs import CsvLog
from babelrs_geo.training.measured import Measured
from babelrs_geo.training.settings import differing, write

if TYPE_CHECKING:
    from babelrs_geo.training.pretrain.recipe import PretrainRecipe
    from babelrs_geo.training.recipe import Recipe

RECIPE = "recipe.yaml"
_PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}

Strategy = Literal["ddp", "fsdp"]
"""How processes share a model: each has all of it, or a part."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where and on what a run is computed."""

    folder: Path
    device: str = "auto"
    """auto, cpu or cuda."""
    devices: int = 1
    """Processes on this machine, one a GPU."""
    nodes: int = 1
    resume: bool = False
    """Go on from the folder's last checkpoint, where there is one."""
    minutes: float | None = None
    """Stop after the step at which so many minutes have passed since the start, as if told to."""
    progress: Progress | None = field(default=None, compare=False)


@dataclass(frozen=True, kw_only=True)
class Course:
    """What Lightning must know of a run."""

    settings: Recipe | PretrainRecipe
    turns: int = 1
    """Parts of a step that each process computes."""
    strategy: Strategy = "ddp"
    unused: bool = False
    """Some parameters that train get no gradient."""

    @cached_property
    def recipe(self) -> str:
        """The settings as YAML, which checkpoints hold."""
        return write(self.settings)

    def differs(self, recipe: str) -> list[str]:
        """Keys in which another recipe differs, as YAML. What it does not say, as one of an earlier version, is as it
        would be now unless told otherwise.
        """
        plain = yaml.safe_load(recipe)
        with suppress(ParameterError):  # keys that there are no longer
            plain = to_plain(from_plain(type(self.settings), plain))
        return differing(plain, to_plain(self.settings))


def begin(course: Course, place: Place) -> dict[str, Any] | None:
    """Look at the folder, write the recipe into it, and give the checkpoint to go on from, if any.

    Raises ParameterError where it holds another run, or one that was not asked to go on; OutputError where it cannot
    be written; WeightsError for a checkpoint that is none.
    """
    first, world = getattr(rank_zero_only, "rank", 0) == 0, place.devices * place.nodes
    shares, recipe = world * course.turns, course.settings
    if recipe.processes not in (None, shares) and first:
        warnings.warn(
            f"recipe {recipe.name} is written for {recipe.processes} processes, which this run's {world} cannot share: "
            "a step sees fewer or more images than it is tuned for; take a number that divides them",
            stacklevel=3,
        )
    last = place.folder / LAST
    if not last.is_file():
        if first:
            with draft(place.folder / RECIPE, "choose a folder you may write to") as hidden:
                place.folder.mkdir(parents=True, exist_ok=True)
                hidden.write_text(course.recipe, encoding="utf-8")
        return None
    if not place.resume:
        raise ParameterError(
            f"{place.folder} holds a run already; go on with it by --resume auto, or choose another folder"
        )
    state = _state(last)
    odd = course.differs(state["recipe"])
    if odd:
        raise ParameterError(
            f"the run in {place.folder} differs from the recipe in {', '.join(odd[:3])}"
            f"{' and more' if odd[3:] else ''}; go on with its own (--config {place.folder / RECIPE}), or choose "
            "another folder"
        )
    if state["world"] != shares and first:
        warnings.warn(
            f"the run in {place.folder} began with the images of {state['world']} processes a step and goes on with "
            f"those of {shares}: it will not be the run it would have been",
            stacklevel=3,
        )
    return state


def _state(last: Path) -> dict[str, Any]:
    """What a run's checkpoint holds. Raises WeightsError for a file that is none, or not whole."""
    try:
        state = torch.load(last, map_location="cpu", mmap=True, weights_only=True)
        if {"recipe", "world", "global_step"} <= state.keys():
            return dict(state)
    except (OSError, RuntimeError, EOFError, ValueError, AttributeError, pickle.UnpicklingError) as error:
        raise WeightsError(
            f"{last} cannot be read ({type(error).__name__}); get a whole copy, or choose another folder"
        ) from error
    raise WeightsError(f"{last} is no checkpoint of a run of babelrs-geo; choose another folder")


class _About(Callback):
    """Puts into each checkpoint what run it is of."""

    def __init__(self, course: Course) -> None:
        self.course = course

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """The recipe, and how many processes' images a step has."""
        checkpoint["recipe"], checkpoint["world"] = self.course.recipe, trainer.world_size * self.course.turns


def train(
    course: Course,
    place: Place,
    keeper: Keeper,
    module: Measured,
    data: LightningDataModule,
    state: dict[str, Any] | None,
    begun: float,
) -> int:
    """Run from `state`, which `begin` gave, and return the step that was reached.

    `begun` is the `time.monotonic()` from which `place.minutes` count.
    """
    keeper.progress = place.progress
    keeper.deadline = None if place.minutes is None else begun + 60 * place.minutes
    with _quiet():
        trainer = _trainer(course, place, keeper, 0 if state is None else int(state["global_step"]))
        path = None if state is None else place.folder / LAST
        trainer.fit(module, data, ckpt_path=path, weights_only=True)
    return trainer.global_step


def _trainer(course: Course, place: Place, keeper: Keeper, start: int) -> Trainer:
    """Lightning's trainer, with all that is its own to decide decided."""
    device = place.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise ParameterError(f'device is "{device}"; expected auto, cpu or cuda')
    if device == "cuda" and torch.cuda.device_count() < place.devices:
        raise ParameterError(f"{place.devices} GPUs were asked for and there are {torch.cuda.device_count()}")
    if device == "cpu" and course.settings.precision == "16":
        raise ParameterError("precision 16 needs a GPU; on a CPU take --set precision=bf16 or 32")
    loggers: list[Any] = [CsvLog(place.folder / "log.csv", start)]
    if course.settings.run.tensorboard:
        loggers.append(
            TensorBoardLogger(
                place.folder, name="tensorboard", version="", purge_step=start + 1 if start else None
            )
        )
    return Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=place.devices,
        num_nodes=place.nodes,
        strategy=_strategy(course, place, device),
        precision=_PRECISIONS[course.settings.precision],  # type: ignore[arg-type]
        max_steps=course.settings.steps,
        max_epochs=-1,
        logger=loggers,
        callbacks=[keeper, _About(course)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        log_every_n_steps=1,
        default_root_dir=place.folder,
    )


def _strategy(course: Course, place: Place, device: str) -> Any:
    world, backend = place.devices * place.nodes, "nccl" if device == "cuda" else "gloo"
    if world == 1:
        return "auto"
    if course.strategy == "fsdp":
        return ModelParallelStrategy(
            data_parallel_size=world,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=backend,
        )
    return DDPStrategy(
        process_group_backend=backend, broadcast_buffers=False, find_unused_parameters=course.unused
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Lightning tells of warnings, but not of what it found, may find and recommends."""
    log = logging.getLogger("lightning.pytorch")
    before = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(before)
