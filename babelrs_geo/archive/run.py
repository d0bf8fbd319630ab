"""A run over an archive: plan, hand out, settle; whatever ends it, running it again goes on.

The order of things keeps the ledger true: a worker writes a draft; this process renames it to its final name, has that
on the disk, and only then writes the row. A draft of a run that was killed is nobody's and goes.
"""

from __future__ import annotations

import json
import shutil
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

from babelrs_geo.archive.cell import Limits, Turn
from babelrs_geo.archive.crew import Crew, hired
from babelrs_geo.archive.ledger import (
    DONE,
    DUPLICATE,
    FAILED,
    INCOMPLETE,
    PLANNED,
    STALE,
    Ledger,
    Row,
    locked,
    now,
)
from babelrs_geo.archive.outputs import DRAFTS, PARTS, flush, output_of, parts_of, place, remove
from babelrs_geo.archive.sources import Item
from babelrs_geo.archive.work import Outcome, Task
from babelrs_geo.cluster import Workers, held_back
from babelrs_geo.drafts import make_folder
from babelrs_geo.errors import OutputError, ParameterError

Progress = Callable[[int, int], None]
"""Called with (scenes ended, scenes in all)."""

SUFFIXES = (".gpkg", ".parquet")
_AHEAD = 256  # rows taken from the ledger at once
_SETTLE = 64  # scenes settled in one transaction, or fewer after
_SETTLE_SECONDS = 0.5
_TWINS = 1000  # fingerprints handed with a task at most; what they miss is found when it is settled


class Job(Protocol):
    """What is done with a scene: `work.Detection`, or what tests put in its place. Picklable."""

    def start(self, turn: Turn) -> Callable[[Task], Outcome]:
        """Make ready, in the process that works, what all scenes share, and give what does one; it computes in its
        turn.
        """


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a run is done. Raises ParameterError where a value cannot work."""

    suffix: str = ".gpkg"
    """Of the results, one of `SUFFIXES`."""
    workers: Workers = field(default_factory=Workers)
    limits: Limits = field(default_factory=Limits)
    attempts: int = 2
    """For scenes that another attempt may save: a worker was lost, memory ran out, a server did not answer."""
    watch: float | None = None
    """Seconds after which the sources are looked through again, for ever; None to end with the last scene."""

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        if self.suffix not in SUFFIXES:
            raise ParameterError(f"{self.suffix} is no kind of result; expected {' or '.join(SUFFIXES)}")
        if self.attempts < 1:
            raise ParameterError(f"attempts is {self.attempts}, expected at least 1")
        for name, value in (("time limit", self.limits.seconds), ("watch", self.watch)):
            if value is not None and not value > 0:
                raise ParameterError(f"{name} is {value} s, expected more than 0")


@dataclass(frozen=True)
class Ended:
    """What a run left."""

    folder: Path
    counts: Mapping[str, int]
    """All scenes of the archive by state."""
    worked: int
    """Scenes that this run dealt with."""
    seconds: float

    @property
    def whole(self) -> bool:
        """Whether no scene failed and none is incomplete."""
        return not (self.counts[FAILED] or self.counts[INCOMPLETE])


def recipe_of(parameters: Mapping[str, Any]) -> str:
    """A hash of what decides the content of results: weights and parameters, not who works."""
    return blake2b(json.dumps(parameters, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def run(
    folder: Path,
    sources: Callable[[], Iterable[Item]],
    job: Job,
    parameters: Mapping[str, Any],
    options: RunOptions | None = None,
    progress: Progress | None = None,
) -> Ended:
    """Work on all scenes that are not done with these parameters, and go on where an earlier run stopped.

    `sources` lists the scenes; `parameters` are JSON values that decide the results, the weights' hash among them (key
    `weights`). Ctrl+C is answered between two steps, and the workers are stopped.

    Raises OutputError where another run has the folder or the disk is full, and what `sources` and `job.start` raise.
    """
    options, begun = options or RunOptions(), time.perf_counter()
    make_folder(folder)
    recipe = recipe_of({**parameters, "suffix": options.suffix})
    with held_back() as heed, ExitStack() as stack:
        stack.enter_context(locked(folder))
        ledger = stack.enter_context(Ledger(folder, write=True))
        drafts = _fresh_drafts(folder, stack)
        # Workers start while the plan is made.
        crew = stack.enter_context(hired(job, options.limits, options.workers))
        loop = _Loop(folder, ledger, crew, drafts, recipe, options, str(parameters.get("weights", "")), heed)
        ledger.plan(loop.remembering(sources()))
        ledger.begin(recipe)
        ledger.set(
            "run", {"recipe": recipe, "parameters": dict(parameters), "begun": now()} | _about(options)
        )
        loop.go(progress)
        while options.watch is not None:
            loop.wait(options.watch)
            if ledger.plan(loop.remembering(_settled(sources(), options.watch))):
                ledger.begin(recipe)
                loop.go(progress)
        shutil.rmtree(folder / PARTS, ignore_errors=True)  # of scenes that are no longer planned
        return Ended(folder, ledger.counts(), loop.worked, time.perf_counter() - begun)


def _about(options: RunOptions) -> dict[str, Any]:
    return {"suffix": options.suffix, "attempts": options.attempts, "limits": asdict(options.limits)}


def _fresh_drafts(folder: Path, stack: ExitStack) -> Path:
    """A folder for this run's drafts; those of runs that were killed go."""
    shutil.rmtree(folder / DRAFTS, ignore_errors=True)
    drafts = folder / DRAFTS / uuid.uuid4().hex[:12]
    make_folder(drafts, "check the disk's space")
    stack.callback(shutil.rmtree, folder / DRAFTS, ignore_errors=True)
    return drafts.absolute()


