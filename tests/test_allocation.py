"""Memory of large arrays stays with a process that keeps it, and the user's own settings win."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from babelrs_geo import allocation

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="settings of glibc")

# pages asked of the kernel for a 96 MB array that another thread has filled and freed before
AGAIN = """
import resource, sys, threading
from babelrs_geo import allocation
import numpy as np
if sys.argv[1] == "keep":
    print(allocation.keep())
faults = []
def fill():
    for _ in range(4):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        np.empty(96 << 20, np.uint8).fill(1)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
thread = threading.Thread(target=fill)
thread.start()
thread.join()
print(max(faults[1:]))
"""


def _faults(what: str, **environment: str) -> list[str]:
    own = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", AGAIN, what]
    return subprocess.run(
        command, env=own | environment, check=True, capture_output=True, text=True
    ).stdout.split()


@pytest.mark.skipif(os.confstr("CS_GNU_LIBC_VERSION") is None, reason="settings of glibc")
def test_memory_of_large_arrays_is_used_again() -> None:
    (without,) = _faults("not")
    done, kept = _faults("keep")
    (started_with,) = _faults("not", **allocation.environment())
    assert done == "True"
    assert int(kept) < 100 and int(started_with) < 100
    assert int(without) > 10 * max(int(kept), int(started_with), 1)  # 48 pages of 2 MB at least


def test_settings_of_the_user_win(monkeypatch: pytest.MonkeyPatch) -> None:
    done, _ = _faults("keep", MALLOC_ARENA_MAX="2")
    assert done == "False"
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    assert not allocation.environment()  # for workers and archive cells, too
