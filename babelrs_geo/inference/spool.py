"""Parts of a run in a folder beside its output, until the output is there: what a dead run had done is not lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from babelrs_geo.detections import Detections
from babelrs_geo.drafts import draft
from babelrs_geo.errors import OutputError
from babelrs_geo.inference.coverage import FAILED
from babelrs_geo.inference.look import Part

NOTE = "run.json"
_ADVICE = "make room or rights, then pass --resume to go on"


def noted(folder: Path) -> dict[str, Any] | None:
    """What the parts in a folder are about; None where there are none. Raises OutputError."""
    note = folder / NOTE
    if not note.is_file():
        return None
    try:
        about: dict[str, Any] = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(f"{note} cannot be read ({error}); pass --overwrite to start anew") from error
    return about


class Spool:
    """A folder of parts, each an Arrow file that is there whole or not at all.

    `about` is all that the parts depend on, as JSON values. With `resume`, parts of a run that is about the same are
    used. Raises OutputError where the folder holds parts and `resume` is False, where they are of another run, and
    where a part cannot be written.
    """

    def __init__(self, folder: Path, about: dict[str, Any], *, resume: bool = False) -> None:
        self.folder = folder
        note, known = folder / NOTE, json.loads(json.dumps(about))
        if note.is_file() and self._files():
            if not resume:
                raise OutputError(
                    f"an earlier run left {len(self._files())} parts of its work in {folder}; pass --resume to go "
                    "on, or --overwrite (from Python: remove the folder) to start anew"
                )
            if (there := noted(folder) or {}) != known:
                raise OutputError(
                    f"{folder} holds parts of another run ({_difference(there, known)}); run what they are of, or "
                    "pass --overwrite (from Python: name another folder) to start anew"
                )
            return
        with draft(note, _ADVICE) as hidden:
            folder.mkdir(parents=True, exist_ok=True)
            hidden.write_text(json.dumps(known, indent=1), encoding="utf-8")

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*.arrow"))

    def parts(self) -> dict[int, Part]:
        """The parts that are there, by the number of their group; not one that a failing disk or host has torn."""
        there = {int(path.stem): _read(path) for path in self._files()}
        return {number: part for number, part in there.items() if part is not None}

    def put(self, number: int, part: Part) -> None:
        """Keep one. What could not be read may be another time: a part with a failed tile is left to be done again.

        Raises OutputError.
        """
        if any(state == FAILED for _, state, _ in part.ended):
            return
        content = _bytes(part)
        with draft(self.folder / f"{number:08d}.arrow", _ADVICE) as hidden:
            hidden.write_bytes(content)

    def remove(self) -> None:
        """The output is there: nothing is needed any more."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _bytes(part: Part) -> bytes:
    import pyarrow as pa

    found = part.found
    about = {
        "ended": part.ended,
        "found": None if found is None else {"classes": found.classes, "oriented": found.oriented},
    }
    boxes = np.zeros((0, 5)) if found is None else found.boxes
    columns: dict[str, Any] = {name: boxes[:, k] for k, name in enumerate(("cx", "cy", "w", "h", "r"))}
    columns["score"] = np.zeros(0, np.float32) if found is None else found.scores
    columns["label"] = np.zeros(0, np.int64) if found is None else found.labels
    columns["tile"] = part.tiles
    table = pa.table(columns).replace_schema_metadata({"part": json.dumps(about)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _read(path: Path) -> Part | None:
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as file:
            table = pa.ipc.open_file(file).read_all()
            about = json.loads(table.schema.metadata[b"part"])
            column = {name: table[name].to_numpy().copy() for name in table.column_names}
    except (pa.ArrowException, OSError):
        return None
    found = None
    if about["found"] is not None:
        boxes = np.stack([column[name] for name in ("cx", "cy", "w", "h", "r")], axis=1)
        kind = about["found"]
        found = Detections(boxes, column["score"], column["label"], tuple(kind["classes"]), kind["oriented"])
    return Part(found, column["tile"], tuple((i, state, reason) for i, state, reason in about["ended"]))


def _difference(there: dict[str, Any], asked: dict[str, Any]) -> str:
    """Which parameters differ, in words."""
    names = [k for k in {**there, **asked} if there.get(k) != asked.get(k)]
    return f"with other {', '.join(names)}"
