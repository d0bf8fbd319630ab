"""The log of a run as CSV, which a run that goes on takes up where its checkpoint stands."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from babelrs_geo.drafts import draft


class CsvLog(Logger):
    """Rows of one file, a column for each figure; rows after step `start` are of a run that was killed and go.

    Lightning's own begins an empty file when a run goes on.
    """

    def __init__(self, path: Path, start: int = 0) -> None:
        super().__init__()
        self.path = path
        self.columns: list[str] = ["step"]
        self.rows: list[dict[str, Any]] = []
        self._open = False
        self._start = start

    @property
    def name(self) -> str:
        """Of the file."""
        return self.path.stem

    @property
    def version(self) -> int:
        """There is one."""
        return 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The recipe lies beside the log."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """One row."""
        if not self._open:
            self._take_up()
        row = {"step": step, **{name: f"{value:.6g}" for name, value in metrics.items()}}
        self.rows.append(row)
        if set(row) <= set(self.columns) and self.path.is_file():
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self.columns).writerow(row)
        else:
            self.columns += [name for name in row if name not in self.columns]
            self._write()

    def _take_up(self) -> None:
        """Rows up to the step that the run goes on from."""
        self._open = True
        if self.path.is_file():
            with self.path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                whole = [row for row in reader if None not in row.values() and (row["step"] or "").isdigit()]
                self.columns = list(reader.fieldnames or self.columns)
            self.rows = [row for row in whole if int(row["step"]) <= self._start]
            self._write()

    def _write(self) -> None:
        with draft(self.path) as hidden, hidden.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(self.rows)
