"""When a run judges, logs and saves, and how it stops."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from babelrs_geo.training.loading import Batches
from babelrs_geo.training.measured import Measured
from babelrs_geo.training.settings import RunPart

LAST = "last.ckpt"
"""What to go on from."""

Progress = Callable[[int, int], None]


class Drawn(Protocol):
    """The data of a run: what is drawn from them since training began."""

    @property
    def batches(self) -> Batches | None:
        """None before it begins."""


class Keeper(Callback):
    """Judges, logs and saves, in this order, after the steps at which each is due; `judge` is a kind of run's own.

    A run that goes on from any checkpoint therefore misses no validation and repeats none. Told to stop (interrupt,
    or termination as by a cluster), it saves after the step in hand.
    """

    def __init__(self, folder: Path, steps: int, run: RunPart, data: Drawn) -> None:
        self.folder, self.steps, self.run, self.drawn = folder, steps, run, data
        self.progress: Progress | None = None
        self.deadline: float | None = None
        """Of `time.monotonic()`: the run is then told to stop."""
        self.spent: dict[str, float] = {}
        """Seconds of steps by what computed them, those of earlier parts of the run included."""
        self.stopped = False
        self._saved = self._clock = time.monotonic()
        self._machine = ""
        self._logged = 0
        self._handlers: dict[int, Any] = {}

    def judge(self, trainer: Trainer, module: Measured, step: int) -> None:
        """Judge the weights as they are after a step, and write what is to be kept of them. All processes call it."""
        raise NotImplementedError

    @property
    def state_key(self) -> str:
        """Of the checkpoint."""
        return "Keeper"

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"logged": self._logged, "spent": dict(self.spent)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From the checkpoint."""
        self._logged = state_dict["logged"]
        self.spent = dict(state_dict.get("spent", {}))  # checkpoints of before kept no time

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The clock starts; listen for requests to stop."""
        assert isinstance(pl_module, Measured) and self.drawn.batches is not None
        pl_module.start_clock(self.drawn.batches)
        self._saved = self._clock = time.monotonic()
        self._machine = machine(trainer)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._stop)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Batches may then end before the run does."""
        assert self.drawn.batches is not None
        self.drawn.batches.stopping = lambda: self.stopped

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen no more; at teardown Lightning has taken down its own handlers, and these would bring them back."""
        self._listen_no_more()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Listen no more: Lightning ends no training after an error."""
        self._listen_no_more()

    def _listen_no_more(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """What is due after a step."""
        assert isinstance(pl_module, Measured)
        step, run, end = trainer.global_step, self.run, self.steps
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
            self.judge(trainer, pl_module, step)
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

    def _log(self, trainer: Trainer, module: Measured, step: int) -> None:
        assert self.drawn.batches is not None
        row = module.row(step - self._logged, self.drawn.batches)
        row["minutes"] = sum(self.spent.values()) / 60
        self._logged = step
        self.tell(trainer, row, step)

    def tell(self, trainer: Trainer, figures: dict[str, float], step: int) -> None:
        """A row of the log."""
        for log in trainer.loggers:
            log.log_metrics(figures, step)
            log.save()


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
