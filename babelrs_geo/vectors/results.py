"""Results read back: what `write` wrote, in any of its formats."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import geopandas as gpd
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pyogrio

from babelrs_geo.errors import LabelError
from babelrs_geo.vectors.files import PROVENANCE_KEY, SUFFIXES

_NEEDED = {"class": str, "score": float, "box": str, "sensor": str}


@dataclass(frozen=True, eq=False)
class Result:
    """A result file."""

    features: gpd.GeoDataFrame
    coverage: gpd.GeoDataFrame
    provenance: Mapping[str, Any]
    """As flat keys, joined by dots as in a GeoPackage."""


def read_result(path: str | os.PathLike[str]) -> Result:
    """Features, coverage and provenance of a result of `babelrs-geo detect`.

    Raises LabelError where the file is missing, cannot be read, or lacks what a result has.
    """
    path = Path(path)
    ending = path.suffix.lower()
    if ending not in SUFFIXES:
        raise LabelError(f"{path} is no result of babelrs-geo detect; expected {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise LabelError(f"{path} does not exist; pass a result of babelrs-geo detect")
    beside = path.with_name(f"{path.stem}_coverage{path.suffix}")
    try:
        if ending == ".gpkg":
            features, coverage = (pyogrio.read_dataframe(path, layer=n) for n in ("detections", "coverage"))
            told = _of_gpkg(path)
        elif ending == ".parquet":
            features, coverage = gpd.read_parquet(path), gpd.read_parquet(beside)
            metadata = pq.read_schema(path).metadata or {}
            told = _flat(json.loads(metadata.get(PROVENANCE_KEY, b"{}")))
        else:
            features, coverage = pyogrio.read_dataframe(path), pyogrio.read_dataframe(beside)
            told = _flat(json.loads(path.read_text(encoding="utf-8")).get("provenance") or {})
    except (OSError, RuntimeError, ValueError, sqlite3.Error, pa.ArrowException) as error:
        cause = " ".join(str(error).split())
        raise LabelError(
            f"{path} cannot be read with its coverage ({cause}); pass a whole result of babelrs-geo detect"
        ) from error
    if features.empty:  # GeoJSON has its columns in its rows
        features = features.assign(**{n: pd.Series(dtype=t) for n, t in _NEEDED.items() if n not in features})
    lacking = [name for name in _NEEDED if name not in features]
    lacking += [] if "state" in coverage else ["state (of the coverage)"]
    if lacking:
        raise LabelError(f"{path} has no column {', '.join(lacking)}; pass a result of babelrs-geo detect")
    return Result(features, coverage, told)


def _of_gpkg(path: Path) -> dict[str, Any]:
    database = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
    try:
        rows = database.execute("SELECT key, value FROM provenance").fetchall()
    finally:
        database.close()
    return {str(key): _value(value) for key, value in rows}


def _value(text: str | None) -> Any:
    """Text as it is where it is no JSON: `write` leaves text bare."""
    try:
        return None if text is None else json.loads(text)
    except ValueError:
        return text


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in nested.items():
        found |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
        )
    return found
