"""`babelrs-geo archive`: many scenes, nothing lost."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from babelrs_geo.cli.going_on import check_goes_on
from babelrs_geo.cli.options import (
    Command,
    Listed,
    ModelArguments,
    apply,
    model_options,
    reading_options,
    split,
)
from babelrs_geo.cli.program import EXIT_INCOMPLETE, EXIT_INTERRUPTED, stoppable, tell
from babelrs_geo.cli.progress import duration, progress_bar

if TYPE_CHECKING:
    from babelrs_geo.archive.ledger import Ledger
    from babelrs_geo.archive.run import Ended, RunOptions
    from babelrs_geo.archive.sources import Item
    from babelrs_geo.archive.work import Detection

_TOLD = 10  # failures named on the terminal


@click.group("archive")
def archive_group() -> None:
    """Find objects in thousands of scenes; stopped anywhere, a run goes on."""


@dataclass(frozen=True, kw_only=True)
class _Reading:
    """How scenes are opened, as typed; a manifest's rows may say otherwise."""

    sensor: str | None
    bands: tuple[int, ...] | None
    polarisation: str | None
    units: str | None
    limits: tuple[float, float] | None
    collar: bool
    height: float | None
    dem: str | None

    def options(self) -> dict[str, Any]:
        """Of `SceneOptions`, those that were typed."""
        found = {k: v for k, v in vars(self).items() if k != "sensor" and v is not None}
        return found if not self.collar else {k: v for k, v in found.items() if k != "collar"}


@dataclass(frozen=True, kw_only=True)
class _Sources:
    """Which scenes, as typed."""

    source: tuple[str, ...]
    stac: str | None
    collection: tuple[str, ...]
    bbox: tuple[float, ...] | None
    datetime: str | None
    asset: str | None
    limit: int | None

    @property
    def named(self) -> bool:
        """Whether any are."""
        return bool(self.source) or self.stac is not None

    def find(self, results: Path) -> Callable[[], Iterator[Item]]:
        """What lists the scenes, as often as it is called."""
        if self.stac is None and (self.collection or self.bbox or self.datetime):
            raise click.UsageError("--collection, --bbox and --datetime belong to a search: pass --stac URL")
        if self.bbox is not None and len(self.bbox) != 4:
            raise click.UsageError("--bbox takes four numbers: WEST,SOUTH,EAST,NORTH")

        def listed() -> Iterator[Item]:
            from babelrs_geo.archive.sources import find
            from babelrs_geo.archive.stac import Search, search

            yield from find(self.source, results.absolute(), self.asset)
            if self.stac is not None:
                box = None if self.bbox is None else (*self.bbox[:2], *self.bbox[2:])
                yield from search(
                    Search(
                        url=self.stac,
                        collections=self.collection,
                        bbox=box,  # type: ignore[arg-type]
                        datetime=self.datetime,
                        asset=self.asset,
                        limit=self.limit,
                    )
                )

        return listed


@dataclass(frozen=True, kw_only=True)
class _Running:
    """How the run is done, as typed."""

    output: str
    form: str
    crs: str | None
    workers: int
    dask: str | None
    time_limit: float
    memory_limit: float | None
    attempts: int
    full_hash: bool
    watch: float | None
    quiet: bool
    as_json: bool

    def options(self) -> RunOptions:
        """The same for the library."""
        from babelrs_geo.archive.cell import Limits
        from babelrs_geo.archive.crew import PAIR
        from babelrs_geo.archive.run import RunOptions
        from babelrs_geo.cluster import Workers

        memory = None if self.memory_limit is None else int(self.memory_limit * 1e6)
        if memory is None and self.dask is None:
            whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            memory = int(0.9 * whole / (PAIR * self.workers))
        return RunOptions(
            suffix=f".{self.form}",
            workers=Workers(processes=self.workers, scheduler=self.dask),
            limits=Limits(self.time_limit, memory),
            attempts=self.attempts,
            watch=self.watch,
        )


