"""An archive in one HTML file that needs nothing else: where its scenes lie, what was found, what failed and why."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from html import escape
from pathlib import Path
from textwrap import shorten
from typing import Any

from babelrs_geo.archive.cell import Cell, Limits, LostError
from babelrs_geo.archive.drawing import COLOURS, Quicklooks, bars, look_of, map_of, timeline
from babelrs_geo.archive.ledger import Ledger, now
from babelrs_geo.drafts import draft
from babelrs_geo.errors import BabelError, OutputError

_SHAPES = 4000  # footprints drawn one by one; beyond, squares of a degree stand for them
_LOOKS, _LOOK_SECONDS = 6, 30.0
_TOLD = 200  # failures listed
_COLUMNS = 120  # of a timeline


def report(ledger: Ledger, path: Path, *, overwrite: bool = False) -> Path:
    """Write the report, whole or not at all, and return its path.

    Raises OutputError where it exists and `overwrite` is False, or cannot be written.
    """
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists; pass --overwrite to replace it, or another name with -o")
    text = _page(ledger)
    with draft(path) as hidden:
        hidden.write_text(text, encoding="utf-8")
    return path


def _page(ledger: Ledger) -> str:
    counts, totals = ledger.counts(), ledger.totals()
    run = ledger.setting("run") or {}
    name, scenes = escape(ledger.folder.absolute().name), sum(counts.values())
    states = "".join(
        f'<span class="state"><i style="background:{COLOURS[state]}"></i>{state} <b>{n:,}</b></span>'
        for state, n in counts.items()
        if n
    )
    share = "".join(
        f'<i style="background:{COLOURS[state]};width:{100 * n / max(1, sum(counts.values())):.3f}%"></i>'
        for state, n in counts.items()
        if n
    )
    sections = [
        ("Where", map_of(_footprints(ledger))),
        ("What was found", bars(_classes(ledger))),
        ("When it was seen", bars(_dates(ledger))),
        ("Throughput", _throughput(ledger)),
        ("Failures", _failures(ledger)),
        ("Densest scenes", _looks(ledger, run)),
        ("How", f"<pre>{escape(json.dumps(run, indent=1))}</pre>"),
    ]
    body = "".join(f"<section><h2>{title}</h2>{content}</section>" for title, content in sections)
    work, told = _duration(totals["seconds"]), now()[:19].replace("T", " ")
    facts = (
        f"{scenes:,} scene{'s' if scenes != 1 else ''} · {totals['detections']:,} detections"
        f" · {totals['tiles']:,} tiles · {work} of work · told {told} UTC"
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Archive {name}</title>'
        f"<style>{_STYLE}</style></head><body><header><h1>Archive {name}</h1><p>{facts}</p>"
        f'<div class="share">{share}</div><p>{states}</p></header>{body}</body></html>\n'
    )


def _footprints(ledger: Ledger) -> list[tuple[str, list[list[float]]]]:
    """Rings by state; of many scenes, squares of a degree with the state that most of theirs are in."""
    query = "SELECT state, footprint FROM scenes WHERE footprint IS NOT NULL"
    if int(ledger.one("SELECT count(*) FROM scenes WHERE footprint IS NOT NULL")) <= _SHAPES:
        return [(row["state"], json.loads(row["footprint"])) for row in ledger.rows(query)]
    squares: dict[tuple[int, int], Counter[str]] = defaultdict(Counter)
    for row in ledger.rows(query):
        lon, lat = json.loads(row["footprint"])[0][:2]
        squares[int(lon // 1), int(lat // 1)][row["state"]] += 1
    return [
        (states.most_common(1)[0][0], [[x, y], [x + 1, y], [x + 1, y + 1], [x, y + 1], [x, y]])
        for (x, y), states in squares.items()
    ]


def _classes(ledger: Ledger) -> list[tuple[str, float]]:
    """Objects by class and sensor, most first."""
    found: Counter[str] = Counter()
    for row in ledger.rows(
        "SELECT sensor, classes FROM scenes WHERE state IN ('done', 'incomplete') AND detections > 0"
    ):
        for name, n in json.loads(row["classes"]).items():
            found[f"{name} ({row['sensor']})"] += n
    return [(name, float(n)) for name, n in found.most_common()]


def _dates(ledger: Ledger) -> list[tuple[str, float]]:
    """Objects by the month, or, within two, the day they were seen."""
    found: Counter[str] = Counter()
    for row in ledger.rows(
        "SELECT substr(acquired, 1, 10) day, sum(detections) n FROM scenes"
        " WHERE state IN ('done', 'incomplete') GROUP BY 1 ORDER BY 1"
    ):
        found[row["day"] or "unknown"] += row["n"] or 0
    if len(found) > 62:
        months: Counter[str] = Counter()
        for day, n in found.items():
            months[day[:7]] += n
        found = months
    return [(day, float(n)) for day, n in sorted(found.items())]


def _throughput(ledger: Ledger) -> str:
    """Scenes that ended, over the time of the runs; idle time between them is left out."""
    rows = [
        row["finished"]
        for row in ledger.rows("SELECT finished FROM scenes WHERE finished IS NOT NULL ORDER BY finished")
    ]
    if not rows:
        return "<p>Nothing yet.</p>"
    unit, found = "", Counter[str]()
    for length, name in ((19, "second"), (16, "minute"), (13, "hour"), (10, "day")):
        unit, found = name, Counter(when[:length] for when in rows)
        if len(found) <= _COLUMNS:
            break
    told = [(when.replace("T", " "), n) for when, n in sorted(found.items())]
    return timeline(told, f"scenes a {unit}")


def _failures(ledger: Ledger) -> str:
    """Reasons with how often they came, then scenes one by one."""
    kinds: Counter[str] = Counter()
    lines: list[str] = []
    query = "SELECT source, state, reason, attempts FROM scenes WHERE state IN ('failed', 'incomplete') ORDER BY id"
    for row in ledger.rows(query):
        reason = row["reason"] or ""
        kinds[_kind(reason, row["source"])] += 1
        if len(lines) < _TOLD:
            lines.append(
                f"<tr><td>{row['state']}</td><td>{escape(row['source'])}</td><td>{escape(reason)}</td>"
                f'<td class="number">{row["attempts"]}</td></tr>'
            )
    if not kinds:
        return "<p>None.</p>"
    more = sum(kinds.values()) - len(lines)
    rest = f"<p>{more:,} more: see archive status --json.</p>" if more else ""
    head = "<tr><th>state</th><th>scene</th><th>reason</th><th>attempts</th></tr>"
    return (
        bars([(kind, float(n)) for kind, n in kinds.most_common(20)])
        + f'<details open><summary>Scenes</summary><table class="list">{head}{"".join(lines)}</table>{rest}</details>'
    )


def _kind(reason: str, source: str) -> str:
    """A reason without what is particular to its scene."""
    text = reason.replace(source, "…").replace(Path(source).name, "…")
    return shorten(re.sub(r"\d[\d.,]*", "N", text), 110, placeholder=" …")


def _duration(seconds: float) -> str:
    """In the unit that suits it."""
    for length, unit in ((3600, "hours"), (60, "minutes")):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.0f} seconds"


def _looks(ledger: Ledger, run: dict[str, Any]) -> str:
    """The scenes with most objects, as pictures; a scene that cannot be shown says why."""
    rows = list(
        ledger.rows(
            "SELECT source, sensor, options, output, detections FROM scenes WHERE state IN ('done', 'incomplete')"
            " AND detections > 0 ORDER BY detections DESC, id LIMIT ?",
            (_LOOKS,),
        )
    )
    reading = dict((run.get("parameters") or {}).get("reading") or {})
    reading.pop("sensor", None)
    with Cell(Quicklooks(), Limits(_LOOK_SECONDS)) as cell:
        pictures = list(_pictures(cell, ledger, rows, reading))
    return f'<div class="looks">{"".join(pictures)}</div>' if pictures else "<p>Nothing yet.</p>"


def _pictures(cell: Cell, ledger: Ledger, rows: list[Any], reading: dict[str, Any]) -> Iterator[str]:
    for row in rows:
        try:
            picture = cell.ask(look_of(row, ledger.folder, reading))
        except (BabelError, LostError) as error:
            picture = f"<p>Cannot be shown: {escape(' '.join(str(error).split()))}</p>"
        name = escape(Path(row["source"]).name)
        yield f"<figure>{picture}<figcaption>{name}<br><b>{row['detections']:,}</b> objects</figcaption></figure>"


_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;color:#1f2933;background:#f5f7fa;margin:0 auto;max-width:1020px;padding:24px}
h1{font-size:24px;margin:0 0 4px}h2{font-size:17px;margin:0 0 10px}header p{margin:4px 0 10px}
section{background:#fff;border:1px solid #e1e7ee;border-radius:8px;padding:16px 20px;margin:16px 0}
.share{display:flex;height:14px;border-radius:7px;overflow:hidden;background:#e1e7ee}
.share i{display:block}.state{margin-right:18px;white-space:nowrap}
.state i{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:5px}
.map{width:100%;background:#eef3f7;border-radius:6px}.grid{stroke:#cfd9e3;stroke-width:1}
.degree{font-size:11px;fill:#7b8794}.timeline{width:100%}.timeline text{font-size:12px;fill:#52606d}
.column{fill:#4a7fb5}table{border-collapse:collapse;width:100%}
.bars th{text-align:left;font-weight:400;width:38%;padding:2px 8px 2px 0}.number{text-align:right;white-space:nowrap}
.bars .number{width:10%;padding-right:10px}.bar span{display:block;height:11px;background:#4a7fb5;border-radius:2px}
.list{font-size:13px;margin-top:8px}.list td,.list th{padding:3px 8px 3px 0;text-align:left;vertical-align:top;
border-top:1px solid #e1e7ee;overflow-wrap:anywhere}.list td:nth-child(2){width:32%}
.list td:first-child,.list th{overflow-wrap:normal;white-space:nowrap}
.looks{display:grid;grid-template-columns:repeat(3,1fr);gap:14px}
figure{margin:0}.look{width:100%;background:#000;border-radius:4px}figcaption{font-size:12px;overflow-wrap:anywhere}
.box{fill:none;stroke:#ffd23f;stroke-width:1.5;vector-effect:non-scaling-stroke}pre{font-size:12px;overflow:auto}
"""
