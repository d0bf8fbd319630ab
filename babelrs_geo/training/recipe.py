"""What a detector's training run is: a recipe, of which `recipes/*.yaml` come with the package.

A recipe fixes every number that the weights depend on; `run`, the part that they do not depend on, may change when a
run goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from babelrs_geo.datasets.augment import Augment
from babelrs_geo.datasets.published import Published
from babelrs_geo.datasets.transforms import Augmentation
from babelrs_geo.errors import ParameterError
from babelrs_geo.models.plain import Count, OneOf, Range, Whole
from babelrs_geo.training import settings
from babelrs_geo.training.schedules import LayerDecay, Rate, StepSchedule
from babelrs_geo.training.settings import RunPart

FOLDER = Path(__file__).parent / "recipes"
SENSORS = ("sar", "rgb", "ir")
SensorName = Annotated[str, OneOf(SENSORS)]


@dataclass(frozen=True, kw_only=True)
class ModelPart:
    """The network and where it begins."""

    base: Literal["full", "compact"] = "compact"
    """`DetectorConfig()`, the paper's, or `COMPACT`."""
    classes: Mapping[SensorName, tuple[str, ...]] | None = None
    """Classes of each sensor, in place of the base's."""
    architecture: Mapping[str, Any] = field(default_factory=dict)
    """Numbers of `DetectorConfig` that differ from the base's, nested as there."""
    start: str | None = None
    """`imagenet` for the compact one's prior; else an encoder or a detector, by name or file; None: at random."""
    freeze: Whole = 0
    """First stages of an ImageNet-trained trunk that are kept as they are."""
    freeze_encoder: bool = False
    """What pretraining with language reaches is kept as it starts: stem, transformer and what joins them."""
    checkpoint_gradients: bool = False
    """Less memory for a third more work."""


@dataclass(frozen=True, kw_only=True)
class DataPart:
    """What is learnt from and judged on."""

    sensors: tuple[SensorName, ...] = SENSORS
    train: Mapping[SensorName, str] = field(default_factory=lambda: dict.fromkeys(SENSORS, "train"))
    """Split by sensor."""
    val: Mapping[SensorName, str] = field(default_factory=lambda: dict.fromkeys(SENSORS, "val"))
    background: bool = True
    """Learn from images without objects too."""
    least: int = 1
    """Images with a shorter side are not learnt from, in pixels."""
    every: Count = 1
    """Learn from every so many-th image of a source, from the first: what fewer labels are good for."""


@dataclass(frozen=True, kw_only=True)
class View:
    """How an image becomes what is learnt from; exactly one of them."""

    crop: Augment | None = None
    """One affine map and tone."""
    affine: Augmentation | None = None
    """torchvision's transforms; speckle, polarity and offset as options."""
    published: Published | None = None
    """The original's whole frames, resized, flipped and turned."""

    @property
    def chosen(self) -> Augment | Augmentation | Published:
        """The one that is given."""
        return next(v for v in (self.crop, self.affine, self.published) if v is not None)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of the run, until the global step `steps`."""

    steps: Count
    quota: Mapping[SensorName, Whole]
    """Images of each sensor in a batch of one process."""
    views: Mapping[SensorName, View]
    """By sensor."""
    lr: Rate = 5e-4
    prior_lr: Rate = 1e-4
    """Of the ImageNet-trained convolutions."""
    weight_decay: Rate = 0.05
    """Of matrices and kernels."""
    warmup: Whole = 100
    """Steps over which the rates rise, counted from the run's start; 0: none."""
    cooldown: Whole = 1
    """Last steps of the phase, over which the rates fall to zero; 0: none."""
    mean_decay: Annotated[float, Range(least=0, below=1)] = 0.0
    """Of the running mean of the weights, which is what is kept; 0: the weights themselves."""


