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

from babelrs_geo.chips.geotiff import write_chip
from babelrs_geo.chips.options import ChipOptions
from babelrs_geo.chips.plan import Chip, Region, Task
from babelrs_geo.chips.shown import Shown, background, shown, where_valid
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
    rows = range(len(task.entry.objects or ())) if task.rows is None else task.rows
    for chip, raw, valid in _pixels(scene, task.regions):
        share = float(valid.mean())
        if share == 0:
            continue
        found, kept = _objects(task.entry.objects, chip.rect, valid, options)
        if task.entry.objects is not None and not kept.any() and not background(chip.name, options):
            continue  # planned for what no valid pixel shows
        write_chip(
            images / f"{chip.name}.tif", raw, valid, scene.facts, scene.georef, chip.rect, options.compress
        )
        told["chips"].append([chip.name, share, int(kept.sum()), int((~kept).sum())])
        told["labels"] += [
            [chip.name, int(rows[row]), float(truncated)]
            for row, truncated in zip(found.rows[kept], found.truncated[kept], strict=True)
        ]
    part.parent.mkdir(parents=True, exist_ok=True)
    with draft(part) as file:
        file.write_text(json.dumps(told), encoding="utf-8")
    scene.close()
    return task.key


def part_path(folder: Path, key: str) -> Path:
    """Where a task's part of the index is."""
    return folder / SPOOL / f"{key}.json"


def _objects(
    objects: Objects | None, rect: Rect, valid: NDArray[np.bool_], options: ChipOptions
) -> tuple[Shown, NDArray[np.bool_]]:
    """The objects that reach into a chip, and which of them the rule keeps."""
    objects = Objects.empty() if objects is None else objects
    found = where_valid(shown(objects, rect), objects, rect, valid)
    return found, found.kept(options)


def _pixels(
    scene: Scene, regions: tuple[Region, ...]
) -> Iterator[tuple[Chip, NDArray[Any], NDArray[np.bool_]]]:
    """Each chip with its raw numbers and validity, from rows that are read once, downward."""
    for top in sorted({region.rect.y for region in regions}):
        row = [region for region in regions if region.rect.y == top]
        chips = [chip for region in row for chip in region.chips]
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
