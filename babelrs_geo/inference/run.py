"""Groups of tiles, by whoever computes them, to merged detections and to an account of every tile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from babelrs_geo.cluster import held_back
from babelrs_geo.detections import Detections
from babelrs_geo.errors import SceneError
from babelrs_geo.inference.coverage import DETECTED, EMPTY, FAILED, OUTSIDE, Area, Coverage
from babelrs_geo.inference.look import Detector, Group, InferenceOptions, Look, Part, Tick
from babelrs_geo.merging import Seen, merge_scales
from babelrs_geo.scenes import Scene
from babelrs_geo.tiling import Grid

Progress = Callable[[int, int], None]
"""Called in the caller's thread with (tiles done, tiles in all) each time tiles have ended."""

Crew = Callable[[Sequence[Group], Tick], Iterator[tuple[Group, Part]]]
"""Computes groups, in any order; ticks as tiles end. A group that came to nothing is a part whose tiles failed."""


class Keep(Protocol):
    """Where the parts of a run are kept, so that it may go on after any death."""

    def parts(self) -> dict[int, Part]:
        """The parts that are there, by the number of their group."""

    def put(self, number: int, part: Part) -> None:
        """Keep one, whole or not at all."""


def run(
    scene: Scene,
    detector: Detector | Sequence[Detector],
    grid: Grid,
    scale: float = 1.0,
    options: InferenceOptions | None = None,
    area: Area | None = None,
    progress: Progress | None = None,
) -> tuple[Detections, Coverage]:
    """Look at every tile of `grid` once, in this process, and merge what was found.

    `grid` spans `scene.shape_at(scale)`: its tiles are in model pixels, `scale` of them to a scene pixel.
    `detector` is one callable, or several that compute batches in turn (batch k goes to detector k modulo
    their number): one for each device. `area` limits the work to the tiles whose inner rectangle touches it
    and the result to the detections centred in it.

    Batches are a function of the grid, the area and the valid mask alone: tiles with a valid pixel, group by group,
    `options.batch` at a time. Detections centred outside their tile or on invalid pixels are dropped before merging.

    Returns the merged detections in scene pixels, and the coverage. Where no tile held a valid pixel the
    detections are empty and know no classes.

    Raises `SceneError` where every tile with pixels to read failed, and `ParameterError` where the grid is
    not the scene's or the memory did not suffice. One unreadable tile is not fatal: `Coverage` tells which
    and why.
    """
    look = Look(scene, grid, scale, options or InferenceOptions())
    detectors = [detector] if callable(detector) else list(detector)
    return gather(look, lambda groups, tick: look.parts(detectors, groups, tick), area, progress)


def gather(
    look: Look,
    crew: Crew,
    area: Area | None = None,
    progress: Progress | None = None,
    keep: Keep | None = None,
) -> tuple[Detections, Coverage]:
    """`run` with a crew to compute the groups, such as `over_dask.crew`, and a place to keep them meanwhile.

    The same for every crew, in whatever order groups come back, and however many of them were kept by a run that ended
    early. Ctrl+C is answered as tiles end. Raises what the crew raises.
    """
    groups = groups_of(look, area)
    parts = {} if keep is None else keep.parts()
    left = [group for group in groups if group.number not in parts]
    total = sum(len(group.tiles) for group in groups)
    done = total - sum(len(group.tiles) for group in left)

    with held_back() as answer:

        def tick(count: int) -> None:
            nonlocal done
            done += count
            if progress is not None:
                progress(done, total)
            answer()

        if done:
            tick(0)
        for group, part in crew(left, tick) if left else ():
            parts[group.number] = part
            if keep is not None:
                keep.put(group.number, part)
    return _merged(look, [(group, parts[group.number]) for group in groups], area)


def groups_of(look: Look, area: Area | None = None) -> list[Group]:
    """What is computed of a look: the groups of the tiles whose inner rectangle touches the area, pass by pass."""
    inners = [_scene_rects(grid, look.scene) for grid, _ in look.passes]
    return look.groups(*(np.ones(len(each), bool) if area is None else area.touches(each) for each in inners))