def _source_options(command: Command) -> Command:
    return apply(
        [
            click.option("--stac", metavar="URL", help="Search this STAC API for scenes."),
            click.option(
                "--collection", multiple=True, metavar="NAME", help="Collection to search; may be repeated."
            ),
            click.option(
                "--bbox", type=Listed("number", float), metavar="W,S,E,N", help="Box to search, in degrees."
            ),
            click.option(
                "--datetime", metavar="FROM/TO", help="Time to search, such as 2026-01-01/2026-01-31."
            ),
            click.option(
                "--asset", metavar="KEY", help="Which asset of a STAC item is the scene, such as vv."
            ),
            click.option(
                "--limit",
                type=click.IntRange(min=1),
                metavar="N",
                help="Items to take from a search at most.",
            ),
        ],
        command,
    )


def _run_options(command: Command) -> Command:
    return apply(
        [
            click.option(
                "-o", "--output", required=True, metavar="RESULTS", help="Folder of ledger and results."
            ),
            click.option(
                "--format",
                "form",
                type=click.Choice(["gpkg", "parquet"]),
                default="gpkg",
                show_default=True,
                help="Of the results, one file a scene.",
            ),
            click.option(
                "--crs", metavar="EPSG:4326", help="CRS of the results, in place of the scenes' own."
            ),
            click.option(
                "--workers",
                type=click.IntRange(min=1),
                default=1,
                show_default=True,
                metavar="N",
                help="Models at work at once, two processes each; from two on by Dask.",
            ),
            click.option("--dask", metavar="ADDRESS", help="Dask scheduler whose workers do the work."),
            click.option(
                "--time-limit",
                type=float,
                default=3600.0,
                show_default=True,
                metavar="SECONDS",
                help="What a scene may take; one that hangs is then given up.",
            ),
            click.option(
                "--memory-limit",
                type=float,
                metavar="MB",
                help="What a scene's process may take; its share of the machine unless given.",
            ),
            click.option(
                "--attempts",
                type=click.IntRange(min=1),
                default=2,
                show_default=True,
                metavar="N",
                help="For scenes that another attempt may save: lost workers, servers that do not answer.",
            ),
            click.option(
                "--full-hash", is_flag=True, help="Find duplicates by whole files, not by sampled blocks."
            ),
            click.option(
                "--watch",
                type=float,
                metavar="SECONDS",
                help="Look for new scenes again and again, until stopped.",
            ),
            click.option("--quiet", is_flag=True, help="Say nothing but warnings and errors."),
            click.option("--json", "as_json", is_flag=True, help="Print a summary as JSON."),
        ],
        command,
    )


@archive_group.command("run")
@click.argument("source", nargs=-1)
@_run_options
@reading_options
@model_options
@_source_options
def run_verb(**given: Any) -> int:
    """Find objects in all scenes of SOURCE, one result each, and keep a ledger of them in RESULTS.

    SOURCE is a folder, a glob, a manifest (.txt, .csv, .parquet), a STAC ItemCollection (.json), a Sentinel-1 product
    (.SAFE or .zip) or a scene; several may be given. Without one, what the ledger has planned is done, with the options
    of the run before. Ends with 0 when every scene is done, 3 when some failed or are incomplete, 1 on an error, 130
    when stopped; run again, it goes on.
    """
    reading, sources, model, running = split(given, _Reading, _Sources, ModelArguments, _Running)
    if running.quiet and running.as_json:
        raise click.UsageError(
            "--quiet and --json exclude each other: --json is already silent but for its document"
        )
    folder, options = Path(running.output), running.options()
    listed = sources.find(folder)
    from babelrs_geo.archive.run import run

    job, parameters = _job(reading, model, running)
    if not sources.named:
        check_goes_on(folder, parameters | {"suffix": options.suffix})
    try:
        with (
            stoppable(),
            progress_bar(folder.name, hidden=running.quiet or running.as_json, what="scenes") as progress,
        ):
            ended = run(folder, listed, job, parameters, options, progress)
    except KeyboardInterrupt:
        tell("error", f"stopped: what is done is in {folder}; run the same again, and it goes on")
        return EXIT_INTERRUPTED
    _say(ended, running)
    return 0 if ended.whole else EXIT_INCOMPLETE


