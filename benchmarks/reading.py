"""What it costs to visit every tile of a large scene, beside plain rasterio windows and beside every block once.

    python benchmarks/reading.py /tmp/reading --json reading.json
    python benchmarks/reading.py /tmp/reading --scene sar --side 6000 --rounds 1

Scenes of 20,000 x 20,000 px are made in the folder, once (up to 2 GB each, a few minutes): cloud-optimised GeoTIFFs of
three bytes, one float32 and one uint16, and a GeoTIFF in strips. Tiles have 640 px and start every 512. Every cell is a
process of its own, in which torch is never imported; rounds take turns, and a figure is the median of its rounds.
Seconds start when the scene is open and one window of it was read: what that costs (the radiometry, looked up in spread
windows; the search for a black border; compiled kernels loaded) is told apart, as opening. Tiles are what a detector
gets: floats in [0, 1], one plane where the scene is grey; on a GPU the bytes of 8-bit scenes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import rasterio.shutil
from numpy.typing import NDArray
from rasterio._env import set_gdal_config
from rasterio.windows import Window

from babelrs_geo.tiling import Grid, Rect

TILE, STEP, TEXTURE = 640, 512, 2048
SENSORS = {"rgb": "rgb", "sar": "sar", "counts": "ir", "strips": "rgb"}
WAYS = {
    "plain": "rasterio windows, 1 thread",
    "blocks-1": "every block once, 1 thread",
    "blocks-2": "every block once, 2 threads",
    "floor-1": "every block once, a tile filled with a number after each, 1 thread",
    "floor-2": "every block once, a tile filled with a number after each, 2 threads",
    "visit-1": "every tile as model input, 1 thread",
    "visit-2": "every tile as model input, 2 threads",
    "bytes-1": "every tile as it goes to a GPU, 1 thread",
    "bytes-2": "every tile as it goes to a GPU, 2 threads",
    "run-2": "the same through inference.run, 2 readers",
}


def texture(r: np.random.Generator) -> NDArray[np.float32]:
    """Smooth ground at four scales, with rectangles on it."""
    out = np.zeros((TEXTURE, TEXTURE), np.float32)
    for cells, height in ((4, 30), (16, 20), (64, 12), (256, 8)):
        knots = r.normal(0, height, (cells + 2, cells + 2)).astype(np.float32)
        place = np.arange(TEXTURE) * cells / TEXTURE
        low, part = place.astype(int), (place % 1).astype(np.float32)
        rows = knots[low] * (1 - part)[:, None] + knots[low + 1] * part[:, None]
        out += rows[:, low] * (1 - part) + rows[:, low + 1] * part
    for _ in range(1500):
        (x, y), (w, h) = r.integers(0, TEXTURE - 60, 2), r.integers(6, 60, 2)
        out[y : y + h, x : x + w] += r.normal(0, 40)
    return out


def make(kind: str, path: Path, side: int) -> None:
    """A scene of a kind, with overviews but in strips."""
    r, plain = np.random.default_rng(0), path.with_suffix(".plain.tif")
    ground = texture(r)
    dtype, bands = {"sar": ("float32", 1), "counts": ("uint16", 1)}.get(kind, ("uint8", 3))
    profile = {
        "driver": "GTiff",
        "width": side,
        "height": side,
        "count": bands,
        "dtype": dtype,
        "BIGTIFF": "YES",
    }
    layout = {"tiled": True, "blockxsize": 512, "blockysize": 512, "interleave": "pixel"}
    place = {"crs": "EPSG:32633", "transform": rasterio.Affine(0.5, 0, 500_000, 0, -0.5, 5_000_000)}
    with rasterio.open(plain, "w", **profile, **layout, **place) as file:
        for y in range(0, side, TEXTURE):
            for x in range(0, side, TEXTURE):
                h, w = min(TEXTURE, side - y), min(TEXTURE, side - x)
                part = np.roll(ground, tuple(r.integers(0, TEXTURE, 2)), (0, 1))[:h, :w]
                if kind == "sar":
                    image = np.exp(part / 60)[None] * 0.05 * r.standard_exponential((1, h, w))
                elif kind == "counts":
                    image = np.clip(1000 + 8 * part[None] + r.normal(0, 20, (1, h, w)), 0, 65535)
                else:
                    grey = part * np.array([1, 0.9, 0.8])[:, None, None]
                    image = np.clip(110 + grey + r.normal(0, 3, (1, h, w)), 0, 255)
                file.write(image.astype(dtype), window=Window(x, y, w, h))
    if kind == "strips":
        rasterio.shutil.copy(
            plain, path, driver="GTiff", COMPRESS="DEFLATE", BIGTIFF="YES", NUM_THREADS="ALL_CPUS"
        )
    else:
        how = {"LEVEL": 1} if kind == "sar" else {"PREDICTOR": "YES"}
        cog = {
            "driver": "COG",
            "COMPRESS": "DEFLATE",
            "BLOCKSIZE": 512,
            "BIGTIFF": "YES",
            "NUM_THREADS": "ALL_CPUS",
        }
        rasterio.shutil.copy(plain, path, **cog, **how)
    plain.unlink()


def plain_windows(path: str) -> float:
    """Seconds to read every tile by rasterio, with GDAL's own block cache."""
    with rasterio.open(path) as file:
        starts = sorted({min(i, file.width - TILE) for i in range(0, file.width - TILE + STEP, STEP)})
        before = time.perf_counter()
        for y in starts:
            for x in starts:
                file.read(window=Window(x, y, TILE, TILE))
        return time.perf_counter() - before


