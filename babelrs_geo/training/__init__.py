"""Training of the detector, and what it shares with `pretrain`, the training of its encoder with language.

`recipe` says what a run is, `data` feeds it, `module` computes its steps, `validation` judges it, `run` puts them
together; `schedules` has AdamW's groups and rates, `origin` what weights come of. Shared are `settings` (recipes as
YAML), `loading` (batches), `measured` (steps and their tally), `keeping` (when to judge, log, save and stop), `logs`
and `trainer` (Lightning's).
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