def _job(reading: _Reading, model: ModelArguments, running: _Running) -> tuple[Detection, dict[str, Any]]:
    """What is done with a scene, and all that decides its result."""
    from dataclasses import asdict, replace
    from hashlib import sha256

    from babelrs_geo.archive.work import Detection, weights_hash
    from babelrs_geo.detect import devices
    from babelrs_geo.errors import LabelError

    kinds = devices(model.device) if running.dask is None else [model.device]
    if len(kinds) > 1:
        raise click.UsageError(
            "an archive's scenes are computed on one device each: name one, and raise --workers"
        )
    options = model.options()
    if running.dask is None and kinds[0] == "cpu" and running.workers > 1:
        options = replace(options, threads=max(1, (os.cpu_count() or 1) // running.workers))
    aoi = None
    if model.aoi is not None:
        try:
            aoi = sha256(Path(model.aoi).read_bytes()).hexdigest()
        except OSError as error:
            raise LabelError(f"{model.aoi} cannot be read ({error.strerror}); check --aoi") from error
    job = Detection(
        weights=model.weights,
        device=kinds[0],
        options=replace(options, device=kinds[0]),
        sensor=reading.sensor,
        reading=reading.options(),
        crs=running.crs,
        full_hash=running.full_hash,
    )
    told = asdict(options)
    # Who works, and how, does not make another result.
    decisive = {k: v for k, v in told.items() if k not in ("device", "threads", "batch", "aoi")}
    parameters = {
        "weights": weights_hash(model.weights),
        "detect": decisive | {"aoi": aoi},
        "reading": {"sensor": reading.sensor} | reading.options(),
        "crs": running.crs,
    }
    return job, parameters


def _say(ended: Ended, running: _Running) -> None:
    from babelrs_geo.archive.ledger import Ledger

    with Ledger(ended.folder) as ledger:
        summary = _summary(ledger) | {"worked": ended.worked, "seconds": round(ended.seconds, 3)}
        if running.as_json:
            click.echo(json.dumps(summary, indent=2))
            return
        if not running.quiet:
            rate = f"{ended.worked / max(ended.seconds, 1e-9):.1f} scenes/s"
            click.echo(f"{ended.worked} scenes in {duration(ended.seconds)} ({rate}).")
            click.echo(_table(summary))
        failed = ended.counts["failed"]
        if failed:
            _tell_failures(ledger, failed)
        if ended.counts["incomplete"]:
            tell(
                "warning",
                f"{ended.counts['incomplete']} scenes are incomplete: some of their tiles could not be read",
            )


def _tell_failures(ledger: Ledger, count: int) -> None:
    for source, reason in ledger.failures(_TOLD):
        told = reason if reason.startswith(source) else f"{source}: {reason}"
        tell("warning", f"failed: {told}")
    if count > _TOLD:
        tell("warning", f"{count - _TOLD} more failed: see archive status --json or archive report")


def _summary(ledger: Ledger) -> dict[str, Any]:
    counts = ledger.counts()
    return {
        "folder": str(ledger.folder),
        "scenes": sum(counts.values()),
        "states": counts,
        **ledger.totals(),
    }


def _table(summary: dict[str, Any]) -> str:
    rows = [(state, f"{n:,}") for state, n in summary["states"].items() if n]
    rows += [("scenes", f"{summary['scenes']:,}"), ("detections", f"{summary['detections']:,}")]
    rows += [("tiles", f"{summary['tiles']:,} ({summary['tiles_failed']:,} unreadable)")]
    width = max(len(value.split()[0]) for _, value in rows)
    return "\n".join(
        f"{name:<11} {value.split()[0]:>{width}} {' '.join(value.split()[1:])}".rstrip()
        for name, value in rows
    )


_results = click.argument("results")


@archive_group.command("status")
@_results
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with every failure.")
def status_verb(results: str, as_json: bool) -> None:
    """Tell how many scenes of RESULTS are done, failed, planned, and why those failed."""
    from babelrs_geo.archive.ledger import Ledger

    with Ledger(Path(results)) as ledger:
        summary = _summary(ledger)
        if as_json:
            failures = [{"source": s, "reason": r} for s, r in ledger.failures(-1)]
            click.echo(json.dumps(summary | {"run": ledger.setting("run"), "failures": failures}, indent=2))
            return
        click.echo(_table(summary))
        if summary["states"]["failed"]:
            _tell_failures(ledger, summary["states"]["failed"])


@archive_group.command("retry")
@_results
@click.option("--reason", metavar="TEXT", help="Only scenes whose reason holds this text.")
def retry_verb(results: str, reason: str | None) -> None:
    """Plan failed and incomplete scenes of RESULTS anew; the next archive run takes them up."""
    from babelrs_geo.archive.ledger import Ledger, locked

    folder = Path(results)
    with Ledger(folder), locked(folder), Ledger(folder, write=True) as ledger:
        count = ledger.retry(reason)
    if count:
        click.echo(
            f"{count} scenes are planned again: run the same babelrs-geo archive run as before, with the options that "
            "it had"
        )
    else:
        which = "" if reason is None else f' with "{reason}" in its reason'
        click.echo(f"No scene is failed or incomplete{which}: nothing is planned again")


@archive_group.command("verify")
@_results
@click.option("--again", is_flag=True, help="Plan scenes anew whose output is missing or damaged.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def verify_verb(results: str, again: bool, as_json: bool) -> int:
    """Read every output in RESULTS and hold it to the ledger. Ends with 3 where one is missing or damaged."""
    from babelrs_geo.archive.check import verify
    from babelrs_geo.archive.ledger import Ledger, locked

    folder = Path(results)
    with Ledger(folder) as ledger:
        verdict = verify(ledger)
    if again and verdict.faults:
        with locked(folder), Ledger(folder, write=True) as ledger:
            values = {"state": "planned", "attempts": 0, "output": None}
            ledger.settle([(row, values | {"reason": fault}) for row, _, fault in verdict.faults])
    if as_json:
        faults = [{"source": source, "fault": fault} for _, source, fault in verdict.faults]
        click.echo(
            json.dumps({"checked": verdict.checked, "faults": faults, "strays": verdict.strays}, indent=2)
        )
    else:
        click.echo(
            f"{verdict.checked:,} outputs read, {len(verdict.faults)} faults, {len(verdict.strays)} stray files."
        )
        for _, source, fault in verdict.faults[:_TOLD]:
            tell("warning", f"{source}: {fault}")
    return 0 if verdict.clean else EXIT_INCOMPLETE


@archive_group.command("export")
@_results
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="FOLDER|OUT.gpkg|OUT.fgb",
    help="A GeoParquet dataset by date and cell, or one file for QGIS.",
)
@click.option("--once", is_flag=True, help="Drop doubles where scenes of one acquisition overlap.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
@click.option("--quiet", is_flag=True, help="Say nothing but warnings and errors.")
@click.option("--json", "as_json", is_flag=True, help="Print a summary as JSON.")
def export_verb(results: str, output: str, once: bool, overwrite: bool, quiet: bool, as_json: bool) -> None:
    """Write all results of RESULTS in one, in EPSG:4326: what is done, nothing that is stale."""
    from babelrs_geo.archive.export import export
    from babelrs_geo.archive.ledger import Ledger

    with (
        Ledger(Path(results)) as ledger,
        progress_bar("export", hidden=quiet or as_json, what="scenes") as progress,
    ):
        done = export(ledger, Path(output), once=once, overwrite=overwrite, progress=progress)
    if as_json:
        click.echo(json.dumps({**vars(done), "path": str(done.path)}, indent=2))
    elif not quiet:
        doubles = f", {done.dropped} doubles left out" if once else ""
        click.echo(f"{done.detections} detections of {done.scenes} scenes{doubles}, written to {done.path}.")


@archive_group.command("report")
@_results
@click.option("-o", "--output", metavar="OUT.html", help="Where to write.  [default: report.html in RESULTS]")
@click.option("--overwrite", is_flag=True, help="Replace an existing report.")
def report_verb(results: str, output: str | None, overwrite: bool) -> None:
    """Write an HTML page about RESULTS: map, counts, throughput, failures, and the densest scenes as pictures."""
    from babelrs_geo.archive.ledger import Ledger
    from babelrs_geo.archive.report import report

    with Ledger(Path(results)) as ledger:
        path = report(ledger, Path(output) if output else ledger.folder / "report.html", overwrite=overwrite)
    click.echo(f"Written to {path}: open it in a browser.")