def _merged(look: Look, parts: list[tuple[Group, Part]], area: Area | None) -> tuple[Detections, Coverage]:
    """All parts as one result."""
    inners = [_scene_rects(grid, look.scene) for grid, _ in look.passes]
    states, reasons = _ended(look, parts, inners)
    ground = inners[0]
    seen = []
    for level, (grid, _) in enumerate(look.passes):
        found = [
            (part.found, part.tiles)
            for group, part in parts
            if group.level == level and part.found is not None
        ]
        if found:
            outers = np.array([tile.outer for tile in grid], np.int64)
            boxes = Detections.concatenate([each for each, _ in found])
            tiles = outers[np.concatenate([tiles for _, tiles in found])]
            if level and look.large is not None:
                asked = np.isin(boxes.class_names, look.large)
                boxes, tiles = boxes[asked], tiles[asked]
            seen.append(Seen(boxes, tiles, (grid.height, grid.width), grid.tile, grid.overlap))
    if not seen:
        return Detections.empty((), False), Coverage(ground, tuple(states), tuple(reasons))
    merged = merge_scales(seen, look.options.merging)
    height, width = seen[0].shape
    found_at = merged.scale(look.scene.width / width, look.scene.height / height)
    if area is not None:
        inside = area.holds(found_at.boxes[:, 0], found_at.boxes[:, 1])
        found_at = found_at[inside]
    for index in np.unique(_owners(look.grid, look.scene, found_at)):
        if states[index] == EMPTY:
            states[index] = DETECTED
    return found_at, Coverage(ground, tuple(states), tuple(reasons))


def _ended(
    look: Look, parts: list[tuple[Group, Part]], inners: list[NDArray[np.int64]]
) -> tuple[list[str], list[str]]:
    """How each tile of the finest pass ended, and why. Ground that a coarser pass could not read has failed too."""
    states, reasons = [OUTSIDE] * len(inners[0]), [""] * len(inners[0])
    for group, part in parts:
        for index, state, reason in part.ended:
            if group.level == 0:
                states[index], reasons[index] = state, reason
    _refuse_total_failure(look.scene, states, reasons)
    middle = inners[0][:, :2] + inners[0][:, 2:] / 2
    for group, part in parts:
        for index, state, reason in part.ended:
            if group.level and state == FAILED:
                x, y, width, height = inners[group.level][index]
                under = ((middle >= (x, y)) & (middle < (x + width, y + height))).all(1)
                for tile in np.flatnonzero(under):
                    if states[tile] == EMPTY:
                        states[tile] = FAILED
                        reasons[tile] = f"read coarser, at scale {look.passes[group.level][1]:g}: {reason}"
    return states, reasons


def _scene_rects(grid: Grid, scene: Scene) -> NDArray[np.int64]:
    """Inner rectangles (N, 4) in whole scene pixels. Their edges, not their sizes, are rounded, so that
    neighbours still meet exactly and the rectangles still partition the scene.
    """
    stretch = (scene.width / grid.width, scene.height / grid.height)
    inners = np.array([tile.inner for tile in grid], np.int64)
    start = np.rint(inners[:, :2] * stretch).astype(np.int64)
    end = np.rint((inners[:, :2] + inners[:, 2:]) * stretch).astype(np.int64)
    return np.concatenate([start, end - start], axis=1)


def _owners(grid: Grid, scene: Scene, found: Detections) -> NDArray[np.int64]:
    """The index of the tile whose inner rectangle holds each centre; `found` in scene pixels."""
    inners = np.array([tile.inner for tile in grid], np.int64)
    columns, rows = np.unique(inners[:, 0]), np.unique(inners[:, 1])
    x, y = found.boxes[:, 0] * (grid.width / scene.width), found.boxes[:, 1] * (grid.height / scene.height)
    column = np.clip(np.searchsorted(columns, x, side="right") - 1, 0, None)
    row = np.clip(np.searchsorted(rows, y, side="right") - 1, 0, None)
    return row * len(columns) + column


def _refuse_total_failure(scene: Scene, states: list[str], reasons: list[str]) -> None:
    failed = [index for index, state in enumerate(states) if state == FAILED]
    if failed and EMPTY not in states:
        raise SceneError(
            f"{scene.name}: none of the {len(failed)} tiles to look at could be read, the first because: "
            f"{reasons[failed[0]]}; the file may be truncated or damaged: check it, or fetch it again"
        )
