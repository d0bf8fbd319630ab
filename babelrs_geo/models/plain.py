"""Configurations as plain values, as YAML and JSON hold them, and back; each value is held to its type and range.

Unknown keys and unfit values are ParameterErrors that name the nearest key.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from babelrs_geo.errors import ParameterError

Settings = TypeVar("Settings")


@dataclass(frozen=True, kw_only=True)
class Range:
    """Numbers that a setting may be: `Annotated[float, Range(least=0)]`."""

    least: float = -math.inf
    above: float = -math.inf
    most: float = math.inf
    below: float = math.inf

    def __contains__(self, value: float) -> bool:
        return self.least <= value <= self.most and self.above < value < self.below

    def __str__(self) -> str:
        ends = {
            "{} or more": self.least,
            "above {}": self.above,
            "{} at most": self.most,
            "below {}": self.below,
        }
        return " and ".join(text.format(f"{end:g}") for text, end in ends.items() if math.isfinite(end))


@dataclass(frozen=True)
class OneOf:
    """Names that a setting may be, or its keys."""

    names: tuple[str, ...]

    def __contains__(self, value: str) -> bool:
        return value in self.names

    def __str__(self) -> str:
        return f"one of {', '.join(self.names)}"


Count = Annotated[int, Range(least=1)]
Whole = Annotated[int, Range(least=0)]


def merged(base: Mapping[str, Any], changes: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Plain values with some changed, nested as there. ParameterError, naming the key below `where`, for others."""
    out = dict(base)
    for name, value in changes.items():
        if name not in base:
            raise ParameterError(f"there is no {where}.{name}; expected some of {', '.join(base)}")
        nested = isinstance(value, Mapping) and isinstance(base[name], Mapping)
        out[name] = merged(base[name], value, f"{where}.{name}") if nested else value
    return out


def to_plain(value: Any) -> Any:
    """Dataclasses, tuples and mappings as dictionaries and lists."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    return [to_plain(v) for v in value] if isinstance(value, tuple | list) else value


def from_plain(kind: type[Settings], value: Any, where: str = "") -> Settings:
    """Plain values as `kind`, a dataclass. ParameterError naming the key, below `where`, at which they do not fit."""
    made: Settings = _typed(kind, value, where, list(keys(kind, f"{where}." if where else "")))
    return made


def _typed(kind: Any, value: Any, where: str, known: Sequence[str]) -> Any:
    """Plain values as `kind`, a type hint, which stands at `where` among the keys that are known."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin is Annotated:
        made, rule = _typed(inner[0], value, where, known), inner[1]
        if made not in rule:
            raise _unfit(where, value, str(rule))
        return made
    if origin in (Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        return _typed(next(k for k in inner if k is not type(None)), value, where, known)
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, where, known)
    if origin is Literal:
        if str(value) in inner:
            return str(value)
        raise _unfit(where, value, f"one of {', '.join(inner)}")
    if origin is tuple:
        if not isinstance(value, list | tuple) or (inner[-1] is not Ellipsis and len(value) != len(inner)):
            raise _unfit(where, value, "a list" if inner[-1] is Ellipsis else f"a list of {len(inner)}")
        hints = [inner[0]] * len(value) if inner[-1] is Ellipsis else inner
        return tuple(
            _typed(h, v, f"{where}.{i}", known) for i, (h, v) in enumerate(zip(hints, value, strict=True))
        )
    if origin is not None:
        if not isinstance(value, Mapping):
            raise _unfit(where, value, "a mapping")
        named = {_typed(inner[0], str(k), f"a key of {where}", known): v for k, v in value.items()}
        return {k: _typed(inner[1], v, f"{where}.{k}", known) for k, v in named.items()}
    return _scalar(kind, value, where)


def _scalar(kind: Any, value: Any, where: str) -> Any:
    if kind is bool or isinstance(value, bool):
        fits = kind is bool and isinstance(value, bool)
    elif kind is float:
        try:  # YAML 1.1 takes 1e-4 for a word
            value = float(value)
            fits = math.isfinite(value)
        except (TypeError, ValueError, OverflowError):
            fits = False
    else:
        fits = isinstance(value, kind)
    if not fits:
        told = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
        raise _unfit(where, value, told.get(kind, str(kind)))
    return value


def _unfit(where: str, value: Any, wanted: str) -> ParameterError:
    return ParameterError(f"{where} is {value!r}; expected {wanted}")


def _dataclass(kind: Any, value: Any, where: str, known: Sequence[str]) -> Any:
    hints = get_type_hints(kind, include_extras=True)
    if not isinstance(value, Mapping):
        raise _unfit(where or "the whole", value, f"a mapping of {', '.join(hints)}")
    lead = f"{where}." if where else ""
    for name in value:
        if name not in hints:
            near = _nearest(str(name), lead, hints, known)
            raise ParameterError(f"there is no {lead}{name}; {near}")
    lacking = [f.name for f in dataclasses.fields(kind) if _needed(f) and f.name not in value]
    if lacking:
        raise ParameterError(f"{lead}{lacking[0]} is missing; give it")
    return kind(**{name: _typed(hints[name], item, lead + name, known) for name, item in value.items()})


def _needed(f: dataclasses.Field[Any]) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _nearest(name: str, lead: str, here: Mapping[str, Any], known: Sequence[str]) -> str:
    """The key that was probably meant: of the same part first, then of any."""
    close = difflib.get_close_matches(name, here, n=1)
    if close:
        return f"did you mean {lead}{close[0]}?"
    close = difflib.get_close_matches(f"{lead}{name}", known, n=1)
    return f"did you mean {close[0]}?" if close else f"expected one of {', '.join(lead + k for k in here)}"


def keys(kind: Any, lead: str = "") -> Iterator[str]:
    """Dotted keys of a dataclass, those in lists and mappings left out."""
    for name, hint in get_type_hints(kind).items():
        yield lead + name
        inner = [k for k in (hint, *get_args(hint)) if dataclasses.is_dataclass(k)]
        if inner and get_origin(hint) is not tuple:
            yield from keys(inner[0], f"{lead}{name}.")
