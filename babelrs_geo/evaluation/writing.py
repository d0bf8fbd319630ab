"""A report on the disk: `report.json`, `report.md` and the picture `pr.png`, whole or not at all."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from babelrs_geo.errors import OutputError, ParameterError
from babelrs_geo.evaluation.report import Report
from babelrs_geo.qgis import class_colour
from babelrs_geo.vectors import check_name, drop_journals

MAIN = "report.json"
"""Written last into a folder that exists: where it is, all is."""

Extras = Mapping[str, Callable[[Path], None]]
"""More files of a report by name, each with what writes it at a path."""


def check_folder(folder: Path, *, overwrite: bool = False, picture: bool = True) -> None:
    """Raise OutputError where `write_report` could not, or should not, write; ParameterError where it cannot draw.

    Ask before the work.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file; name a folder for the report with -o")
    if (folder / MAIN).exists() and not overwrite:
        raise OutputError(
            f"{folder} holds a report; pass --overwrite to replace it, or another folder with -o"
        )
    parent = folder.absolute().parent
    if not parent.is_dir() or not os.access(folder if folder.is_dir() else parent, os.W_OK | os.X_OK):
        raise OutputError(
            f"{folder} cannot be written: {parent} is missing or not writable; choose another -o"
        )
    if picture and find_spec("matplotlib") is None:
        raise ParameterError(
            "the picture needs matplotlib, which is not installed: pip install matplotlib, or pass --no-picture"
        )


def write_report(
    folder: Path,
    report: Report,
    extras: Extras | None = None,
    *,
    overwrite: bool = False,
    picture: bool = True,
) -> Path:
    """Write a report into a folder and return it: a new folder appears whole; in one that exists only the report's
    own files are replaced. Raises as `check_folder` does, and OutputError where the disk refuses.
    """
    check_folder(folder, overwrite=overwrite, picture=picture)
    for name in extras or ():
        check_name(folder / name)
    folder = folder.absolute()
    beside = folder if folder.is_dir() else folder.parent  # only there is it known to be allowed
    try:
        with tempfile.TemporaryDirectory(
            prefix=f".{folder.name}.", dir=beside, ignore_cleanup_errors=True
        ) as draft:
            made = Path(draft) / "report"
            made.mkdir()
            for name, write in (extras or {}).items():
                write(made / name)
            if picture:
                draw(report, made / "pr.png")
            (made / "report.md").write_text(markdown(report.figures), encoding="utf-8")
            text = json.dumps(plain(report.figures), indent=2, ensure_ascii=False, allow_nan=False)
            (made / MAIN).write_text(text + "\n", encoding="utf-8")
            if not folder.exists():
                made.replace(folder)
            else:
                _replace(made, folder)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(
            f"{folder} cannot be written ({error}); check the disk's space and permissions, or choose another -o"
        ) from error
    return folder


def _replace(made: Path, folder: Path) -> None:
    (folder / MAIN).unlink(missing_ok=True)
    for name in ("matches.gpkg", "pr.png"):  # of an earlier report, if this one has none
        (folder / name).unlink(missing_ok=True)
        drop_journals(folder / name)
    for path in sorted(made.iterdir(), key=lambda p: p.name == MAIN):
        shutil.move(path, folder / path.name)


