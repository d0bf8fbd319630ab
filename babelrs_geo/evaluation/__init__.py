"""How good detections are: weights on labelled images, and results on scenes against labels on the ground.

`frames` shows labelled images one by one, `judging` counts what a detector finds on them, `report` puts the sensors
together, `ground` matches a result with labels on the map, `writing` makes files of either.
"""

from babelrs_geo.evaluation.frames import DataOptions, Frame, Frames, find_frames, record_frames
from babelrs_geo.evaluation.ground import GroundOptions, Matches, judge_ground
from babelrs_geo.evaluation.judging import Evaluation, Measured, evaluate, without_transformer
from babelrs_geo.evaluation.report import Report, judge, overall
from babelrs_geo.evaluation.writing import check_folder, write_report

__all__ = [
    "DataOptions",
    "Evaluation",
    "Frame",
    "Frames",
    "GroundOptions",
    "Matches",
    "Measured",
    "Report",
    "check_folder",
    "evaluate",
    "find_frames",
    "judge",
    "judge_ground",
    "overall",
    "record_frames",
    "without_transformer",
    "write_report",
]
