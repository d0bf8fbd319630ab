"""Published checkpoints on disk: read without running code, written in our format, and back.

Three kinds are known, told apart by the names of their tensors: the fine-tuned detector (an mmrotate `.pth`),
the pretrained encoder, and a vision-language model of the InternVL2.5-1B kind (`official` has the names).
Nothing is fetched; a file is refused unless every tensor in it is accounted for.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from babelrs_geo.errors import OutputError, ParameterError, WeightsError
from babelrs_geo.models import checkpoints, official, zoo
from babelrs_geo.models.checkpoints import Header, Start, differences
from babelrs_geo.models.detector import Detector, DetectorConfig
from babelrs_geo.models.official import LAYOUTS, PivotSizes, State
from babelrs_geo.models.pivot import STEP
from babelrs_geo.models.vit import ViTConfig

Layout = Literal["official", "transformers", "vit"]
"""What `export` writes: the published names, transformers' names, or the published encoder alone."""

INDEX = "model.safetensors.index.json"
_NAMES = {"detector": "babelrs", "encoder": "babelrs-vit", "vision-language": "internvl2_5-1b"}


@dataclass(frozen=True)
class Targets:
    """What a published checkpoint must fit. Defaults are the paper's."""

    detector: DetectorConfig = field(default_factory=DetectorConfig)
    encoder: ViTConfig = official.INTERNVIT
    pivot: PivotSizes = field(default_factory=PivotSizes)


PAPER = Targets()


@dataclass(frozen=True)
class ImportOptions:
    """How imported weights are kept."""

    name: str | None = None
    """What they are called; by default after their kind."""
    licence: str | None = None
    """Their terms; by default those of the published weights of their kind."""
    half: bool = False
    """Store float16, half the size, instead of the precision of the file."""


@dataclass(frozen=True)
class Imported:
    """What was imported."""

    path: Path
    header: Header | Start
    kind: str
    """detector, encoder or vision-language."""
    tensors: int


def import_weights(
    file: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    options: ImportOptions | None = None,
    *,
    overwrite: bool = False,
) -> Imported:
    """Write a published checkpoint in our format, at `output` or under its name among the user's weights.

    Raises WeightsError for a file that is none, is damaged, would run code, or whose tensors are not exactly
    those expected; OutputError where the output exists or cannot be written; ParameterError for a name that
    is no file name.
    """
    options = options or ImportOptions()
    path = Path(file)
    if options.name or output is not None:  # refuse before reading what can be refused
        _output(output, options.name or "", overwrite)
    state, files = read_published(path)
    kind = kind_of(path, state)
    name = options.name or _NAMES[kind]
    target = _output(output, name, overwrite)
    source = {"source": path.name, "source_sha256": {f.name: checkpoints.sha256(f) for f in files}}
    header: Header | Start
    if kind == "detector":
        header, state = _detector(path, state, PAPER.detector)
    elif kind == "encoder":
        header, state = _encoder(path, state, PAPER.encoder)
    else:
        header, state = _pivot(path, state, PAPER.pivot)
    header = replace(
        header, name=name, licence=options.licence or header.licence, training={**source, **header.training}
    )
    state = _sound(path, state, half=options.half)
    if output is None:
        target.parent.mkdir(parents=True, exist_ok=True)
    checkpoints.write(target, state, {checkpoints.KEY: header.to_json()})
    return Imported(target, header, kind, len(state))


def export(
    weights: str | os.PathLike[str],
    output: str | os.PathLike[str],
    layout: Layout = "official",
    *,
    overwrite: bool = False,
) -> int:
    """Write weights of ours as safetensors in published names, bit for bit; give the number of tensors.

    An encoder (`vit`) keeps our header beside them: a detector can start from the file as it is.

    Raises WeightsError where the weights are none or have no such layout, OutputError as `import_weights`.
    """
    path = zoo.find(weights)
    header: Header | Start = checkpoints.read(path)
    target = _output(output, "", overwrite)
    kind = header.kind if isinstance(header, Start) else "detector"
    metadata = {"name": header.name, "licence": header.licence}
    if layout == "vit":
        if kind == "detector":
            raise WeightsError(f"{path} is a whole detector: its transformer was resized and is not exported")
        encoder, state = checkpoints.read_encoder(path)
        metadata[checkpoints.KEY] = encoder.to_json()  # a detector starts from the file as it is
    else:
        state = checkpoints.tensors(path)
        if kind == "pivot":
            state = {k: v for k, v in state.items() if k != STEP}
        published = kind == "pivot" and set(header.architecture["encoder"]) == {"transformer"}
        if kind == "backbone" or (kind == "pivot" and not published):
            raise WeightsError(f"{path} ({kind}) has no published layout; export it --as vit")
        if layout == "transformers" and kind in ("detector", "encoder"):
            raise WeightsError(f"{path} ({kind}) has no layout in transformers; export it --as official")
        if kind == "pivot" and layout == "transformers":
            state = official.renamed(state, official.PIVOT)
        elif kind == "vision-language" and layout == "official":
            state = official.renamed(state, official.PIVOT, back=True)
    # transformers reads files only that say `format` pt
    checkpoints.write(target, state, {"format": "pt", **metadata})
    return len(state)


