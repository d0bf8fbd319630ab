"""Find objects in large georeferenced SAR, infrared and RGB scenes, and hand over vectors for QGIS.

    import babelrs_geo as bg
    scene = bg.open_scene("S1_GRD.tif", sensor="sar")
    found = bg.detect(scene)               # bundled weights; found.features, found.coverage, found.provenance
    found.save("ships.gpkg")               # opens styled in QGIS

Importing the package is light: what is heavy (GDAL, torch) is imported by the first call that needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

# `detect` is both a module and, here, the function: imported at once, because importing the module later
# would put the module in the function's place. The module itself imports nothing heavy until it is called.
from babelrs_geo.detect import DetectOptions, Found, Running, detect

if TYPE_CHECKING:
    from babelrs_geo.cluster import Workers
    from babelrs_geo.scenes import Scene, SceneOptions, open_scene
    from babelrs_geo.sensors import Sensor

__version__ = "0.1.0"

__all__ = [
    "DetectOptions",
    "Found",
    "Running",
    "Scene",
    "SceneOptions",
    "Sensor",
    "Workers",
    "__version__",
    "detect",
    "open_scene",
]

_LAZY = {
    "Scene": "scenes",
    "SceneOptions": "scenes",
    "Sensor": "sensors",
    "Workers": "cluster",
    "open_scene": "scenes",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module the first time it is asked for."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Every public name, imported yet or not."""
    return sorted(__all__)
