"""`babelrs-geo weights`: import published checkpoints, see what there is, hand weights on."""

from __future__ import annotations

import json
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from babelrs_geo.models.checkpoints import Header


@click.group("weights")
def weights_group() -> None:
    """Import published checkpoints, list and describe weights, export them."""


@weights_group.command("import")
@click.argument("file")
@click.option(
    "-o",
    "--output",
    metavar="OUT.safetensors",
    help="Where to write.  [default: under its name among your weights, where detect finds it by name]",
)
@click.option("--name", help="What the weights are called; by default after what they are.")
@click.option("--licence", metavar="TEXT", help="Their terms, in place of those of the published weights.")
@click.option("--half", is_flag=True, help="Store half precision, in place of the precision of the file.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
def import_verb(
    file: str, output: str | None, name: str | None, licence: str | None, half: bool, overwrite: bool
) -> None:
    """Write the published checkpoint FILE in the format of babelrs-geo.

    FILE is the fine-tuned BabelRS detector (.pth), its pretrained ViT (.safetensors), or InternVL2.5-1B (one
    file, an index of shards, or their folder). No code in it is run, and every tensor must be accounted for.
    """
    from babelrs_geo.models.importing import ImportOptions, import_weights

    done = import_weights(file, output, ImportOptions(name, licence, half), overwrite=overwrite)
    click.echo(f"Imported {_WHAT[done.kind]} {done.header.name}: {done.tensors} tensors.")
    click.echo(f"Licence of these weights: {done.header.licence}")
    if done.kind == "detector":
        told = done.path if output else done.header.name
        click.echo(
            f"Written to {done.path}: babelrs-geo detect scene.tif --sensor sar --weights {quote(str(told))}\n"
            "Thresholds and ground sampling are plain assumptions (see weights info): adjust with --score and --gsd"
        )
    else:
        click.echo(f"Written to {done.path}: a start for training, which detects nothing by itself")


_WHAT = {
    "detector": "the detector",
    "encoder": "the encoder",
    "vision-language": "the vision-language model",
}


@weights_group.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_verb(as_json: bool) -> None:
    """List the bundled weights and your own."""
    from babelrs_geo.models import zoo

    rows = [_row(name, path) for name, path in zoo.known().items()]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    columns = ("name", "kind", "knows", "from", "licence")
    widths = [max([len(row[column]) for row in rows] + [len(column)]) for column in columns]
    for row in [dict(zip(columns, columns, strict=True)), *rows]:
        cells = [row[column].ljust(width) for column, width in zip(columns, widths, strict=True)]
        click.echo("  ".join(cells).rstrip())
    click.echo(f"Your own lie in {zoo.folder()}")


def _row(name: str, path: Path) -> dict[str, str]:
    """What the list says of one file, damaged or not."""
    from babelrs_geo.errors import WeightsError
    from babelrs_geo.models import checkpoints, zoo

    origin = "bundled" if path.parent == zoo.BUNDLED else "yours"
    try:
        header = checkpoints.read(path)
    except WeightsError as error:
        return {
            "name": name,
            "kind": "damaged",
            "knows": "",
            "from": origin,
            "licence": "",
            "error": str(error),
        }
    kind = header.kind if isinstance(header, checkpoints.Start) else "detector"
    classes = {} if isinstance(header, checkpoints.Start) else header.classes
    knows = ", ".join(f"{sensor} ({len(names)})" for sensor, names in classes.items())
    licence = header.licence.partition(". ")[0].rstrip(".")
    return {"name": name, "kind": kind, "knows": knows, "from": origin, "licence": licence}


@weights_group.command("info")
@click.argument("weights", metavar="NAME|FILE")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info_verb(weights: str, as_json: bool) -> None:
    """Tell what weights find, on which images, how well, and on which terms they may be used."""
    from babelrs_geo.models import checkpoints, zoo

    path = zoo.find(weights)
    header = checkpoints.read(path)
    what = checkpoints.describe(path)
    told: dict[str, Any] = {"name": header.name, "kind": what.kind, "file": str(path), "sha256": what.sha256}
    told |= {"parameters": what.parameters, "precision": what.precision, "licence": header.licence}
    if isinstance(header, checkpoints.Start):
        told |= {"architecture": dict(header.architecture)}
    else:
        told |= {
            "input": header.tile,
            "sensors": {sensor: _sensor(header, sensor) for sensor in header.classes},
        }
    told |= {"training": dict(header.training)}
    if isinstance(header, checkpoints.Header):
        told |= {"metrics": dict(header.metrics)}
    if as_json:
        click.echo(json.dumps(told, indent=2))
        return
    rows = _rows(told)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        click.echo(f"{name:<{width}}  {value}")


def _sensor(header: Header, sensor: str) -> dict[str, Any]:
    return {
        "classes": list(header.classes[sensor]),
        "boxes": header.box_kind[sensor],
        "gsd_m": list(header.gsd[sensor]),
        "thresholds": dict(header.thresholds[sensor]),
        "radiometry": header.radiometry.get(sensor, ""),
    }


def _rows(told: dict[str, Any]) -> list[tuple[str, str]]:
    """The description as lines for a person."""
    rows = [(key, str(told[key])) for key in ("name", "kind", "file", "sha256")]
    rows += [("parameters", f"{told['parameters']:,}"), ("precision", told["precision"])]
    rows += [("licence", told["licence"])]
    if "input" in told:
        rows += [("input", f"tiles of {told['input']} px unless --tile says otherwise")]
    for sensor, own in told.get("sensors", {}).items():
        classes = ", ".join(f"{name} from {own['thresholds'][name]:g}" for name in own["classes"])
        low, high = own["gsd_m"]
        rows += [
            (sensor, f"{own['boxes']} boxes at {low:g} to {high:g} m a pixel"),
            (f"{sensor} classes", f"{classes} (least score)"),
            (f"{sensor} pixels", own["radiometry"]),
        ]
        figures = told["metrics"].get(sensor)
        if figures:
            rows += [(f"{sensor} AP50", _figure(figures, "ap50")), (f"{sensor} mAP", _figure(figures, "map"))]
    if "sensors" in told and not told["metrics"]:
        rows += [("metrics", "none in the file")]
    more = {**told.get("architecture", {}), **told["training"]}
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in more.items()}
    recipes = [key for key, text in texts.items() if "\n" in text or r"\n" in text]
    rows += [(key, text) for key, text in texts.items() if key not in recipes]
    return rows + ([("recipe", f"--json shows it ({', '.join(recipes)})")] if recipes else [])