def kind_of(path: Path, state: Mapping[str, Any]) -> str:
    """detector, encoder or vision-language, by the names of the tensors. Raises WeightsError for another."""
    if any(key.startswith("spm.") for key in state):
        raise WeightsError(
            f"{path} is a backbone pretrained by babelrs-geo; start a detector from it as it is"
        )
    for kind, beginnings in (
        ("vision-language", ("language_model.", "model.language_model.", "mlp1.")),
        ("detector", ("backbone.", "neck.")),
        ("encoder", ("vision_model.", "embeddings.", "encoder.")),
    ):
        if any(key.startswith(beginnings) for key in state):
            return kind
    raise WeightsError(
        f"{path} holds none of the names known here (first {', '.join(list(state)[:3]) or 'none'}); expected a "
        "BabelRS detector, its pretrained ViT, or InternVL2.5-1B"
    )


def read_published(path: Path) -> tuple[State, list[Path]]:
    """The tensors of a published checkpoint and the files that hold them.

    A pickle, safetensors, an index of safetensors shards, or a folder with either. Prefixes that say nothing
    (`module.`; `vision_model.` where all names have it) are taken away. Raises WeightsError.
    """
    if path.is_dir():
        inside = [path / name for name in (INDEX, "model.safetensors") if (path / name).is_file()]
        if not inside:
            raise WeightsError(
                f"{path} is a folder without {INDEX} or model.safetensors; give the file itself"
            )
        path = inside[0]
    if not path.is_file():
        raise WeightsError(f"there is no file {path}; give a published checkpoint that is on this disk")
    with path.open("rb") as opened:
        head = opened.read(64)
    files = [path]
    if head.lstrip().startswith((b"<", b"version https://git-lfs")):
        what = "a web page" if head.lstrip().startswith(b"<") else "a Git LFS pointer"
        raise WeightsError(f"{path} is {what}, not a checkpoint; download the file itself again")
    if path.suffix == ".json":
        state, files = _read_shards(path)
    elif head.startswith((b"PK", b"\x80")):
        state = _read_pickle(path)
    else:
        state = _read_safetensors(path)
    for prefix in ("module.", "vision_model."):
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state, files


def _read_safetensors(path: Path) -> State:
    try:
        return checkpoints.tensors(path)
    except (SafetensorError, OSError) as cause:
        raise WeightsError(
            f"{path} is neither a whole safetensors file nor a torch checkpoint ({cause}); download it again"
        ) from cause


def _read_shards(index: Path) -> tuple[State, list[Path]]:
    try:
        places = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as cause:
        raise WeightsError(f"{index} is no index of safetensors shards (it lacks a weight_map)") from cause
    state: State = {}
    files = []
    for name in sorted({str(place) for place in places.values()}):
        shard = index.parent / name
        if Path(name).name != name or not shard.is_file():
            raise WeightsError(f"{index} names the shard {name}, which is not beside it; get all shards")
        files.append(shard)
        state |= _read_safetensors(shard)
    odd = differences(dict.fromkeys(places, ()), dict.fromkeys(state, ()))
    if odd:
        raise WeightsError(f"{index} and its shards disagree: {odd}; get all of one version")
    return state, files


def _read_pickle(path: Path) -> State:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols: what cannot be read raises
            content = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None
            )
    except pickle.UnpicklingError as cause:
        named = re.search(r"GLOBAL ([\w.]+)", str(cause))
        what = f"holds {named[1]} beside its tensors" if named else "is damaged, or holds more than tensors"
        raise WeightsError(
            f"{path} {what}, which may run code, so it was not opened; download it again, or where you trust it "
            'make a copy with the tensors alone: torch.save({"state_dict": ...}, FILE)'
        ) from cause
    except Exception as cause:  # a damaged file may raise anything; nothing in it was run
        text = " ".join(str(cause).split())[:120]
        raise WeightsError(
            f"{path} is no whole torch checkpoint ({type(cause).__name__}: {text}); download it again"
        ) from cause
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not state:
        raise WeightsError(f"{path} holds no state_dict; expected a checkpoint as mmrotate saves it")
    odd = [str(key) for key, value in state.items() if not isinstance(value, Tensor)]
    if odd:
        raise WeightsError(f"{path}: {odd[0]} in its state_dict is no tensor; expected tensors alone")
    return {str(key): value.detach() for key, value in state.items()}


