"""What an archive costs beside the model: a ledger of a million scenes, small scenes with some damaged, and the steady
pace of a run.

    python benchmarks/archive.py ledger --scenes 1000000
    python benchmarks/archive.py scenes ../shared/data --scenes 2000 --damaged 20
    python benchmarks/archive.py pace --scenes 1000000 --done 20000

`ledger` plans scenes from a manifest without touching a file, and asks for the status. `scenes` cuts crops from real
rasters, each at a place of its own, damages some in ten ways, and runs them with the bundled weights; a second run over
the undamaged alone is held to one read of their pixels and the model's forward time on the same tiles, with as many
threads, in the same call. `pace` does nothing with the scenes: what is left is the ledger, the scheduler and the way to
the workers and back.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio.transform import from_origin

from babelrs_geo.archive.cell import Limits, Turn
from babelrs_geo.archive.ledger import Ledger
from babelrs_geo.archive.run import RunOptions, run
from babelrs_geo.archive.sources import find
from babelrs_geo.archive.work import Detection, Outcome, Task, weights_hash
from babelrs_geo.detect import DetectOptions

SIDE = 256
LIMIT = 5.0
"""Seconds that a scene may take."""

SOURCES = {
    "scenes/sentinel1_port_la_db.tif": ("sar", 30.0),
    "scenes/rgb_dutch_orthophoto.tif": ("rgb", 0.25),
    "soi_mini/DroneVehicle/dota_val/images": ("ir", 0.12),
}
"""Where crops come from, and the pixel size in metres that they are given: real SAR, RGB and thermal infrared."""


def write_manifest(folder: Path, scenes: int) -> Path:
    """Scenes that are nowhere."""
    manifest = folder / "scenes.csv"
    with manifest.open("w") as file:
        file.write("scene,sensor,priority,size,stamp\n")
        for n in range(scenes):
            file.write(f"/archive/{n % 1000:03d}/S1_{n:09d}.tif,sar,{n % 3},{n * 7919 % 1_000_003},{n}\n")
    return manifest


def plan_many(folder: Path, scenes: int) -> dict[str, float]:
    """Seconds and memory to plan scenes from a manifest and to tell the status."""
    manifest = write_manifest(folder, scenes)
    begun = time.perf_counter()
    with Ledger(folder, write=True) as ledger:
        ledger.plan(find([str(manifest)]))
        ledger.begin("a recipe")
    planned = time.perf_counter() - begun
    begun = time.perf_counter()
    with Ledger(folder) as ledger:
        counts, _ = ledger.counts(), ledger.totals()
    status = time.perf_counter() - begun
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    assert sum(counts.values()) == scenes
    return {"plan_s": planned, "status_s": status, "memory_mb": memory}


def write_crops(folder: Path, source: Path, scenes: int) -> list[tuple[str, str]]:
    """GeoTIFFs of `SIDE` pixels, each elsewhere on the ground; gives path and sensor."""
    draw, images = np.random.default_rng(0), []
    for name, about in SOURCES.items():
        files = sorted((source / name).glob("*.jpg"))[:40] or [source / name]
        images.append((about, [_pixels(path) for path in files]))
    made = []
    for n in range(scenes):
        (sensor, metres), pictures = images[n % len(images)]
        whole = pictures[n // len(images) % len(pictures)]
        y, x = (int(draw.integers(0, side - SIDE)) for side in whole.shape[1:])
        pixels = whole[: 3 if sensor == "rgb" else 1, y : y + SIDE, x : x + SIDE]
        path = folder / f"{sensor}-{n:05d}.tif"
        profile = {"width": SIDE, "height": SIDE, "count": len(pixels), "dtype": pixels.dtype}
        place = {"crs": "EPSG:32633", "transform": from_origin(4e5 + n * 100, 4.6e6, metres, metres)}
        with rasterio.open(path, "w", driver="GTiff", **profile, **place) as file:
            file.write(pixels)
            file.update_tags(ACQUISITION_DATETIME=f"2026-03-{n % 28 + 1:02d}T10:00:00Z", CROP=str(n))
            if sensor == "sar":
                file.descriptions = ("VV dB",)
        made.append((str(path), sensor))
    return made


def _pixels(path: Path) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a photograph has no georeference
        with rasterio.open(path) as file:
            return file.read()


def _cut(share: float) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, int(path.stat().st_size * share))


def _void(path: Path) -> None:
    with rasterio.open(path, "r+") as file:
        file.nodata = 0
        file.write(np.zeros((file.count, file.height, file.width), file.dtypes[0]))


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no raster"),
    "cut in half": _cut(0.5),
    "cut short": _cut(0.02),
    "header only": lambda path: path.write_bytes(b"II*\0" + bytes(64)),
    "nothing valid": _void,
    "hangs": _fifo,
    "gone": lambda path: path.unlink(),
    "links to itself": _loop,
    "noise": lambda path: path.write_bytes(np.random.default_rng(1).bytes(50_000)),
}


def prepare(
    folder: Path, source: Path, scenes: int, damaged: int
) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """Crops, with path and sensor, and how which of them are damaged; those that are there if they are."""
    note = folder / "made.json"
    if not note.exists():
        (folder / "in").mkdir(parents=True)
        made = write_crops(folder / "in", source, scenes)
        draw, kinds = random.Random(0), list(DAMAGES)
        bad = {path: kinds[n % len(kinds)] for n, (path, _) in enumerate(draw.sample(made, damaged))}
        for path, kind in bad.items():
            DAMAGES[kind](Path(path))
        note.write_text(json.dumps([made, bad]))
    made, bad = json.loads(note.read_text())
    return [(path, sensor) for path, sensor in made], bad


def run_small(
    folder: Path, made: list[tuple[str, str]], bad: dict[str, str], forms: Sequence[str], threads: int
) -> dict[str, object]:
    """Failures, in the first form, and the undamaged scenes' time beside that of reading and computing alone.

    The latter is measured in shares, before, between and after the runs: machines are now faster, now slower.
    """
    good = [each for each in made if each[0] not in bad]
    options = DetectOptions(gsd="native", threads=threads, device="cpu")
    reading, forward = _alone(good[:: len(forms) + 1], options)
    told: dict[str, dict[str, Any]] = {"with_damaged": run_damaged(folder, made, bad, forms[0], options)}
    clean = {}
    for number, form in enumerate(forms, 1):
        # What a run costs that has but one scene is the start of its processes, and that scene.
        first, _ = _archive(folder / f"{form}-first", good[:1], options, form)
        clean[form], _ = _archive(folder / f"{form}-clean", good, options, form)
        told[form] = {"undamaged_wall_s": clean[form], "first_scene_and_start_s": first}
        read, computed = _alone(good[number :: len(forms) + 1], options)
        reading, forward = reading + read, forward + computed
    for form in forms:
        first = told[form]["first_scene_and_start_s"]
        rest = (clean[form] - first) / (len(good) - 1) * len(good)
        told[form] |= {
            "undamaged_over_forward_and_read": rest / (forward + reading),
            "with_start_over_forward_and_read": clean[form] / (forward + reading),
        }
    return {"scenes": len(made), "threads": threads, "read_s": reading, "forward_s": forward, **told}


def run_damaged(
    folder: Path, made: list[tuple[str, str]], bad: dict[str, str], form: str, options: DetectOptions
) -> dict[str, object]:
    """A run over all scenes: which failed, and why."""
    wall, states = _archive(folder / form, made, options, form)
    with Ledger(folder / form) as ledger:
        failed = dict(ledger.failures(-1))
    reasons = {f"{bad.get(path, 'not damaged')}: {why.replace(path, '...')}" for path, why in failed.items()}
    return {
        "states": states,
        "exactly_the_damaged_failed": set(failed) == set(bad),
        "wall_s": wall,
        "reasons": sorted(reasons),
    }


def _archive(
    results: Path, scenes: Sequence[tuple[str, str]], options: DetectOptions, form: str
) -> tuple[float, dict[str, int]]:
    """Seconds of a run over scenes, and how many ended how."""
    manifest = results.with_suffix(".csv")
    manifest.write_text("scene,sensor\n" + "".join(f"{path},{sensor}\n" for path, sensor in scenes))
    begun = time.perf_counter()
    ended = run(
        results,
        lambda: find([str(manifest)]),
        Detection("compact", "cpu", options),
        {"weights": weights_hash("compact")},
        RunOptions(suffix=f".{form}", limits=Limits(seconds=LIMIT), attempts=1),
    )
    return time.perf_counter() - begun, {state: n for state, n in ended.counts.items() if n}


def _alone(scenes: Sequence[tuple[str, str]], options: DetectOptions) -> tuple[float, float]:
    """Seconds to read all pixels once, and to compute the tiles, after one scene of each sensor."""
    import torch

    from babelrs_geo.detect import plan_for
    from babelrs_geo.models import zoo
    from babelrs_geo.scenes import open_scene

    torch.set_num_threads(options.threads or 1)
    weights = zoo.load("compact", "cpu")
    reading = forward = 0.0
    seen: set[str] = set()
    for path, sensor in scenes:
        begun = time.perf_counter()
        with rasterio.open(path) as file:
            file.read()
        read = time.perf_counter() - begun
        with open_scene(path, sensor) as scene:
            grid = plan_for(scene, weights.header, options).grid
            images = [scene.read(tile.outer).image for tile in grid]
        find_objects = weights.detector(sensor)
        batch = int(options.batch)
        batches = [np.stack(images[start : start + batch]) for start in range(0, len(images), batch)]
        if sensor not in seen:
            seen.add(sensor)
            find_objects(batches[0])
        begun = time.perf_counter()
        for each in batches:
            find_objects(each)
        forward += time.perf_counter() - begun
        reading += read
    return reading, forward


@dataclass(frozen=True)
class Nothing:
    """Work that looks at no scene and leaves a result of nothing, copied from one that was made beforehand."""

    sample: str

    def start(self, turn: Turn) -> Callable[[Task], Outcome]:
        """What leaves the result."""

        def leave(task: Task) -> Outcome:
            names = (f"{Path(task.name).stem}.json", task.name)
            for name in names:
                shutil.copyfile(Path(self.sample).with_suffix(Path(name).suffix), Path(task.drafts) / name)
            return Outcome("done", values={"tiles": 1, "tiles_failed": 0, "detections": 0, "classes": "{}"})

        return leave


def keep_pace(folder: Path, scenes: int, most: int, seconds: float) -> dict[str, float]:
    """Plan many scenes, do some of them, and compare the pace of the first and the last thousand."""
    sample = folder / "sample.gpkg"
    sample.write_bytes(bytes(1000))
    sample.with_suffix(".json").write_text("{}")
    manifest = write_manifest(folder, scenes)
    ended: list[tuple[int, float]] = []

    def heard(done: int, _: int) -> None:
        ended.append((done, time.perf_counter()))
        if done >= most or time.perf_counter() - begun > seconds:
            raise KeyboardInterrupt

    begun = time.perf_counter()
    with suppress(KeyboardInterrupt):
        run(
            folder / "out",
            lambda: find([str(manifest)]),
            Nothing(str(sample)),
            {"weights": "none"},
            RunOptions(suffix=".gpkg"),
            heard,
        )
    took = time.perf_counter() - begun
    with Ledger(folder / "out") as ledger:
        done = ledger.counts()["done"]
    return {
        "planned": scenes,
        "done": done,
        "seconds_with_planning": took,
        "first_thousand_per_s": _pace(ended, ended[0][0], 1000),
        "last_thousand_per_s": _pace(ended, ended[-1][0] - 1000, 1000),
        "all_per_s": _pace(ended, ended[0][0], most),
        "memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "memory_of_workers_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,
    }


def _pace(ended: Sequence[tuple[int, float]], start: int, count: int) -> float:
    """Scenes a second over `count` scenes from the one numbered `start` on."""
    numbers, times = np.array(ended, float).T
    first, last = np.interp([start, start + count], numbers, times)
    return float((min(start + count, numbers[-1]) - start) / (last - first))


def main() -> None:
    """Parse, measure, print JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    ledger = kinds.add_parser("ledger")
    ledger.add_argument("--scenes", type=int, default=1_000_000)
    small = kinds.add_parser("scenes")
    small.add_argument("source", type=Path)
    small.add_argument("--scenes", type=int, default=2000)
    small.add_argument("--damaged", type=int, default=20)
    small.add_argument("--format", nargs="+", choices=["gpkg", "parquet"], default=["parquet", "gpkg"])
    small.add_argument("--threads", type=int, default=1)
    small.add_argument("--folder", type=Path, help="for crops and results, kept: run again, it goes on")
    small.add_argument("--untimed", action="store_true", help="failures alone")
    pace = kinds.add_parser("pace")
    pace.add_argument("--scenes", type=int, default=1_000_000)
    pace.add_argument("--done", type=int, default=20_000)
    pace.add_argument("--seconds", type=float, default=300.0, help="stop then, whatever is done")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if given.kind == "ledger":
            told: object = plan_many(folder, given.scenes)
        elif given.kind == "pace":
            told = keep_pace(folder, given.scenes, given.done, given.seconds)
        else:
            folder = given.folder or folder
            made, bad = prepare(folder, given.source, given.scenes, given.damaged)
            if given.untimed:
                options = DetectOptions(gsd="native", threads=given.threads, device="cpu")
                told = run_damaged(folder, made, bad, given.format[0], options)
            else:
                told = run_small(folder, made, bad, given.format, given.threads)
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    from archive import main as start  # by the name that the processes which work know it by

    start()
