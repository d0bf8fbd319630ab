"""What several verbs ask for: parameter types, groups of options, and the dataclasses that hold them as typed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from babelrs_geo.cli.program import tell
from babelrs_geo.errors import ParameterError

if TYPE_CHECKING:
    from babelrs_geo.detect import DetectOptions
    from babelrs_geo.scenes import Scene

# As `SceneOptions.units` lists them.
UNITS = (
    "amplitude",
    "intensity",
    "db",
    "kelvin",
    "centikelvin",
    "celsius",
    "counts",
    "reflectance",
    "uint8",
)

SENSORS = ("sar", "ir", "rgb")

_PLACED = {"affine": "an affine", "gcps": "control points", "none": "no georeference"}

Command = Callable[..., Any]


class Listed(click.ParamType):
    """A comma-separated list."""

    def __init__(self, name: str, item: Callable[[str], Any]) -> None:
        self.name = name
        self._item = item

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Any, ...]:
        """The list as a tuple of items."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(self._item(part.strip()) for part in str(value).split(",") if part.strip())
        except ValueError:
            self.fail(f'"{value}" is not a comma-separated list of {self.name}s', param, ctx)


class Gsd(click.ParamType):
    """Metres per pixel, or "native"."""

    name = "METRES|native"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | str:
        """Metres, or the word."""
        if value == "native" or isinstance(value, float):
            return value
        try:
            return float(value)
        except ValueError:
            self.fail(f'"{value}" is neither metres per pixel nor "native"', param, ctx)


