"""What a training run is, as dataclasses and as YAML: `recipes/*.yaml` come with the package.

A recipe fixes every number that the weights depend on; `run`, the part that they do not depend on, may change when a
run goes on. Unknown keys and unfit values are ParameterErrors that name the nearest key.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from babelrs_geo.datasets.augment import Augment
from babelrs_geo.datasets.published import Published
from babelrs_geo.datasets.transforms import Augmentation
from babelrs_geo.errors import ParameterError
from babelrs_geo.training.schedules import LayerDecay, StepSchedule

FOLDER = Path(__file__).parent / "recipes"
SENSORS = ("sar", "rgb", "ir")


@dataclass(frozen=True, kw_only=True)
class ModelPart:
    """The network and where it begins."""

    base: Literal["full", "compact"] = "compact"
    """`DetectorConfig()`, the paper's, or `COMPACT`."""
    classes: Mapping[str, tuple[str, ...]] | None = None
    """Classes of each sensor, in place of the base's."""
    architecture: Mapping[str, Any] = field(default_factory=dict)
    """Numbers of `DetectorConfig` that differ from the base's, nested as there."""
    start: str | None = None
    """`imagenet` for the compact one's prior; else an encoder or a detector, by name or file; None: at random."""
    freeze: int = 0
    """First stages of an ImageNet-trained trunk that are kept as they are."""
    checkpoint_gradients: bool = False
    """Less memory for a third more work."""


@dataclass(frozen=True, kw_only=True)
class DataPart:
    """What is learnt from and judged on."""

    sensors: tuple[str, ...] = SENSORS
    train: Mapping[str, str] = field(default_factory=lambda: dict.fromkeys(SENSORS, "train"))
    """Split by sensor."""
    val: Mapping[str, str] = field(default_factory=lambda: dict.fromkeys(SENSORS, "val"))
    background: bool = True
    """Learn from images without objects too."""
    least: int = 1
    """Images with a shorter side are not learnt from, in pixels."""


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

    steps: int
    quota: Mapping[str, int]
    """Images of each sensor in a batch of one process."""
    views: Mapping[str, View]
    """By sensor."""
    lr: float = 5e-4
    prior_lr: float = 1e-4
    """Of the ImageNet-trained convolutions."""
    weight_decay: float = 0.05
    warmup: int = 100
    """Steps over which the rates rise, counted from the run's start."""
    cooldown: int = 1
    """Last steps of the phase, over which the rates fall to zero."""
    mean_decay: float = 0.0
    """Of the running mean of the weights, which is what is kept; 0: the weights themselves."""


@dataclass(frozen=True, kw_only=True)
class HeaderPart:
    """What the weights say of themselves beyond what is measured."""

    gsd: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Metres a pixel by sensor, where the data do not say."""
    radiometry: Mapping[str, str] = field(default_factory=dict)
    licence: str = "Not stated: the terms of the training data apply."
    data: str = ""
    """What the training data are, in words."""
    means: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Classes in a sensor's mean; all that have objects unless given."""


