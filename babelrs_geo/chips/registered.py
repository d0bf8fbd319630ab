"""Co-registered scenes to chips: one grid, one name a chip for all its sensors."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from babelrs_geo.boxes import corners, from_corners, from_xyxy
from babelrs_geo.chips.options import ChipOptions
from babelrs_geo.chips.plan import Entry
from babelrs_geo.chips.run import ALIGNED, Cut, Progress, check_folder, cut_entries, objects_on, sources
from babelrs_geo.cluster import Workers
from babelrs_geo.coregister import Shift, align, between
from babelrs_geo.errors import LabelError
from babelrs_geo.georef import Georef
from babelrs_geo.scenes import Scene
from babelrs_geo.vectors import Labels, Objects


def cut_registered(
    scenes: Mapping[str, Scene],
    folder: str | os.PathLike[str],
    labels: Sequence[Labels] = (),
    options: ChipOptions | None = None,
    workers: Workers | None = None,
    *,
    reference: str | None = None,
    correct: bool = False,
    progress: Progress | None = None,
) -> tuple[Cut, list[Shift]]:
    """Bring scenes, by sensor, to one grid, and cut them alike; returns what was cut and the shifts measured.

    The scenes on the grid stay in the folder as `aligned/<sensor>.tif`. A chip has one name for all sensors, and one
    validity: what all of them saw. Labels in pixels belong to the scene that bears their name, and go with its ground
    (with its picture, where `correct` moves that). Raises as `coregister.align` and `cut_chips`; LabelError also where
    labels in pixels bear the name of no scene, or of several.
    """
    out, options = Path(folder).absolute(), options or ChipOptions()
    told = sources(labels) | {"reference": reference, "correct_shift": correct}
    check_folder(out, options, told)
    drawn_on = [_drawn_on(each, scenes) for each in labels]
    aligned, shifts = align(scenes, out / ALIGNED, reference, correct=correct)
    first = next(iter(aligned.values()))
    name = "-".join(dict.fromkeys(Path(scene.name).stem for scene in scenes.values()))
    taken_out = {shift.sensor: (shift.dx, shift.dy) for shift in shifts if shift.corrected}
    found = []
    for each, sensors in zip(labels, drawn_on, strict=True):
        if not sensors:
            found.append(each.on(name, first.georef, alone=True))
            continue
        sensor = next((s for s in sensors if s not in taken_out), sensors[0])
        found.append(_on_grid(each, scenes[sensor], first.georef, taken_out.get(sensor, (0.0, 0.0))))
    objects = objects_on(first, found)
    entries = [Entry(name, sensor, scenes[sensor].path, scene, objects) for sensor, scene in aligned.items()]
    try:
        return cut_entries(entries, out, options, workers, progress, told), shifts
    finally:
        for scene in aligned.values():
            scene.close()


def _drawn_on(labels: Labels, scenes: Mapping[str, Scene]) -> list[str]:
    """The sensor whose pixels labels lie in, several where these have one name and one grid; none for labels on the
    ground.
    """
    if labels.frame is not None:
        return []
    mine = [sensor for sensor, scene in scenes.items() if Path(scene.name).stem in labels.images]
    if len({(Path(scenes[sensor].name).stem, scenes[sensor].georef) for sensor in mine}) == 1:
        return mine
    which = "the names of several" if mine else "the name of none"
    named = ", ".join(f"{sensor} {scenes[sensor].name}" for sensor in mine or scenes)
    raise LabelError(
        f"{labels.path} lies in pixels and bears {which} of the scenes ({named}): give labels named as the one scene "
        "that they were drawn on, or labels with coordinates"
    )


def _on_grid(labels: Labels, scene: Scene, grid: Georef, shift: tuple[float, float]) -> Objects:
    """What labels in a scene's pixels show, in those of the grid, on which its picture was moved back by `shift`.

    What has no place there is left out.
    """
    objects = labels.on(Path(scene.name).stem, scene.georef, alone=True)
    quads = corners(objects.boxes)
    quads = np.stack(between(scene.georef, grid, quads[..., 0], quads[..., 1]), -1) - shift
    placed = np.isfinite(quads).all((1, 2))
    quads, objects = quads[placed], objects[placed]
    upright = from_xyxy(np.concatenate([quads.min(1), quads.max(1)], 1))
    boxes = np.where(objects.oriented[:, None], from_corners(quads), upright)
    return Objects(boxes, objects.classes, objects.oriented)