def _settled(items: Iterable[Item], seconds: float) -> Iterator[Item]:
    """Scenes that nobody is still writing: those last changed a while ago."""
    limit = time.time() - min(seconds, 10.0)
    for item in items:
        if item.stamp is None or not item.stamp.isdecimal() or int(item.stamp) / 1e9 < limit:
            yield item


@dataclass
class _Loop:
    """Hands out what is planned and settles what has ended."""

    folder: Path
    ledger: Ledger
    crew: Crew
    drafts: Path
    recipe: str
    options: RunOptions
    weights: str
    heed: Callable[[], None]
    worked: int = 0

    def __post_init__(self) -> None:
        self._opened: dict[str, str] = {}  # addresses with signatures, by what may be told of them
        self._waiting: deque[Row] = deque()
        self._out: dict[int, Row] = {}
        self._ended: list[tuple[Row, Outcome]] = []

    def remembering(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items; keeps in memory how those are opened whose address may not be written down."""
        for item in items:
            self.heed()
            if item.path != item.source:
                self._opened[item.source] = item.path
            yield item

    def go(self, progress: Progress | None) -> None:
        """Work until nothing is planned; gives back what was not begun, however it ends."""
        total = int(self.ledger.one("SELECT count(*) FROM scenes"))
        left = sum(self.ledger.counts()[state] for state in (PLANNED, STALE))
        done, last = total - left, time.monotonic()
        try:
            while self._hand_out() or self._out:
                self.heed()
                for task, outcome in self.crew.finished(_SETTLE_SECONDS):
                    if isinstance(outcome, BaseException):
                        raise outcome
                    self._ended.append((self._out.pop(task.id), outcome))
                if len(self._ended) >= _SETTLE or time.monotonic() - last > _SETTLE_SECONDS or not self._out:
                    done += self._settle()
                    last = time.monotonic()
                    if progress:
                        progress(done, total)
        finally:
            self._leave()

    def wait(self, seconds: float) -> None:
        """Wait, but for being told to stop."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.heed()
            time.sleep(min(left, 0.2))

    def _leave(self) -> None:
        """Settle what has ended, and give back the rest."""
        try:
            self._settle()
        finally:
            rest = [*(row.id for row in self._waiting), *self._out, *(row.id for row, _ in self._ended)]
            self._waiting.clear()
            self._out.clear()
            if rest:
                self.ledger.give_back(rest)

    def _hand_out(self) -> bool:
        """Fill the crew's hands; False where nothing is left to hand out."""
        room = self.crew.room()
        while room > 0:
            if not self._waiting:
                self._waiting += self.ledger.take(_AHEAD)
                if not self._waiting:
                    return False
            rows = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
            self._out |= {row.id: row for row in rows}
            self.crew.submit([self._task(row) for row in rows])
            room = self.crew.room()
        return True

    def _task(self, row: Row) -> Task:
        twins: frozenset[str] = frozenset()
        if row.size is not None:
            low = f"{row.size:x}-"
            found = (
                each[0]
                for kind in "fs"
                for each in self.ledger.rows(
                    "SELECT fingerprint FROM scenes INDEXED BY by_content WHERE fingerprint BETWEEN ? AND ? AND id < ?"
                    " AND state IN ('done', 'incomplete') LIMIT ?",
                    (kind + low, kind + low + "~", row.id, _TWINS),
                )
            )
            twins = frozenset(found)
        output = output_of(row.source, self.recipe, self.options.suffix)
        return Task(
            row.id,
            row.source,
            self._opened.get(row.source, row.source),
            Path(output).name,
            str(self.drafts),
            row.sensor,
            row.options,
            twins,
            row.size is None or row.stamp is None,
            "" if self.options.workers.alone else str(parts_of(self.folder.absolute(), output, row)),
        )

    def _settle(self) -> int:
        """Give drafts their names, then write rows; gives how many scenes need no more work."""
        changes: list[tuple[int, Mapping[str, Any]]] = []
        folders: set[Path] = set()
        gone: list[str] = []
        gone_parts: list[Path] = []
        fresh: dict[str, int] = {}
        final = 0
        for row, outcome in self._ended:
            output = output_of(row.source, self.recipe, self.options.suffix)
            values: dict[str, Any] = {
                **outcome.values,
                "state": outcome.state,
                "reason": outcome.reason,
                "finished": now(),
                "recipe": self.recipe,
                "weights": self.weights,
                "twin": None,
            }
            for known in ("size", "stamp"):  # what the plan says goes before what a server says
                if getattr(row, known) is not None:
                    values.pop(known, None)
            if outcome.state == FAILED and outcome.again and row.attempts + 1 < self.options.attempts:
                values["state"] = PLANNED if row.output is None else STALE
            else:
                final += 1
                if not self.options.workers.alone:
                    gone_parts.append(parts_of(self.folder, output, row))
            mark = values.get("fingerprint")
            if mark and outcome.state in (DONE, INCOMPLETE, DUPLICATE):
                first, later = self._namesakes(mark, row.id, fresh)
                if first is not None:
                    values |= {"state": DUPLICATE, "twin": first, "reason": None}
                elif outcome.state == DUPLICATE:  # its twin is no longer there
                    values |= {"state": PLANNED if row.output is None else STALE}
                    final -= 1
                if later is not None and first is None:  # the one that comes first in the plan is kept
                    old = self.ledger.one("SELECT output FROM scenes WHERE id = ?", (later,))
                    old = old or next((v["output"] for i, v in changes if i == later and "output" in v), None)
                    gone += [old] if old else []
                    changes.append((later, {"state": DUPLICATE, "twin": row.id, "output": None}))
                    changes += [(each, {"twin": row.id}) for each in self._doubles(mark, later, changes)]
            if values["state"] in (DONE, INCOMPLETE):
                folders |= self._placed(output)
                values["output"] = output
                if mark:
                    fresh[mark] = row.id
                if row.output not in (None, output):
                    gone.append(str(row.output))
            elif values["state"] == DUPLICATE:
                values["output"] = None
                gone += [row.output] if row.output else []
            changes.append((row.id, values))
        flush(folders)
        if changes:
            self.ledger.settle(changes)
        self._ended.clear()
        for output in gone:  # only once no row names it
            remove(self.folder, output)
        for parts in gone_parts:
            shutil.rmtree(parts, ignore_errors=True)
        self.worked += final
        return final

    def _placed(self, output: str) -> set[Path]:
        try:
            return place(self.folder, self.drafts, output)
        except OSError as error:
            raise OutputError(
                f"{self.folder / output} cannot be written ({error.strerror}); check the disk's space and permissions, "
                "then run the same again"
            ) from error

    def _namesakes(self, mark: str, row: int, fresh: Mapping[str, int]) -> tuple[int | None, int | None]:
        """Another scene of the same content that is done: one before this, or one after."""
        others = [
            each["id"]
            for each in self.ledger.rows(
                "SELECT id FROM scenes INDEXED BY by_content WHERE fingerprint = ? AND id <> ? AND recipe = ?"
                " AND state IN ('done', 'incomplete')",
                (mark, row, self.recipe),
            )
        ]
        if mark in fresh and fresh[mark] != row:
            others.append(fresh[mark])
        earlier = [each for each in others if each < row]
        later = [each for each in others if each > row]
        return (min(earlier) if earlier else None), (min(later) if later else None)

    def _doubles(self, mark: str, first: int, changes: Sequence[tuple[int, Mapping[str, Any]]]) -> list[int]:
        """Scenes that are told, or are about to be, as doubles of this one."""
        told = self.ledger.rows(
            "SELECT id FROM scenes INDEXED BY by_content WHERE fingerprint = ? AND twin = ?", (mark, first)
        )
        return [*(row["id"] for row in told), *(i for i, values in changes if values.get("twin") == first)]


__all__ = ["Ended", "Job", "RunOptions", "recipe_of", "run"]
