"""Weights on disk: safetensors under a JSON header that says what they are and may be used for.

A detector has a `Header`, what training can start from has a `Start`. Trained detectors are stored in half
precision, imported weights as their file has them; all compute in float32.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from babelrs_geo.drafts import draft
from babelrs_geo.errors import ParameterError, WeightsError
from babelrs_geo.models.adapter import ViTAdapter
from babelrs_geo.models.detector import Detector, DetectorConfig
from babelrs_geo.models.official import BACKBONE, ENCODER, backbone_of, vision_of
from babelrs_geo.models.pivot import STEP, PivotConfig
from babelrs_geo.models.plain import Settings, from_plain
from babelrs_geo.models.vit import ViTConfig

KEY = "babelrs_geo"
"""Where the header stands in the safetensors metadata."""
FORMAT = 1

StartKind = Literal["encoder", "backbone", "vision-language", "pivot"]
State = Mapping[str, torch.Tensor]
Shape = tuple[int, ...]


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
    """Least score that is reported, by sensor and class, by F1 on the validation split."""
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

    @cached_property
    def config(self) -> DetectorConfig:
        """The architecture as a configuration. Raises WeightsError for one that this version does not know."""
        try:
            return DetectorConfig.from_dict(self.architecture)
        except ParameterError as cause:
            raise WeightsError(
                f'the architecture of weights "{self.name}" cannot be read ({cause}); use the babelrs-geo that wrote '
                "them or newer weights"
            ) from cause

    @property
    def tile(self) -> int:
        """Side in pixels of the images that the weights were made for."""
        return self.config.backbone.vit.image_size

    def chosen(self, sensor: str, classes: Sequence[str] | None = None) -> tuple[str, ...]:
        """Those of `classes` (all by default) that the weights know for the sensor, in their own order.

        Raises `WeightsError` where they lack the sensor, `ParameterError` for a class they do not know.
        """
        if sensor not in self.classes:
            raise WeightsError(
                f'weights "{self.name}" know nothing of {sensor} (they know {", ".join(self.classes)}): pass '
                "weights trained on it, or another sensor if the scene was taken for the wrong one"
            )
        known = self.classes[sensor]
        for name in classes or ():
            if name not in known:
                raise ParameterError(
                    f'unknown class "{name}" for {sensor}: the weights know {", ".join(known)}'
                )
        return tuple(name for name in known if classes is None or name in classes)

    def to_json(self) -> str:
        """The header as it is stored."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Header:
        """The header from `to_json`. Raises WeightsError for another format or unfit fields."""
        return _parsed(cls, _values(text))


@dataclass(frozen=True)
class Start:
    """What a checkpoint that training starts from says of itself; it finds nothing yet."""

    kind: StartKind
    """An encoder alone, in the names of the published one (`encoder`) or, with stem and all, of a detector's
    backbone; or encoder, projector and language model: imported ones in the names of transformers' InternVL
    (`vision-language`), ours in those of `PivotModel` (`pivot`).
    """
    name: str
    architecture: Mapping[str, Any]
    """Sizes: `ViTConfig`, `AdapterConfig` with the last trained `layer` and the images' `mean` and `std`,
    `official.PivotSizes`, or `PivotConfig`, as plain values.
    """
    licence: str
    training: Mapping[str, Any] = field(default_factory=dict)
    """Where the weights come from."""
    format: int = FORMAT

    def to_json(self) -> str:
        """The header as it is stored."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)


def _values(text: str) -> dict[str, Any]:
    """What a header of this format holds."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as cause:
        raise WeightsError(f"the weights' header cannot be read ({cause}); expected babelrs-geo's") from cause
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        told = values.get("format", "none") if isinstance(values, dict) else "none"
        raise WeightsError(
            f"weights have header format {told}; this version reads {FORMAT}: use the babelrs-geo that wrote them or "
            "newer weights"
        )
    return values


def _parsed(kind: type[Settings], values: Mapping[str, Any]) -> Settings:
    try:
        return from_plain(kind, values)
    except ParameterError as cause:
        raise WeightsError(f"the weights' header cannot be read ({cause}); expected babelrs-geo's") from cause


