"""`SceneDataset`: whole scenes of one sensor as a TorchGeo dataset, read live through `Scene.read`."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from babelrs_geo.boxes import bounds
from babelrs_geo.datasets.ground import GroundDataset, GroundOptions, Picture
from babelrs_geo.datasets.samples import label_indices
from babelrs_geo.errors import ParameterError
from babelrs_geo.scenes import Scene, SceneOptions, open_scene
from babelrs_geo.sensors import Sensor
from babelrs_geo.vectors.labels import Labels, read_labels

_KEPT_OPEN = 32  # scenes; beyond that each is closed after a read, to spare file handles

_Given = str | os.PathLike[str] | Scene


class SceneDataset(GroundDataset):
    """Scenes of one sensor and, where there are labels, what is on them.

    `scenes` are paths or open scenes, or one of them. `labels` is what `read_labels` takes or gives: a vector file, a
    COCO JSON, a DOTA text or a folder of such; without it samples have no boxes. `classes` fixes the order of the
    classes; the labels' own, sorted, if None. `how` says how scenes that are given as paths are read.

    Raises SceneError or SensorError for a scene that cannot be opened, ParameterError where scenes differ in
    sensor, GeorefError where some have a georeference and some have none, LabelError where labels do not fit.

    Every scene is closed once what it says of itself is known, and opened again by the first read.
    """

    named = False

    def __init__(
        self,
        scenes: _Given | Sequence[_Given],
        sensor: str | Sensor | None = None,
        labels: str | os.PathLike[str] | Labels | None = None,
        classes: Sequence[str] | None = None,
        options: GroundOptions | None = None,
        how: SceneOptions | None = None,
    ) -> None:
        given = [scenes] if isinstance(scenes, str | os.PathLike | Scene) else scenes
        known = [_closed(s if isinstance(s, Scene) else open_scene(s, sensor, how)) for s in given]
        kinds = {s.sensor: s.name for s in known}
        if len(kinds) > 1 or (sensor is not None and set(kinds) - {Sensor.parse(sensor)}):
            raise ParameterError(
                f"a dataset has one sensor, but was given {', '.join(f'{s} ({n})' for s, n in kinds.items())}; "
                "make one of each and combine them by & or |"
            )
        self.scenes, self.paths = known, [s.path for s in known]
        self._lock = threading.Lock()
        pictures = [Picture(s.name, s.width, s.height, s.georef, s.acquired) for s in known]
        told = read_labels(labels) if isinstance(labels, str | os.PathLike) else labels
        found = [] if told is None else [self._on(told, s, len(known) == 1) for s in known]
        names = sorted({str(c) for _, own in found for c in own}) if classes is None else list(classes)
        self._objects = [(boxes, label_indices(own, names, told and told.path)) for boxes, own in found]
        super().__init__(pictures, next(iter(kinds), sensor or Sensor.RGB), names, options or GroundOptions())

    @staticmethod
    def _on(labels: Labels, scene: Scene, alone: bool) -> tuple[NDArray[np.float64], list[str]]:
        """Boxes and class names of the objects that touch a scene."""
        objects = labels.on(Path(scene.name).stem, scene.georef, alone=alone)
        box = bounds(objects.boxes)
        near = (box[:, 2:] > 0).all(1) & (box[:, :2] < (scene.width, scene.height)).all(1)
        return objects.boxes[near], [str(c) for c in objects.classes[near]]

    @contextmanager
    def _open(self, picture: int) -> Iterator[Scene]:
        scene = self.scenes[picture]
        if len(self.scenes) <= _KEPT_OPEN:
            yield scene
            return
        with self._lock, scene:
            yield scene

    def _labelled(self, picture: int, scene: Scene) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        return self._objects[picture] if self._objects else (np.zeros((0, 5)), np.zeros(0, np.int64))

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in super().__getstate__().items() if k != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()


def _closed(scene: Scene) -> Scene:
    """The scene without its file handle: a system allows fewer than there may be scenes."""
    scene.close()
    return scene
