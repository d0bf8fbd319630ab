"""Merging, timed: `python benchmarks/merging.py` (about a minute; `--million` for a million boxes as well).

Seconds are medians of several runs; machines differ and are noisy, so compare the ratios within one run: to our
own `nms` of the same boxes, and to torchvision's `batched_nms` where its quadratic time allows. Boxes are 70 % in
clusters, 12 to 48 px long, five classes, seen by every 640 px tile (overlap 128) that holds the centre, moved by
about a pixel.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torchvision

from babelrs_geo import boxes
from babelrs_geo.detections import Detections
from babelrs_geo.merging import merge, nms

SCENE, TILE, STEP = 50_000, 640, 512
CLASSES = ("a", "b", "c", "d", "e")


def workload(n: int, oriented: bool, seed: int = 0) -> tuple[Detections, np.ndarray]:
    """`n` detections and the tiles they came from."""
    r = np.random.default_rng(seed)
    objects = int(n / 1.2)
    middles = r.uniform(0, SCENE, (max(20, n // 400), 2))
    grouped = int(objects * 0.7)
    centre = np.concatenate(
        [
            middles[r.integers(0, len(middles), grouped)] + r.normal(0, 400, (grouped, 2)),
            r.uniform(0, SCENE, (objects - grouped, 2)),
        ]
    ).clip(30, SCENE - 30)
    width = r.uniform(12, 48, objects)
    truth = np.column_stack(
        [centre, width, width * r.uniform(0.3, 1, objects), r.uniform(-90, 90, objects) * oriented]
    )
    label = r.integers(0, len(CLASSES), objects)
    last = SCENE - TILE
    which, tile = [], []
    for dx in (0, -1):
        for dy in (0, -1):
            corner = np.clip(np.floor(centre / STEP) + np.array([dx, dy]), 0, None) * STEP
            seen = ((centre < corner + TILE) & (centre >= corner) & (corner <= last)).all(1)
            which.append(np.flatnonzero(seen))
            tile.append(corner[seen])
    w, t = np.concatenate(which), np.concatenate(tile).astype(np.int64)
    _, first = np.unique(np.column_stack([w, t]), axis=0, return_index=True)
    pick = r.permutation(np.resize(r.permutation(first), n))
    w, t = w[pick], t[pick]
    found = truth[w] + r.normal(0, 1, (n, 5)) * [1, 1, 0, 0, 3 * oriented]
    extent = np.column_stack([t, t + TILE])
    return (
        Detections(boxes.clip(found, extent), r.random(n, np.float32), label[w], CLASSES, oriented),
        np.column_stack([t, np.full((n, 2), TILE)]),
    )


def median(run: Callable[[], object], repeats: int) -> float:
    """Seconds, the median of `repeats` runs after one that is not counted."""
    run()
    seconds = []
    for _ in range(repeats):
        before = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - before)
    return statistics.median(seconds)


def measure(n: int, oriented: bool) -> dict[str, object]:
    """One row of the table."""
    found, tiles = workload(n, oriented)
    shape = (SCENE, SCENE)
    repeats = 5 if n <= 100_000 else 3
    alone = median(partial(nms, found), repeats)
    whole = median(partial(merge, found, tiles, shape), repeats)
    theirs = None
    if not oriented and n <= 10_000:
        tensors = [
            torch.from_numpy(x) for x in (boxes.bounds(found.boxes), found.scores.astype(float), found.labels)
        ]
        theirs = median(partial(torchvision.ops.batched_nms, *tensors, 0.5), repeats) / alone
    return {
        "boxes": "oriented" if oriented else "horizontal",
        "N": n,
        "nms s": round(alone, 4),
        "merge s": round(whole, 4),
        "merge / nms": round(whole / alone, 2),
        "torchvision / nms": None if theirs is None else round(theirs, 1),
        "left": len(merge(found, tiles, shape)),
    }


def main() -> None:
    """Print the table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--million", action="store_true", help="also time a million boxes")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    rows = []
    for oriented in (False, True):
        for n in [1_000, 10_000, 100_000] + [1_000_000] * options.million:
            rows.append(measure(n, oriented))
            if len(rows) == 1:
                print("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
            print(
                "| " + " | ".join("" if v is None else str(v) for v in rows[-1].values()) + " |", flush=True
            )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