def _figure(figures: dict[str, Any], name: str) -> str:
    low, high = figures[f"{name}_interval"]
    return f"{figures[name]:.3f} ({low:.3f} to {high:.3f}) on {figures['images']} images"


@weights_group.command("export")
@click.argument("weights", metavar="NAME|FILE")
@click.option("-o", "--output", required=True, metavar="FILE", help="Where to write.")
@click.option(
    "--as",
    "layout",
    type=click.Choice(["official", "transformers", "vit", "onnx"]),
    default="official",
    show_default=True,
    help="Names of the tensors: the published ones, transformers', or the encoder's alone; or an ONNX program.",
)
@click.option(
    "--sensor",
    type=click.Choice(["sar", "ir", "rgb"]),
    help="Whose head goes into the ONNX program. [required there]",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
def export_verb(weights: str, output: str, layout: Any, sensor: str | None, overwrite: bool) -> None:
    """Write weights as plain safetensors under published names: what `weights import` reads, bit for bit.

    With --as onnx, a detector's network for one sensor instead, up to but without the boxes (see docs/weights.md).
    """
    if (layout == "onnx") != (sensor is not None):
        raise click.UsageError(
            "--sensor says whose head goes into an ONNX program: give it with --as onnx alone"
        )
    if sensor is not None:
        from babelrs_geo.models.onnx import export_onnx

        names = export_onnx(weights, output, sensor, overwrite=overwrite)
        click.echo(f"Written to {output}: an ONNX program for {sensor}, from images to {', '.join(names)}")
        return
    from babelrs_geo.models.importing import export

    number = export(weights, output, layout, overwrite=overwrite)
    click.echo(f"Written to {output}: {number} tensors, named as {layout}")
