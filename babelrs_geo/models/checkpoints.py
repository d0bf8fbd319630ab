"""Weights on disk: safetensors in half precision under a JSON header that says what they are and may be used
for.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from babelrs_geo.errors import OutputError, WeightsError
from babelrs_geo.models.detector import Detector, DetectorConfig

KEY = "babelrs_geo"
"""Where the header stands in the safetensors metadata."""
FORMAT = 1


@dataclass(frozen=True)
class Header:
    """What a checkpoint says of itself."""

    name: str
    classes: Mapping[str, tuple[str, ...]]
    """Class names by sensor ("sar", "ir", "rgb"); a sensor that is not here is not known to the weights."""
    box_kind: Mapping[str, str]
    """ "horizontal" or "oriented", by sensor."""
    gsd: Mapping[str, tuple[float, float]]
    """Ground sampling range in metres by sensor: scenes outside are read resampled into it."""
    thresholds: Mapping[str, Mapping[str, float]]
    """Least score that is reported, by sensor and class: best F1 on the validation split."""
    radiometry: Mapping[str, str]
    """How pixels become values in [0, 1], by sensor, in words."""
    architecture: Mapping[str, Any]
    """`DetectorConfig.to_dict()`."""
    licence: str
    """Terms of the weights, which may be stricter than the code's."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Data, its hash, start, steps and minutes."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """Figures on the validation split, with intervals."""
    format: int = FORMAT

    @property
    def config(self) -> DetectorConfig:
        """The architecture as a configuration."""
        return DetectorConfig.from_dict(self.architecture)

    def to_json(self) -> str:
        """The header as it is stored."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Header:
        """The header from `to_json`. Raises WeightsError for another format or missing fields."""
        try:
            values = json.loads(text)
            if values["format"] != FORMAT:
                raise WeightsError(
                    f"weights have header format {values['format']}; this version reads {FORMAT}: "
                    "use the babelrs-geo that wrote them or newer weights"
                )
            values["classes"] = {s: tuple(names) for s, names in values["classes"].items()}
            values["gsd"] = {s: (float(low), float(high)) for s, (low, high) in values["gsd"].items()}
            return cls(**values)
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as cause:
            if isinstance(cause, WeightsError):
                raise
            raise WeightsError(
                f"the weights' header cannot be read ({cause}); expected babelrs-geo's"
            ) from cause


def save(path: str | os.PathLike[str], model: Detector, header: Header) -> None:
    """Write weights in half precision with their header; the file appears whole or not at all."""
    path = Path(path)
    state = {k: v.detach().half().contiguous() for k, v in model.state_dict().items()}
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            temporary = Path(folder) / path.name
            save_file(state, temporary, metadata={KEY: header.to_json()})
            temporary.chmod(0o644)  # safetensors writes for its owner alone
            temporary.replace(path)
    except OSError as cause:
        raise OutputError(f"{path} cannot be written ({cause}); choose a folder you may write to") from cause


def read_header(path: str | os.PathLike[str]) -> Header:
    """The header alone, without reading the tensors. Raises WeightsError."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as cause:
        raise WeightsError(
            f"{path} is not a readable safetensors file ({cause}); give weights made by babelrs-geo"
        ) from cause
    if KEY not in metadata:
        raise WeightsError(f"{path} has no babelrs-geo header; give weights made by babelrs-geo")
    return Header.from_json(metadata[KEY])


def load(path: str | os.PathLike[str], device: str = "cpu") -> tuple[Detector, Header]:
    """The model in float32, ready to predict, and its header.

    Raises WeightsError for a file that is damaged or whose tensors do not fit its architecture; the message
    lists the first keys that are missing, unexpected or of another shape.
    """
    header = read_header(path)
    with torch.device("meta"):
        model = Detector(header.config)
    wanted = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    with safe_open(path, "pt", device=device) as file:
        there = {k: tuple(file.get_slice(k).get_shape()) for k in file.keys()}  # noqa: SIM118 (no iterator)
        _check(path, wanted, there)
        state = {k: file.get_tensor(k).float() for k in there}
    model = Detector(header.config)
    model.load_state_dict(state)
    return model.to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False), header


def _check(path: Any, wanted: Mapping[str, tuple[int, ...]], there: Mapping[str, tuple[int, ...]]) -> None:
    missing = [k for k in wanted if k not in there]
    surplus = [k for k in there if k not in wanted]
    shaped = [f"{k} {there[k]} for {wanted[k]}" for k in wanted if k in there and there[k] != wanted[k]]
    if missing or surplus or shaped:
        parts = [
            f"{len(keys)} {what} ({', '.join(keys[:3])})"
            for what, keys in (("missing", missing), ("unexpected", surplus), ("mis-shaped", shaped))
            if keys
        ]
        raise WeightsError(f"{path} does not fit its own architecture: {'; '.join(parts)}; get a whole copy")


def sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
