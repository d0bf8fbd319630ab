"""What is left of objects after tiling and merging: `python benchmarks/seams.py --peers PEERS/bin/python`.

A detector without fault looks at tiles of 640 px, 512 apart. A tile shows an object where at least 30 % of it lies
inside; a whole one is reported a pixel off (turned ones a degree too), a cut one as the smallest box around what is
seen, upright ones a pixel off as well. Scores are drawn, and lower for cut boxes. Three worlds, of several seeds:
`upright` and `turned` objects of 12 to 400 px that do not touch, and `rows` of 40 x 10 px side by side, 13 px apart.

Extras are boxes that stand for no object, in percent of the objects; recall is the share of objects found at an IoU,
one box each; large ones are longer than the tiles' overlap. `nothing` shows what the detections alone would reach.
Other tools run in an environment made from `requirements-peers.txt`; those that know no angles are given upright
objects alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from merging import contest

from babelrs_geo import boxes
from babelrs_geo.merging.neighbours import lying_together, meeting

TILE, STEP = 640, 512
UPRIGHT = (
    "nothing", "ours, nms", "ours, merge", "SAHI NMS, IoS", "SAHI GreedyNMM", "SAHI NMM", "supervision NMS",
    "supervision NMM", "GeoDeep", "DeepForest",
)  # fmt: skip
TURNED = ("nothing", "ours, nms", "ours, merge", "powerboxes", "supervision NMS", "ultralytics rotated")
LOCAL = ("nothing", "ours, nms", "ours, merge")
Array = np.ndarray[Any, np.dtype[np.float64]]


def apart(found: Array, side: int) -> Array:
    """Boxes (N, 5) inside the scene, none of which touches another: of two the later goes."""
    box = boxes.bounds(found)
    found = found[(box[:, :2] >= 0).all(1) & (box[:, 2:] < side).all(1)]
    pairs = lying_together(found, np.zeros(len(found), np.int64), 0.0)
    if pairs is None:
        raise RuntimeError("the scene is too crowded to keep objects apart")
    gone = np.zeros(len(found), np.bool_)
    for i, j in sorted(zip(pairs.i.tolist(), pairs.j.tolist(), strict=True)):
        gone[j] |= not gone[i]
    return found[~gone]


def objects(seed: int, side: int, turned: bool) -> Array:
    """Objects of 12 to 400 px, as many small ones as large ones by their logarithm."""
    r = np.random.default_rng(seed)
    n = int(side**2 * 1.4e-4)
    length = np.exp(r.uniform(np.log(12), np.log(400), n))
    size = np.column_stack([length, length * r.uniform(0.25, 1, n)])
    swap = r.random(n) < 0.5
    size[swap] = size[swap][:, ::-1]
    angle = r.uniform(-90, 90, n) * turned
    return apart(np.column_stack([r.uniform(0, side, (n, 2)), size, angle]), side)


def rows(seed: int, side: int) -> Array:
    """Rows of fifty."""
    r = np.random.default_rng(seed)
    out = []
    for _ in range(int(side**2 / 1.2e6)):
        angle, first = r.uniform(-90, 90), r.uniform(0, side, 2)
        turn = np.deg2rad(angle)
        places = first + np.arange(50)[:, None] * 13 * np.array([np.sin(turn), np.cos(turn)])
        out.append(np.column_stack([places, np.tile([40.0, 10.0, angle], (50, 1))]))
    return apart(np.concatenate(out), side)


def detections(truth: Array, seed: int, side: int) -> dict[str, Any]:
    """What the tiles report, in the form that `contestants.py` reads."""
    r = np.random.default_rng(seed + 1000)
    turned = bool(truth[:, 4].any())
    starts = sorted({*range(0, side - TILE + 1, STEP), side - TILE})
    found, scores, tiles = [], [], []
    bounds = boxes.bounds(truth)
    for y in starts:
        for x in starts:
            tile = np.array([x, y, x + TILE, y + TILE], float)
            near = (bounds[:, :2] < tile[2:]).all(1) & (bounds[:, 2:] > tile[:2]).all(1)
            here = truth[near]
            seen = boxes.areas_within(here, here, np.tile(tile, (len(here), 1)))[:, 0] / boxes.areas(here)
            here, seen = here[seen >= 0.3], seen[seen >= 0.3]
            n = len(here)
            part = boxes.clip(here, tile)
            whole = seen > 0.999
            moved = here + r.normal(0, 1, (n, 5)) * [1, 1, 0, 0, turned]
            moved[:, 2:4] *= r.normal(1, 0.02, (n, 2)).clip(0.9, 1.1)
            if not turned:
                corner = boxes.bounds(part) + r.normal(0, 1, (n, 4))
                moved = boxes.from_xyxy(np.clip(corner, np.tile(tile[:2], 2), np.tile(tile[2:], 2)))
                whole[:] = True
            found.append(np.where(whole[:, None], moved, part))
            scores.append(r.uniform(0.6, 0.95, n) * (0.5 + 0.5 * seen))
            tiles.append(np.tile([x, y, TILE, TILE], (n, 1)))
    table = np.concatenate(found)
    return {
        "boxes": table,
        "scores": np.concatenate(scores).astype(np.float32),
        "labels": np.zeros(len(table), np.int64),
        "tiles": np.concatenate(tiles),
        "side": side,
    }


def judged(merged: Array, truth: Array) -> dict[str, float]:
    """Counts: objects, large ones, and those found; boxes that stand for none. Closest pairs first, one box each."""
    none = np.zeros(len(merged), np.int64), np.zeros(len(truth), np.int64)
    i, j = meeting(boxes.bounds(merged), none[0], truth, none[1])
    iou = boxes.rotated_iou_pairs(merged[i], truth[j])
    large = truth[:, 2:4].max(1) > TILE - STEP
    out: dict[str, float] = {"boxes": len(merged), "objects": len(truth), "large": int(large.sum())}
    order = np.argsort(-iou, kind="stable")
    for least in (0.5, 0.8):
        hit, used = np.zeros(len(truth), np.bool_), np.zeros(len(merged), np.bool_)
        for k in order[: int((iou > least).sum())]:
            if not hit[j[k]] and not used[i[k]]:
                hit[j[k]] = used[i[k]] = True
        out |= {f"found {least}": int(hit.sum()), f"large {least}": int(hit[large].sum())}
        if least == 0.5:
            out["extras"] = int((~used).sum())
    return out


def main() -> None:
    """Print the table, and write it where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", help="Python of the environment with the other tools")
    parser.add_argument("--side", type=int, default=8192, help="pixels of the scene")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    worlds: dict[str, Callable[[int], Array]] = {
        "upright": lambda seed: objects(seed, args.side, False),
        "turned": lambda seed: objects(seed, args.side, True),
        "rows": lambda seed: rows(seed, args.side),
    }
    columns = ("extras %", "recall .5", "recall .8", "large, recall .5", "large, recall .8")
    print(
        "| world | objects | tool | " + " | ".join(columns) + " | s |\n" + "|---" * (len(columns) + 4) + "|"
    )
    table = []
    for world, make in worlds.items():
        for name in UPRIGHT if world == "upright" else TURNED:
            if name not in LOCAL and not args.peers:
                continue
            total: dict[str, float] = {}
            seconds = 0.0
            try:
                for seed in range(args.seeds):
                    with tempfile.TemporaryDirectory() as folder:
                        file, out = Path(folder, "given.npz"), Path(folder, "kept.npz")
                        truth = make(seed)
                        given = detections(truth, seed, args.side)
                        np.savez(file, **given)
                        python = sys.executable if name in LOCAL else args.peers
                        seconds += contest(python, name, file, 1, out)["seconds"]
                        with np.load(out) as data:
                            result = data["result"]
                    merged = result if result.ndim == 2 else given["boxes"][result.astype(np.int64)]
                    one = judged(merged, truth)
                    total = {key: total.get(key, 0) + value for key, value in one.items()}
            except RuntimeError as error:
                print(f"| {world} | | {name} | {error} |")
                continue
            large = max(total["large"], 1)
            figures = [
                100 * total["extras"] / total["objects"],
                total["found 0.5"] / total["objects"],
                total["found 0.8"] / total["objects"],
                total["large 0.5"] / large,
                total["large 0.8"] / large,
            ]
            if not total["large"]:
                figures[3:] = []
            row = dict(zip(columns, (round(f, 4) for f in figures), strict=False))
            table.append({"world": world, "tool": name, "s": round(seconds / args.seeds, 3), **total, **row})
            cells = [f"{row[c]:.4f}".lstrip("0") if c in row else "" for c in columns]
            cells[0] = f"{row['extras %']:.2f}"
            told = " | ".join(cells)
            print(
                f"| {world} | {total['objects']:.0f} | {name} | {told} | {seconds / args.seeds:.3f} |",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
