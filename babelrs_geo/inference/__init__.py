"""Tiles of a scene through any callable detector, to merged detections and to an account of every tile: in this
process or in many (`over_dask`), and kept meanwhile (`spool`).
"""

from babelrs_geo.inference.coverage import (
    DETECTED,
    EMPTY,
    FAILED,
    INVALID,
    OUTSIDE,
    STATES,
    Area,
    Coverage,
)
from babelrs_geo.inference.look import Detector, Group, InferenceOptions, Look, Part
from babelrs_geo.inference.run import Crew, Keep, Progress, gather, groups_of, run

__all__ = [
    "DETECTED",
    "EMPTY",
    "FAILED",
    "INVALID",
    "OUTSIDE",
    "STATES",
    "Area",
    "Coverage",
    "Crew",
    "Detector",
    "Group",
    "InferenceOptions",
    "Keep",
    "Look",
    "Part",
    "Progress",
    "gather",
    "groups_of",
    "run",
]
