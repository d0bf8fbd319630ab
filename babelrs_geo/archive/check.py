"""Whether the ledger is true: every row that is done has a readable output with the recorded count."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from babelrs_geo.archive.ledger import Ledger
from babelrs_geo.archive.outputs import RESULTS, files_of


@dataclass(frozen=True)
class Verdict:
    """What was found."""

    checked: int
    faults: tuple[tuple[int, str, str], ...]
    """Row, source, and what is wrong with its output."""
    strays: tuple[str, ...]
    """Files among the results that no row names, relative to the folder: of runs that were killed. Harmless."""

    @property
    def clean(self) -> bool:
        """Whether every output is as the ledger says."""
        return not self.faults


def verify(ledger: Ledger) -> Verdict:
    """Read every output that a row names, and look for files that none does."""
    faults: list[tuple[int, str, str]] = []
    known: set[str] = set()
    checked = 0
    for row in ledger.rows(
        "SELECT id, source, state, output, detections FROM scenes WHERE output IS NOT NULL"
    ):
        known.update(files_of(row["output"]))
        if row["state"] not in ("done", "incomplete"):
            continue
        checked += 1
        fault = fault_of(ledger.folder, row["output"], row["detections"])
        if fault:
            faults.append((row["id"], row["source"], fault))
    for row in ledger.rows(
        "SELECT id, source FROM scenes WHERE output IS NULL AND state IN ('done', 'incomplete')"
    ):
        faults.append((row["id"], row["source"], "the row is done and names no output"))
    strays = tuple(sorted(name for name in _files(ledger.folder) if name not in known))
    return Verdict(checked, tuple(faults), strays)


def fault_of(folder: Path, output: str, detections: int) -> str:
    """What is wrong with an output; empty where nothing is."""
    for name in files_of(output):
        if not (folder / name).is_file():
            return f"{name} is missing"
    try:
        item = json.loads((folder / files_of(output)[0]).read_text(encoding="utf-8"))
        told = item["properties"]["babelrs_geo:detections"]
        counted = _count(folder / output)
        if output.endswith(".parquet"):
            _count(folder / files_of(output)[1])
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        sqlite3.Error,
    ) as error:  # pyarrow's errors are among these
        return f"{output} cannot be read ({' '.join(str(error).split())})"
    if not counted == told == detections:
        return f"{output} holds {counted} detections, its STAC item says {told}, the ledger {detections}"
    return ""


def _count(path: Path) -> int:
    """Features in a result, read from its end to its beginning."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        return int(pq.read_table(path).num_rows)
    database = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
    try:
        (sound,) = database.execute("PRAGMA quick_check").fetchone()
        if sound != "ok":
            raise ValueError(sound)
        database.execute("SELECT count(*) FROM coverage").fetchone()
        return int(database.execute("SELECT count(*) FROM detections").fetchone()[0])
    finally:
        database.close()


def _files(folder: Path) -> Iterator[str]:
    for path in (folder / RESULTS).rglob("*"):
        if path.is_file():
            yield path.relative_to(folder).as_posix()