def save(path: str | os.PathLike[str], model: Detector, header: Header) -> None:
    """Write a detector in half precision with its header; the file appears whole or not at all."""
    write(path, {k: v.detach().half() for k, v in model.state_dict().items()}, {KEY: header.to_json()})


def write(path: str | os.PathLike[str], state: State, metadata: Mapping[str, str]) -> None:
    """Write tensors as they are, under safetensors metadata; the file appears whole or not at all.

    Raises OutputError where it cannot be written.
    """
    with draft(Path(path), "choose a folder you may write to", (SafetensorError,)) as hidden:
        save_file({k: v.contiguous() for k, v in state.items()}, hidden, metadata=dict(metadata))
        hidden.chmod(0o644)  # safetensors writes for its owner alone


def read(path: str | os.PathLike[str]) -> Header | Start:
    """What a checkpoint of ours says of itself, without reading the tensors. Raises WeightsError."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as cause:
        raise WeightsError(
            f"{path} is not a readable safetensors file ({cause}); give weights made by babelrs-geo"
        ) from cause
    if KEY not in metadata:
        raise WeightsError(
            f"{path} has no babelrs-geo header; give weights made by babelrs-geo, or make some of published "
            "ones: babelrs-geo weights import"
        )
    values = _values(metadata[KEY])
    return _parsed(Start, values) if "kind" in values else _parsed(Header, values)


def read_header(path: str | os.PathLike[str]) -> Header:
    """The header of a detector, without reading the tensors. Raises WeightsError, also for a `Start`."""
    header = read(path)
    if isinstance(header, Start):
        raise WeightsError(
            f"{path} holds no detector but what one is trained from (kind {header.kind}): "
            "give detector weights, such as the bundled compact"
        )
    return header


def shapes(path: str | os.PathLike[str]) -> dict[str, Shape]:
    """Names and shapes of the tensors in a safetensors file, without reading them."""
    with safe_open(path, "pt") as file:
        return {k: tuple(file.get_slice(k).get_shape()) for k in file.keys()}  # noqa: SIM118 (no iterator)


def tensors(path: str | os.PathLike[str], device: str = "cpu") -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file in the precision they are stored in."""
    with safe_open(path, "pt", device=device) as file:
        return {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (no iterator)


@dataclass(frozen=True)
class Contents:
    """What a checkpoint's file holds, beside what its header says."""

    kind: str
    """detector, or a `StartKind`."""
    parameters: int
    precision: str
    """Types of the tensors, such as float16."""
    sha256: str


def describe(path: str | os.PathLike[str]) -> Contents:
    """Look into a checkpoint of ours without loading it. Raises WeightsError."""
    header = read(path)
    sizes = {k: math.prod(shape) for k, shape in shapes(path).items() if k != STEP}
    with safe_open(path, "pt") as file:
        kinds = sorted({str(file.get_slice(k).get_dtype()) for k in sizes})
    precision = ", ".join(_PRECISIONS.get(kind, kind) for kind in kinds)
    if isinstance(header, Start):
        return Contents(header.kind, sum(sizes.values()), precision, sha256(path))
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Detector(header.config).parameters())
    return Contents("detector", parameters, precision, sha256(path))


_PRECISIONS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


def load(path: str | os.PathLike[str], device: str = "cpu") -> tuple[Detector, Header]:
    """The model in float32, ready to predict, and its header.

    Raises WeightsError for a file that is damaged or whose tensors do not fit its architecture; the message
    lists the first keys that are missing, unexpected or of another shape.
    """
    header = read_header(path)
    # On the device "meta" nothing would be drawn, but that imports torch's compiler, which takes longer than to look
    # at a small scene. What is drawn is overwritten, and the caller's generator is left as it was.
    with torch.random.fork_rng(devices=[]):
        model = Detector(header.config)
    odd = differences({k: tuple(v.shape) for k, v in model.state_dict().items()}, shapes(path))
    if odd:
        raise WeightsError(f"{path} does not fit its own architecture: {odd}; get a whole copy")
    model.load_state_dict({k: v.float() for k, v in tensors(path, device).items()}, assign=True)
    for name, values in model.normalisation().items():  # not in the file, so still without values
        setattr(model, name, values.to(device))
    return model.to(memory_format=torch.channels_last).eval().requires_grad_(False), header


