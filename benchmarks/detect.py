"""What detection costs beside the model, in time and memory: `python benchmarks/detect.py FOLDER --row memory`.

Rows, each of two to six minutes on an idle machine; all of them unless some are named. Scenes are made in the folder,
once.

memory   Peak resident memory of `detect` with a detector that finds nothing, on single-band 8-bit scenes of 10,000 and
         40,000 px: GeoTIFFs in deflated tiles of a pattern that packs well, every one of which is decoded. Each in a
         process of its own, without torch.
compact  `detect` and the GeoPackage of a three-band scene of 36 tiles by the bundled weights, over forward passes alone
         on the same batches, which are in memory. Start-up (imports, weights) is excluded.
kept     Forward passes of the bundled weights in a thread, batches of 4 and of 2, where the memory of large arrays goes
         back to the kernel and where it stays with the process, as the command has it. Each in a process of its own.
small    As `compact`, on 8192 x 8192 px (256 tiles) with a network of two convolutions that finds its 25 brightest
         places in each tile, one thread to compute and one to read. Detection is from the open scene to merged boxes;
         `reading` visits the tiles alone; `plain` reads windows by rasterio and computes them one by one, and no more.
workers  Groups of 64 tiles by two Dask workers, over two processes without Dask that do half the groups each: compact
         weights, a thread each, started and warmed up before.
first    `babelrs-geo detect` from the shell's call to the file on the disk: scenes of one tile, and the example of six,
         over `import torch` alone; then where the time goes in one process.

Rounds take turns; a ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.windows import Window

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "harbour_sar.tif"
TILE, STEP = 640, 512
SCENES = {
    "memory": (("pattern", 10_000), ("pattern", 40_000)),
    "compact": (("rgb", TILE + 5 * STEP),),
    "small": (("rgb", 8192),),
    "workers": (("rgb", TILE + 7 * STEP),),
}
Cells = dict[str, float]
Line = tuple[str, str, list[Cells], str, float]
"""What was measured, the unit that counts, each round, what it is over, and the ratio."""


def pattern(path: Path, side: int) -> None:
    """A single-band 8-bit scene of dark rows and columns with a bright rectangle in each block."""
    block = (40 + np.add.outer(np.arange(512) // 64, np.arange(512) // 32)).astype(np.uint8)
    block[200:230, 100:180] = 220
    profile = {
        "driver": "GTiff",
        "width": side,
        "height": side,
        "count": 1,
        "dtype": "uint8",
        "BIGTIFF": "YES",
    }
    layout = {"tiled": True, "blockxsize": 512, "blockysize": 512, "compress": "deflate", "zlevel": 1}
    place = {"crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 300_000, 0, -10, 5_000_000)}
    with rasterio.open(path, "w", **profile, **layout, **place) as file:
        row = np.tile(block, (1, -(-side // 512)))[:, :side]
        for y in range(0, side, 512):
            file.write(row[None, : side - y], window=Window(0, y, side, min(512, side - y)))


def ready(folder: Path, kind: str, side: int) -> Path:
    """A scene, made where it is missing, in another process: a cell's memory counts what its parent held."""
    path = folder / f"{kind}{side}.tif"
    if not path.exists():
        from reading import make

        given = (path, side) if kind == "pattern" else (kind, path, side)
        maker = multiprocessing.get_context("spawn").Process(
            target=pattern if kind == "pattern" else make, args=given
        )
        maker.start()
        maker.join()
        if maker.exitcode:
            raise SystemExit(f"{path} could not be made")
    return path


@dataclass(frozen=True)
class Network:
    """As weights with any callable for a network."""

    find: Callable[[NDArray[np.float32]], Any]
    name: str = "none"
    sha256: str = "0" * 64
    tile: int = TILE
    thresholds: Any = None
    gsd: Any = None

    @property
    def header(self) -> Any:
        """Itself: it says of itself what a header says."""
        every = {"sar": (0.01, 1e4), "rgb": (0.01, 1e4)}
        thresholds = {sensor: {"ship": 0.0} for sensor in every}
        return Network(self.find, thresholds=thresholds, gsd=every)

    def chosen(self, sensor: str, classes: Sequence[str] | None = None) -> tuple[str, ...]:
        """The one class there is."""
        return ("ship",)

    def detector(self, sensor: str, score: Any = None, classes: Any = None) -> Callable[..., Any]:
        """The network."""
        return self.find


