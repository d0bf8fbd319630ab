"""Suppression and merging, timed beside other tools: `python benchmarks/merging.py --peers PEERS/bin/python`.

PEERS is an environment made from `requirements-peers.txt`; without it only what needs none of them runs. Each row is a
process of its own (`contestants.py`), all on one thread; a round runs every row once, and ratios are medians over
rounds of a tool's seconds to those of our `nms` in the same round: machines differ and are noisy. "same" says whether
it keeps the boxes that our `nms` keeps; `tests/test_merging.py` holds that to a plain reference. Memory is what the
first call added at its peak, a tool's own code included, and what the second did. Tools whose time or memory grows with
the square of the boxes stop early. The whole takes some ten minutes, and is run on an idle machine.

Boxes are 70 % in clusters, 12 to 48 px long, five classes, seen by every 640 px tile (overlap 128) that holds the
centre, moved by about a pixel; `--boxes FILE` takes others, in the form that `contestants.py` reads.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from babelrs_geo import boxes
from babelrs_geo.merging.neighbours import lying_together

SCENE, TILE, STEP = 50_000, 640, 512
CLASSES = 5
HERE = Path(__file__).parent
UP_TO = {
    False: {
        "ours, nms": 1_000_000, "ours, merge": 1_000_000, "lsnms": 1_000_000, "powerboxes": 1_000_000,
        "shapely STRtree": 100_000, "SAHI NMS": 1_000_000, "SAHI GreedyNMM": 100_000, "torchvision": 10_000,
        "DeepForest": 10_000, "GeoDeep": 10_000, "supervision NMS": 10_000,
    },
    True: {
        "ours, nms": 1_000_000, "ours, merge": 1_000_000, "powerboxes": 10_000, "shapely STRtree": 100_000,
        "supervision NMS": 10_000, "ultralytics rotated": 1_000,
    },
}  # fmt: skip
"""Most boxes that each is given, upright and turned. powerboxes panics beyond 10,000 turned ones."""
LOCAL = ("ours, nms", "ours, merge", "shapely STRtree", "torchvision")
FIRST = """
import numpy as np
from babelrs_geo.detections import Detections
from babelrs_geo.merging import merge
r = np.random.default_rng(0)
b = np.column_stack([r.uniform(0, 2000, (1000, 2)), r.uniform(5, 60, (1000, 2)), r.uniform(-90, 90, 1000)])
outers = np.column_stack([np.clip(b[:, :2] // 512 * 512, 0, 1360), np.full((1000, 2), 640)])
merge(Detections(b, r.random(1000), r.integers(0, 3, 1000), ("a", "b", "c"), True), outers, (2000, 2000))
"""


def workload(n: int, turned: bool, seed: int = 0) -> dict[str, Any]:
    """`n` detections, and the tiles that they came from."""
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
        [centre, width, width * r.uniform(0.3, 1, objects), r.uniform(-90, 90, objects) * turned]
    )
    label = r.integers(0, CLASSES, objects)
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
    found = truth[w] + r.normal(0, 1, (n, 5)) * [1, 1, 0, 0, 3 * turned]
    tiles = np.column_stack([t, np.full((n, 2), TILE)])
    return {
        "boxes": boxes.clip(found, np.column_stack([t, t + TILE])),
        # no ties, which tools break each in its own way
        "scores": ((r.permutation(n) + 1) / (n + 1)).astype(np.float32 if n <= 2**22 else np.float64),
        "labels": label[w],
        "tiles": tiles,
        "side": SCENE,
    }


def contest(python: str, name: str, file: Path, repeats: int, out: Path) -> dict[str, float]:
    """Seconds and megabytes of one contestant, in a process of its own on one thread."""
    command = [
        python,
        str(HERE / "contestants.py"),
        name,
        str(file),
        "--repeats",
        str(repeats),
        "--out",
        str(out),
    ]
    one = os.environ | {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=one, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: {(done.stderr.strip().splitlines() or ['no message'])[-1][:200]}")
    told: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return told


def measure(file: Path, names: Sequence[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the table for one set of boxes."""
    with np.load(file) as data:
        table, labels = data["boxes"], data["labels"]
    pairs = lying_together(table, labels, 0.0)
    count = 0 if pairs is None else len(pairs.i)
    repeats = 9 if len(table) <= 10_000 else 3
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    kept: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for _ in range(args.rounds):
        for name in names:
            out = file.with_suffix(".out.npz")
            try:
                python = sys.executable if name in LOCAL else args.peers
                results[name].append(contest(python, name, file, repeats, out))
            except RuntimeError as error:
                failed[name] = str(error)
                continue
            with np.load(out) as data:
                kept[name] = data["result"]
    base = [one["seconds"] for one in results["ours, nms"]]
    rows = []
    for name in names:
        row: dict[str, Any] = {
            "boxes": "turned" if table[:, 4].any() else "upright",
            "N": len(table),
            "pairs that overlap": count,
            "tool": name,
        }
        if name in failed:
            rows.append(row | {"failed": failed[name]})
            continue
        seconds = [one["seconds"] for one in results[name]]
        same = None
        if name != "ours, merge" and kept[name].ndim == 1:
            same = np.array_equal(np.sort(kept[name]), np.sort(kept["ours, nms"]))
        rows.append(
            row
            | {
                "seconds": round(statistics.median(seconds), 4),
                "times ours": round(statistics.median(a / b for a, b in zip(seconds, base, strict=True)), 2),
                "us a pair": round(1e6 * statistics.median(seconds) / max(count, 1), 3),
                "MB added": round(statistics.median(one["added_mb"] for one in results[name])),
                "MB again": round(statistics.median(one["again_mb"] for one in results[name])),
                "left": len(kept[name]),
                "same": same,
            }
        )
    return rows


def first_merge(runs: int = 7) -> dict[str, Any]:
    """Seconds from the start of a process to its first merge, the disk warm, and those of an empty one."""
    seconds: dict[str, list[float]] = {FIRST: [], "pass": []}
    for _ in range(runs + 1):
        for code, taken in seconds.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            taken.append(time.perf_counter() - start)
    whole, bare = (statistics.median(taken[1:]) for taken in seconds.values())
    return {"first merge in a fresh process, s": round(whole, 3), "an empty process, s": round(bare, 3)}


def main() -> None:
    """Print the table, and write it where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", help="Python of the environment with the other tools")
    parser.add_argument("--sizes", default="1000,10000,100000,1000000")
    parser.add_argument("--tools", help="only these, beside our nms, separated by semicolons")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--boxes", type=Path, action="append", help="files of boxes, in place of made-up ones"
    )
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    print(json.dumps(first := first_merge()) + "\n")
    columns = (
        "boxes",
        "N",
        "tool",
        "seconds",
        "times ours",
        "us a pair",
        "MB added",
        "left",
        "same",
        "failed",
    )
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        sizes = [(turned, int(n)) for turned in (False, True) for n in args.sizes.split(",")]
        for k, what in enumerate(args.boxes or sizes):
            file = Path(folder) / f"{k}.npz"
            if isinstance(what, Path):
                file.write_bytes(what.read_bytes())
            else:
                np.savez(file, **workload(what[1], what[0]))
            with np.load(file) as data:
                n, turned = len(data["boxes"]), bool(data["boxes"][:, 4].any())
            wanted = [name for name, most in UP_TO[turned].items() if n <= most]
            wanted = [name for name in wanted if args.peers or name in LOCAL]
            if args.tools:
                wanted = ["ours, nms"] + [name for name in wanted if name in args.tools.split(";")]
            for row in measure(file, wanted, args):
                rows.append(row)
                print("| " + " | ".join(str(row.get(c, "")) for c in columns) + " |", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"first": first, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
