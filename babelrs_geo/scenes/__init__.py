"""Scenes: the only opener of rasters. `open_scene` gives a `Scene`; `Scene.read(window, scale)` is how pixels
come in.

`reader` holds GDAL handles and turns a window into raw numbers and declared validity, `collar` finds the
black frame that orthomosaics have without declaring it, `resample` brings a window to another scale so that
neighbours agree, `scene` puts them together with the sensor's radiometry and the georeference.
"""

from babelrs_geo.scenes.facts import Facts, file_state
from babelrs_geo.scenes.scene import Pixels, Scene, SceneOptions, open_scene

__all__ = ["Facts", "Pixels", "Scene", "SceneOptions", "file_state", "open_scene"]