class Batch(click.ParamType):
    """A number of tiles, or "auto"."""

    name = "N|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        """The number, or the word."""
        if value == "auto" or isinstance(value, int):
            return value
        try:
            return int(value)
        except ValueError:
            self.fail(f'"{value}" is neither a number of tiles nor "auto"', param, ctx)


class Named(click.ParamType):
    """A name in place of another."""

    name = "FROM=TO"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        """Both names."""
        if isinstance(value, tuple):
            return value
        first, equals, second = str(value).partition("=")
        if not (first and equals and second):
            self.fail(f'"{value}" renames nothing; expected FROM=TO such as Ship=ship', param, ctx)
        return first, second


class Splits(click.ParamType):
    """The name of a split, or one for each sensor."""

    name = "NAME|sar=NAME,..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> str | dict[str, str]:
        """The name, or names by sensor."""
        if isinstance(value, dict) or "=" not in str(value):
            return value if isinstance(value, dict) else str(value)
        pairs = [part.partition("=") for part in str(value).split(",")]
        if any(sensor not in SENSORS or not name for sensor, _, name in pairs):
            self.fail(f'"{value}" is no split; expected a name, or sar=test,rgb=val,ir=test', param, ctx)
        return {sensor: name for sensor, _, name in pairs}


@dataclass(frozen=True, kw_only=True)
class SceneArguments:
    """How the scene is to be opened, as typed."""

    scene: str
    sensor: str | None
    bands: tuple[int, ...] | None
    polarisation: str | None
    units: str | None
    limits: tuple[float, float] | None
    collar: bool
    height: float | None
    dem: str | None

    def open(self, *, among_others: bool = False) -> Scene:
        """The scene; the caller closes it. What does not apply to it is refused by ParameterError, and only warned of
        where it may be meant for others that are opened the same.
        """
        from babelrs_geo.scenes import SceneOptions, open_scene

        options = SceneOptions(
            bands=self.bands,
            polarisation=self.polarisation,
            units=self.units,
            limits=self.limits,
            collar=self.collar,
            height=self.height,
            dem=self.dem,
        )
        scene = open_scene(self.scene, self.sensor, options)
        kind = scene.georef.kind
        for option, value in (("--height", self.height), ("--dem", self.dem)):
            if value is None or kind == "rpcs":
                continue
            told = (
                f"{option} is for scenes placed by RPCs, and {scene.name} has {_PLACED[kind]}: leave it out"
            )
            if not among_others:
                scene.close()
                raise ParameterError(told)
            tell("warning", told)
        return scene


@dataclass(frozen=True, kw_only=True)
class ModelArguments:
    """What looks at the scene and how, as typed."""

    weights: str
    classes: tuple[str, ...] | None
    score: float | None
    gsd: float | str | None
    tile: int | None
    overlap: int
    scales: tuple[float, ...]
    aoi: str | None
    device: str
    batch: int | str

    def options(self) -> DetectOptions:
        """The same for the library."""
        from babelrs_geo.detect import DetectOptions

        given = {name: value for name, value in vars(self).items() if name != "weights"}
        return DetectOptions(**given)


def split(given: dict[str, Any], *kinds: type[Any]) -> list[Any]:
    """The options that click collected, each handed to the dataclass that has a field for it."""
    return [kind(**{name: given[name] for name in kind.__dataclass_fields__}) for kind in kinds]


def scene_options(command: Command) -> Command:
    """Give a verb what `SceneArguments` holds."""
    return click.argument("scene")(reading_options(command))


def reading_options(command: Command) -> Command:
    """Give a verb what `SceneArguments` holds but for the scene itself."""
    options: Sequence[Callable[[Command], Command]] = [
        click.option(
            "--sensor",
            type=click.Choice(["sar", "ir", "rgb"], case_sensitive=False),
            help="What took the scene; may be left out where the metadata settles it.",
        ),
        click.option(
            "--bands",
            type=Listed("band number", int),
            metavar="N[,N,N]",
            help="Bands to read, counted from 1: one for sar and ir, red,green,blue for rgb.",
        ),
        click.option("--polarisation", metavar="VV", help="Polarisation to read, by the bands' names (sar)."),
        click.option(
            "--units",
            type=click.Choice(UNITS),
            help="What the values are, where the metadata does not say.",
        ),
        click.option(
            "--range",
            "limits",
            nargs=2,
            type=float,
            metavar="LOW HIGH",
            help="Values shown to the model as 0 and 1, in place of the scene's own percentiles.",
        ),
        click.option(
            "--collar/--no-collar",
            default=True,
            help="Take black that is connected to the border for no data.  [default: collar]",
        ),
        click.option(
            "--height",
            type=float,
            metavar="METRES",
            help="Height of the ground, for scenes with RPCs; the RPCs' own mean unless given.",
        ),
        click.option("--dem", metavar="FILE", help="Elevation model, for scenes with RPCs."),
    ]
    return apply(options, command)


def model_options(command: Command) -> Command:
    """Give a verb what `ModelArguments` holds."""
    options: Sequence[Callable[[Command], Command]] = [
        click.option(
            "--weights",
            default="compact",
            show_default=True,
            metavar="NAME|FILE",
            help="Weights by name (see weights list), or a file.",
        ),
        click.option(
            "--classes",
            type=Listed("class", str),
            metavar="A,B",
            help="Classes to report; all unless given.",
        ),
        click.option(
            "--score",
            type=float,
            metavar="0..1",
            help="Lowest score to report, in place of the weights' own.",
        ),
        click.option(
            "--gsd", type=Gsd(), help="Metres per pixel to read at; unless given, in the weights' range."
        ),
        click.option("--tile", type=int, metavar="PX", help="Side of a tile; the weights' own unless given."),
        click.option(
            "--overlap", type=int, default=128, show_default=True, metavar="PX", help="Shared by neighbours."
        ),
        click.option(
            "--scales",
            type=Listed("number", float),
            default="1",
            show_default=True,
            metavar="1[,S,...]",
            help="Shares of the resolution to look at once more, for objects larger than a tile: 1,0.25.",
        ),
        click.option("--aoi", metavar="FILE", help="Vector file with the area of interest, in any CRS."),
        click.option(
            "--device",
            default="auto",
            show_default=True,
            metavar="auto|cpu|cuda|cuda:0,cuda:1",
            help="Where to compute.",
        ),
        click.option(
            "--batch",
            type=Batch(),
            default=4,
            show_default=True,
            help="Tiles computed at once; auto: what a GPU holds, and fewer where the memory does not suffice.",
        ),
    ]
    return apply(options, command)


def apply(options: Sequence[Callable[[Command], Command]], command: Command) -> Command:
    """Decorate a command with options that are listed in the order `--help` shows them."""
    for option in reversed(options):
        command = option(command)
    return command
