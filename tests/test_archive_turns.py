"""Processes that compute in turn: one at a time, none for ever, and whatever ends one, the others go on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from bright_archive import BrightWork, write_ships

from babelrs_geo.archive.turns import Rota, Turns
from babelrs_geo.archive.work import Task

TAKE = """
import os, signal, sys, time
from babelrs_geo.archive.turns import Turns

turns = Turns([int(handle) for handle in sys.argv[3:]])
print("ready", flush=True)
sys.stdin.read()
log = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
for n in range(40):
    with turns:
        os.write(log, b"%d in\\n" % os.getpid())
        if sys.argv[2] == "dies" and n == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.002)
        os.write(log, b"%d out\\n" % os.getpid())
"""


def test_one_process_at_a_time_in_turn_and_one_that_dies_leaves_its_turn(tmp_path: Path) -> None:
    rota = Rota()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TAKE, str(tmp_path / "log"), how, *map(str, rota.handles)],
            pass_fds=rota.handles,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for how in ("lives", "lives", "dies")
    ]
    for process in processes:  # they begin together
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()
    assert [process.wait(60) for process in processes] == [0, 0, -9]
    lines = (tmp_path / "log").read_text().splitlines()
    died = f"{processes[2].pid} in"
    last = max(n for n, line in enumerate(lines) if line == died)
    assert lines.pop(last) == died and not any(line.startswith(died[:-3]) for line in lines[last:])
    assert len(lines) == 2 * (40 + 40 + 5)
    for entered, left in zip(lines[::2], lines[1::2], strict=True):
        assert entered.endswith(" in") and left == entered.replace(" in", " out")
    owners = [line.split()[0] for line in lines[::2]]
    together = owners[: min(len(owners) - owners[::-1].index(str(p.pid)) for p in processes[:2])]
    switches = sum(one != other for one, other in zip(together, together[1:], strict=False))
    assert switches > len(together) // 3
    for process in processes:
        assert process.stdout is not None
        process.stdout.close()
    rota.close()


class Counted:
    """How often a turn is taken."""

    taken = 0

    def __enter__(self) -> None:
        self.taken += 1

    def __exit__(self, *_: object) -> None:
        pass


def test_every_batch_is_computed_in_its_turn(tmp_path: Path) -> None:
    ships = write_ships(tmp_path / "a.tif", 1)
    turn = Counted()
    outcome = BrightWork().start(turn)(
        Task(1, str(tmp_path / "a.tif"), str(tmp_path / "a.tif"), "a.parquet", str(tmp_path))
    )
    assert outcome.values["detections"] == ships
    assert turn.taken == outcome.values["tiles"] // 2 == 2  # in batches of 2


def test_a_rota_is_shared_by_those_who_inherit_it_alone(tmp_path: Path) -> None:
    one, other = Rota(), Rota()
    with Turns(one.handles), Turns(other.handles):
        pass  # two pairs do not wait for each other
    one.close()
    other.close()
