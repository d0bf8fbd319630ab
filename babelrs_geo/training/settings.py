"""Settings of a run as dataclasses and as YAML: read by name or file, with changes `dotted.key=value`.

Unknown keys and unfit values are ParameterErrors that name the nearest key.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from babelrs_geo.errors import ParameterError

Settings = TypeVar("Settings")


@dataclass(frozen=True, kw_only=True)
class RunPart:
    """What the weights do not depend on."""

    workers: int = 0
    """Processes that read and augment, for each process that trains."""
    checkpoint_minutes: float = 5.0
    """Between checkpoints to go on from; 0: every step."""
    validate_every: int = 0
    """Steps between validations; 0: at the end alone."""
    log_every: int = 20
    gradients_every: int = 100
    """Steps between measurements of the sensors' gradients, which cost a backward pass a sensor; 0: never."""
    tensorboard: bool = True


def names(folder: Path) -> list[str]:
    """Recipes that come with the package."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def read(
    kind: type[Settings], folder: Path, name_or_path: str | Path, changes: Sequence[str] = ()
) -> Settings:
    """A recipe by its name in `folder` or as a file, with changes `dotted.key=value`. Raises ParameterError.

    Values are YAML; a key may step into lists by number, or into all elements by `*`.
    """
    known = names(folder)
    path = folder / f"{name_or_path}.yaml" if str(name_or_path) in known else Path(name_or_path)
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ParameterError(
            f"there is no recipe {name_or_path} ({error}); give a YAML file, or one of {', '.join(known)}"
        ) from error
    except yaml.YAMLError as error:
        raise ParameterError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict):
        raise ParameterError(
            f"{path} holds no mapping; expected the keys of a recipe: {', '.join(_keys(kind))}"
        )
    whole = to_plain(from_plain(kind, document))
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise ParameterError(f'"{change}" is no change; expected key=value such as clip=1')
        try:
            _put(whole, key.strip().split("."), yaml.safe_load(value), key)
        except yaml.YAMLError as error:
            raise ParameterError(f"{change}: the value is no YAML; quote it") from error
    return from_plain(kind, whole)


def write(settings: Any) -> str:
    """The recipe as YAML that `read` takes."""
    return yaml.safe_dump(to_plain(settings), sort_keys=False, width=110)


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Dotted keys in which two plain recipes differ, those under `run` left out."""
    first, second = dict(_flat(one)), dict(_flat(other))
    return sorted(
        key
        for key in first.keys() | second.keys()
        if first.get(key) != second.get(key) and not key.startswith("run.")
    )


