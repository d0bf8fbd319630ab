"""A training run on Lightning, from one CPU to several machines."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file

from babelrs_geo.errors import ParameterError, WeightsError
from babelrs_geo.models import checkpoints, zoo
from babelrs_geo.models.checkpoints import Header
from babelrs_geo.models.detector import COMPACT, Detector, DetectorConfig
from babelrs_geo.models.imagenet import load_efficientnet_lite0
from babelrs_geo.models.plain import from_plain, merged, to_plain
from babelrs_geo.training.data import TrainingData
from babelrs_geo.training.keeping import LAST
from babelrs_geo.training.module import DetectorTraining
from babelrs_geo.training.origin import Origin, fingerprint, weights_before
from babelrs_geo.training.recipe import ModelPart, Recipe
from babelrs_geo.training.schedules import freeze_prior
from babelrs_geo.training.settings import write
from babelrs_geo.training.trainer import RECIPE, Course, Place, begin, train
from babelrs_geo.training.validation import BEST, FINAL, UNJUDGED_SCORE, DetectorKeeper, Verdict

_CLASSED = ("gfl_cls.", "fc_cls.")  # outputs whose number follows from the classes


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
    """H-mAP of the last validation; None where there was none."""

    @property
    def judged(self) -> str:
        """How good the weights are, in words."""
        if self.final is None:
            return f"not judged, and reports from scores of {UNJUDGED_SCORE}; babelrs-geo evaluate judges"
        return f"H-mAP {self.best:.3f} after step {self.best_step}, {self.final:.3f} at the end"


def configuration(part: ModelPart) -> DetectorConfig:
    """The architecture that a recipe asks for. ParameterError for numbers that there are not."""
    base = DetectorConfig() if part.base == "full" else COMPACT
    plain = merged(to_plain(base), part.architecture, "model.architecture")
    plain["classes"] = plain["classes"] | {s: list(names) for s, names in (part.classes or {}).items()}
    return from_plain(DetectorConfig, plain, "model.architecture")


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
        freeze_prior(model.backbone, part.freeze)
    if part.freeze_encoder:
        reached = model.backbone.reached(model.config.backbone.vit.depth)
        for name, parameter in model.backbone.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name not in reached)
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
    is no number, or a process that reads data is lost.
    """
    begun = time.monotonic()
    course = Course(
        settings=recipe,
        turns=recipe.turns(place.devices * place.nodes),
        unused=len(recipe.data.sensors) < 3,
    )
    state = begin(course, place)
    model = build(recipe)
    module = DetectorTraining(model, recipe)
    sources = TrainingData(recipe, model.config, data)
    ground(recipe, sources)
    start = weights_before(recipe.model.start)
    learnt = cache(lambda: fingerprint(sources.learn[s].samples for s in recipe.data.sensors))

    def describe(verdict: Verdict, spent: Mapping[str, float]) -> Header:
        return header(recipe, sources, model.config, verdict, Origin(learnt(), spent, start))

    keeper = DetectorKeeper(place.folder, recipe, sources, describe)
    step = train(course, place, keeper, module, sources, state, begun)
    return Trained(place.folder, step, step < recipe.steps, keeper.best, keeper.best_step, keeper.last)


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
        metrics=verdict.metrics(),
    )


__all__ = ["BEST", "FINAL", "LAST", "RECIPE", "Place", "Trained", "build", "configuration", "fit", "header"]
