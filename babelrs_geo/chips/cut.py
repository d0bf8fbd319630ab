"""One task: regions of a scene read downward, each row of the file once, and cut into chips with their objects.

Runs in a worker process. What it learnt of its chips goes to a small file, written last and at once: where that file
is, the task is done, whatever happens to the run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from babelrs_geo import boxes
from babelrs_geo.chips.geotiff import write_chip
from babelrs_geo.chips.options import ChipOptions
from babelrs_geo.chips.plan import Chip, Region, Task, lot
from babelrs_geo.drafts import draft
from babelrs_geo.scenes import Scene
from babelrs_geo.tiling import Rect
from babelrs_geo.vectors import Objects

SPOOL = ".spool"


def cut_task(task: Task, folder: str, options: ChipOptions) -> str:
    """Write the task's chips, then its part of the index; returns its key. Done already: does nothing.

    Raises SceneError where the scene cannot be read, OutputError where a chip cannot be written.
    """
    part = part_path(Path(folder), task.key)
    if part.exists():
        return task.key
    told: dict[str, list[Any]] = {"chips": [], "labels": []}
    images = Path(folder, "images", task.entry.folder)
    images.mkdir(parents=True, exist_ok=True)
    scene = task.entry.scene
    objects = {
        chip.name: _objects(task.entry.objects, chip.rect, options) for r in task.regions for chip in r.chips
    }
    wanted = {
        name for name, (kept, _) in objects.items() if _wanted(task.entry.objects, name, len(kept), options)
    }
    for chip, raw, valid in _pixels(scene, task.regions, wanted):
        share = float(valid.mean())
        if share == 0:
            continue
        write_chip(
            images / f"{chip.name}.tif", raw, valid, scene.facts, scene.georef, chip.rect, options.compress
        )
        kept, dropped = objects[chip.name]
        told["chips"].append([chip.name, share, len(kept), dropped])
        rows = range(len(task.entry.objects or ())) if task.rows is None else task.rows
        told["labels"] += [[chip.name, int(rows[row]), truncated] for row, truncated in kept]
    part.parent.mkdir(parents=True, exist_ok=True)
    with draft(part) as file:
        file.write_text(json.dumps(told), encoding="utf-8")
    scene.close()
    return task.key


def part_path(folder: Path, key: str) -> Path:
    """Where a task's part of the index is."""
    return folder / SPOOL / f"{key}.json"


def _objects(
    objects: Objects | None, rect: Rect, options: ChipOptions
) -> tuple[list[tuple[int, float]], int]:
    """The objects of a chip, by row and share of the area outside it, and how many the rule drops."""
    if objects is None or not len(objects):
        return [], 0
    extent = np.array([rect.x, rect.y, rect.x1, rect.y1], np.float64)
    near = boxes.bounds(objects.boxes)
    rows = np.flatnonzero(((near[:, :2] < extent[2:]) & (near[:, 2:] > extent[:2])).all(1))
    window = np.repeat(boxes.from_xyxy(extent[None]), len(rows), 0)
    inside = boxes.intersection_pairs(objects.boxes[rows], window) / boxes.areas(objects.boxes[rows])
    outside = np.where(inside > 1 - 1e-9, 0.0, 1 - inside)
    touching = inside > 1e-9
    kept = touching & (outside <= options.keep_truncated)
    found = [(int(row), float(share)) for row, share in zip(rows[kept], outside[kept], strict=True)]
    return found, int((touching & ~kept).sum())


def _wanted(objects: Objects | None, name: str, count: int, options: ChipOptions) -> bool:
    """Whether a chip is cut: all with objects, and the chosen share of the others where there are labels."""
    return objects is None or count > 0 or lot(options.seed, f"background {name}") < options.background


def _pixels(
    scene: Scene, regions: tuple[Region, ...], wanted: set[str]
) -> Iterator[tuple[Chip, NDArray[Any], NDArray[np.bool_]]]:
    """Each wanted chip with its raw numbers and validity, from rows that are read once, downward."""
    for top in sorted({region.rect.y for region in regions}):
        row = [region for region in regions if region.rect.y == top]
        chips = [chip for region in row for chip in region.chips if chip.name in wanted]
        if not chips:
            continue
        left, right = min(r.rect.x for r in row), max(r.rect.x1 for r in row)
        strip = _Strip(scene, left, right, row[0].rect.y1)
        for chip in sorted(chips, key=lambda chip: (chip.rect.y, chip.rect.x)):
            strip.reach(chip.rect.y, chip.rect.y1)
            yield chip, *strip.cut(chip.rect)


class _Strip:
    """Columns `left` to `right` of a scene, of which the rows now needed are held.

    Rows come in whole blocks of the file, and none comes twice.
    """

    def __init__(self, scene: Scene, left: int, right: int, end: int) -> None:
        self._scene, self._left, self._right, self._end = scene, left, right, end
        self._parts: list[tuple[int, NDArray[Any], NDArray[np.bool_]]] = []  # first row, raw, valid
        self._next: int | None = None  # the first row not read yet

    def reach(self, top: int, bottom: int) -> None:
        """Hold rows `top` to `bottom`; those above are forgotten."""
        block = self._scene.facts.block[0]
        self._parts = [p for p in self._parts if p[0] + len(p[2]) > top]
        start = max(top // block * block, self._next or 0)
        stop = min(-(-bottom // block) * block, self._end)
        if start < stop:
            window = (self._left, start, self._right - self._left, stop - start)
            raw, valid = self._scene.read_both(window, once=True)
            self._parts.append((start, raw, valid))
            self._next = stop

    def cut(self, rect: Rect) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Raw numbers and validity of a chip within the rows held."""
        x = slice(rect.x - self._left, rect.x1 - self._left)
        raws, valids = [], []
        for first, raw, valid in self._parts:
            y = slice(max(rect.y - first, 0), max(rect.y1 - first, 0))
            raws.append(raw[:, y, x])
            valids.append(valid[y, x])
        return np.concatenate(raws, axis=1), np.concatenate(valids)