def merged(base: Mapping[str, Any], changes: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Plain values with some changed, nested as there. ParameterError, naming the key below `where`, for others."""
    out = dict(base)
    for name, value in changes.items():
        if name not in base:
            raise ParameterError(f"there is no {where}.{name}; expected some of {', '.join(base)}")
        nested = isinstance(value, Mapping) and isinstance(base[name], Mapping)
        out[name] = merged(base[name], value, f"{where}.{name}") if nested else value
    return out


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        for name, item in inner:
            yield from _flat(item, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def _put(at: Any, keys: list[str], value: Any, whole: str) -> None:
    """Set what lies under `keys` in plain values."""
    name, rest = keys[0], keys[1:]
    if isinstance(at, list):
        if name != "*" and not (name.isdigit() and int(name) < len(at)):
            raise ParameterError(
                f"{whole}: {name} is none of the {len(at)} elements; count from 0, or * for all"
            )
        places: list[Any] = list(range(len(at))) if name == "*" else [int(name)]
    else:
        places = [name]
    for place in places:
        if not rest:
            at[place] = value
            continue
        if isinstance(at, dict) and at.get(place) is None:
            at[place] = {}
        if not isinstance(at[place], dict | list):
            raise ParameterError(f"{whole}: {place} holds a value, in which there is no {rest[0]}")
        _put(at[place], rest, value, whole)


def to_plain(value: Any) -> Any:
    """Dataclasses, tuples and mappings as dictionaries and lists."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    return [to_plain(v) for v in value] if isinstance(value, tuple | list) else value


def from_plain(kind: type[Settings], value: Any) -> Settings:
    """Plain values as `kind`, a dataclass. ParameterError naming the key at which they do not fit."""
    made: Settings = _typed(kind, value, "", kind)
    return made


def _typed(kind: Any, value: Any, where: str, root: Any) -> Any:
    """Plain values as `kind`, a type hint, which stands at `where` in `root`."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        return _typed(next(k for k in inner if k is not type(None)), value, where, root)
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, where, root)
    if origin is Literal:
        if str(value) in inner:
            return str(value)
        raise _unfit(where, value, f"one of {', '.join(inner)}")
    if origin is tuple:
        if not isinstance(value, list | tuple) or (inner[-1] is not Ellipsis and len(value) != len(inner)):
            raise _unfit(where, value, "a list" if inner[-1] is Ellipsis else f"a list of {len(inner)}")
        hints = [inner[0]] * len(value) if inner[-1] is Ellipsis else inner
        return tuple(
            _typed(h, v, f"{where}.{i}", root) for i, (h, v) in enumerate(zip(hints, value, strict=True))
        )
    if origin is not None:
        if not isinstance(value, Mapping):
            raise _unfit(where, value, "a mapping")
        return {str(k): _typed(inner[1], v, f"{where}.{k}", root) for k, v in value.items()}
    return _scalar(kind, value, where)


def _scalar(kind: Any, value: Any, where: str) -> Any:
    if kind is bool or isinstance(value, bool):
        fits = kind is bool and isinstance(value, bool)
    elif kind is float:
        try:  # YAML 1.1 takes 1e-4 for a word
            return float(value)
        except (TypeError, ValueError):
            fits = False
    else:
        fits = isinstance(value, kind)
    if not fits:
        told = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
        raise _unfit(where, value, told.get(kind, str(kind)))
    return value


def _unfit(where: str, value: Any, wanted: str) -> ParameterError:
    return ParameterError(f"{where} is {value!r}; expected {wanted}")


def _dataclass(kind: Any, value: Any, where: str, root: Any) -> Any:
    hints = get_type_hints(kind)
    if not isinstance(value, Mapping):
        raise _unfit(where or "the recipe", value, f"a mapping of {', '.join(hints)}")
    lead = f"{where}." if where else ""
    for name in value:
        if name not in hints:
            near = _nearest(str(name), lead, hints, root)
            raise ParameterError(f"there is no {lead}{name} in a recipe; {near}")
    lacking = [f.name for f in dataclasses.fields(kind) if _needed(f) and f.name not in value]
    if lacking:
        raise ParameterError(f"the recipe lacks {lead}{lacking[0]}; give it")
    return kind(**{name: _typed(hints[name], item, lead + name, root) for name, item in value.items()})


def _needed(f: dataclasses.Field[Any]) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _nearest(name: str, lead: str, here: Mapping[str, Any], root: Any) -> str:
    """The key that was probably meant: of the same part first, then of any."""
    close = difflib.get_close_matches(name, here, n=1)
    if close:
        return f"did you mean {lead}{close[0]}?"
    close = difflib.get_close_matches(f"{lead}{name}", list(_keys(root)), n=1)
    return f"did you mean {close[0]}?" if close else f"expected one of {', '.join(lead + k for k in here)}"


def _keys(kind: Any, lead: str = "") -> Iterator[str]:
    """Dotted keys of a dataclass, those in lists and mappings left out."""
    for name, hint in get_type_hints(kind).items():
        yield lead + name
        inner = [k for k in (hint, *get_args(hint)) if dataclasses.is_dataclass(k)]
        if inner and get_origin(hint) is not tuple:
            yield from _keys(inner[0], f"{lead}{name}.")