@dataclass(frozen=True, kw_only=True)
class HeaderPart:
    """What the weights say of themselves beyond what is measured."""

    gsd: Mapping[SensorName, tuple[float, float]] = field(default_factory=dict)
    """Metres a pixel by sensor, where the data do not say."""
    radiometry: Mapping[SensorName, str] = field(default_factory=dict)
    licence: str = "Not stated: the terms of the training data apply."
    data: str = ""
    """What the training data are, in words."""
    means: Mapping[SensorName, tuple[str, ...]] = field(default_factory=dict)
    """Classes in a sensor's mean; all that have objects unless given."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training run."""

    name: str
    phases: tuple[Phase, ...]
    model: ModelPart = field(default_factory=ModelPart)
    data: DataPart = field(default_factory=DataPart)
    layer_decay: LayerDecay | None = None
    """Rates that fall from layer to layer, in place of the phases' own."""
    schedule: StepSchedule | None = None
    """Goes with `layer_decay`."""
    clip: Annotated[float, Range(above=0)] = 10.0
    """Greatest total norm of the gradient."""
    precision: Literal["32", "bf16", "16"] = "32"
    processes: Count | None = None
    """How many processes' images a step learns from: fewer processes take several turns each. As many as there are if
    None.
    """
    seed: int = 0
    header: HeaderPart = field(default_factory=HeaderPart)
    run: RunPart = field(default_factory=RunPart)

    def __post_init__(self) -> None:
        if not self.phases:
            raise ParameterError(f"recipe {self.name} has no phases; give at least one")
        if (self.layer_decay is None) != (self.schedule is None):
            raise ParameterError("layer_decay and schedule go together; give both or neither")
        if len({p.mean_decay > 0 for p in self.phases}) > 1:
            raise ParameterError(
                "mean_decay is 0 in some phases and not in others; keep a running mean in all or none"
            )
        before = 0
        for number, phase in enumerate(self.phases):
            where = f"phases.{number}"
            if phase.steps <= before:
                raise ParameterError(
                    f"{where}.steps is {phase.steps}; a phase ends after the one before it ({before})"
                )
            before = phase.steps
            for sensor in self.data.sensors:
                if phase.quota.get(sensor, 0) < 1:
                    raise ParameterError(
                        f"{where}.quota has no {sensor}; give 1 or more, or leave it out of data.sensors"
                    )
                view = phase.views.get(sensor)
                given = 0 if view is None else sum(v is not None for v in vars(view).values())
                if given != 1:
                    raise ParameterError(
                        f"{where}.views.{sensor} has {given} kinds; give one of crop, affine, published"
                    )
                if sensor == "sar" and view is not None and view.affine is not None and view.affine.oriented:
                    raise ParameterError(
                        f"{where}.views.sar.affine turns horizontal boxes, which become loose; give oriented: false"
                    )
            sizes = sorted({phase.views[sensor].chosen.size for sensor in self.data.sensors})
            if len(sizes) > 1:
                raise ParameterError(
                    f"{where}.views have sizes {', '.join(map(str, sizes))}; the images of a batch have one"
                )
            if sizes[0] < 1:
                raise ParameterError(f"{where}.views have size {sizes[0]}; expected 1 or more")

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return self.phases[-1].steps

    @property
    def averaged(self) -> bool:
        """True where a running mean of the weights is kept."""
        return self.phases[0].mean_decay > 0

    def phase(self, step: int) -> Phase:
        """The phase that a global step is in."""
        return next(p for p in self.phases if step < p.steps)

    def turns(self, world: int) -> int:
        """Parts of a step that each of `world` processes computes one after the other, so that together they see what
        as many as the recipe is written for would; 1 where they cannot share it evenly.
        """
        meant = self.processes or world
        return 1 if meant % world else meant // world

    def quota(self, phase: Phase) -> dict[str, int]:
        """Images of each sensor in a batch, in the order of `data.sensors`."""
        return {sensor: phase.quota[sensor] for sensor in self.data.sensors}


def names() -> list[str]:
    """Recipes that come with the package."""
    return settings.names(FOLDER)


def read(
    name_or_path: str | Path, changes: Sequence[str] = (), values: Mapping[str, Any] | None = None
) -> Recipe:
    """A recipe by name or file, with changes, as `settings.read`. Raises ParameterError."""
    return settings.read(Recipe, FOLDER, name_or_path, changes, values)
