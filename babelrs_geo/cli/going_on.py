"""Whether an archive's run without SOURCE goes on with what the one before it did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from babelrs_geo.errors import ParameterError


def check_goes_on(folder: Path, parameters: dict[str, Any]) -> None:
    """Refuse a run without SOURCE that has nothing to go on with, or other options than the one before it: all that is
    done would be stale. ParameterError.
    """
    from babelrs_geo.archive.ledger import NAME, Ledger

    before = None
    if planned := (folder / NAME).exists():
        with Ledger(folder) as ledger:
            planned, before = sum(ledger.counts().values()) > 0, ledger.setting("run")
    if not planned:
        raise ParameterError("nothing to do: pass a SOURCE, or -o of an archive that has a plan")
    if before is None:  # it ended while it planned
        return
    had = _typed(before["parameters"] | {"suffix": before["suffix"]})
    has = _typed(parameters)
    other = [_told(name, had.get(name)) for name in had | has if had.get(name) != has.get(name)]
    if other:
        raise ParameterError(
            f"{folder} was run {', '.join(other)}: without a SOURCE run it so again, or pass the SOURCE to do all anew"
        )


def _typed(parameters: dict[str, Any]) -> dict[str, Any]:
    """What decides results, by the options that say it; those that say nothing are left out."""
    flat = {**parameters.get("detect", {}), **parameters.get("reading", {})}
    flat |= {key: parameters.get(key) for key in ("weights", "crs")}
    flat["format"] = parameters["suffix"].lstrip(".")
    names = {"limits": "range", "collar": "no-collar"}
    given = {f"--{names.get(key, key)}": value for key, value in flat.items() if value is not None}
    return dict(json.loads(json.dumps(given)))  # as the ledger has them


def _told(option: str, value: Any) -> str:
    """An option of another run."""
    if value is None:
        return f"without {option}"
    if option in ("--weights", "--aoi"):  # of which there is a hash
        return f"with other {option}"
    if option == "--no-collar":
        return f"with {option}"
    several = value if isinstance(value, list) else [value]
    between = " " if option == "--range" else ","
    return f"with {option} {between.join(map(str, several))}"
