"""`babelrs-geo evaluate`."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from babelrs_geo import allocation
from babelrs_geo.cli.options import Command, Gsd, Listed, Named, Splits, apply, split
from babelrs_geo.cli.progress import duration, progress_bar

if TYPE_CHECKING:
    from babelrs_geo.evaluation import Report
    from babelrs_geo.evaluation.writing import Extras


@dataclass(frozen=True, kw_only=True)
class _ImageArguments:
    """Weights and labelled images, as typed."""

    weights: str
    data: str | None
    splits: str | dict[str, str]
    sensor: tuple[str, ...] | None
    background: bool
    fit: bool
    gsd: float | str | None
    device: str
    replicates: int


@dataclass(frozen=True, kw_only=True)
class _GroundArguments:
    """A result and labels on the ground, as typed."""

    detections: str | None
    labels: str | None
    iou: float
    class_column: str
    matches: bool


@dataclass(frozen=True, kw_only=True)
class _ReportArguments:
    """Where the report goes and how much is said, as typed."""

    output: str
    rename: tuple[tuple[str, str], ...]
    picture: bool
    overwrite: bool
    quiet: bool
    as_json: bool


def _image_options(command: Command) -> Command:
    return apply(
        [
            click.option("--data", metavar="FOLDER", help="Chips of babelrs-geo tile, or SOI-Det's folders."),
            click.option(
                "--weights", default="compact", show_default=True, metavar="NAME|FILE", help="What to judge."
            ),
            click.option(
                "--split", "splits", type=Splits(), default="val", show_default=True, help="Which images."
            ),
            click.option(
                "--sensor",
                type=Listed("sensor", str),
                metavar="sar,ir,rgb",
                help="Sensors to judge; all that data and weights share unless given.",
            ),
            click.option(
                "--background/--no-background",
                default=True,
                help="Count RGB and infrared images without labels; published figures do not.  [default: background]",
            ),
            click.option(
                "--fit", is_flag=True, help="Resize SOI-Det's frames to the weights' input, as published."
            ),
            click.option(
                "--gsd", type=Gsd(), help="Metres per pixel for chips; unless given, in the weights' range."
            ),
            click.option(
                "--device",
                default="auto",
                show_default=True,
                metavar="auto|cpu|cuda",
                help="Where to compute.",
            ),
            click.option(
                "--replicates",
                type=click.IntRange(1),
                default=1000,
                show_default=True,
                metavar="N",
                help="Resamplings of the images for the intervals.",
            ),
        ],
        command,
    )


def _ground_options(command: Command) -> Command:
    return apply(
        [
            click.option(
                "--detections", metavar="FILE", help="A result of babelrs-geo detect, instead of --data."
            ),
            click.option("--labels", metavar="FILE", help="Vector file of labelled polygons, in any CRS."),
            click.option(
                "--iou",
                type=float,
                default=0.5,
                show_default=True,
                metavar="0..1",
                help="Least overlap of a hit.",
            ),
            click.option(
                "--class-column", default="class", show_default=True, metavar="NAME", help="Of the labels."
            ),
            click.option(
                "--matches", is_flag=True, help="Write matches.gpkg: hits, misses and false finds for QGIS."
            ),
        ],
        command,
    )


@click.command("evaluate")
@_image_options
@_ground_options
@click.option("-o", "--output", required=True, metavar="FOLDER", help="Where the report goes.")
@click.option("--rename", type=Named(), multiple=True, help="A class of the labels by the detector's name.")
@click.option(
    "--picture/--no-picture", default=True, help="Draw pr.png (needs matplotlib).  [default: picture]"
)
@click.option("--overwrite", is_flag=True, help="Replace an existing report.")
@click.option("--quiet", is_flag=True, help="Say nothing but warnings and errors.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def evaluate_verb(**given: Any) -> None:
    """Judge weights on labelled images (--data), or a result against labels on the ground (--detections, --labels).

    Writes report.json, report.md and pr.png. Only classes that both sides know are judged; the report says which
    were left out.
    """
    allocation.keep()
    images, ground, out = split(given, _ImageArguments, _GroundArguments, _ReportArguments)
    if (images.data is None) == (ground.detections is None) or (ground.detections is None) != (
        ground.labels is None
    ):
        raise click.UsageError("give either --data, or --detections together with --labels")
    _refuse_others(_ImageArguments if images.data is None else _GroundArguments)
    from babelrs_geo.evaluation import check_folder, write_report
    from babelrs_geo.evaluation.writing import plain

    folder = Path(out.output)
    check_folder(folder, overwrite=out.overwrite, picture=out.picture)
    start = time.perf_counter()
    extras: Extras = {}
    if images.data is not None:
        report = _of_images(images, out)
    else:
        report, extras = _of_ground(ground, out)
    write_report(folder, report, extras, overwrite=out.overwrite, picture=out.picture)
    if out.as_json:
        click.echo(json.dumps(plain({"output": str(folder), **report.figures}), indent=2))
    elif not out.quiet:
        click.echo(_sentence(report.figures))
        click.echo(f"Written to {folder}/report.md in {duration(time.perf_counter() - start)}")


def _refuse_others(kind: type[_ImageArguments] | type[_GroundArguments]) -> None:
    """UsageError where something was typed that only goes with the other way to judge."""
    context = click.get_current_context()
    for option in context.command.params:
        typed = context.get_parameter_source(str(option.name)) is ParameterSource.COMMANDLINE
        if typed and option.name in {each.name for each in fields(kind)}:
            with_it = "--data" if kind is _ImageArguments else "--detections and --labels"
            raise click.UsageError(f"{option.opts[0]} goes with {with_it}")


def _of_images(given: _ImageArguments, out: _ReportArguments) -> Report:
    from babelrs_geo.detect import devices
    from babelrs_geo.evaluation import DataOptions, judge
    from babelrs_geo.models import zoo

    options = DataOptions(
        split=given.splits,
        sensors=given.sensor,
        rename=dict(out.rename),
        background=given.background,
        fit=given.fit,
        gsd=given.gsd,
    )
    weights = zoo.load(given.weights, devices(given.device)[0])
    with progress_bar("evaluate", hidden=out.quiet or out.as_json, what="images") as bar:

        def show(sensor: str, done: int, total: int) -> None:
            if bar:
                bar(done, total)

        return judge(weights, Path(str(given.data)), options, given.replicates, show)


def _of_ground(given: _GroundArguments, out: _ReportArguments) -> tuple[Report, Extras]:
    from babelrs_geo.evaluation import GroundOptions, judge_ground
    from babelrs_geo.vectors import write_matches

    options = GroundOptions(iou=given.iou, class_column=given.class_column, rename=dict(out.rename))
    report, matches, result = judge_ground(Path(str(given.detections)), Path(str(given.labels)), options)
    if not given.matches:
        return report, {}
    about = {key: report.figures[key] for key in ("software", "detections", "labels", "iou", "weights")}

    def write(path: Path) -> None:
        write_matches(path, matches.table(), result.coverage, about)

    return report, {"matches.gpkg": write}


def _sentence(figures: dict[str, Any]) -> str:
    """The headline figures."""
    overall = figures["overall"]
    if figures["kind"] == "ground":
        return (
            f"{overall['hits']} of {overall['objects']} objects hit, {overall['false']} false: "
            f"precision {overall['precision']:.3f}, recall {overall['recall']:.3f}, F1 {overall['f1']:.3f}."
        )
    each = [f"{s} {own['map']:.3f} (AP50 {own['ap50']:.3f})" for s, own in figures["sensors"].items()]
    h_map = f", H-mAP {overall['h_map']:.3f}" if "h_map" in overall else ""
    return f"mAP {', '.join(each)}; overall {overall['map']:.3f} (AP50 {overall['ap50']:.3f}){h_map}."
