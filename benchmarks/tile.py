"""Tiling, timed: `python benchmarks/tile.py FOLDER` (a 20,000 x 20,000 three-band COG; `--side 4000` for a quick look).

The scene and its halves are made first and kept; `--prepare` makes them and measures nothing.

Every figure is measured in this run, on this machine, which should do nothing else:

* *floor*: every block of the COG read once, in order, plus the pixels that the chips hold written once, by the same
  compression, into GeoTIFFs of the blocks' own size; one process. Files are in the system's memory before anything is
  timed; each figure is the best of `--rounds`, which come in turn;
* *tile*: `babelrs-geo tile` with one process, start of the interpreter included, and its ratio to the floor;
* *memory*: the largest resident set of any process of a run, read from the kernel, which counts what its parent held
  when it was started: so the scene is made by a process of its own;
* *two workers*: scenes a second of one run with two workers, over the sum of two runs that each tile half of the scene
  alone, side by side; whole runs, from start to end.

`blocks read` counts the windows that tiling asks for, in blocks of the file, over the blocks there are.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import rasterio
import rasterio.shutil
from rasterio.windows import Window

from babelrs_geo.chips import ChipOptions, cut_chips, read_index
from babelrs_geo.chips.geotiff import write_chip
from babelrs_geo.scenes import open_scene
from babelrs_geo.tiling import Rect

SPLIT = "0.8/0.1/0.1"


def make_cog(path: Path, width: int, height: int) -> None:
    """Three bands of smooth ground, edges and noise, deflated, with overviews: as a photograph compresses."""
    plain = _plain(path)
    r = np.random.default_rng(0)
    profile = {
        "driver": "GTiff",
        "width": width,
        "height": height,
        "count": 3,
        "dtype": "uint8",
        "crs": "EPSG:32631",
        "transform": rasterio.Affine(0.5, 0, 400_000, 0, -0.5, 5_000_000),
        "tiled": True,
        "blockxsize": 512,
        "blockysize": 512,
        "photometric": "RGB",
    }
    with rasterio.open(plain, "w", **profile) as file:
        for y in range(0, height, 512):
            h = min(512, height - y)
            rows, columns = np.mgrid[y : y + h, 0:width]
            ground = (
                110
                + 60 * np.sin(rows / 170) * np.cos(columns / 230)
                + 30 * ((rows // 64 + columns // 96) % 3)
            )
            bands = [ground + k + r.integers(-4, 5, ground.shape) for k in (0, 8, -8)]
            file.write(np.clip(bands, 1, 255).astype(np.uint8), window=Window(0, y, width, h))
    _finish(plain, path)


def _plain(path: Path) -> Path:
    return path.with_suffix(".plain.tif")


def _finish(plain: Path, path: Path) -> None:
    """A COG of a plain GeoTIFF, which goes."""
    rasterio.shutil.copy(
        plain, path, driver="COG", COMPRESS="DEFLATE", PREDICTOR="YES", BLOCKSIZE=512, NUM_THREADS="ALL_CPUS"
    )
    plain.unlink()


def cut_half(source: Path, path: Path, top: int, rows: int) -> None:
    """Half of the scene as a file of its own, stored as the whole is."""
    with rasterio.open(source) as file:
        profile = file.profile | {"height": rows, "driver": "GTiff", "bigtiff": "IF_SAFER", "compress": None}
        profile["transform"] = file.window_transform(Window(0, top, file.width, rows))
        with rasterio.open(_plain(path), "w", **profile) as out:
            for y in range(0, rows, 512):
                window = Window(0, y, file.width, min(512, rows - y))
                out.write(file.read(window=Window(0, top + y, file.width, window.height)), window=window)
    _finish(_plain(path), path)


def prepare(folder: Path, side: int) -> tuple[Path, list[Path]]:
    """The scene and its halves, made where they are not there; by a process that ends, for the sake of *memory*."""
    folder.mkdir(parents=True, exist_ok=True)
    cog, halves = folder / "scene.tif", [folder / "upper.tif", folder / "lower.tif"]
    made: list[tuple[Path, Callable[..., None], tuple[object, ...]]] = [(cog, make_cog, (cog, side, side))]
    made += [(half, cut_half, (cog, half, n * (side // 2), side // 2)) for n, half in enumerate(halves)]
    for path, make, given in made:
        if not path.exists():
            maker = multiprocessing.get_context("spawn").Process(target=make, args=given)
            maker.start()
            maker.join()
    return cog, halves


def floor(source: Path, folder: Path, pixels: int) -> tuple[float, float]:
    """Seconds to read every block once, and to write `pixels` pixels once."""
    folder.mkdir()
    with open_scene(source, "rgb") as scene:
        start = time.perf_counter()
        with rasterio.open(source) as file:
            for _, window in file.block_windows(1):
                file.read(window=window)
        read = time.perf_counter() - start
        side, written, start = 1024, 0, time.perf_counter()
        raw = scene.read_raw((0, 0, min(side, scene.width), min(side, scene.height)))
        valid = np.ones(raw.shape[1:], bool)
        rect = Rect(0, 0, raw.shape[2], raw.shape[1])
        while written < pixels:
            write_chip(folder / f"{written}.tif", raw, valid, scene.facts, scene.georef, rect)
            written += raw.shape[1] * raw.shape[2]
        write = (time.perf_counter() - start) * pixels / written
    shutil.rmtree(folder)
    return read, write


def tile(sources: list[Path], out: Path, options: argparse.Namespace, workers: int) -> list[str]:
    """The command line of a run."""
    size = ["--size", str(options.size), "--overlap", str(options.size // 4), "--split", SPLIT]
    command = [sys.executable, "-m", "babelrs_geo", "tile", *map(str, sources), "--sensor", "rgb", *size]
    return [*command, "-o", str(out), "--workers", str(workers), "--quiet"]


def timed(commands: list[list[str]]) -> tuple[list[float], float, float]:
    """Seconds of each command, all at once, the largest resident set of any process in MiB, and processor seconds of
    those that were started, without their children.
    """
    start = time.perf_counter()
    pids = {os.posix_spawn(c[0], c, dict(os.environ)): n for n, c in enumerate(commands)}
    seconds, largest, busy, ended = [0.0] * len(commands), [0.0], 0.0, threading.Event()
    watcher = threading.Thread(target=watch, args=(list(pids), largest, ended))
    watcher.start()
    for _ in commands:
        pid, status, usage = os.wait4(-1, 0)
        seconds[pids[pid]] = time.perf_counter() - start
        if status:
            raise SystemExit(f"a run ended with status {status}: {' '.join(commands[pids[pid]])}")
        largest[0] = max(largest[0], usage.ru_maxrss / 1024)
        busy += usage.ru_utime + usage.ru_stime
    ended.set()
    watcher.join()
    return seconds, largest[0], busy


def watch(pids: list[int], largest: list[float], ended: threading.Event) -> None:
    """The largest resident set of these processes and all that they start, as the kernel remembers it, in MiB."""
    while not ended.wait(0.5):
        left = list(pids)
        while left:
            place = Path(f"/proc/{left.pop()}")
            with contextlib.suppress(OSError, StopIteration):  # it has ended
                lines = (place / "status").read_text().splitlines()
                peak = next(line for line in lines if line.startswith("VmHWM"))
                largest[0] = max(largest[0], int(peak.split()[1]) / 1024)
                for path in (place / "task").glob("*/children"):
                    left += map(int, path.read_text().split())


def blocks_read(source: Path, out: Path, options: argparse.Namespace) -> float:
    """Blocks of the file that tiling asks for, over those there are."""
    asked = 0
    with open_scene(source, "rgb") as scene:
        down, across = scene.facts.block
        kind = type(scene)
        whole = kind.read_both

        def counted(self, window, **how):  # type: ignore[no-untyped-def]
            nonlocal asked
            x, y, w, h = window
            asked += (-(-(y + h) // down) - y // down) * (-(-(x + w) // across) - x // across)
            return whole(self, window, **how)

        kind.read_both = counted  # type: ignore[method-assign]
        try:
            cut_chips([scene], out, options=ChipOptions(size=options.size, overlap=options.size // 4))
        finally:
            kind.read_both = whole  # type: ignore[method-assign]
        shutil.rmtree(out)
        return asked / (-(-scene.height // down) * -(-scene.width // across))


def measure(cog: Path, halves: list[Path], folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """One round of all that is timed. Leaves the chips of the last one."""
    for made in folder.iterdir():
        shutil.rmtree(made)
    (alone,), memory, busy = timed([tile([cog], folder / "one", options, 1)])
    index = read_index(folder / "one")
    before = time.process_time()
    read, write = floor(cog, folder / "floor", int((index["width"] * index["height"]).sum()))
    least = time.process_time() - before
    (together,), shared, _ = timed([tile([cog], folder / "two", options, 2)])
    apart, _, _ = timed([tile([half], folder / half.stem, options, 1) for half in halves])
    found = {"tile s": alone, "busy s": busy, "read s": read, "write s": write, "least s": least}
    found |= {"together s": together, "upper s": apart[0], "lower s": apart[1]}
    return found | {"memory": memory, "shared": shared}


def main() -> None:
    """Make the scene, measure, print the table, and write it where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="an empty or new folder with room for five times the scene")
    parser.add_argument("--side", type=int, default=20_000, help="pixels a side of the scene")
    parser.add_argument("--size", type=int, default=800, help="pixels a side of a chip; a quarter overlaps")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--prepare", action="store_true", help="make the scene and its halves, and end")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    side = options.side
    cog, halves = prepare(options.folder, side)
    if options.prepare:
        return
    folder = options.folder / "out"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    subprocess.run(
        [sys.executable, "-c", "import babelrs_geo.chips, distributed"], check=True
    )  # from the disk
    rounds = [measure(cog, halves, folder, options) for _ in range(options.rounds)]
    best = {name: min(each[name] for each in rounds) for name in rounds[0]}
    index = read_index(folder / "one")
    least = best["read s"] + best["write s"]
    apart = [best["upper s"], best["lower s"]]
    figures: dict[str, float | int | str] = {
        "scene": f"{side} x {side} x 3",
        "chips": len(index),
        "pixels of chips / scene": round(float((index["width"] * index["height"]).sum()) / side**2, 2),
        "read s": round(best["read s"], 2),
        "write s": round(best["write s"], 2),
        "tile s": round(best["tile s"], 2),
        "tile / floor": round(best["tile s"] / least, 3),
        "tile / floor, each round": ", ".join(
            f"{each['tile s'] / (each['read s'] + each['write s']):.3f}" for each in rounds
        ),
        "tile / floor, processor seconds": round(best["busy s"] / best["least s"], 3),
        "tile / floor, two workers": round(best["together s"] / least, 3),
        "memory MiB": round(max(each["memory"] for each in rounds)),
        "memory MiB, two workers": round(max(each["shared"] for each in rounds)),
        "two workers s": round(best["together s"], 2),
        "halves s": " and ".join(f"{s:.2f}" for s in apart),
        "two workers / two halves": round((1 / best["together s"]) / sum(0.5 / s for s in apart), 3),
        "two workers / two halves, each round": ", ".join(
            f"{(1 / each['together s']) / sum(0.5 / each[k] for k in ('upper s', 'lower s')):.3f}"
            for each in rounds
        ),
        "blocks read": blocks_read(cog, folder / "count", options),
    }
    shutil.rmtree(folder)
    print("| figure | value |\n|---|---|")
    for name, value in figures.items():
        print(f"| {name} | {value} |")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
