"""The ledger: one row a scene, in SQLite, written by the coordinating process alone.

A row says `done` only after its output has its final name, so whatever ends a run, the ledger is true.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

from babelrs_geo.archive.sources import Item, options_text
from babelrs_geo.errors import OutputError, ParameterError

NAME = "ledger.sqlite"
LOCK = "run.lock"
_MOUNTS = Path("/proc/self/mountinfo")

PLANNED, RUNNING, DONE, INCOMPLETE = "planned", "running", "done", "incomplete"
STALE, DUPLICATE, FAILED = "stale", "duplicate", "failed"
STATES = (PLANNED, RUNNING, DONE, INCOMPLETE, STALE, DUPLICATE, FAILED)
"""`incomplete`: the output is there, but some of its tiles could not be read. `stale`: the output is there, but it is
of other weights, parameters or an earlier scene, and waits for a new one. `duplicate`: another row has this scene."""
WITH_OUTPUT = (DONE, INCOMPLETE, STALE)

_LAYOUT = 1
_BATCH = 20_000
# As mounts begin to be called. Those by FUSE, such as fuse.glusterfs, fuse.ceph-fuse and fuse.sshfs, are most of them
# remote, and for the rest the journal that works everywhere will do; fuseblk is a disk.
_NETWORK = ("nfs", "cifs", "smb", "lustre", "gpfs", "beegfs", "ceph", "afs", "9p", "pvfs2", "panfs", "fuse")
_DISK = "fuseblk"

_SCHEMA = """
CREATE TABLE IF NOT EXISTS settings (key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS scenes (
  id INTEGER PRIMARY KEY,
  source TEXT NOT NULL UNIQUE,
  asked TEXT, options TEXT NOT NULL DEFAULT '', priority REAL NOT NULL DEFAULT 0, size INTEGER, stamp TEXT,
  state TEXT NOT NULL, reason TEXT, attempts INTEGER NOT NULL DEFAULT 0,
  sensor TEXT, recipe TEXT, weights TEXT, fingerprint TEXT, twin INTEGER,
  planned TEXT, started TEXT, finished TEXT, seconds REAL, host TEXT,
  tiles INTEGER, tiles_failed INTEGER, detections INTEGER, classes TEXT,
  output TEXT, acquired TEXT, footprint TEXT
);
CREATE INDEX IF NOT EXISTS by_outcome ON scenes (state, tiles, tiles_failed, detections, seconds)
  WHERE state NOT IN ('planned', 'running');
CREATE INDEX IF NOT EXISTS by_content ON scenes (fingerprint, id) WHERE fingerprint IS NOT NULL;
"""

_BY_TURN = "CREATE INDEX IF NOT EXISTS by_turn ON scenes (state, attempts, priority DESC, size DESC, id)"


@dataclass(frozen=True)
class Row:
    """A scene whose turn it is."""

    id: int
    source: str
    sensor: str | None
    options: Mapping[str, Any]
    size: int | None
    stamp: str | None
    attempts: int
    """Those before this one."""
    output: str | None
    """What an earlier run left, relative to the folder."""


def now() -> str:
    """The time as the ledger has it: UTC, to the millisecond."""
    return datetime.now(UTC).replace(tzinfo=None).isoformat(timespec="milliseconds") + "Z"


def key_of(source: str) -> str:
    """What tells a scene's files from those of a namesake, the same in every run."""
    return blake2b(source.encode(), digest_size=5).hexdigest()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder for this run alone. Raises OutputError that names the run which has it, or where nobody can."""
    path = folder / LOCK
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written ({error.strerror}); check the folder's permissions, or work on a copy"
        ) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            other = os.read(handle, 4096).decode(errors="replace").strip() or "another run"
            raise OutputError(
                f"{folder} is in use by {other}; wait for it, stop it, or write elsewhere with -o"
            ) from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()} since {now()}".encode(), 0)
        try:
            yield
        finally:
            os.ftruncate(handle, 0)
    finally:
        os.close(handle)  # releases the lock, as the end of the process does however it comes


def on_network(folder: Path) -> bool:
    """Whether a folder lies on a network file system, where SQLite's write-ahead log does not work."""
    try:
        mounts = os.fsdecode(_MOUNTS.read_bytes()).splitlines()
    except OSError:
        return True  # unknown: the journal that works everywhere
    best, kind = "", ""
    real = str(folder.resolve())
    for line in mounts:
        head, _, tail = line.partition(" - ")
        point = head.split()[4].replace("\\040", " ")
        if len(point) >= len(best) and (real == point or real.startswith(point.rstrip("/") + "/")):
            best, kind = point, tail.split()[0]
    return kind.startswith(_NETWORK) and kind != _DISK


class Ledger:
    """An archive's ledger; a context manager.

    Raises OutputError where it cannot be opened or written (a full disk), ParameterError where there is none to read.
    """

    def __init__(self, folder: Path, *, write: bool = False) -> None:
        self.folder = folder
        self.path = folder / NAME
        if not write and not self.path.exists():
            raise ParameterError(
                f"{folder} holds no archive ({NAME} is missing); pass a folder that archive run wrote to"
            )
        with self._told():
            if write:
                self._db = sqlite3.connect(self.path, isolation_level=None, timeout=30)
                network = on_network(folder)
                self._db.execute(f"PRAGMA journal_mode={'DELETE' if network else 'WAL'}")
                # An output has its name on the disk before its row: a row lost to a power cut is a scene done twice.
                self._db.execute(f"PRAGMA synchronous={'FULL' if network else 'NORMAL'}")
                self._db.executescript(_SCHEMA)
                self._db.execute(_BY_TURN)
                layout = self.setting("layout")
                if layout is None:
                    self.set("layout", _LAYOUT)
                elif layout != _LAYOUT:
                    raise OutputError(
                        f"{self.path} has layout {layout}, this release knows {_LAYOUT}; write elsewhere with -o"
                    )
            else:
                self._db = self._opened_to_read()
        self._db.row_factory = sqlite3.Row

    def _opened_to_read(self) -> sqlite3.Connection:
        address = f"{self.path.absolute().as_uri()}?mode=ro"
        database = sqlite3.connect(address, uri=True, timeout=30)
        try:
            database.execute("SELECT 1 FROM sqlite_master")
        except sqlite3.OperationalError as error:
            # SQLite shares a log by a file that it cannot make in a folder that cannot be written. Where there is no
            # log, nobody writes either, and it needs none.
            refused = error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN)
            if not refused or any(Path(f"{self.path}{end}").exists() for end in ("-wal", "-journal")):
                raise
            database.close()
            database = sqlite3.connect(f"{address}&immutable=1", uri=True)
        return database

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise OutputError(
                f"{self.path} cannot be used ({error}); check the disk's space and permissions, then run the same again"
            ) from error

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._told():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                if self._db.in_transaction:  # SQLite itself has undone it where the disk is full
                    self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def rows(self, query: str, values: Sequence[Any] = ()) -> Iterator[sqlite3.Row]:
        """What a query finds."""
        with self._told():
            yield from self._db.execute(query, values)

    def one(self, query: str, values: Sequence[Any] = ()) -> Any:
        """The first value of the first row, None where there is none."""
        return next((row[0] for row in self.rows(query, values)), None)

    def setting(self, key: str) -> Any:
        """What was noted under a key, None where nothing was."""
        text = self.one("SELECT value FROM settings WHERE key = ?", (key,))
        return None if text is None else json.loads(text)

    def set(self, key: str, value: Any) -> None:
        """Note a JSON value under a key."""
        with self._writing() as db:
            db.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", (key, json.dumps(value)))

    def plan(self, items: Iterable[Item]) -> int:
        """Add scenes, or renew those whose size, stamp, sensor, options or fault changed; gives how many were told.

        A scene that changed after it was done is stale. Nothing is touched but the ledger.
        """
        stream, told = iter(items), 0
        fresh = self.one("SELECT 1 FROM scenes LIMIT 1") is None
        with self._told():
            if fresh:  # an index made at the end is made in a third of the time
                self._db.execute("DROP INDEX by_turn")
            try:
                while batch := list(islice(stream, _BATCH)):
                    self._plan(batch, fresh)
                    told += len(batch)
            finally:
                self._db.execute(_BY_TURN)
        return told

    def _plan(self, batch: Sequence[Item], fresh: bool) -> None:
        when = now()
        rows = [
            (
                i.source,
                i.sensor,
                options_text(i.options),
                i.priority,
                i.size,
                i.stamp,
                FAILED if i.fault else PLANNED,
                i.fault or None,
                when,
            )
            for i in batch
        ]
        with self._writing() as db:
            db.executemany(_PLAN, rows)
            if not fresh:
                db.executemany(
                    "UPDATE scenes SET priority = ?1 WHERE source = ?2 AND priority <> ?1",
                    [(i.priority, i.source) for i in batch if not i.fault],
                )
                db.executemany(
                    "DELETE FROM scenes WHERE source = ? AND state = 'failed' AND output IS NULL",
                    [(i.faulty,) for i in batch if i.faulty],
                )

    def begin(self, recipe: str) -> int:
        """Make the rows ready for a run with a recipe: what an earlier run left half done is planned, what has another
        recipe is stale, and what was a duplicate of a scene that is no longer there has its own turn. Gives how many
        are stale.
        """
        with self._writing() as db:
            # What was under way when a run ended has its turn again; the interrupted attempt does not count.
            db.execute(
                "UPDATE scenes SET state = CASE WHEN output IS NULL THEN 'planned' ELSE 'stale' END,"
                " attempts = max(0, attempts - 1) WHERE state = 'running'"
            )
            db.execute(
                "UPDATE scenes SET state = 'stale', attempts = 0, reason = 'made with other weights or parameters'"
                " WHERE state IN ('done', 'incomplete') AND recipe <> ?",
                (recipe,),
            )
            db.execute(
                "UPDATE scenes SET state = 'planned', attempts = 0, twin = NULL, reason = NULL"
                " WHERE state IN ('failed', 'duplicate') AND attempts > 0 AND recipe <> ?",
                (recipe,),
            )
            db.execute(
                "UPDATE scenes SET state = 'planned', attempts = 0, twin = NULL WHERE state = 'duplicate'"
                " AND NOT EXISTS (SELECT 1 FROM scenes AS first WHERE first.id = scenes.twin"
                " AND first.fingerprint = scenes.fingerprint AND first.state IN ('done', 'incomplete'))"
            )
        return int(self.one("SELECT count(*) FROM scenes WHERE state = 'stale'"))

    def take(self, count: int) -> list[Row]:
        """The next scenes, which from now on are running: fewest attempts first, then by priority and size."""
        rows: list[sqlite3.Row] = []
        for state in (PLANNED, STALE):
            if len(rows) < count:
                rows += self.rows(
                    "SELECT * FROM scenes INDEXED BY by_turn WHERE state = ?"
                    " ORDER BY attempts, priority DESC, size DESC, id LIMIT ?",
                    (state, count - len(rows)),
                )
        with self._writing() as db:
            db.executemany(
                "UPDATE scenes SET state = 'running', attempts = attempts + 1, started = ? WHERE id = ?",
                [(now(), row["id"]) for row in rows],
            )
        return [
            Row(
                row["id"],
                row["source"],
                row["asked"],
                json.loads(row["options"] or "{}"),
                row["size"],
                row["stamp"],
                row["attempts"],
                row["output"],
            )
            for row in rows
        ]

    def settle(self, changes: Sequence[tuple[int, Mapping[str, Any]]]) -> None:
        """Write how scenes ended, all or none of them; columns by name."""
        with self._writing() as db:
            for row, values in changes:
                columns = ", ".join(f"{name} = ?" for name in values)
                db.execute(f"UPDATE scenes SET {columns} WHERE id = ?", (*values.values(), row))

    def give_back(self, ids: Iterable[int]) -> None:
        """Scenes that were taken and not begun: their attempt does not count."""
        with self._writing() as db:
            db.executemany(
                "UPDATE scenes SET state = CASE WHEN output IS NULL THEN 'planned' ELSE 'stale' END,"
                " attempts = attempts - 1 WHERE id = ? AND state = 'running'",
                [(each,) for each in ids],
            )

    def retry(self, pattern: str | None = None) -> int:
        """Plan failed and incomplete scenes anew, those whose reason holds `pattern` where given; gives how many.

        What nobody attempted is a fault of the plan, and waits for a better one.
        """
        where, values = "state IN ('failed', 'incomplete') AND attempts > 0", []
        if pattern:
            where += " AND instr(lower(reason), lower(?)) > 0"
            values = [pattern]
        with self._writing() as db:
            return db.execute(
                "UPDATE scenes SET state = CASE WHEN output IS NULL THEN 'planned' ELSE 'stale' END, attempts = 0"
                f" WHERE {where}",
                values,
            ).rowcount

    def counts(self) -> dict[str, int]:
        """Scenes by state, every state named."""
        found = dict.fromkeys(STATES, 0)
        for state in STATES:  # a range of an index each
            found[state] = int(self.one("SELECT count(*) FROM scenes WHERE state = ?", (state,)))
        return found

    def totals(self) -> dict[str, Any]:
        """Tiles, detections and seconds of what is done and incomplete."""
        (row,) = self.rows(
            "SELECT sum(tiles) tiles, sum(tiles_failed) failed, sum(detections) detections, sum(seconds) seconds"
            " FROM scenes WHERE state IN ('done', 'incomplete')"
            " AND state NOT IN ('planned', 'running')"
        )
        return {
            "tiles": row["tiles"] or 0,
            "tiles_failed": row["failed"] or 0,
            "detections": row["detections"] or 0,
            "seconds": round(row["seconds"] or 0.0, 3),
        }

    def failures(self, limit: int = 20) -> list[tuple[str, str]]:
        """Source and reason of scenes that failed, the first of them."""
        query = "SELECT source, reason FROM scenes WHERE state = 'failed' ORDER BY id LIMIT ?"
        return [(row["source"], row["reason"] or "") for row in self.rows(query, (limit,))]


_PLAN = """
INSERT INTO scenes (source, asked, options, priority, size, stamp, state, reason, planned)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (source) DO UPDATE SET
  asked = excluded.asked, options = excluded.options, size = excluded.size, stamp = excluded.stamp,
  priority = excluded.priority, attempts = 0, fingerprint = NULL, twin = NULL,
  state = CASE WHEN excluded.state = 'failed' THEN 'failed' WHEN scenes.output IS NULL THEN 'planned' ELSE 'stale' END,
  reason = CASE WHEN excluded.state = 'failed' THEN excluded.reason WHEN scenes.output IS NULL THEN NULL
    ELSE 'the scene or its options changed' END
WHERE scenes.options IS NOT excluded.options OR scenes.asked IS NOT excluded.asked
  OR (excluded.size IS NOT NULL AND scenes.size IS NOT excluded.size)
  OR (excluded.stamp IS NOT NULL AND scenes.stamp IS NOT excluded.stamp)
  OR (excluded.reason IS NOT NULL AND scenes.reason IS NOT excluded.reason)
  OR (excluded.reason IS NULL AND scenes.state = 'failed' AND scenes.attempts = 0)
"""
