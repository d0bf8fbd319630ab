"""Detections of many overlapping tiles to one per object: `merge`, and exact suppression alone: `nms`."""

from babelrs_geo.merging.options import MergeOptions
from babelrs_geo.merging.scene import merge, nms

__all__ = ["MergeOptions", "merge", "nms"]
