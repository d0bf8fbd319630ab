"""What the first scene of a process would wait for, done before it: imports, loops that are compiled, the model's first
batch. A scene's time limit is then for the scene.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from babelrs_geo.errors import BabelError

if TYPE_CHECKING:
    from babelrs_geo.detect import DetectOptions
    from babelrs_geo.models.zoo import Weights

_SIDE, _TILE, _OVERLAP = 64, 40, 8  # four tiles, so that there are seams
_BOXES = ((10.0, 10.0, 8.0, 6.0, 0.0), (11.0, 10.0, 8.0, 6.0, 5.0), (37.0, 20.0, 6.0, 6.0, 0.0))


def practise(weights: Weights, options: DetectOptions) -> None:
    """Detect in a scene of black and grey, all but the writing; whatever is wrong is the real scenes' to tell."""
    import numpy as np
    from rasterio.io import MemoryFile
    from rasterio.transform import from_origin

    from babelrs_geo.detect import detect
    from babelrs_geo.scenes import open_scene

    sensor = next(iter(weights.header.classes))
    plain = replace(options, aoi=None, classes=None, gsd="native", tile=_TILE, overlap=_OVERLAP)
    pixels = np.full((1, _SIDE, _SIDE), 90, np.uint8)
    pixels[:, :, :_TILE] = 0
    place = {"crs": "EPSG:32633", "transform": from_origin(5e5, 4.6e6, 1, 1)}
    with warnings.catch_warnings(), suppress(BabelError), MemoryFile() as memory:
        warnings.simplefilter("ignore")
        with memory.open(driver="GTiff", width=_SIDE, height=_SIDE, count=1, dtype="uint8", **place) as file:
            file.write(pixels)
        with open_scene(memory.name, sensor) as scene:
            for oriented in (True, False):
                detect(scene, cast("Weights", _Sure(weights, oriented)), plain)
        weights.detector(sensor)(np.zeros((1, 3, _SIDE, _SIDE), np.float32))


class _Sure:
    """Weights that find something in every tile."""

    def __init__(self, weights: Weights, oriented: bool) -> None:
        self.name, self.sha256, self.header = weights.name, weights.sha256, weights.header
        self._oriented = oriented

    def detector(self, sensor: str, *_: Any) -> Callable[[Any], Any]:
        """The same boxes, whatever it is shown."""
        import numpy as np

        from babelrs_geo.detections import Detections

        scores, labels = np.array([0.9, 0.8, 0.7], np.float32), np.zeros(3, np.int64)
        one = Detections(np.array(_BOXES), scores, labels, self.header.classes[sensor], self._oriented)
        return lambda images: [one] * len(images)
