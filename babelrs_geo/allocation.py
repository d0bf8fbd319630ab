"""How the C library keeps memory between large arrays.

glibc gives an array of more than 32 MB back to the kernel once it is freed, and the pages of the next one are filled
with zeros before they are used: an eighth of a detector's time on a CPU. These settings keep about what was in use at
once. They are for processes that this library starts itself.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

_SETTINGS: Mapping[str, str] = {
    "MALLOC_MMAP_MAX_": "0",  # no array by itself
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),  # bytes that are kept
    "MALLOC_ARENA_MAX": "1",  # memory of threads by themselves goes back whatever the threshold is
}
_OPTIONS = {"MALLOC_TRIM_THRESHOLD_": -1, "MALLOC_MMAP_MAX_": -4, "MALLOC_ARENA_MAX": -8}  # of malloc.h


def environment() -> dict[str, str]:
    """What a process keeps memory by that is started with it; nothing where the user has settings of their own in the
    environment.
    """
    own = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    return {} if own else dict(_SETTINGS)


def keep() -> bool:
    """Keep memory in this process, from now on; before its threads begin. False, and nothing done, where `environment`
    has nothing, or another C library is here.
    """
    settings = environment()
    if not sys.platform.startswith("linux") or not settings:
        return False
    import ctypes  # here, for other verbs start without it

    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    return all(library.mallopt(option, int(settings[name])) for name, option in _OPTIONS.items())
