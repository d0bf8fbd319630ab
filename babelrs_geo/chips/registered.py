"""Co-registered scenes to chips: one grid, one name a chip for all its sensors."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from babelrs_geo.chips.options import ChipOptions
from babelrs_geo.chips.plan import Entry
from babelrs_geo.chips.run import ALIGNED, Cut, Progress, cut_entries, objects_on, sources
from babelrs_geo.cluster import Workers
from babelrs_geo.coregister import Shift, align
from babelrs_geo.scenes import Scene
from babelrs_geo.vectors import Labels


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
    validity: what all of them saw. Raises as `coregister.align` and `cut_chips`.
    """
    out = Path(folder).absolute()
    aligned, shifts = align(scenes, out / ALIGNED, reference, correct=correct)
    first = next(iter(aligned.values()))
    name = "-".join(dict.fromkeys(Path(scene.name).stem for scene in scenes.values()))
    objects = objects_on(first, name, labels, alone=True)
    entries = [Entry(name, sensor, scenes[sensor].path, scene, objects) for sensor, scene in aligned.items()]
    told = sources(labels) | {"reference": reference, "correct_shift": correct}
    try:
        return cut_entries(entries, out, options, workers, progress, told), shifts
    finally:
        for scene in aligned.values():
            scene.close()
