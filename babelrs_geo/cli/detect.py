"""`babelrs-geo detect` and `babelrs-geo info`."""

from __future__ import annotations

import json
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import click

from babelrs_geo import allocation
from babelrs_geo.cli.options import ModelArguments, SceneArguments, model_options, scene_options, split
from babelrs_geo.cli.program import EXIT_INCOMPLETE, EXIT_INTERRUPTED, stoppable, tell
from babelrs_geo.cli.progress import duration, progress_bar
from babelrs_geo.errors import BabelError, BatchError, SceneError

if TYPE_CHECKING:
    from babelrs_geo.detect import DetectOptions, Found, Running
    from babelrs_geo.scenes import Scene


@dataclass(frozen=True, kw_only=True)
class _RunningArguments:
    """Who computes, as typed."""

    workers: int
    dask: str | None
    resume: bool

    def running(self, spool: Path, *, quiet: bool) -> Running:
        """The same for the library."""
        from babelrs_geo.cluster import Workers
        from babelrs_geo.detect import Running

        return Running(
            workers=Workers(processes=self.workers, scheduler=self.dask),
            spool=spool,
            resume=self.resume,
            dashboard=None if quiet else lambda address: tell("dashboard", address),
        )


@dataclass(frozen=True, kw_only=True)
class _OutputArguments:
    """Where the result goes and how much is said, as typed."""

    output: str | None
    crs: str | None
    overwrite: bool
    quiet: bool
    as_json: bool


@click.command("detect")
@scene_options
@model_options
@click.option(
    "-o",
    "--output",
    metavar="OUT.gpkg|.parquet|.geojson",
    help="Where to write.  [default: SCENE_detections.gpkg in the working directory]",
)
@click.option("--crs", metavar="EPSG:4326", help="CRS of the result, in place of the scene's own.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Processes on this machine that compute.",
)
@click.option(
    "--dask",
    metavar="ADDRESS|scheduler.json",
    help="A Dask scheduler whose workers compute, in place of --workers.",
)
@click.option("--resume", is_flag=True, help="Go on where a run that was stopped or died had come to.")
@click.option("--quiet", is_flag=True, help="Say nothing but warnings and errors.")
@click.option("--json", "as_json", is_flag=True, help="Print a summary as JSON.")
def detect_verb(**given: Any) -> int:
    """Find objects in SCENE (a raster file or any path GDAL opens) and write them.

    The result opens styled in QGIS: the layer `detections`, and the layer `coverage` with the ground that was
    looked at. Ends with 0 when done, 1 on an error, 2 on wrong usage, and 3 when some tiles could not be
    read: these are in `coverage` as failed.
    """
    allocation.keep()
    scene_arguments, model, output, crew = split(
        given, SceneArguments, ModelArguments, _OutputArguments, _RunningArguments
    )
    if crew.dask is not None and crew.workers > 1:
        raise click.UsageError("--workers and --dask exclude each other: a scheduler has its own workers")
    if output.quiet and output.as_json:
        raise click.UsageError(
            "--quiet and --json exclude each other: --json is already silent but for its document"
        )
    from babelrs_geo import vectors

    options = model.options()
    path = Path(output.output or f"{_stem(scene_arguments.scene)}_detections.gpkg")
    with scene_arguments.open() as scene:
        from babelrs_geo.detect import check_crs, detect

        vectors.check_target(path, overwrite=output.overwrite)
        if output.crs is not None:
            check_crs(output.crs, georeferenced=scene.georef.on_earth)
        start = time.perf_counter()
        silent = output.quiet or output.as_json
        spool = path.with_name(f".{path.name}.parts")
        running = crew.running(spool, quiet=silent)
        if output.overwrite and not crew.resume:
            shutil.rmtree(spool, ignore_errors=True)
        earlier = any(spool.glob("*.arrow"))
        try:
            with stoppable():
                with progress_bar(scene.name, hidden=silent) as progress:
                    found = detect(scene, model.weights, options, progress, running)
                found.save(path, overwrite=output.overwrite, crs=output.crs)
        except KeyboardInterrupt:
            if not any(spool.glob("*.arrow")):
                shutil.rmtree(spool, ignore_errors=True)
                raise
            tell("error", "stopped, and what is done is kept: run the same with --resume, and it goes on")
            return EXIT_INTERRUPTED
        except BabelError as error:
            # a scene that cannot be read ends the same again; what an earlier run did is not at fault
            if (isinstance(error, SceneError) and not earlier) or not any(spool.glob("*.arrow")):
                shutil.rmtree(spool, ignore_errors=True)
            elif isinstance(error, BatchError):
                raise BatchError(
                    f"{error}; what is done is kept: --resume with the same batch, or --overwrite with a smaller one"
                ) from error
            raise
        shutil.rmtree(spool, ignore_errors=True)
        seconds = time.perf_counter() - start
    if output.as_json:
        click.echo(json.dumps(_summary(found, path, seconds), indent=2))
    elif not output.quiet:
        click.echo(_sentence(found, path, seconds))
    failed = found.provenance["tiles"]["failed"]
    if failed:
        reason = next(iter(found.coverage.loc[found.coverage["state"] == "failed", "reason"]))
        tiles = "1 tile" if failed == 1 else f"{failed} tiles"
        tell(
            "warning",
            f"{tiles} could not be read ({reason}): the layer coverage shows where; check the file and "
            "run again with --overwrite",
        )
        return EXIT_INCOMPLETE
    return 0


@click.command("info")
@scene_options
@model_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info_verb(**given: Any) -> None:
    """Tell what SCENE is, how it would be read, where it lies, and how long detection would take here."""
    scene_arguments, model = split(given, SceneArguments, ModelArguments)
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
    within = "" if options.aoi is None else " in the area of interest"
    rows = {
        "read at": size,
        "classes": ", ".join(plan.classes),
        "tiles": f"{plan.tiles} of {plan.grid.tile} px, about {cost.tiles} with valid pixels{within}",
        "estimated time": f"{duration(cost.seconds)} ({cost.seconds_per_tile:.2f} s a tile, measured here)",
    }
    return rows | ({"caution": plan.caution} if plan.caution else {})


def _stem(scene: str) -> str:
    """The name of the default output: the scene's, without folders, the query of a URL, and the suffix.

    Of a GDAL name such as `NETCDF:"m.nc":heat` it is `NETCDF_m_heat`.
    """
    name = scene.partition("?")[0].rstrip('/"').rpartition("/")[2]
    return "_".join(Path(part).stem for part in re.split('[:"]+', name) if part) or "scene"


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
        f"Found {what} in {looked} of {sum(tiles.values())} tiles in {duration(seconds)}.\n"
        f"Written to {path}: drag it into QGIS, or run: qgis {quote(str(path))}"
    )


def _summary(found: Found, path: Path, seconds: float) -> dict[str, Any]:
    return {
        "output": str(path),
        "detections": len(found.features),
        "classes": _counts(found),
        "seconds": round(seconds, 3),
        **found.provenance,
    }