def nothing(images: NDArray[np.float32]) -> list[Any]:
    """Finds nothing."""
    from babelrs_geo.detections import Detections

    return [Detections.empty(("ship",), False)] * len(images)


def measure_memory(path: str) -> Cells:
    """A whole detection with a detector that finds nothing."""
    import babelrs_geo as bg

    before = time.perf_counter()
    with bg.open_scene(path, "sar") as scene, tempfile.TemporaryDirectory() as folder:
        weights: Any = Network(nothing)
        bg.detect(scene, weights).save(Path(folder, "out.gpkg"))
    if "torch" in sys.modules:
        raise SystemExit("torch was imported")
    return {"seconds": time.perf_counter() - before}


def cell(command: list[str]) -> Cells:
    """A process of its own: seconds, and its peak of memory in MiB; what it prints as JSON is added."""
    before = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT)
    assert child.stdout is not None
    told = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = status
    if status:
        raise SystemExit(f"{' '.join(command)} ended with status {status}")
    whole = {"seconds": time.perf_counter() - before, "memory": usage.ru_maxrss / 1024}
    return whole | (json.loads(told) if told.startswith("{") else {})


def memory(folder: Path, rounds: int) -> Iterator[Line]:
    """10,000 px against 40,000."""
    paths = {side: ready(folder, kind, side) for kind, side in SCENES["memory"]}
    cells: dict[int, list[Cells]] = {side: [] for side in paths}
    for _ in range(rounds):
        for side, path in paths.items():
            cells[side].append(cell([sys.executable, __file__, str(path), "--measure", "memory"]))
    for side in paths:
        ratio = over(cells[side], cells[10_000], "memory")
        yield f"peak memory, {side:,} px", "memory", cells[side], "10,000 px", ratio


def look_at(scene: Any, batch: int = 4) -> Any:
    """How `detect` looks at a scene at its own pixels."""
    from babelrs_geo.inference import InferenceOptions, Look
    from babelrs_geo.tiling import Grid

    return Look(
        scene, Grid(scene.width, scene.height, TILE, TILE - STEP), options=InferenceOptions(batch=batch)
    )


def read(scene: Any, tile: Any) -> NDArray[Any]:
    """A tile as a detector gets it on a CPU."""
    from babelrs_geo.scenes.develop import sheet

    (room,) = sheet(scene.radiometry, 1, TILE, TILE)
    image: NDArray[Any] = scene.read(tile, out=room).image
    return image


def batches_of(look: Any) -> list[NDArray[Any]]:
    """The batches of a detection, in memory."""
    batch, out = look.options.batch, []
    for group in look.groups(np.ones(len(look.grid), bool)):
        tiles = [look.grid[i].outer for i in group.tiles]
        for start in range(0, len(tiles), batch):
            out.append(np.stack([read(look.scene, tile) for tile in tiles[start : start + batch]]))
    return out


def timed(work: Callable[[], Any]) -> float:
    """Seconds of a call."""
    before = time.perf_counter()
    work()
    return time.perf_counter() - before