def every_block(path: str, threads: int, *, filled: bool = False) -> float:
    """Seconds to read the file by its blocks (strips: 64 at once), each once, a handle a thread. `filled`: into one
    array a thread, past GDAL's cache, with as many tiles of float32 filled as there are: less cannot be done.
    """
    own = threading.local()
    if filled:
        set_gdal_config("GDAL_CACHEMAX", 8 << 20)
    with rasterio.open(path) as file:
        down, across = file.block_shapes[0]
        down = down if across < file.width else 64
        windows = [
            Window(x, y, min(across, file.width - x), min(down, file.height - y))
            for y in range(0, file.height, down)
            for x in range(0, file.width, across)
        ]
        tiles = len(Grid(file.width, file.height, TILE, TILE - STEP)) if filled else 0

    def read(number: int) -> None:
        if not hasattr(own, "file"):
            own.file = rasterio.open(path)
            own.block = np.empty((own.file.count, down, across), own.file.dtypes[0])
            own.tile = np.empty((3, TILE, TILE), np.float32)
        window = windows[number]
        part = own.block[:, : window.height, : window.width] if filled else None
        own.file.read(window=window, out=part)
        for _ in range((number + 1) * tiles // len(windows) - number * tiles // len(windows)):
            own.tile.fill(number)

    before = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(read, range(len(windows))):
            pass
    return time.perf_counter() - before


def every_tile(path: str, sensor: str, threads: int, *, to_gpu: bool = False) -> tuple[float, float]:
    """Seconds to open the scene, and to visit every tile of its grid by `Scene.read`."""
    from babelrs_geo.scenes import open_scene
    from babelrs_geo.scenes.develop import sheet

    before = time.perf_counter()
    with open_scene(path, sensor) as scene, ThreadPoolExecutor(threads) as pool:
        scene.find_collar()
        scene.read((0, 0, 1, 1))
        opened = time.perf_counter()
        grid = Grid(scene.width, scene.height, TILE, TILE - STEP)
        tiles = [grid[i].outer for i in grid.order(scene.strip(), paired=scene.is_tiled)]

        plain = to_gpu and scene.holds_bytes
        shown = np.uint8 if plain else np.float32

        def look(tile: Rect) -> None:
            scene.read(
                tile, out=sheet(scene.radiometry, 1, TILE, TILE, shown)[0]
            )  # and the model does nothing

        with scene.expecting(tiles):
            for _ in pool.map(look, tiles):
                pass
        return opened - before, time.perf_counter() - opened


def every_batch(path: str, sensor: str, threads: int) -> tuple[float, float]:
    """Seconds to open the scene, and to bring it to a detector that does nothing."""
    from babelrs_geo.detections import Detections
    from babelrs_geo.inference import InferenceOptions, run
    from babelrs_geo.scenes import open_scene
    from babelrs_geo.tiling import Grid

    def nothing(images: NDArray[np.float32]) -> list[Detections]:
        return [Detections.empty(("ship",), False)] * len(images)

    before = time.perf_counter()
    with open_scene(path, sensor) as scene:
        scene.find_collar()
        scene.read((0, 0, 1, 1))
        opened = time.perf_counter()
        grid = Grid(scene.width, scene.height, TILE, TILE - STEP)
        run(scene, nothing, grid, options=InferenceOptions(readers=threads))
        return opened - before, time.perf_counter() - opened


def measure(way: str, path: str, sensor: str) -> dict[str, float]:
    """One cell, in this process."""
    opening, (name, _, threads) = 0.0, way.partition("-")
    if name == "plain":
        seconds = plain_windows(path)
    elif name in ("blocks", "floor"):
        seconds = every_block(path, int(threads), filled=name == "floor")
    else:
        visits: dict[str, Callable[[str, str, int], tuple[float, float]]] = {
            "visit": every_tile,
            "bytes": partial(every_tile, to_gpu=True),
            "run": every_batch,
        }
        opening, seconds = visits[name](path, sensor, int(threads))
    if "torch" in sys.modules:
        raise SystemExit("torch was imported")
    return {"seconds": seconds, "opening": opening}


def cell(way: str, path: Path, sensor: str) -> dict[str, float]:
    """One cell, in a process of its own, with its peak of memory in MiB."""
    command = [sys.executable, __file__, str(path), "--measure", way, "--scene", sensor]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    text = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = status
    if status:
        raise SystemExit(f"{way} of {path} ended with status {status}")
    used = {"memory": usage.ru_maxrss / 1024, "cpu": usage.ru_utime + usage.ru_stime}
    return json.loads(text) | used


def table(kind: str, path: Path, rounds: int) -> dict[str, dict[str, Any]]:
    """All ways over one scene, printed."""
    told: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with path.open("rb") as file:  # from a warm disk, as far as memory goes
        while file.read(1 << 24):
            pass
    for _ in range(rounds):
        for way in WAYS:
            told[way].append(cell(way, path, SENSORS[kind]))
    figures = {
        way: {name: statistics.median(each[name] for each in cells) for name in cells[0]}
        for way, cells in told.items()
    }
    for way, figure in figures.items():
        for base in ("plain", "blocks-1", "blocks-2"):
            ratios = [a["seconds"] / b["seconds"] for a, b in zip(told[way], told[base], strict=True)]
            figure[f"/ {base}"] = statistics.median(ratios)
    print(f"\n{kind} ({path.stat().st_size / 1e9:.2f} GB)\n")
    print("| way | s | / plain | / blocks, 1 thread | / blocks, 2 threads | peak MiB | opening s |")
    print("|---|---|---|---|---|---|---|")
    for way, f in figures.items():
        ratio = " | ".join(f"{f[f'/ {base}']:.2f}" for base in ("plain", "blocks-1", "blocks-2"))
        print(
            f"| {WAYS[way]} | {f['seconds']:.2f} | {ratio} | {f['memory']:.0f} | {f['opening']:.2f} |",
            flush=True,
        )
    return figures


def main() -> None:
    """Make the scenes that are missing, measure, print, and write where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a folder for the scenes, which stay there")
    parser.add_argument("--scene", action="append", help=f"one of {', '.join(SENSORS)}; all if left out")
    parser.add_argument("--side", type=int, default=20_000, help="pixels a side")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--json", type=Path, help="write the figures to this file, beside those of other scenes"
    )
    parser.add_argument("--make", action="store_true", help="make the scenes and measure nothing")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, str(options.folder), options.scene[0])))
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    found = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    for kind in options.scene or SENSORS:
        path = options.folder / f"{kind}{options.side}.tif"
        if not path.exists():  # in another process: a cell's peak of memory counts what its parent held
            maker = multiprocessing.get_context("spawn").Process(target=make, args=(kind, path, options.side))
            maker.start()
            maker.join()
            if maker.exitcode:
                raise SystemExit(f"{path} could not be made")
        if not options.make:
            found[f"{kind} {options.side}"] = table(kind, path, options.rounds)
            if options.json:
                options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