def read_encoder(path: str | os.PathLike[str]) -> tuple[Start, dict[str, torch.Tensor]]:
    """The encoder in a file of any `Start`: kind `encoder` or `backbone`, and its tensors under bare names.

    A backbone holds what its last trained layer depends on, not what leads on to the detector's maps. Raises
    WeightsError for a file that is no start.
    """
    start = read(path)
    if isinstance(start, Header):
        raise WeightsError(
            f"{path} is a whole detector; expected an encoder, or what one was pretrained in: babelrs-geo weights "
            "import"
        )
    state = tensors(path)
    if start.kind == "vision-language":
        sizes = start.architecture["vision"]
        return replace(start, kind="encoder", architecture=sizes), vision_of(state)
    if start.kind != "pivot":
        return start, state
    config = PivotConfig.from_dict(start.architecture)
    own = {k.removeprefix("vision_model."): v for k, v in state.items() if k.startswith("vision_model.")}
    sizes = dataclasses.asdict(config.encoder)
    if isinstance(config.encoder, ViTConfig):
        return replace(start, kind="encoder", architecture=sizes), own
    with torch.device("meta"):
        names = ViTAdapter(config.encoder).reached(config.taps.last)
    kept = {k: v for k, v in own.items() if k in names}
    sizes |= {"layer": config.taps.last, "mean": list(config.mean), "std": list(config.std)}
    return replace(start, kind="backbone", architecture=sizes), kept


def start_backbone(model: Detector, path: str | os.PathLike[str]) -> None:
    """Put an imported or pretrained encoder (a `Start` of any kind) into a detector, resized to its images.

    Every tensor of the transformer is replaced, and of a pretrained backbone every one that it was trained in; the
    others are left alone. Raises WeightsError where the file is no start, or its sizes or its images' normalisation are
    others.
    """
    start, state = read_encoder(path)
    ours = {k: tuple(v.shape) for k, v in model.state_dict().items() if k.startswith("backbone.")}
    if start.kind == "backbone":
        seen = {name: tuple(start.architecture.get(name, ())) for name in ("mean", "std")}
        if seen != {name: getattr(model.config, name) for name in seen}:
            raise WeightsError(
                f"the encoder {path} was pretrained on images normalised by mean {seen['mean']} and std {seen['std']}, "
                f"the detector has {model.config.mean} and {model.config.std}; pretrain it with the detector's"
            )
        table = BACKBONE
        names = {f"backbone.{name}" for name in model.backbone.reached(start.architecture["layer"])}
        wanted = {k: shape for k, shape in ours.items() if k in names}
    else:
        table = ENCODER
        kinds = ("backbone.embeddings.", "backbone.layers.")
        wanted = {k: shape for k, shape in ours.items() if k.startswith(kinds)}
    backbone = backbone_of(state, model.config.backbone.vit, table)
    odd = differences(wanted, {k: tuple(v.shape) for k, v in backbone.items()})
    if odd:
        what = "backbone" if table is BACKBONE else "transformer"
        raise WeightsError(f"the encoder {path} does not fit the detector's {what}: {odd}")
    model.load_state_dict(backbone, strict=False)


def differences(wanted: Mapping[str, Shape], there: Mapping[str, Shape]) -> str:
    """The first keys that are missing, unexpected and mis-shaped, and how many; empty where all is as wanted."""
    missing = [k for k in wanted if k not in there]
    surplus = [k for k in there if k not in wanted]
    shaped = [f"{k} {there[k]} for {wanted[k]}" for k in wanted if k in there and there[k] != wanted[k]]
    parts = [
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for what, keys in (("missing", missing), ("unexpected", surplus), ("mis-shaped", shaped))
        if keys
    ]
    return "; ".join(parts)


def sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
