"""The command line: one thin verb each. Heavy imports happen inside the verb, so that `--help` answers at
once.

Exit codes: 0 done; 1 an error, told in one line on stderr; 2 wrong usage; 3 done, but some tiles could not be
read (they are in the result's coverage as failed); 130 interrupted. Whatever the code but 0 and 3, nothing
was written.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

import click

from babelrs_geo import __version__
from babelrs_geo.errors import BabelError

if TYPE_CHECKING:
    from babelrs_geo.detect import DetectOptions, Found
    from babelrs_geo.scenes import Scene

PROGRAM = "babelrs-geo"
EXIT_ERROR, EXIT_INCOMPLETE, EXIT_INTERRUPTED = 1, 3, 130

# With this set in the environment, an error nobody foresaw shows its traceback.
DEBUG_VARIABLE = "BABELRS_GEO_DEBUG"

# As `SceneOptions.units` lists them.
_UNITS = (
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

Command = Callable[..., Any]


class _Program(click.Group):
    """The group of verbs, which ends every failure in one line on stderr and an exit code."""

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        kwargs["standalone_mode"] = False
        kwargs.setdefault("prog_name", PROGRAM)
        try:
            with _own_warnings():
                code = super().main(*args, **kwargs)
        except click.UsageError as error:
            path = error.ctx.command_path if error.ctx else PROGRAM
            _fail(f"{error.format_message()} (see '{path} --help')", error.exit_code)
        except click.ClickException as error:
            _fail(error.format_message(), error.exit_code)
        except (click.Abort, KeyboardInterrupt):
            _fail("interrupted, nothing was written", EXIT_INTERRUPTED)
        except BabelError as error:
            _fail(str(error), EXIT_ERROR)
        except Exception as error:
            if os.environ.get(DEBUG_VARIABLE):
                raise
            _fail(
                f"unexpected {type(error).__name__}: {error} (a fault of the program: set {DEBUG_VARIABLE}=1 "
                "for the traceback and report it)",
                EXIT_ERROR,
            )
        sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> NoReturn:
    _tell("error", message)
    sys.exit(code)


def _tell(kind: str, message: str) -> None:
    click.echo(f"{PROGRAM}: {kind}: {' '.join(message.split())}", err=True)


@contextmanager
def _own_warnings() -> Iterator[None]:
    """The package's own warnings in one line on stderr, each once; others are for developers."""
    here = str(Path(__file__).parent)
    told: set[str] = set()

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        ours = filename.startswith(here) and issubclass(category, UserWarning)
        if (
            ours
            and category.__module__.partition(".")[0] in ("builtins", "babelrs_geo")
            and str(message) not in told
        ):
            told.add(str(message))
            _tell("warning", str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        yield


class _Listed(click.ParamType):
    """A comma-separated list."""

    def __init__(self, name: str, item: Callable[[str], Any]) -> None:
        self.name = name
        self._item = item

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(self._item(part.strip()) for part in str(value).split(",") if part.strip())
        except ValueError:
            self.fail(f'"{value}" is not a comma-separated list of {self.name}s', param, ctx)


class _Gsd(click.ParamType):
    """Metres per pixel, or "native"."""

    name = "METRES|native"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | str:
        if value == "native" or isinstance(value, float):
            return value
        try:
            return float(value)
        except ValueError:
            self.fail(f'"{value}" is neither metres per pixel nor "native"', param, ctx)


@dataclass(frozen=True, kw_only=True)
class _SceneArguments:
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

    def open(self) -> Scene:
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
        return open_scene(self.scene, self.sensor, options)


@dataclass(frozen=True, kw_only=True)
class _ModelArguments:
    """What looks at the scene and how, as typed."""

    weights: str
    classes: tuple[str, ...] | None
    score: float | None
    gsd: float | str | None
    tile: int
    overlap: int
    aoi: str | None
    device: str
    batch: int

    def options(self) -> DetectOptions:
        from babelrs_geo.detect import DetectOptions

        given = {name: value for name, value in vars(self).items() if name != "weights"}
        return DetectOptions(**given)


@dataclass(frozen=True, kw_only=True)
class _OutputArguments:
    """Where the result goes and how much is said, as typed."""

    output: str | None
    crs: str | None
    overwrite: bool
    quiet: bool
    as_json: bool


def _split(given: dict[str, Any], *kinds: type[Any]) -> list[Any]:
    """The options that click collected, each handed to the dataclass that has a field for it."""
    return [kind(**{name: given[name] for name in kind.__dataclass_fields__}) for kind in kinds]


def _scene_options(command: Command) -> Command:
    options: Sequence[Callable[[Command], Command]] = [
        click.argument("scene"),
        click.option(
            "--sensor",
            type=click.Choice(["sar", "ir", "rgb"], case_sensitive=False),
            help="What took the scene; may be left out where the metadata settles it.",
        ),
        click.option(
            "--bands",
            type=_Listed("band number", int),
            metavar="N[,N,N]",
            help="Bands to read, counted from 1: one for sar and ir, red,green,blue for rgb.",
        ),
        click.option("--polarisation", metavar="VV", help="Polarisation to read, by the bands' names (sar)."),
        click.option(
            "--units",
            type=click.Choice(_UNITS),
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
    return _apply(options, command)


def _model_options(command: Command) -> Command:
    options: Sequence[Callable[[Command], Command]] = [
        click.option(
            "--weights",
            default="compact",
            show_default=True,
            metavar="NAME|FILE",
            help="Bundled weights, or a file.",
        ),
        click.option(
            "--classes",
            type=_Listed("class", str),
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
            "--gsd", type=_Gsd(), help="Metres per pixel to read at; unless given, in the weights' range."
        ),
        click.option(
            "--tile", type=int, default=640, show_default=True, metavar="PX", help="Side of a tile."
        ),
        click.option(
            "--overlap", type=int, default=128, show_default=True, metavar="PX", help="Shared by neighbours."
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
            "--batch", type=int, default=4, show_default=True, metavar="N", help="Tiles computed at once."
        ),
    ]
    return _apply(options, command)


def _apply(options: Sequence[Callable[[Command], Command]], command: Command) -> Command:
    for option in reversed(options):
        command = option(command)
    return command


@click.group(PROGRAM, cls=_Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name=PROGRAM, message="%(prog)s %(version)s")
def main() -> None:
    """Find objects in large SAR, infrared and RGB scenes and write them as vectors for QGIS."""


@main.command("detect")
@_scene_options
@_model_options
@click.option(
    "-o",
    "--output",
    metavar="OUT.gpkg|.parquet|.geojson",
    help="Where to write.  [default: SCENE_detections.gpkg in the working directory]",
)
@click.option("--crs", metavar="EPSG:4326", help="CRS of the result, in place of the scene's own.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
@click.option("--quiet", is_flag=True, help="Say nothing but warnings and errors.")
@click.option("--json", "as_json", is_flag=True, help="Print a summary as JSON.")
def detect_verb(**given: Any) -> int:
    """Find objects in SCENE (a raster file or any path GDAL opens) and write them.

    The result opens styled in QGIS: the layer `detections`, and the layer `coverage` with the ground that was
    looked at. Ends with 0 when done, 1 on an error, 2 on wrong usage, and 3 when some tiles could not be
    read: these are in `coverage` as failed.
    """
    scene_arguments, model, output = _split(given, _SceneArguments, _ModelArguments, _OutputArguments)
    if output.quiet and output.as_json:
        raise click.UsageError(
            "--quiet and --json exclude each other: --json is already silent but for its document"
        )
    from babelrs_geo import vectors

    options = model.options()
    path = Path(output.output or f"{_stem(scene_arguments.scene)}_detections.gpkg")
    vectors.check_target(path, overwrite=output.overwrite)
    with scene_arguments.open() as scene:
        from babelrs_geo.detect import check_crs, detect

        if output.crs is not None:
            check_crs(output.crs, georeferenced=scene.georef.crs is not None)
        start = time.perf_counter()
        with _progress_bar(scene.name, hidden=output.quiet or output.as_json) as progress:
            found = detect(scene, model.weights, options, progress)
        found.save(path, overwrite=output.overwrite, crs=output.crs)
        seconds = time.perf_counter() - start
    if output.as_json:
        click.echo(json.dumps(_summary(found, path, seconds), indent=2))
    elif not output.quiet:
        click.echo(_sentence(found, path, seconds))
    failed = found.provenance["tiles"]["failed"]
    if failed:
        reason = next(iter(found.coverage.loc[found.coverage["state"] == "failed", "reason"]))
        tiles = "1 tile" if failed == 1 else f"{failed} tiles"
        _tell(
            "warning",
            f"{tiles} could not be read ({reason}): the layer coverage shows where; check the file and "
            "run again with --overwrite",
        )
        return EXIT_INCOMPLETE
    return 0


@main.command("info")
@_scene_options
@_model_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info_verb(**given: Any) -> None:
    """Tell what SCENE is, how it would be read, where it lies, and how long detection would take here."""
    scene_arguments, model = _split(given, _SceneArguments, _ModelArguments)
    options = model.options()
    with scene_arguments.open() as scene:
        rows = dict(scene.describe()) | _outlook(scene, model.weights, options)
    if given["as_json"]:
        click.echo(json.dumps(rows, indent=2))
        return
    width = max(len(name) for name in rows)
    for name, value in rows.items():
        click.echo(f"{name:<{width}}  {value}")


def _outlook(scene: Scene, weights: str, options: DetectOptions) -> dict[str, str]:
    """What detection would do with the scene; where it would refuse, why."""
    from babelrs_geo.detect import outlook

    try:
        plan, cost = outlook(scene, weights, options)
    except BabelError as error:
        return {"detection": f"not possible: {error}"}
    size = "the scene's own pixels"
    if plan.gsd is not None:
        how = "the scene's own" if plan.scale == 1 else f"resampled {plan.scale:.3g}x"
        size = f"{plan.gsd:.3g} m a pixel, {how}"
    rows = {
        "read at": size,
        "classes": ", ".join(plan.classes),
        "tiles": f"{len(plan.grid)} of {options.tile} px, about {cost.tiles} with valid pixels",
        "estimated time": f"{_duration(cost.seconds)} ({cost.seconds_per_tile:.2f} s a tile, measured here)",
    }
    return rows | ({"caution": plan.caution} if plan.caution else {})


def _stem(scene: str) -> str:
    """The name of the default output: the scene's, without folders, the query of a URL, and the suffix."""
    name = scene.partition("?")[0].rstrip("/").rpartition("/")[2]
    return Path(name).stem or "scene"


@contextmanager
def _progress_bar(name: str, *, hidden: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on stderr with tiles per second and the time left, where stderr is a terminal."""
    if hidden or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tiles, {task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(name, total=None, rate="")
        start = time.perf_counter()

        def progress(done: int, total: int) -> None:
            rate = done / max(time.perf_counter() - start, 1e-9)
            bar.update(task, completed=done, total=total, rate=f"{rate:.1f} tiles/s")

        yield progress


def _counts(found: Found) -> dict[str, int]:
    """Objects by class, most first."""
    return {str(name): int(count) for name, count in found.features["class"].value_counts().items()}


def _sentence(found: Found, path: Path, seconds: float) -> str:
    """What was found, where it was written, how to open it."""
    counts = _counts(found)
    objects = "1 object" if len(found.features) == 1 else f"{len(found.features)} objects"
    what = f"{objects} ({', '.join(f'{n} {name}' for name, n in counts.items())})" if counts else "nothing"
    tiles = found.provenance["tiles"]
    looked = tiles["detected"] + tiles["empty"]
    return (
        f"Found {what} in {looked} of {sum(tiles.values())} tiles in {_duration(seconds)}.\n"
        f"Written to {path}: drag it into QGIS, or run: qgis {path}"
    )


def _summary(found: Found, path: Path, seconds: float) -> dict[str, Any]:
    return {
        "output": str(path),
        "detections": len(found.features),
        "classes": _counts(found),
        "seconds": round(seconds, 3),
        **found.provenance,
    }


def _duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
