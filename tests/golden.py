"""The original modules' numbers (../shared/golden), and how far ours are from them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

GOLDEN = Path(os.environ.get("BABELRS_GEO_SHARED", Path(__file__).parents[2] / "shared")) / "golden"
needs_golden = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason="the official module's numbers (shared/golden) are not here"
)
WORST: dict[tuple[str, str], float] = {}
"""Largest error relative to the largest value, by file and subject; `python tests/test_parity.py` prints it."""


class Golden:
    """One golden file: arrays as tensors, a state dict by prefix."""

    def __init__(self, name: str) -> None:
        self.name = name
        with np.load(GOLDEN / f"{name}.npz") as file:
            self.arrays = dict(file)

    def __getitem__(self, key: str) -> Tensor:
        return torch.from_numpy(np.asarray(self.arrays[key]))

    def state(self, prefix: str = "sd/") -> dict[str, Tensor]:
        return {k.removeprefix(prefix): self[k] for k in self.arrays if k.startswith(prefix)}

    def sizes(self) -> list[tuple[int, int]]:
        return [(int(h), int(w)) for h, w in self.arrays["img_shapes"]]

    def same(self, subject: str, got: Any, wanted: Any, tolerance: float = 1e-4, scale: float = 0.0) -> None:
        """Assert and note the error relative to the largest value wanted, or to `scale` where that is larger."""
        got, wanted = (
            torch.as_tensor(np.asarray(t.detach() if isinstance(t, Tensor) else t)) for t in (got, wanted)
        )
        assert got.shape == wanted.shape
        error = relative(got.double(), wanted.double(), scale)
        key = (self.name, subject)
        WORST[key] = max(WORST.get(key, 0.0), error)
        assert error <= tolerance, f"{self.name}, {subject}: {error:.1e}"


def relative(got: Tensor, wanted: Tensor, scale: float = 0.0) -> float:
    """Largest difference over the largest value."""
    if not wanted.numel():
        return 0.0
    return (got - wanted).abs().max().item() / (max(wanted.abs().max().item(), scale) or 1.0)


def document(name: str) -> dict[str, Any]:
    """A golden JSON file."""
    return json.loads((GOLDEN / f"{name}.json").read_text())
