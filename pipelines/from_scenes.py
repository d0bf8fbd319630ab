"""From scenes and labels to trained and judged weights in one command, each step by the command that users have.

    python pipelines/from_scenes.py ../shared/data runs/scenes

Frames of soi_mini lie beside each other as GeoTIFF scenes with labels, and annotated aircraft are scenes of their own;
`tile` cuts them into chips, TorchGeo's sampler draws from them, `train` goes on from weights, `evaluate` judges on
chips of other ground, and on scenes of other frames what `detect` finds. It shows that the road is whole, not how good
a detector may become: that takes more steps. Places on the map are assigned, not true.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader
from torchgeo.samplers import RandomGeoSampler

from babelrs_geo.chips import read_index
from babelrs_geo.cli import main as babelrs_geo
from babelrs_geo.datasets.airbus import CLASS, read_airbus
from babelrs_geo.datasets.airbus import GSD as AIRBUS_GSD
from babelrs_geo.datasets.chips import ChipDataset
from babelrs_geo.datasets.ground import GroundOptions
from babelrs_geo.datasets.mosaics import Assigned, lay_out, write_labels, write_mosaic
from babelrs_geo.datasets.samples import collate
from babelrs_geo.datasets.seeding import Seeded
from babelrs_geo.datasets.soi import Record, read_split
from babelrs_geo.models import checkpoints, zoo

SENSORS = ("sar", "rgb", "ir")
CRS = "EPSG:32633"
APART = 50_000.0  # metres from scene to scene, so that none shares ground with another

Group = tuple[list[Record], tuple[str, ...], float]
"""Frames of one scene, their classes, and metres a pixel."""


@dataclass(frozen=True)
class Scenes:
    """Scenes of one sensor with their label files; the last one is held out."""

    paths: list[Path]
    labels: list[Path]


def run(*words: object) -> None:
    """One command of babelrs-geo. SystemExit where it fails."""
    try:
        babelrs_geo([str(word) for word in words])
    except SystemExit as ended:
        if ended.code:
            raise


def some(records: Sequence[Record], count: int) -> list[Record]:
    """So many of them, evenly spread, or all."""
    return [records[i] for i in np.linspace(0, len(records) - 1, min(count, len(records))).astype(int)]


def make_scenes(options: argparse.Namespace) -> dict[str, Scenes]:
    """GeoTIFFs and label files of each sensor."""
    header = checkpoints.read_header(zoo.find(options.start))
    folder = options.out / "scenes"
    folder.mkdir(parents=True, exist_ok=True)
    soi, aircraft = (
        options.data / "soi_mini",
        some(read_airbus(options.data / "airbus_aircraft"), options.aircraft),
    )
    made: dict[str, Scenes] = {}
    for row, sensor in enumerate(SENSORS):
        classes, gsd = header.classes[sensor], float(np.sqrt(np.prod(header.gsd[sensor])))
        groups: dict[str, Group] = {
            f"{sensor}_{split}": (some(read_split(soi, sensor, split, classes), count), classes, gsd)
            for split, count in (("train", options.frames), ("val", max(1, options.frames // 2)))
        }
        if sensor == "rgb":
            planes: dict[str, Group] = {
                f"airbus_{i}": ([record], (CLASS,), AIRBUS_GSD) for i, record in enumerate(aircraft)
            }
            groups = {"rgb_train": groups["rgb_train"], **planes, "rgb_val": groups["rgb_val"]}
        paths, labels = [], []
        for column, (name, (records, names, metres)) in enumerate(groups.items()):
            corner = (200_000.0 + APART * column, 5_000_000.0 + APART * row)
            placed, ground = lay_out(records), Assigned(crs=CRS, corner=corner, gsd=metres)
            paths.append(folder / f"{name}.tif")
            labels.append(folder / f"{name}.gpkg")
            write_mosaic(paths[-1], placed, ground)
            write_labels(labels[-1], placed, names, ground)
        made[sensor] = Scenes(paths, labels)
    return made


def tile(scenes: Scenes, sensor: str, chips: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Chips of all scenes but the one that is held out, with splits, and how many."""
    given = [word for path in scenes.labels[:-1] for word in ("--labels", path)]
    how = ["--size", options.size, "--overlap", options.size // 4, "--block", 1, "--split", "0.7/0.3/0"]
    where = ["-o", chips, "--workers", 1, "--quiet"]
    run("tile", *scenes.paths[:-1], "--sensor", sensor, *given, *how, "--no-collar", *where)
    index = read_index(chips)
    return {
        "chips": index["split"].value_counts().to_dict(),
        "objects": int(index["objects"].sum()),
        "scenes": len(scenes.paths) - 1,
    }


def draw(sensor: str, chips: Path, options: argparse.Namespace) -> dict[str, int]:
    """What TorchGeo's random sampler draws from the chips to learn from."""
    data = ChipDataset(chips, sensor, "train", options=GroundOptions(least=options.crop))
    sampler = Seeded(RandomGeoSampler(data, size=options.crop, length=8), seed=0)
    batches = [batch[sensor] for batch in DataLoader(data, 4, sampler=sampler, collate_fn=collate)]
    return {
        "windows": sum(len(batch["image"]) for batch in batches),
        "seen": sum(len(labels) for batch in batches for labels in batch["labels"]),
    }


def train(chips: Sequence[Path], options: argparse.Namespace) -> Path:
    """The weights after a few steps, by the recipe with phases of their own."""
    view = {"crop": {"size": options.crop, "scale": [0.8, 1.3], "turn": False}}
    phase = {
        "steps": options.steps,
        "quota": dict.fromkeys(SENSORS, 1),
        "views": dict.fromkeys(SENSORS, view),
        "lr": options.rate,
        "prior_lr": options.rate / 4,
        "warmup": max(1, options.steps // 4),
        "cooldown": max(1, options.steps // 2),
        "mean_decay": 0.9,
    }
    data = [word for path in chips for word in ("--data", path)]
    known = "--recipe" if options.recipe == "compact" else "--config"
    changes = [
        f"phases={json.dumps([phase])}",
        "run.validate_every=0",
        "run.tensorboard=false",
        "run.workers=0",
    ]
    changes += ["data.val={sar: val, rgb: val, ir: val}", "header.data=mosaics of soi_mini, and aircraft"]
    given = [word for change in changes for word in ("--set", change)]
    folder = options.out / "run"
    where = ["-o", folder, "--start", options.start, "--device", options.device, "--quiet"]
    run("train", known, options.recipe, *data, *given, *where)
    return folder / "final.safetensors"


def judge(sensor: str, chips: Path, weights: object, report: Path) -> dict[str, float | None]:
    """Average precision on the chips of split val."""
    how = ["--split", "val", "--replicates", 100, "--no-picture", "--overwrite", "--quiet"]
    run("evaluate", "--weights", weights, "--data", chips, *how, "-o", report)
    found = json.loads((report / "report.json").read_text())["sensors"][sensor]
    return {"map": found["map"], "ap50": found["ap50"]}


def find(sensor: str, scenes: Scenes, weights: object, options: argparse.Namespace) -> dict[str, Any]:
    """What is found on the scene that is held out, against its labels on the ground."""
    report = options.out / "reports" / f"{sensor}_ground"
    result = report.with_suffix(".gpkg")
    how = ["--tile", options.size, "--overlap", options.size // 4, "--no-collar", "--overwrite", "--quiet"]
    run("detect", scenes.paths[-1], "--sensor", sensor, "--weights", weights, *how, "-o", result)
    how = ["--no-picture", "--overwrite", "--quiet"]
    run("evaluate", "--detections", result, "--labels", scenes.labels[-1], *how, "-o", report)
    found: dict[str, Any] = json.loads((report / "report.json").read_text())["overall"]
    return {key: found[key] for key in ("objects", "hits", "false", "precision", "recall")}


def main(arguments: Sequence[str] | None = None) -> None:
    """The whole road; prints a table, and writes all figures to report.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder with soi_mini and airbus_aircraft")
    parser.add_argument("out", type=Path, help="where everything goes")
    parser.add_argument("--frames", type=int, default=9, help="of a sensor in the scene that is tiled")
    parser.add_argument("--aircraft", type=int, default=1, help="scenes of aircraft")
    parser.add_argument("--size", type=int, default=384, help="of a chip")
    parser.add_argument("--crop", type=int, default=192, help="of what is learnt from")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rate", type=float, default=5e-5, help="of learning")
    parser.add_argument("--recipe", default="compact", help="compact, or a file")
    parser.add_argument("--start", default="compact", help="weights to go on from")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(arguments)
    if options.out.is_dir() and any(options.out.iterdir()):
        sys.exit(f"{options.out} is not empty; name a new folder")
    begun = time.perf_counter()
    made = make_scenes(options)
    figures: dict[str, Any] = {}
    folders = {sensor: options.out / "chips" / sensor for sensor in SENSORS}
    for sensor, chips in folders.items():
        chips.parent.mkdir(exist_ok=True)
        figures[sensor] = tile(made[sensor], sensor, chips, options) | draw(sensor, chips, options)
    weights = train(list(folders.values()), options)
    (options.out / "reports").mkdir(exist_ok=True)
    for sensor, chips in folders.items():
        for name, which in (("before", options.start), ("after", weights)):
            report = options.out / "reports" / f"{sensor}_{name}"
            figures[sensor][name] = judge(sensor, chips, which, report)
        figures[sensor]["ground"] = find(sensor, made[sensor], weights, options)
    figures["seconds"] = round(time.perf_counter() - begun, 1)
    (options.out / "report.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(_table(figures))


def _table(figures: dict[str, Any]) -> str:
    rows = [
        "| sensor | scenes | chips train, val | objects | drawn: windows, objects | val AP50 before, after | "
        "other scene: objects, precision, recall |",
        "|---|---|---|---|---|---|---|",
    ]
    for sensor in SENSORS:
        own = figures[sensor]
        there, ground = own["chips"], own["ground"]
        rows.append(
            f"| {sensor} | {own['scenes']} | {there.get('train', 0)}, {there.get('val', 0)} | {own['objects']} | "
            f"{own['windows']}, {own['seen']} | {_told(own['before']['ap50'])}, {_told(own['after']['ap50'])} | "
            f"{ground['objects']}, {_told(ground['precision'])}, {_told(ground['recall'])} |"
        )
    return "\n".join([*rows, "", f"{figures['seconds']:.0f} s in all"])


def _told(share: float | None) -> str:
    return "none" if share is None else f"{share:.3f}"


if __name__ == "__main__":
    main()
