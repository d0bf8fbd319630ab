"""Weights by name or file, ready to find objects in tiles."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from babelrs_geo.boxes import from_le90, from_xyxy
from babelrs_geo.detections import Detections
from babelrs_geo.errors import WeightsError
from babelrs_geo.models import checkpoints
from babelrs_geo.models.checkpoints import Header
from babelrs_geo.models.detector import Detector, Prediction

BUNDLED = Path(__file__).parent / "weights"
"""Weights that come with the package, `NAME.safetensors` each beside its model card `NAME.md`."""


def bundled() -> list[str]:
    """Names of the weights that come with the package."""
    return sorted(p.stem for p in BUNDLED.glob("*.safetensors"))


def folder() -> Path:
    """Where the user's own weights lie: `babelrs-geo/weights` in `$XDG_CACHE_HOME`, or in `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "babelrs-geo" / "weights"


def known() -> dict[str, Path]:
    """Every name that `find` knows, bundled weights first, and its file."""
    found = {name: BUNDLED / f"{name}.safetensors" for name in bundled()}
    return found | {
        p.stem: p for p in sorted(folder().glob("*.safetensors"), key=lambda p: p.stem) if p.stem not in found
    }


def find(name_or_path: str | os.PathLike[str]) -> Path:
    """The file that a name or path means. Raises WeightsError that lists the names there are."""
    text = os.fspath(name_or_path)
    names = known()
    if text in names:
        return names[text]
    if Path(text).is_file():
        return Path(text)
    raise WeightsError(
        f'there are no weights "{text}": give a safetensors file or a name ({", ".join(names) or "none"}); published '
        "weights get a name by babelrs-geo weights import FILE"
    )


@dataclass(frozen=True)
class Weights:
    """Loaded weights."""

    name: str
    path: Path
    sha256: str
    header: Header
    model: Detector
    device: str

    def detector(
        self,
        sensor: str,
        score: float | Mapping[str, float] | None = None,
        classes: Sequence[str] | None = None,
    ) -> TileDetector:
        """What finds objects of one sensor.

        `score` is the least score reported, for all classes or by class; by default the weights' own.
        `classes` are those to report, all by default. Raises WeightsError for a sensor the weights do not
        know and ParameterError for such a class.
        """
        header = self.header
        chosen, known = header.chosen(sensor, classes), header.classes[sensor]
        own = header.thresholds[sensor]
        least = np.array([_least(own, score, n) if n in chosen else np.inf for n in known])
        return TileDetector(self, sensor, known, least)


@dataclass(frozen=True, eq=False)
class TileDetector:
    """Finds objects of one sensor in images."""

    weights: Weights
    sensor: str
    classes: tuple[str, ...]
    least: NDArray[np.float64]
    """The least score reported of each class (K,)."""

    @property
    def takes_bytes(self) -> bool:
        """Whether bytes cost it less than floats: where they are sent to a device. For a CPU they are divided as they
        are read, beside the model.
        """
        return not self.weights.device.startswith("cpu")

    def __call__(self, images: NDArray[np.float32] | NDArray[np.uint8]) -> list[Detections]:
        """Images (B, 3, h, w), float32 in [0, 1] or bytes, to one `Detections` each, in pixels of the image."""
        model, header = self.weights.model, self.weights.header
        batch = torch.from_numpy(images).to(self.weights.device)
        if batch.dtype == torch.uint8:  # there, not before: a quarter to send
            batch = batch.float() / 255
        first, oriented = (
            model.config.labels(self.sensor).start,
            header.box_kind[self.sensor] == "oriented",
        )
        return [
            to_detections(p, first, self.classes, oriented, self.least)
            for p in model.predict(batch, self.sensor)
        ]


def _least(own: Mapping[str, float], score: float | Mapping[str, float] | None, name: str) -> float:
    if score is None:
        return own[name]
    return score[name] if isinstance(score, Mapping) else score


def to_detections(
    prediction: Prediction, first: int, classes: Sequence[str], oriented: bool, least: NDArray[np.float64]
) -> Detections:
    """A prediction as `Detections` of a sensor's own classes, without those below the least score a class (K,)."""
    boxes, scores, labels = (t.cpu().numpy() for t in prediction)
    labels = labels - first
    keep = scores >= least[labels]
    boxes = boxes[keep].astype(np.float64)
    return Detections(
        from_le90(boxes) if oriented else from_xyxy(boxes),
        scores[keep],
        labels[keep],
        tuple(classes),
        oriented,
    )


def load(name_or_path: str | os.PathLike[str] = "compact", device: str = "cpu") -> Weights:
    """Weights by bundled name or file, on a torch device. Raises WeightsError."""
    path = find(name_or_path)
    model, header = checkpoints.load(path, device)
    return Weights(header.name, path, checkpoints.sha256(path), header, model, device)
