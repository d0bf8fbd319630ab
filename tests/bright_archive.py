"""An archive whose scenes are bright rectangles, and the work that finds them without a network: real files, real
processes, real results, but no torch to load.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from oracle import patches
from rasterio.transform import from_origin

from babelrs_geo.archive.cell import Limits, Turn
from babelrs_geo.archive.crew import Workers
from babelrs_geo.archive.run import Ended, Progress, RunOptions, run
from babelrs_geo.archive.sources import find
from babelrs_geo.archive.work import Detection, Outcome, Task
from babelrs_geo.detect import DetectOptions
from babelrs_geo.detections import Detections

SMALL = DetectOptions(tile=48, overlap=16, batch=2)
WEIGHTS = "0" * 64


def write_ships(path: Path, seed: int, side: int = 64, crs: str | None = "EPSG:32633", **more: Any) -> int:
    """A dark GeoTIFF with some bright ships, at a place of its own; gives how many."""
    draw = np.random.default_rng(seed)
    image = np.full((side, side), 20, np.uint8)
    count = 0
    for y in range(4, side - 12, 16):
        for x in range(4, side - 12, 16):
            if draw.random() < 0.4:
                w, h = draw.integers(4, 10, 2)
                image[y : y + h, x : x + w] = 200
                count += 1
    image[0, :8] = 20 + np.arange(8) * (seed % 7 + 1)  # no two alike
    image[1, :2] = seed % 251, seed // 251 % 251
    place = {} if crs is None else {"crs": crs, "transform": from_origin(5e5 + 700 * seed, 4.6e6, 10, 10)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(
        path, "w", driver="GTiff", width=side, height=side, count=1, dtype="uint8", **place, **more
    ) as file:
        file.write(image[None])
        file.update_tags(ACQUISITION_DATETIME=f"2026-03-{seed % 3 + 1:02d}T10:00:00Z")
    return count


def make_archive(folder: Path, count: int, **more: Any) -> dict[str, int]:
    """Scenes `s000.tif`, ... and how many ships each has."""
    return {f"s{n:03d}.tif": write_ships(folder / f"s{n:03d}.tif", n, **more) for n in range(count)}


@dataclass(frozen=True)
class _Header:
    """Of weights that know ships, as far as `detect` asks."""

    classes: dict[str, tuple[str, ...]] = field(
        default_factory=lambda: dict.fromkeys(("sar", "ir", "rgb"), ("ship",))
    )
    gsd: dict[str, tuple[float, float]] = field(
        default_factory=lambda: dict.fromkeys(("sar", "ir", "rgb"), (5.0, 20.0))
    )
    thresholds: dict[str, dict[str, float]] = field(
        default_factory=lambda: {k: {"ship": 0.3} for k in ("sar", "ir", "rgb")}
    )
    tile: int = 48

    def chosen(self, sensor: str, classes: Sequence[str] | None = None) -> tuple[str, ...]:
        return tuple(classes or self.classes[sensor])


class Bright:
    """As loaded weights: each bright patch is a ship."""

    name, sha256, header = "bright", WEIGHTS, _Header()

    def detector(
        self, sensor: str, score: float | None = None, classes: Any = None
    ) -> Callable[[NDArray[np.float32]], list[Detections]]:
        return _bright


def _bright(images: NDArray[np.float32]) -> list[Detections]:
    found = []
    for image in images:
        x, y, w, h = patches(image[0] > 0.5).T
        boxes = np.stack([x + w / 2, y + h / 2, w, h, np.zeros_like(x)], axis=1)
        found.append(Detections(boxes, 1 - 1 / (1 + w * h), np.zeros(len(x), np.int64), ("ship",), False))
    return found


@dataclass(frozen=True)
class BrightWork(Detection):
    """Detection by `Bright`; scenes that bear a sign in their name do harm."""

    weights: str = "bright"
    device: str = "cpu"
    options: DetectOptions = SMALL
    sensor: str | None = "sar"
    pause: float = 0.0
    seen: str = ""
    """A folder to leave word in of who does which task."""

    def load(self) -> Any:
        return Bright()

    def start(self, turn: Turn) -> Callable[[Task], Outcome]:
        usual = super().start(turn)

        def one(task: Task) -> Outcome:
            time.sleep(self.pause)
            if self.seen:
                Path(self.seen, f"{Path(task.path).stem} {task.groups} {os.getppid()}").touch()
            name = Path(task.path).name
            if "crash" in name:
                os.kill(os.getpid(), signal.SIGSEGV)
            if "hungry" in name:
                hoard = np.ones(1 << 27)  # 1 GB
                time.sleep(60)
                return Outcome("done", str(hoard[0]))
            if "exits" in name:
                print("no more of this", file=sys.stderr)
                os._exit(7)
            if "once" in name and not (mark := Path(task.path).with_suffix(".seen")).exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return usual(task)

        return one


def go(
    scenes: Path | Sequence[str],
    results: Path,
    work: Detection | None = None,
    changed: str = "",
    progress: Progress | None = None,
    **options: Any,
) -> Ended:
    """A run with ordinary options."""
    sources = [str(scenes)] if isinstance(scenes, Path) else list(scenes)
    parameters = {"weights": WEIGHTS, "changed": changed}
    given = {"suffix": ".parquet", "limits": Limits(seconds=120)} | options
    return run(
        results,
        lambda: find(sources, results.absolute()),
        work or BrightWork(),
        parameters,
        RunOptions(**given),
        progress,
    )


if (
    __name__ == "__main__"
):  # python bright_archive.py SCENES RESULTS '{"processes": 2, "pause": .01, "attempts": 5}'
    from bright_archive import BrightWork, go  # by the name that other processes know it by

    from babelrs_geo.errors import BabelError

    asked = json.loads(sys.argv[3]) if len(sys.argv) > 3 else {}
    own = BrightWork(pause=asked.get("pause", 0.0))
    try:
        done = go(
            Path(sys.argv[1]),
            Path(sys.argv[2]),
            own,
            workers=Workers(processes=asked.get("processes", 1)),
            attempts=asked.get("attempts", 2),
        )
    except BabelError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        sys.exit(1)
    sys.exit(0 if done.whole else 3)