def plain(value: Any) -> Any:
    """Figures as JSON has them: what is not a number becomes null, numbers are rounded to a millionth."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value


def draw(report: Report, path: Path) -> None:
    """Precision against recall, a panel for each sensor and a line for each class, in the colours of the map.

    The legend has average precision as it is counted in the tables, which for SAR is not quite the area drawn.
    """
    from matplotlib.figure import Figure

    figures, curves = report.figures, report.curves
    ground = figures["kind"] == "ground"
    panels = max(1, len(curves))
    figure = Figure(figsize=(5.5 * panels, 5.2), dpi=120, layout="constrained")
    for place, (panel, lines) in enumerate(curves.items(), 1):
        axes = figure.add_subplot(1, panels, place)
        axes.set(
            title=f"{panel}, IoU {figures.get('iou', 0.5):g}",
            xlabel="recall",
            ylabel="precision",
            xlim=(0, 1.01),
            ylim=(0, 1.02),
        )
        axes.set_facecolor("#1d2127")  # on which the map's colours were chosen
        axes.grid(alpha=0.2)
        for name, curve in lines.items():
            recall = np.concatenate([[0.0], curve.recall])
            precision = np.concatenate([curve.precision[:1], curve.precision])
            own = (
                figures["by_class"][name]["ap"]
                if ground
                else figures["sensors"][panel]["by_class"][name]["ap50"]
            )
            axes.plot(recall, precision, color=class_colour(name), label=f"{name} {_percent(own)}")
        if lines:
            legend = axes.legend(
                fontsize=8, title="AP, %", title_fontsize=8, labelcolor="white", facecolor="#1d2127"
            )
            legend.get_title().set_color("white")
    figure.savefig(path, metadata={"Software": "babelrs-geo"})


def markdown(figures: Mapping[str, Any]) -> str:
    """The figures as tables for a person, in percent, with 95 % intervals."""
    return _ground(figures) if figures["kind"] == "ground" else _images(figures)


def _images(figures: Mapping[str, Any]) -> str:
    overall, sensors = figures["overall"], figures["sensors"]
    rows = [
        [
            s,
            own["split"],
            own["images"],
            len(own["classes_in_mean"]),
            _figure(own, "map"),
            _figure(own, "ap50"),
        ]
        for s, own in sensors.items()
    ]
    total = sum(own["images"] for own in sensors.values())
    rows.append(["overall", "", total, overall["classes"], _figure(overall, "map"), _figure(overall, "ap50")])
    if "h_map" in overall:
        rows.append(["H-mAP", "", "", "", _figure(overall, "h_map"), ""])
    classes = [
        [s, name, one["objects"], _figure(one, "map"), _figure(one, "ap50", "interval")]
        for s, own in sensors.items()
        for name, one in own["by_class"].items()
    ]
    sizes = [
        [s, f"{size} ({_span(one['area_px'])})", one["objects"], _figure(one, "map"), _figure(one, "ap50")]
        for s, own in sensors.items()
        for size, one in own["by_size"].items()
    ]
    lines = [
        f"# {figures['weights']['name']} on {figures['data']}",
        "In percent, with 95 % intervals (bootstrap over images). mAP is the mean over IoU .5 to .95; SAR is counted "
        "as COCO does, RGB and infrared as the rotated VOC benchmarks do. Overall is weighted by the numbers of "
        "classes; H-mAP is the harmonic mean over the three sensors.",
        _table(["sensor", "split", "images", "classes", "mAP", "AP50"], rows),
        "## By class",
        _table(["sensor", "class", "objects", "mAP", "AP50"], classes),
        "## By size",
        _table(["sensor", "size", "objects", "mAP", "AP50"], sizes),
    ]
    left = [
        f"* {s}: {n} objects of class {name}, which the weights do not know"
        for s, own in sensors.items()
        for name, n in own["left_out"]["unknown_to_the_weights"].items()
    ]
    left += [
        f"* {s}: {', '.join(own['left_out']['not_labelled'])}, which the data does not label"
        for s, own in sensors.items()
        if own["left_out"]["not_labelled"]
    ]
    left += [f"* {s} as a whole: {reason}" for s, reason in figures["sensors_left_out"].items()]
    if left:
        lines += ["## Not judged", "\n".join(left)]
    return _text(figures, lines)


def _ground(figures: Mapping[str, Any]) -> str:
    def row(name: str, own: Mapping[str, Any], ap: float, threshold: str) -> list[Any]:
        counts = [own[key] for key in ("objects", "hits", "missed", "false")]
        rates = [_figure(own, key) for key in ("precision", "recall", "f1")]
        return [name, threshold, *counts, *rates, _percent(ap)]

    overall, left = figures["overall"], figures["left_out"]
    rows = [
        row(name, own, own["ap"], "" if own["threshold"] is None else f"{own['threshold']:g}")
        for name, own in figures["by_class"].items()
    ]
    rows.append(row("all", overall, overall["mean_ap"], ""))
    head = ["class", "least score", "objects", "hits", "missed", "false", "precision", "recall", "F1", "AP"]
    lines = [
        f"# {figures['detections']} against {figures['labels']}",
        f"Matched on the ground at IoU {figures['iou']:g}, where the coverage says that it was looked at. In percent, "
        "with 95 % Wilson intervals; AP is the area under the curve down to the least score reported.",
        _table(head, rows),
    ]
    notes = [
        f"* {n} objects of class {name}, which the detector does not know"
        for name, n in left["unknown_to_the_detector"].items()
    ]
    notes += [
        f"* {n} detections of {name}, which nobody labelled" for name, n in left["not_labelled"].items()
    ]
    if left["labels_where_nobody_looked"]:
        notes.append(f"* {left['labels_where_nobody_looked']} labels on ground that was not looked at")
    if left["detections_ignored"]:
        notes.append(f"* {left['detections_ignored']} detections of objects centred beyond that ground")
    if notes:
        lines += ["## Not judged", "\n".join(notes)]
    return _text(figures, lines)


def _text(figures: Mapping[str, Any], blocks: Sequence[str]) -> str:
    weights = figures["weights"]
    told = f"Weights: {weights['name']}, SHA-256 `{weights['sha256']}`. By {figures['software']}."
    return "\n\n".join([*blocks, told]) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines
    )


def _percent(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{100 * value:.2f}"


def _figure(own: Mapping[str, Any], key: str, interval: str | None = None) -> str:
    """A figure and its interval."""
    low, high = own[interval or f"{key}_interval"]
    if math.isnan(own[key]):
        return "–"
    return f"{_percent(own[key])} ({100 * low:.1f} to {100 * high:.1f})"


def _span(area: Sequence[float | None]) -> str:
    low, high = (None if side is None else round(math.sqrt(side)) for side in area)
    return f"from {low}² px" if high is None else f"{low}² to {high}² px" if low else f"below {high}² px"
