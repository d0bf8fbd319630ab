"""Detections of many overlapping tiles to one per object: `merge`, or `merge_scales` where a scene was read at several
scales; and exact suppression alone: `nms`.
"""

from babelrs_geo.merging.options import MergeOptions
from babelrs_geo.merging.scene import Seen, merge, merge_scales, nms

__all__ = ["MergeOptions", "Seen", "merge", "merge_scales", "nms"]
