"""A process that works on one scene after the other, so that whatever a scene does to it costs that scene alone.

The parent waits for each answer and ends the process where a scene takes too long or too much memory; where the
process dies by itself, the scene in hand is to blame. The next scene gets a new process. The model is loaded once a
process.
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol

from babelrs_geo import allocation
from babelrs_geo.archive.turns import Rota, Turns
from babelrs_geo.errors import BabelError, ParameterError

_STARTS = 3  # a start that is lost says nothing of the scene: once more, and again
_START_SECONDS = 900.0  # imports and weights, on a machine that is busy with others
_LOOK_SECONDS = 0.2  # between two looks at memory and clock
_PAGE = os.sysconf("SC_PAGE_SIZE")
_HEAD = struct.Struct(">Q")

Turn = AbstractContextManager[None]
"""Entered, again and again, for what the cells that stand together do one at a time: computing."""


class Work(Protocol):
    """What a cell is for; picklable, and importable where the cell starts."""

    def start(self, turn: Turn) -> Callable[[Any], Any]:
        """Make ready what all tasks share, and give what does one; it computes in its turn."""


@dataclass(frozen=True)
class Limits:
    """What one task may cost."""

    seconds: float | None = None
    memory: int | None = None
    """Bytes of resident memory."""


class LostError(Exception):
    """A task brought its process down, or was ended; the message says why, in one line."""


class Cell:
    """The parent's end: starts the process when it is first needed, and again after a loss.

    Cells that are given the same rota compute in turn.
    """

    def __init__(self, work: Work, limits: Limits | None = None, rota: Rota | None = None) -> None:
        self._work, self._limits = work, limits or Limits()
        self._handles = () if rota is None else rota.handles
        self._process: subprocess.Popen[bytes] | None = None
        self._killed = False
        self._words: Any = None

    def __enter__(self) -> Cell:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def ask(self, task: Any) -> Any:
        """The work's answer to a task.

        Raises LostError where the task cost the process, and what `Work.start` raises where it cannot begin.
        """
        if self._process is None:
            self._start_surely()
        process = self._process
        assert process is not None and process.stdin is not None
        try:
            _send(process.stdin, task)
        except BrokenPipeError:  # it died between two tasks, of something that is not this one's doing
            self._end()
            self._start_surely()
            assert self._process is not None and self._process.stdin is not None
            _send(self._process.stdin, task)
        try:
            kind, value = self._answer(self._limits)
        except BaseException:
            self._end()
            raise
        if kind == "raised":
            raise value
        return value

    def close(self) -> None:
        """End the process."""
        self._end()

    def kill(self) -> None:
        """End the process from another thread than the one that asks, which then sees it die."""
        self._killed = True
        process = self._process
        if process is not None:
            process.kill()

    def _start_surely(self) -> None:
        for left in reversed(range(_STARTS)):
            try:
                return self._start()
            except (LostError, BrokenPipeError) as error:
                self._end()
                if self._killed or not left:
                    raise ParameterError(f"a process for scenes could not start: it {error}") from error
        return None

    def _start(self) -> None:
        self._words = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        environment = {**allocation.environment(), **os.environ} | {
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(os.getpid()), *map(str, self._handles)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            env=environment,
            pass_fds=self._handles,
            start_new_session=True,  # a Ctrl-C is for the run, which then ends its cells
        )
        assert self._process.stdin is not None
        if self._killed:
            self._end()
            raise LostError("was stopped with the run")
        try:
            _send(self._process.stdin, self._work)
            kind, value = self._answer(Limits(_START_SECONDS))
        except BaseException:
            self._end()
            raise
        if kind == "raised":
            self._end()
            raise value

    def _answer(self, limits: Limits) -> tuple[str, Any]:
        """What the process says. LostError where it goes beyond its limits or dies."""
        process = self._process
        assert process is not None and process.stdout is not None
        channel, begun, data = process.stdout.fileno(), time.monotonic(), bytearray()
        while True:
            if select.select([channel], [], [], _LOOK_SECONDS)[0]:
                piece = os.read(channel, 1 << 20)
                if not piece:
                    raise LostError(self._death())
                data += piece
                if len(data) >= _HEAD.size and len(data) == _HEAD.size + _HEAD.unpack_from(data)[0]:
                    kind, value = pickle.loads(bytes(data[_HEAD.size :]))
                    return kind, value
                continue
            if limits.seconds is not None and time.monotonic() - begun > limits.seconds:
                raise LostError(
                    f"took longer than the {limits.seconds:g} s it may (--time-limit): it hangs, or is too large"
                )
            used = _resident(process.pid)
            if limits.memory is not None and used > limits.memory:
                raise LostError(
                    f"needed more than the {limits.memory / 1e6:,.0f} MB it may have (--memory-limit)"
                )

    def _death(self) -> str:
        """How the process ended by itself."""
        assert self._process is not None
        code = self._process.wait()
        if code == -signal.SIGKILL:
            return "was killed (SIGKILL): most likely the machine ran out of memory"
        if code < 0:
            return f"crashed its process ({signal.Signals(-code).name}): the file makes a library fail"
        self._words.seek(0, os.SEEK_END)
        self._words.seek(max(0, self._words.tell() - 4000))
        lines = self._words.read().decode(errors="replace").strip().splitlines()
        return f"ended its process with code {code} ({lines[-1].strip() if lines else 'without a word'})"

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):  # it had died with something unread
                    pipe.close()
        process.wait()
        self._words.close()


def _resident(process: int) -> int:
    """Bytes of memory that a process holds; 0 where it is gone."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * _PAGE
    except (OSError, IndexError, ValueError):
        return 0


def _send(channel: Any, value: Any) -> None:
    data = pickle.dumps(value)
    channel.write(_HEAD.pack(len(data)) + data)
    channel.flush()


def _receive(channel: BinaryIO) -> Any:
    """The next message; EOFError where the other end is gone."""
    head = channel.read(_HEAD.size)
    if len(head) < _HEAD.size:
        raise EOFError
    return pickle.loads(channel.read(_HEAD.unpack(head)[0]))


def _watch(parent: int) -> None:
    """End with the parent, whatever this process is at."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def serve(parent: int, handles: Sequence[int]) -> None:
    """The process itself: tasks from standard input, answers to standard output, until the parent closes it."""
    tasks, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not come between the answers
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500")  # dies before the process that keeps the ledger
    try:
        work = _receive(tasks).start(Turns(handles) if handles else nullcontext())
    except BabelError as error:
        _send(answers, ("raised", error))
        return
    _send(answers, ("ready", None))
    while True:
        try:
            task = _receive(tasks)
        except EOFError:
            os._exit(0)
        try:
            answer = ("done", work(task))
        except BabelError as error:
            answer = ("raised", error)
        _send(answers, answer)


if __name__ == "__main__":
    # As a module of its own name, so that what is pickled here is known by the same name there.
    from babelrs_geo.archive import cell

    cell.serve(int(sys.argv[1]), [int(handle) for handle in sys.argv[2:]])