def _fit(path: Path, what: str, wanted: Mapping[str, tuple[int, ...]], state: State) -> None:
    odd = differences(wanted, {k: tuple(v.shape) for k, v in state.items()})
    if odd:
        raise WeightsError(f"{path} is not {what} of {len(wanted)} tensors: {odd}")


def _detector(path: Path, state: State, config: DetectorConfig) -> tuple[Header, State]:
    with torch.device("meta"):
        wanted = {k: tuple(v.shape) for k, v in Detector(config).state_dict().items()}
    _fit(path, "the BabelRS detector", wanted, official.renamed(state, official.DETECTOR))
    header = Header(
        name="",
        classes=dict(config.classes),
        box_kind={"sar": "horizontal", "rgb": "oriented", "ir": "oriented"},
        gsd=official.GSD,
        thresholds={sensor: dict.fromkeys(names, official.SCORE) for sensor, names in config.classes.items()},
        radiometry=official.RADIOMETRY,
        architecture=config.to_dict(),
        licence=official.LICENCE,
        training={"assumed": "thresholds and ground sampling: neither is published"},
    )
    return header, {k: state[k] for k in wanted}


def _encoder(path: Path, state: State, vit: ViTConfig) -> tuple[Start, State]:
    _fit(path, "the pretrained ViT", official.encoder_shapes(vit), state)
    return Start("encoder", "", vars(vit) | {}, official.LICENCE), state


def _pivot(path: Path, state: State, sizes: PivotSizes) -> tuple[Start, State]:
    layout = next(
        (n for n, (start, _) in LAYOUTS.items() if any(k.startswith(start) for k in state)), "original"
    )
    table = LAYOUTS[layout][1]
    ours = official.renamed(state, table)
    tokens = ours.get("model.language_model.embed_tokens.weight")
    sizes = replace(
        sizes,
        # its rows are padded differently from release to release
        vocabulary=sizes.vocabulary if tokens is None else len(tokens),
        tied="lm_head.weight" not in ours,
    )
    _fit(path, f"InternVL2.5-1B ({layout} layout)", official.layout_names(sizes, layout), state)
    return Start("vision-language", "", sizes.to_dict(), official.LICENCE_PIVOT), ours


def _sound(path: Path, state: State, *, half: bool) -> State:
    """The tensors as they will be stored: floating point, finite, each in memory of its own."""
    out: State = {}
    seen: set[int] = set()
    for key, value in state.items():
        if not value.is_floating_point():
            raise WeightsError(f"{path}: {key} is {value.dtype}; expected floating point")
        value = value.half() if half else value
        if not value.isfinite().all():
            why = ", or too large for half precision" if half else ""
            raise WeightsError(f"{path}: {key} holds values that are not finite{why}; get another copy")
        place = value.untyped_storage().data_ptr() if value.is_contiguous() else 0
        whole = value.untyped_storage().nbytes() == value.numel() * value.element_size()
        out[key] = value if whole and place not in seen else value.contiguous().clone()
        seen.add(place)
    return out


def _output(output: str | os.PathLike[str] | None, name: str, overwrite: bool) -> Path:
    """Where to write. Raises as `import_weights` says."""
    if name and not re.fullmatch(r"\w[\w.-]*", name, flags=re.ASCII):
        raise ParameterError(
            f'"{name}" cannot name weights; use letters, digits, dots, dashes and underscores'
        )
    if output is None and name in zoo.bundled():
        raise ParameterError(f'"{name}" is the name of bundled weights; choose another with --name')
    path = zoo.folder() / f"{name}.safetensors" if output is None else Path(output)
    if output is not None and path.suffix != ".safetensors":
        raise ParameterError(f'the output is "{path}", expected a name that ends with .safetensors')
    if path.is_dir() or (path.exists() and not overwrite):
        raise OutputError(f"{path} exists already: choose another name, or pass --overwrite to replace it")
    if output is not None and not path.parent.is_dir():
        raise OutputError(f"there is no folder {path.parent}: make it, or write elsewhere")
    return path