def in_turns(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[Cells]]:
    """Seconds of each way, once unmeasured and then in turns."""
    for work in ways.values():
        work()
    told: dict[str, list[Cells]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, work in ways.items():
            told[way].append({"seconds": timed(work)})
    return told


def over(told: Sequence[Cells], base: Sequence[Cells], unit: str = "seconds") -> float:
    """The median ratio of the rounds."""
    return statistics.median(a[unit] / b[unit] for a, b in zip(told, base, strict=True))


def whole(path: Path, weights: Any, batch: int = 4) -> Callable[[], None]:
    """From an open scene to a GeoPackage."""
    import babelrs_geo as bg

    def work() -> None:
        with bg.open_scene(path, "rgb") as scene, tempfile.TemporaryDirectory() as folder:
            found = bg.detect(scene, weights, bg.DetectOptions(batch=batch, gsd="native"))
            found.save(Path(folder, "out.gpkg"))

    return work


def compact(folder: Path, rounds: int) -> Iterator[Line]:
    """The bundled weights."""
    import torch

    from babelrs_geo import allocation
    from babelrs_geo.models import zoo
    from babelrs_geo.scenes import open_scene

    allocation.keep()  # as the command does
    torch.set_num_threads(2)
    path, weights = ready(folder, *SCENES["compact"][0]), zoo.load("compact")
    find = weights.detector("rgb")
    with open_scene(path, "rgb") as scene:
        batches = batches_of(look_at(scene))
    ways = {"forward": lambda: [find(b) for b in batches], "detect": whole(path, weights)}
    told = in_turns(ways, rounds)
    yield "compact, forward passes alone", "seconds", told["forward"], "", 1.0
    ratio = over(told["detect"], told["forward"])
    yield "compact, detect and GeoPackage", "seconds", told["detect"], "forward", ratio


def measure_kept(path: str, *, kept: bool, batch: int) -> Cells:
    """Forward passes in a thread of this process, where `detect` has them."""
    import torch

    from babelrs_geo import allocation
    from babelrs_geo.models import zoo
    from babelrs_geo.scenes import open_scene

    if kept and not allocation.keep():
        raise SystemExit("nothing can be kept here")
    torch.set_num_threads(2)
    find = zoo.load("compact").detector("rgb")
    with open_scene(path, "rgb") as scene:
        batches = batches_of(look_at(scene, batch))[: 12 // batch]
    with ThreadPoolExecutor(1) as pool:
        pool.submit(find, batches[0]).result()
        return {"seconds": timed(lambda: [pool.submit(find, each).result() for each in batches])}


KEPT = {
    f"{kept}-{batch}": partial(measure_kept, kept=kept == "kept", batch=batch)
    for batch in (4, 2)
    for kept in ("given back", "kept")
}


def kept(folder: Path, rounds: int) -> Iterator[Line]:
    """Memory that stays."""
    path = str(ready(folder, *SCENES["compact"][0]))
    told: dict[str, list[Cells]] = {way: [] for way in KEPT}
    for _ in range(rounds):
        for way in KEPT:
            told[way].append(cell([sys.executable, __file__, path, "--measure", way]))
    for way, cells in told.items():
        what, _, batch = way.partition("-")
        for unit in ("seconds", "memory"):
            ratio = over(cells, told["given back-4"], unit)
            yield f"12 tiles by {batch}, memory {what}", unit, cells, "by 4, given back", ratio


def brightest() -> Callable[[NDArray[np.float32]], list[Any]]:
    """Two convolutions, and the 25 highest places of their map as boxes."""
    import torch

    from babelrs_geo.detections import Detections

    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 8, 8), torch.nn.ReLU(), torch.nn.Conv2d(16, 1, 3, padding=1)
    )

    @torch.inference_mode()
    def find(images: NDArray[np.float32]) -> list[Detections]:
        scores = net(torch.from_numpy(images)).flatten(1).sigmoid()
        value, place = scores.topk(25)
        y, x = (8.0 * part + 4 for part in (place // (images.shape[3] // 8), place % (images.shape[3] // 8)))
        boxes = torch.stack([x, y, torch.full_like(x, 20), torch.full_like(x, 12), torch.zeros_like(x)], -1)
        labels = np.zeros(25, np.int64)
        return [
            Detections(b, v, labels, ("ship",), False)
            for b, v in zip(boxes.numpy(), value.numpy(), strict=True)
        ]

    return find


def small(folder: Path, rounds: int) -> Iterator[Line]:
    """A network that costs next to nothing."""
    import torch

    from babelrs_geo import allocation
    from babelrs_geo.inference import gather
    from babelrs_geo.scenes import open_scene

    allocation.keep()  # as the command does
    torch.set_num_threads(1)
    path, find = ready(folder, *SCENES["small"][0]), brightest()
    with open_scene(path, "rgb") as scene:
        batches = batches_of(look_at(scene))

    def reading() -> None:
        with open_scene(path, "rgb") as scene:
            look = look_at(scene)
            tiles = [look.grid[i].outer for i in look.grid.order(scene.strip(), paired=scene.is_tiled)]
            with scene.expecting(tiles):
                for tile in tiles:
                    read(scene, tile)

    def detecting() -> None:
        with open_scene(path, "rgb") as scene:
            look = look_at(scene)
            gather(look, lambda groups, tick: look.parts([find], groups, tick))

    def plain() -> None:
        with rasterio.open(path) as file:
            last = 8192 - TILE
            starts = [min(i, last) for i in range(0, last + STEP, STEP)]
            for y in starts:
                for x in starts:
                    find(file.read(window=Window(x, y, TILE, TILE))[None].astype(np.float32) / 255)

    told = in_turns(
        {
            "forward": lambda: [find(b) for b in batches],
            "reading": reading,
            "detecting": detecting,
            "whole": whole(path, Network(find)),
            "plain": plain,
        },
        rounds,
    )
    forward, reads = told["forward"], told["reading"]
    larger = [max(pair, key=lambda c: c["seconds"]) for pair in zip(forward, reads, strict=True)]
    yield "small, forward passes alone", "seconds", forward, "", 1.0
    yield "small, reading alone", "seconds", reads, "forward", over(reads, forward)
    yield "small, a plain loop", "seconds", told["plain"], "forward", over(told["plain"], forward)
    detected = told["detecting"]
    yield "small, tiles to merged boxes", "seconds", detected, "the larger of both", over(detected, larger)
    yield "small, detect and GeoPackage", "seconds", told["whole"], "forward", over(told["whole"], forward)


def half(path: str, which: int, channel: Any) -> None:
    """A process of its own that does half of the groups, again and again, as it is told to."""
    import torch

    from babelrs_geo.models import zoo
    from babelrs_geo.scenes import open_scene

    torch.set_num_threads(1)
    find = zoo.load("compact").detector("rgb")
    with open_scene(path, "rgb") as scene:
        look = look_at(scene)
        groups = look.groups(np.ones(len(look.grid), bool))
        mine = groups[: len(groups) // 2] if which == 0 else groups[len(groups) // 2 :]
        for _ in look.parts([find], mine[:1]):
            pass
        channel.send("ready")
        while channel.recv():
            for _ in look.parts([find], mine):
                pass
            channel.send("done")


def workers(folder: Path, rounds: int) -> Iterator[Line]:
    """Dask's two beside two alone."""
    from babelrs_geo.cluster import Workers
    from babelrs_geo.detect.crew import Running, Where, crew_of
    from babelrs_geo.models import zoo
    from babelrs_geo.scenes import open_scene

    path, loaded = ready(folder, *SCENES["workers"][0]), zoo.load("compact")
    spawn = multiprocessing.get_context("spawn")
    channels = []
    for which in (0, 1):
        ours, theirs = spawn.Pipe()
        spawn.Process(target=half, args=(str(path), which, theirs), daemon=True).start()
        channels.append(ours)
    for channel in channels:
        channel.recv()

    def apart() -> None:
        for channel in channels:
            channel.send(True)
        for channel in channels:
            channel.recv()

    classes = loaded.header.chosen("rgb")
    with open_scene(path, "rgb") as scene:
        look = look_at(scene)
        groups = look.groups(np.ones(len(look.grid), bool))
        running, where = Running(workers=Workers(processes=2)), Where("compact", "cpu", 1)
        with crew_of(running, look, [loaded], None, classes, where) as crew:
            told = in_turns({"apart": apart, "dask": lambda: list(crew(groups, lambda n: None))}, rounds)
    for channel in channels:
        channel.send(False)
    share = 1 / over(told["dask"], told["apart"])
    yield f"workers, two processes alone, {len(look.grid)} tiles", "seconds", told["apart"], "", 1.0
    yield "workers, two of Dask, tiles/s", "seconds", told["dask"], "two alone", share


def measure_first(path: str) -> dict[str, float]:
    """Where the time of a detection goes, in one process."""
    told: dict[str, float] = {}

    def stage(name: str, work: Callable[[], Any]) -> Any:
        before = time.perf_counter()
        out = work()
        told[name] = time.perf_counter() - before
        return out

    import importlib

    from babelrs_geo.detect import detect

    stage("rasterio, geopandas, pyogrio imported", lambda: importlib.import_module("babelrs_geo.vectors"))
    scenes = stage("the scene's modules", lambda: importlib.import_module("babelrs_geo.scenes"))
    stage("torch imported", lambda: importlib.import_module("torch"))
    zoo = stage("the model's modules", lambda: importlib.import_module("babelrs_geo.models.zoo"))
    stage("merging, with numba", lambda: importlib.import_module("babelrs_geo.inference"))
    weights = stage("weights", lambda: zoo.load("compact"))
    scene = stage("the scene opened", lambda: scenes.open_scene(path, "sar"))
    find = weights.detector("sar")
    image = stage("a tile read", lambda: scene.read((0, 0, TILE, TILE)).image)
    stage("its forward pass", lambda: find(image[None]))
    stage("the same again", lambda: find(image[None]))
    found = stage("detect, reading and forward included", lambda: detect(scene, weights))
    with tempfile.TemporaryDirectory() as folder:
        stage("GeoPackage", lambda: found.save(Path(folder, "out.gpkg")))
    return told


def first(folder: Path, rounds: int) -> Iterator[Line]:
    """The command, from nothing to a file."""
    one = folder / "tile640.tif"
    with rasterio.open(EXAMPLE) as file:
        window = Window(300, 100, TILE, TILE)
        profile = file.profile | {"width": TILE, "height": TILE, "transform": file.window_transform(window)}
        with rasterio.open(one, "w", **profile) as clip:
            clip.write(file.read(window=window))
    out = folder / "first.gpkg"
    words = [sys.executable, "-m", "babelrs_geo", "detect"]
    more = ["--sensor", "sar", "--overwrite", "--quiet", "-o", str(out)]
    ways = {
        "first, import torch alone": [sys.executable, "-c", "import torch"],
        "first, a scene of one tile": [*words, str(one), *more],
        "first, the example, six tiles": [*words, str(EXAMPLE), *more],
    }
    told: dict[str, list[Cells]] = {way: [] for way in ways}
    for turn in range(rounds + 1):
        for way, command in ways.items():
            taken = cell(command)
            if turn:
                told[way].append(taken)
    base = told["first, import torch alone"]
    for way, cells in told.items():
        yield way, "seconds", cells, "import torch", over(cells, base)
    stages = [cell([sys.executable, __file__, str(one), "--measure", "first"]) for _ in range(rounds)]
    for name in stages[0]:
        if name not in ("seconds", "memory"):
            cells = [{"seconds": each[name]} for each in stages]
            yield f"... {name}", "seconds", cells, "import torch", over(cells, base)


ROWS = {
    "memory": memory,
    "compact": compact,
    "kept": kept,
    "small": small,
    "workers": workers,
    "first": first,
}


def main() -> None:
    """Measure, print a table, and write JSON where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a folder for the scenes, which stay there")
    parser.add_argument("--row", action="append", choices=ROWS, help="only this; may be repeated")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--json", type=Path, help="write the figures to this file, beside those of other rows"
    )
    parser.add_argument("--make", action="store_true", help="make the scenes of the rows and measure nothing")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        ways: dict[str, Callable[[str], Cells]] = {"memory": measure_memory, "first": measure_first, **KEPT}
        print(json.dumps(ways[options.measure](str(options.folder))))
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.make:
        for kind, side in [scene for name in options.row or ROWS for scene in SCENES.get(name, ())]:
            ready(options.folder, kind, side)
        return
    found = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    print("| what | median | lowest | highest | ratio | of |\n|---|---|---|---|---|---|")
    for name in options.row or ROWS:
        for what, unit, cells, base, ratio in ROWS[name](options.folder, options.rounds):
            values = [each[unit] for each in cells]
            shown = ["%.0f MiB" if unit == "memory" else "%.2f s"] * 3
            figures = [
                form % value
                for form, value in zip(
                    shown, (statistics.median(values), min(values), max(values)), strict=True
                )
            ]
            print(f"| {what} | {' | '.join(figures)} | {ratio:.3f} | {base} |", flush=True)
            found[what] = {"values": values, "unit": unit, "ratio": ratio, "of": base}
        if options.json:
            options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
