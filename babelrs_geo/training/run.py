"""A training run on Lightning, from one CPU to several machines."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from safetensors.torch import load_file

from babelrs_geo.errors import OutputError, ParameterError, WeightsError
from babelrs_geo.models import checkpoints, zoo
from babelrs_geo.models.checkpoints import Header
from babelrs_geo.models.detector import COMPACT, Detector, DetectorConfig
from babelrs_geo.models.imagenet import load_efficientnet_lite0
from babelrs_geo.training.data import TrainingData
from babelrs_geo.training.keeping import BEST, FINAL, LAST, Keeper, Progress
from babelrs_geo.training.logs import CsvLog
from babelrs_geo.training.module import DetectorTraining
from babelrs_geo.training.origin import Origin, fingerprint, weights_before
from babelrs_geo.training.recipe import ModelPart, Recipe, differing, to_plain, write
from babelrs_geo.training.schedules import freeze_prior
from babelrs_geo.training.validation import Verdict

RECIPE = "recipe.yaml"
_PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}
_CLASSED = ("gfl_cls.", "fc_cls.")  # outputs whose number follows from the classes


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


@dataclass(frozen=True)
class Trained:
    """How a run ended."""

    folder: Path
    step: int
    stopped: bool
    """True where it was told to stop before its last step."""
    best: float
    """H-mAP of `best.safetensors`; negative where nothing was judged yet."""
    best_step: int
    final: float | None
    """H-mAP of the last validation."""


def configuration(part: ModelPart) -> DetectorConfig:
    """The architecture that a recipe asks for. ParameterError for numbers that there are not."""
    base = DetectorConfig() if part.base == "full" else COMPACT
    plain = _merged(to_plain(base), part.architecture, "model.architecture")
    plain["classes"] = plain["classes"] | {s: list(names) for s, names in (part.classes or {}).items()}
    return DetectorConfig.from_dict(plain)


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any], where: str) -> dict[str, Any]:
    out = dict(base)
    for name, value in changes.items():
        if name not in base:
            raise ParameterError(f"there is no {where}.{name}; expected some of {', '.join(base)}")
        nested = isinstance(value, Mapping) and isinstance(base[name], Mapping)
        out[name] = _merged(base[name], value, f"{where}.{name}") if nested else value
    return out


def build(recipe: Recipe) -> Detector:
    """The detector as the run begins. Raises WeightsError where the start does not fit it."""
    part = recipe.model
    torch.manual_seed(recipe.seed)
    model = Detector(configuration(part))
    if part.start == "imagenet":
        if model.config.backbone.prior == "convolutional":
            raise WeightsError(
                "model.start is imagenet, whose trunk this prior has not; give an encoder, a detector or null"
            )
        load_efficientnet_lite0(model.backbone.spm.get_submodule("trunk"))
    elif part.start is not None:
        path = zoo.find(part.start)
        if isinstance(checkpoints.read(path), Header):
            start_detector(model, path)
        else:
            checkpoints.start_backbone(model, path)
    if part.freeze:
        freeze_prior(model, part.freeze)
    absent = {"sar", "rgb", "ir"} - set(recipe.data.sensors)
    for sensor in absent:
        prefix = {"sar": "sar_", "rgb": "rgb_", "ir": "ifr_"}[sensor]
        for name, parameter in model.named_parameters():
            if name.startswith(prefix):
                parameter.requires_grad_(False)
    model.checkpoint_gradients(part.checkpoint_gradients)
    return model.to(memory_format=torch.channels_last).train()


def start_detector(model: Detector, path: Path) -> None:
    """Put a trained detector's weights into one whose classes may differ: then outputs of classes begin anew.

    Raises WeightsError where anything else differs.
    """
    state, own = {k: v.float() for k, v in load_file(path).items()}, model.state_dict()
    if checkpoints.read_header(path).config.classes != model.config.classes:
        state |= {k: v for k, v in own.items() if any(part in k for part in _CLASSED)}
    shapes = ({k: tuple(v.shape) for k, v in each.items()} for each in (own, state))
    if odd := checkpoints.differences(*shapes):
        raise WeightsError(f"the detector {path} does not fit the recipe's architecture: {odd}")
    model.load_state_dict(state)


def fit(recipe: Recipe, data: Sequence[Path], place: Place) -> Trained:
    """Train as a recipe says; checkpoints, logs and weights go to `place.folder`.

    Raises ParameterError where the folder holds another run, or one that was not asked to go on; OutputError where
    it cannot be written; LabelError, WeightsError, SceneError for what the run is made of; TrainingError where a loss
    is no number.
    """
    first = getattr(rank_zero_only, "rank", 0) == 0
    begun = time.monotonic()
    state = _begin(recipe, place, first)
    world = place.devices * place.nodes
    if recipe.processes not in (None, world) and first:
        warnings.warn(
            f"recipe {recipe.name} is written for {recipe.processes} processes and this run has {world}: a step sees "
            "fewer or more images than it is tuned for",
            stacklevel=2,
        )
    model = build(recipe)
    module = DetectorTraining(model, recipe)
    sources = TrainingData(recipe, model.config, data)
    ground(recipe, sources)
    start = weights_before(recipe.model.start)
    learnt = cache(lambda: fingerprint(sources.learn[s].samples for s in recipe.data.sensors))

    def describe(verdict: Verdict, spent: Mapping[str, float]) -> Header:
        return header(recipe, sources, model.config, verdict, Origin(learnt(), spent, start))

    keeper = Keeper(place.folder, recipe, sources, describe)
    keeper.progress = place.progress
    keeper.deadline = None if place.minutes is None else begun + 60 * place.minutes
    with _quiet():
        trainer = _trainer(recipe, place, keeper, 0 if state is None else int(state["global_step"]))
        path = None if state is None else place.folder / LAST
        trainer.fit(module, sources, ckpt_path=path, weights_only=True)
    step = trainer.global_step
    return Trained(place.folder, step, step < recipe.steps, keeper.best, keeper.best_step, keeper.last)


def _begin(recipe: Recipe, place: Place, first: bool) -> dict[str, Any] | None:
    """Look at the folder, write the recipe into it, and give the checkpoint to go on from, if any."""
    last = place.folder / LAST
    if not last.is_file():
        try:
            place.folder.mkdir(parents=True, exist_ok=True)
            if first:
                draft = place.folder / f".{RECIPE}.part"
                draft.write_text(write(recipe), encoding="utf-8")
                draft.replace(place.folder / RECIPE)
        except OSError as error:
            raise OutputError(
                f"{place.folder} cannot be written ({error}); choose a folder you may write to"
            ) from error
        return None
    if not place.resume:
        raise ParameterError(
            f"{place.folder} holds a run already; go on with it by --resume auto, or choose another folder"
        )
    state: dict[str, Any] = torch.load(last, map_location="cpu", mmap=True, weights_only=True)
    odd = differing(yaml.safe_load(state["recipe"]), yaml.safe_load(write(recipe)))
    if odd:
        raise ParameterError(
            f"the run in {place.folder} differs from the recipe in {', '.join(odd[:3])}"
            f"{' and more' if odd[3:] else ''}; go on with its own (--config {place.folder / RECIPE}), or choose "
            "another folder"
        )
    if state["world"] != place.devices * place.nodes and first:
        warnings.warn(
            f"the run in {place.folder} began with {state['world']} processes and goes on with "
            f"{place.devices * place.nodes}: it will not be the run it would have been",
            stacklevel=3,
        )
    return state


class _About(Callback):
    """Puts into each checkpoint what run it is of."""

    def __init__(self, recipe: Recipe) -> None:
        self.text = write(recipe)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """The recipe and the number of processes."""
        checkpoint["recipe"], checkpoint["world"] = self.text, trainer.world_size


def _trainer(recipe: Recipe, place: Place, keeper: Keeper, start: int) -> Trainer:
    """Lightning's trainer, with all that is its own to decide decided."""
    device = place.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise ParameterError(f'device is "{device}"; expected auto, cpu or cuda')
    if device == "cuda" and torch.cuda.device_count() < place.devices:
        raise ParameterError(f"{place.devices} GPUs were asked for and there are {torch.cuda.device_count()}")
    if device == "cpu" and recipe.precision == "16":
        raise ParameterError("precision 16 needs a GPU; on a CPU take --set precision=bf16 or 32")
    loggers: list[Any] = [CsvLog(place.folder / "log.csv", start)]
    if recipe.run.tensorboard:
        loggers.append(
            TensorBoardLogger(
                place.folder, name="tensorboard", version="", purge_step=start + 1 if start else None
            )
        )
    world = place.devices * place.nodes
    whole = len(recipe.data.sensors) == 3
    strategy = (
        DDPStrategy(
            process_group_backend="nccl" if device == "cuda" else "gloo",
            broadcast_buffers=False,
            find_unused_parameters=not whole,
        )
        if world > 1
        else "auto"
    )
    return Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=place.devices,
        num_nodes=place.nodes,
        strategy=strategy,
        precision=_PRECISIONS[recipe.precision],  # type: ignore[arg-type]
        max_steps=recipe.steps,
        max_epochs=-1,
        logger=loggers,
        callbacks=[keeper, _About(recipe)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        log_every_n_steps=1,
        default_root_dir=place.folder,
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


def ground(recipe: Recipe, data: TrainingData) -> dict[str, tuple[float, float]]:
    """Metres a pixel that the weights will know, by sensor: what was seen and a quarter beyond.

    ParameterError where neither data nor recipe say.
    """
    found = {}
    for sensor in recipe.data.sensors:
        seen = data.learn[sensor].gsd
        if seen is None and sensor not in recipe.header.gsd:
            raise ParameterError(
                f"the {sensor} data do not say how many metres a pixel has; tell the weights' range: "
                f"--set header.gsd.{sensor}=[0.1,1]"
            )
        low, high = (seen[0] / 1.25, seen[1] * 1.25) if seen else recipe.header.gsd[sensor]
        found[sensor] = (round(low, 4), round(high, 4))
    return found


def header(
    recipe: Recipe, data: TrainingData, config: DetectorConfig, verdict: Verdict, origin: Origin
) -> Header:
    """What weights say of themselves."""
    part, sensors = recipe.header, recipe.data.sensors
    kinds = {"sar": "horizontal", "rgb": "oriented", "ir": "oriented"}
    return Header(
        name=recipe.name,
        classes={s: tuple(config.classes[s]) for s in sensors},
        box_kind={s: kinds[s] for s in sensors},
        gsd=ground(recipe, data),
        thresholds=verdict.thresholds,
        radiometry={s: part.radiometry.get(s, "as babelrs-geo reads scenes of this sensor") for s in sensors},
        architecture=config.to_dict(),
        licence=part.licence,
        training={
            "data": part.data or "; ".join(data.learn[s].about for s in sensors),
            "images": {s: len(data.learn[s].samples) for s in sensors},
            "start": recipe.model.start or "at random",
            "config": write(recipe),
            "steps": verdict.step,
            **origin.to_dict(),
        },
        metrics={**verdict.reports, "h_map": verdict.h_map},
    )


__all__ = ["BEST", "FINAL", "LAST", "Place", "Trained", "build", "configuration", "fit", "header"]
