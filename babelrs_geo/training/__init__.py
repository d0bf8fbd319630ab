"""Training of the detector.

`recipe` says what a run is, `data` feeds it, `module` computes its steps, `validation` judges it, `run` puts them
together on Lightning; `schedules` has AdamW's groups and rates, `origin` what weights come of.
"""

from babelrs_geo.training.schedules import (
    LayerDecay,
    StepSchedule,
    freeze_prior,
    layer_decay_groups,
    parameter_groups,
    schedule,
    step_schedule,
)

__all__ = [
    "LayerDecay",
    "StepSchedule",
    "freeze_prior",
    "layer_decay_groups",
    "parameter_groups",
    "schedule",
    "step_schedule",
]
