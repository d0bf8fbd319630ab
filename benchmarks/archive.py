"""What an archive costs beside the model: a ledger of a million scenes, and small scenes with some damaged.

    python benchmarks/archive.py ledger --scenes 1000000
    python benchmarks/archive.py scenes ../shared/data/scenes --scenes 2000 --damaged 20

`ledger` plans scenes from a manifest without touching a file, and asks for the status. `scenes` cuts crops from real
rasters, each at a place of its own, damages some in ten ways, runs them with the bundled weights, and holds the wall
time of the undamaged to one read of their pixels and the model's forward time on the same tiles, in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import rasterio
from rasterio.transform import from_origin

from babelrs_geo.archive.cell import Limits
from babelrs_geo.archive.ledger import Ledger
from babelrs_geo.archive.run import RunOptions, run
from babelrs_geo.archive.sources import find
from babelrs_geo.archive.work import Detection, fitting, weights_hash
from babelrs_geo.detect import DetectOptions

SIDE = 256
SENSORS = {"sentinel1_port_la_db.tif": ("sar", 30.0), "rgb_dutch_orthophoto.tif": ("rgb", 0.25)}
"""Sources and the pixel size, in metres, of the crops. Infrared is the Dutch orthophoto's red band as 8-bit counts."""


def plan_many(folder: Path, scenes: int) -> dict[str, float]:
    """Seconds and memory to plan scenes from a manifest and to tell the status."""
    manifest = folder / "scenes.csv"
    with manifest.open("w") as file:
        file.write("scene,sensor,priority,size,stamp\n")
        for n in range(scenes):
            file.write(f"/archive/{n % 1000:03d}/S1_{n:09d}.tif,sar,{n % 3},{n * 7919 % 1_000_003},{n}\n")
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
    draw, images = np.random.default_rng(0), {}
    for name in SENSORS:
        with rasterio.open(source / name) as file:
            images[name] = file.read()
    made = []
    for n in range(scenes):
        name = list(SENSORS)[n % 2]
        sensor, metres = SENSORS[name]
        if n % 6 == 5:
            sensor, metres = "ir", 0.12
        whole = images[name]
        y, x = (int(draw.integers(0, side - SIDE)) for side in whole.shape[1:])
        pixels = whole[:, y : y + SIDE, x : x + SIDE]
        pixels = pixels[:1] if sensor == "ir" else pixels[:3]
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


def run_small(folder: Path, source: Path, scenes: int, damaged: int, form: str) -> dict[str, object]:
    """The run's time beside that of reading and computing alone."""
    import torch

    from babelrs_geo.detect import plan_for
    from babelrs_geo.models import zoo
    from babelrs_geo.scenes import open_scene

    torch.set_num_threads(1)
    (folder / "in").mkdir()
    made = write_crops(folder / "in", source, scenes)
    draw, kinds = random.Random(0), list(DAMAGES)
    bad = {path: kinds[n % len(kinds)] for n, (path, _) in enumerate(draw.sample(made, damaged))}
    for path, kind in bad.items():
        DAMAGES[kind](Path(path))
    manifest = folder / "scenes.csv"
    manifest.write_text("scene,sensor\n" + "".join(f"{path},{sensor}\n" for path, sensor in made))
    options = DetectOptions(gsd="native", threads=1, device="cpu")
    limit = 5.0
    begun = time.perf_counter()
    ended = run(
        folder / "out",
        lambda: find([str(manifest)]),
        Detection("compact", "cpu", options),
        {"weights": weights_hash("compact")},
        RunOptions(suffix=f".{form}", limits=Limits(seconds=limit), attempts=1),
    )
    wall = time.perf_counter() - begun
    with Ledger(folder / "out") as ledger:
        failed = {row["source"] for row in ledger.rows("SELECT source FROM scenes WHERE state = 'failed'")}
        spent = ledger.one("SELECT sum(seconds) FROM scenes WHERE state = 'done'")
        reasons = [row["reason"] for row in ledger.rows("SELECT reason FROM scenes WHERE state = 'failed'")]
    weights = zoo.load("compact", "cpu")
    forward = reading = 0.0
    for path, sensor in made:
        if path in bad:
            continue
        begun = time.perf_counter()
        with open_scene(path, sensor) as scene:
            grid = plan_for(scene, weights.header, options).grid
            images = [scene.read(tile.outer).image for tile in grid]
        reading += time.perf_counter() - begun
        find_objects = weights.detector(sensor)
        batch = fitting(options.batch, len(images))
        begun = time.perf_counter()
        for start in range(0, len(images), batch):
            find_objects(np.stack(images[start : start + batch]))
        forward += time.perf_counter() - begun
    return {
        "scenes": scenes,
        "format": form,
        "states": dict(ended.counts),
        "exactly_the_damaged_failed": failed == set(bad),
        "wall_s": wall,
        "undamaged_s": spent,
        "forward_s": forward,
        "read_s": reading,
        "undamaged_over_forward_and_read": spent / (forward + reading),
        "wall_over_forward_and_read": wall / (forward + reading),
        "reasons": sorted(set(reasons))[:20],
    }


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
    small.add_argument("--format", choices=["gpkg", "parquet"], default="parquet")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if given.kind == "ledger":
            told: object = plan_many(Path(folder), given.scenes)
        else:
            told = run_small(Path(folder), given.source, given.scenes, given.damaged, given.format)
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