@dataclass(frozen=True, kw_only=True)
class RunPart:
    """What the weights do not depend on."""

    workers: int = 0
    """Processes that read and augment, for each process that trains."""
    checkpoint_minutes: float = 5.0
    """Between checkpoints to go on from; 0: every step."""
    validate_every: int = 0
    """Steps between validations; 0: at the end alone."""
    log_every: int = 20
    gradients_every: int = 100
    """Steps between measurements of the sensors' gradients, which cost a backward pass a sensor; 0: never."""
    tensorboard: bool = True


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
    clip: float = 10.0
    """Greatest total norm of the gradient."""
    precision: Literal["32", "bf16", "16"] = "32"
    processes: int | None = None
    """For how many processes the quotas are meant; any if None."""
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
        if unknown := set(self.data.sensors) - set(SENSORS):
            raise ParameterError(
                f"data.sensors has {', '.join(sorted(unknown))}; expected some of {', '.join(SENSORS)}"
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
            sizes = sorted({phase.views[sensor].chosen.size for sensor in self.data.sensors})
            if len(sizes) > 1:
                raise ParameterError(
                    f"{where}.views have sizes {', '.join(map(str, sizes))}; the images of a batch have one"
                )

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

    def quota(self, phase: Phase) -> dict[str, int]:
        """Images of each sensor in a batch, in the order of `data.sensors`."""
        return {sensor: phase.quota[sensor] for sensor in self.data.sensors}


def names() -> list[str]:
    """Recipes that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read(name_or_path: str | Path, changes: Sequence[str] = ()) -> Recipe:
    """A recipe by name or file, with changes `dotted.key=value`. Raises ParameterError.

    Values are YAML; a key may step into lists by number, or into all elements by `*`.
    """
    path = FOLDER / f"{name_or_path}.yaml" if str(name_or_path) in names() else Path(name_or_path)
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ParameterError(
            f"there is no recipe {name_or_path} ({error}); give a YAML file, or one of {', '.join(names())}"
        ) from error
    except yaml.YAMLError as error:
        raise ParameterError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict):
        raise ParameterError(
            f"{path} holds no mapping; expected the keys of a recipe: {', '.join(_keys(Recipe))}"
        )
    whole = to_plain(from_plain(Recipe, document))
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise ParameterError(f'"{change}" is no change; expected key=value such as phases.0.lr=1e-4')
        try:
            _put(whole, key.strip().split("."), yaml.safe_load(value), key)
        except yaml.YAMLError as error:
            raise ParameterError(f"{change}: the value is no YAML; quote it") from error
    return from_plain(Recipe, whole)


def write(recipe: Recipe) -> str:
    """The recipe as YAML that `read` takes."""
    return yaml.safe_dump(to_plain(recipe), sort_keys=False, width=110)


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Dotted keys in which two plain recipes differ, those under `run` left out."""
    first, second = dict(_flat(one)), dict(_flat(other))
    return sorted(
        key
        for key in first.keys() | second.keys()
        if first.get(key) != second.get(key) and not key.startswith("run.")
    )


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        for name, item in inner:
            yield from _flat(item, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def _put(at: Any, keys: list[str], value: Any, whole: str) -> None:
    """Set what lies under `keys` in plain values."""
    name, rest = keys[0], keys[1:]
    if isinstance(at, list):
        if name != "*" and not (name.isdigit() and int(name) < len(at)):
            raise ParameterError(
                f"{whole}: {name} is none of the {len(at)} elements; count from 0, or * for all"
            )
        places: list[Any] = list(range(len(at))) if name == "*" else [int(name)]
    else:
        places = [name]
    for place in places:
        if not rest:
            at[place] = value
            continue
        if isinstance(at, dict) and at.get(place) is None:
            at[place] = {}
        if not isinstance(at[place], dict | list):
            raise ParameterError(f"{whole}: {place} holds a value, in which there is no {rest[0]}")
        _put(at[place], rest, value, whole)


def to_plain(value: Any) -> Any:
    """Dataclasses, tuples and mappings as dictionaries and lists."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    return [to_plain(v) for v in value] if isinstance(value, tuple | list) else value


def from_plain(kind: Any, value: Any, where: str = "") -> Any:
    """Plain values as `kind`, a type hint. ParameterError naming the key `where` it does not fit."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        return from_plain(next(k for k in inner if k is not type(None)), value, where)
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, where)
    if origin is Literal:
        if str(value) in inner:
            return str(value)
        raise _unfit(where, value, f"one of {', '.join(inner)}")
    if origin is tuple:
        if not isinstance(value, list | tuple) or (inner[-1] is not Ellipsis and len(value) != len(inner)):
            raise _unfit(where, value, "a list" if inner[-1] is Ellipsis else f"a list of {len(inner)}")
        hints = [inner[0]] * len(value) if inner[-1] is Ellipsis else inner
        return tuple(
            from_plain(h, v, f"{where}.{i}") for i, (h, v) in enumerate(zip(hints, value, strict=True))
        )
    if origin is not None:
        if not isinstance(value, Mapping):
            raise _unfit(where, value, "a mapping")
        return {str(k): from_plain(inner[1], v, f"{where}.{k}") for k, v in value.items()}
    return _scalar(kind, value, where)


def _scalar(kind: Any, value: Any, where: str) -> Any:
    if kind is bool or isinstance(value, bool):
        fits = kind is bool and isinstance(value, bool)
    elif kind is float:
        try:  # YAML 1.1 takes 1e-4 for a word
            return float(value)
        except (TypeError, ValueError):
            fits = False
    else:
        fits = isinstance(value, kind)
    if not fits:
        told = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
        raise _unfit(where, value, told.get(kind, str(kind)))
    return value


def _unfit(where: str, value: Any, wanted: str) -> ParameterError:
    return ParameterError(f"{where} is {value!r}; expected {wanted}")


def _dataclass(kind: Any, value: Any, where: str) -> Any:
    hints = get_type_hints(kind)
    if not isinstance(value, Mapping):
        raise _unfit(where or "the recipe", value, f"a mapping of {', '.join(hints)}")
    lead = f"{where}." if where else ""
    for name in value:
        if name not in hints:
            near = _nearest(f"{lead}{name}", str(name), lead, hints)
            raise ParameterError(f"there is no {lead}{name} in a recipe; {near}")
    lacking = [f.name for f in dataclasses.fields(kind) if _needed(f) and f.name not in value]
    if lacking:
        raise ParameterError(f"the recipe lacks {lead}{lacking[0]}; give it")
    return kind(**{name: from_plain(hints[name], item, lead + name) for name, item in value.items()})


def _needed(f: dataclasses.Field[Any]) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _nearest(dotted: str, name: str, lead: str, here: Mapping[str, Any]) -> str:
    """The key that was probably meant: of the same part first, then of any."""
    close = difflib.get_close_matches(name, here, n=1)
    if close:
        return f"did you mean {lead}{close[0]}?"
    close = difflib.get_close_matches(dotted, list(_keys(Recipe)), n=1)
    return f"did you mean {close[0]}?" if close else f"expected one of {', '.join(lead + k for k in here)}"


def _keys(kind: Any, lead: str = "") -> Iterator[str]:
    """Dotted keys of a dataclass, those in lists and mappings left out."""
    for name, hint in get_type_hints(kind).items():
        yield lead + name
        inner = [k for k in (hint, *get_args(hint)) if dataclasses.is_dataclass(k)]
        if inner and get_origin(hint) is not tuple:
            yield from _keys(inner[0], f"{lead}{name}.")
