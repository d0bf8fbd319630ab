"""A recipe of a few steps of the tiny detector, and what it runs on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from tiny_model import TINY

from babelrs_geo.models.plain import to_plain


def tiny_recipe(steps: int = 6, **changes: Any) -> dict[str, Any]:
    """Plain values of a recipe on `test_datasets.write_soi`, which has a train split alone."""
    crop = {"crop": {"size": 64, "scale": [0.8, 1.1], "turn": False}}
    phase = {"quota": {"sar": 1, "rgb": 1, "ir": 1}, "views": dict.fromkeys(("sar", "rgb", "ir"), crop)}
    rates = {"lr": 2e-3, "prior_lr": 1e-3, "warmup": 2, "mean_decay": 0.9}
    middle = max(1, steps // 2)
    return {
        "name": "tiny",
        "model": {"base": "compact", "architecture": to_plain(TINY)},
        "data": {"val": dict.fromkeys(("sar", "rgb", "ir"), "train")},
        "phases": [
            {"steps": middle, **phase, **rates},
            {"steps": steps, **phase, **rates, "quota": {"sar": 2, "rgb": 1, "ir": 1}, "cooldown": 2},
        ],
        "header": {"gsd": {"sar": [1, 10], "rgb": [0.1, 1], "ir": [0.1, 1]}},
        "run": {"checkpoint_minutes": 0, "log_every": 1, "gradients_every": 2, "tensorboard": False},
        **changes,
    }


def write_recipe(path: Path, **given: Any) -> Path:
    """The recipe as a file."""
    path.write_text(yaml.safe_dump(tiny_recipe(**given)))
    return path
