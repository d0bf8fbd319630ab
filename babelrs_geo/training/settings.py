"""Settings of a run as dataclasses and as YAML: read by name or file, with changes `dotted.key=value`.

Unknown keys and unfit values are ParameterErrors that name the nearest key.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml

from babelrs_geo.errors import ParameterError
from babelrs_geo.models.plain import Count, Range, Settings, Whole, from_plain, keys, to_plain


@dataclass(frozen=True, kw_only=True)
class RunPart:
    """What the weights do not depend on."""

    workers: Whole = 0
    """Processes that read and augment, for each process that trains."""
    checkpoint_minutes: Annotated[float, Range(least=0)] = 5.0
    """Between checkpoints to go on from; 0: every step."""
    validate_every: Whole = 0
    """Steps between validations; 0: at the end alone."""
    judge: bool = True
    """False: no validation, and the last weights are written without figures, where a machine must be given back."""
    log_every: Count = 20
    gradients_every: Whole = 100
    """Steps between measurements of the sensors' gradients, which cost a backward pass a sensor; 0: never."""
    tensorboard: bool = True


def names(folder: Path) -> list[str]:
    """Recipes that come with the package."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def read(
    kind: type[Settings],
    folder: Path,
    name_or_path: str | Path,
    changes: Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
) -> Settings:
    """A recipe by its name in `folder` or as a file, with changes `dotted.key=value`. Raises ParameterError.

    Values are YAML, those in `values`, by dotted key, what they are; a key may step into lists by number, or into all
    elements by `*`.
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
            f"{path} holds no mapping; expected the keys of a recipe: {', '.join(keys(kind))}"
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
    for key, given in (values or {}).items():
        _put(whole, key.split("."), given, key)
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
