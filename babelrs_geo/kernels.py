"""Kernels: functions that numba compiles, and where it keeps what it compiled."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit
from numba.core import config


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Compile a kernel with numba: without the GIL, and kept on disk where there is a place to keep it.

    numba looks at NUMBA_CACHE_DIR, the package's own folder and the user's cache folder, in this order, and
    raises if none can be written (a read-only container without a home). Kernels then lie in a folder of the user's
    own among the temporary files; where that fails too, they are compiled anew in each process.
    `options` are numba's own.
    """
    settings: Any = config
    usual = settings.CACHE_DIR
    try:
        for place in (None, _private_folder):
            settings.CACHE_DIR = usual if place is None else place()
            try:
                kernel: Callable[..., Any] = njit(cache=True, nogil=True, **options)(function)
            except RuntimeError:
                continue
            return kernel
    finally:
        settings.CACHE_DIR = usual
    kernel = njit(nogil=True, **options)(function)
    return kernel


def _private_folder() -> str:
    """A folder that nobody else can write; "" where there is none. Kernels are pickles: another's would run code."""
    try:
        folder = Path(tempfile.gettempdir(), f"babelrs-geo-{os.getuid()}")
        folder.mkdir(mode=0o700, exist_ok=True)
        what = folder.lstat()
    except OSError:
        return ""
    own = stat.S_ISDIR(what.st_mode) and what.st_uid == os.getuid() and not what.st_mode & 0o077
    return str(folder) if own else ""
