"""What a run leaves: checkpoints to go on from, its log, and weights with their header."""

from __future__ import annotations

import copy
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer

from babelrs_geo.models import checkpoints
from babelrs_geo.models.checkpoints import Header
from babelrs_geo.training.data import TrainingData
from babelrs_geo.training.module import DetectorTraining
from babelrs_geo.training.recipe import Recipe
from babelrs_geo.training.validation import Verdict, judge

LAST, BEST, FINAL = "last.ckpt", "best.safetensors", "final.safetensors"
"""What to go on from; the weights of the best validation; those of the last step."""

Progress = Callable[[int, int], None]
Describe = Callable[[Verdict, Mapping[str, float]], Header]
"""A verdict and the seconds that were spent, by machine, to the header of the weights that are written."""


class Keeper(Callback):
    """Judges, logs and saves, in this order, after the steps at which each is due.

    A run that goes on from any checkpoint therefore misses no validation and repeats none. Told to stop (interrupt,
    or termination as by a cluster), it saves after the step in hand.
    """

    def __init__(self, folder: Path, recipe: Recipe, data: TrainingData, describe: Describe) -> None:
        self.folder, self.recipe, self.data, self.describe = folder, recipe, data, describe
        self.progress: Progress | None = None
        self.deadline: float | None = None
        """Of `time.monotonic()`: the run is then told to stop."""
        self.spent: dict[str, float] = {}
        """Seconds of steps by what computed them, those of earlier parts of the run included."""
        self.best = -1.0
        self.best_step = 0
        self.last: float | None = None
        self.stopped = False
        self._saved = self._clock = time.monotonic()
        self._machine = ""
        self._logged = 0
        self._handlers: dict[int, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {
            "best": self.best,
            "best_step": self.best_step,
            "last": self.last,
            "logged": self._logged,
            "spent": dict(self.spent),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From the checkpoint."""
        self.best, self.best_step = state_dict["best"], state_dict["best_step"]
        self.last, self._logged = state_dict["last"], state_dict["logged"]
        self.spent = dict(state_dict.get("spent", {}))  # checkpoints of before kept no time

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The clock starts; listen for requests to stop."""
        self._saved = self._clock = time.monotonic()
        self._machine = machine(trainer)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._stop)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Listen no more."""
        self._listen_no_more()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Listen no more: Lightning tears nothing down after an error."""
        self._listen_no_more()

    def _listen_no_more(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """What is due after a step."""
        assert isinstance(pl_module, DetectorTraining)
        step, run, end = trainer.global_step, self.recipe.run, self.recipe.steps
        now = time.monotonic()
        self.spent[self._machine] = self.spent.get(self._machine, 0.0) + now - self._clock
        if self.deadline is not None and now >= self.deadline:
            self.stopped = True
        if self.progress is not None and trainer.is_global_zero:
            self.progress(step, end)
        if step % run.log_every == 0 or step == end:
            self._log(trainer, pl_module, step)
        if step == end or (run.validate_every and step % run.validate_every == 0):
            began = time.perf_counter()
            self._judge(trainer, pl_module, step)
            pl_module.skip_clock(time.perf_counter() - began)
        due = step == end or self.stopped or time.monotonic() - self._saved >= 60 * run.checkpoint_minutes
        if trainer.world_size > 1:  # clocks and signals differ from process to process
            due = trainer.strategy.reduce_boolean_decision(due, all=False)
            self.stopped = trainer.strategy.reduce_boolean_decision(self.stopped, all=False)
        if due:
            began = time.perf_counter()
            save(trainer, self.folder / LAST)
            self._saved = time.monotonic()
            pl_module.skip_clock(time.perf_counter() - began)
        if self.stopped and step < end:
            trainer.should_stop = True
        self._clock = time.monotonic()

    def _log(self, trainer: Trainer, module: DetectorTraining, step: int) -> None:
        assert self.data.batches is not None
        row = module.row(step - self._logged, self.data.batches) | {"minutes": sum(self.spent.values()) / 60}
        self._logged = step
        for log in trainer.loggers:
            log.log_metrics(row, step)
            log.save()

    def _judge(self, trainer: Trainer, module: DetectorTraining, step: int) -> None:
        """Judge the weights as they would be stored: in half precision."""
        model = copy.deepcopy(module.kept).requires_grad_(False)
        model.load_state_dict({k: v.half().float() for k, v in model.state_dict().items()})
        rank, world = trainer.global_rank, trainer.world_size
        verdict = judge(model, self.data.judge, self.recipe, step, rank=rank, world=world)
        if verdict is not None:
            for log in trainer.loggers:
                log.log_metrics({f"val_{k}": v for k, v in verdict.figures().items()}, step)
                log.save()
            header = self.describe(verdict, self.spent)
            if verdict.h_map > self.best:
                checkpoints.save(self.folder / BEST, model, header)
            if step == self.recipe.steps:
                checkpoints.save(self.folder / FINAL, model, header)
        told = [None if verdict is None else verdict.h_map]
        if world > 1:
            torch.distributed.broadcast_object_list(told, src=0)
        assert told[0] is not None
        self.last = told[0]
        if self.last > self.best:
            self.best, self.best_step = self.last, step


def save(trainer: Trainer, path: Path) -> None:
    """A checkpoint that appears whole or not at all; all processes call it."""
    draft = path.with_name(f".{path.name}.part")
    trainer.save_checkpoint(draft)
    if trainer.is_global_zero:
        draft.replace(path)


def machine(trainer: Trainer) -> str:
    """What a run computes on, in words."""
    device, world = trainer.strategy.root_device, trainer.world_size
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    told = name or f"{torch.get_num_threads()} CPU threads"
    return told if world == 1 else f"{world} x {told}"
