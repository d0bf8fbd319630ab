"""Intervals of time as TorchGeo's index has them: UTC without zone, closed, in microseconds."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

ALWAYS = (pd.Timestamp("1678-01-01"), pd.Timestamp("2262-01-01"))
"""The interval of a picture whose time is unknown: all that nanoseconds can count."""

_MOMENT = 2  # microseconds that a picture takes: of an interval without length TorchGeo's splits leave less than none

Micro = NDArray[np.int64]


def microseconds(when: Any) -> int:
    """A moment, zone or none (UTC then), as microseconds since 1970."""
    stamp = pd.Timestamp(when)
    if stamp.tzinfo is not None:
        stamp = stamp.tz_convert(UTC).tz_localize(None)
    return int(stamp.as_unit("us").asm8.astype(np.int64))  # `.value` is nanoseconds, whatever the unit


def moments(acquired: Sequence[datetime | None]) -> tuple[Micro, Micro]:
    """First and last microsecond (N,) of pictures begun at these times; None is `ALWAYS`."""
    known = [None if when is None or pd.isna(when) else microseconds(when) for when in acquired]
    low, high = (microseconds(when) for when in ALWAYS)
    return (
        np.array([low if m is None else m for m in known], np.int64),
        np.array([high if m is None else m + _MOMENT for m in known], np.int64),
    )


def intervals(since: Micro, until: Micro) -> pd.IntervalIndex:
    """TorchGeo's index of time for rows that begin and end at these microseconds (N,).

    A sampler's query bears the interval of the row that it was drawn from, and is to find that row among others of
    its time. So no two rows have one interval: of equal ones each further one ends a microsecond later (begins so,
    where its time is unknown).
    """
    unknown = until == microseconds(ALWAYS[1])
    kept, moved = np.where(unknown, until, since), np.where(unknown, since, until)
    table = pd.DataFrame({"kept": kept, "moved": moved}).sort_values("moved", kind="stable")
    place = table.groupby("kept").cumcount()
    moved = ((table["moved"] - place).groupby(table["kept"]).cummax() + place).sort_index().to_numpy()
    ends = np.where(unknown, moved, since), np.where(unknown, until, moved)
    left, right = (pd.DatetimeIndex(end.astype("datetime64[us]")) for end in ends)
    return pd.IntervalIndex.from_arrays(left, right, closed="both", name="datetime")


def bounds_of(index: pd.IntervalIndex) -> tuple[Micro, Micro]:
    """First and last microsecond (N,) of an index."""
    return index.left.as_unit("us").asi8, index.right.as_unit("us").asi8


def within(
    first: tuple[Micro, Micro], second: tuple[Micro, Micro], tolerance: timedelta | None
) -> tuple[NDArray[np.bool_], Micro, Micro]:
    """Which intervals lie at most `tolerance` apart (None: however far), and what each pair covers: what both
    share, or from the end of the earlier to the start of the later.
    """
    begin, end = np.maximum(first[0], second[0]), np.minimum(first[1], second[1])
    gap = begin - end
    near = np.ones(len(gap), bool) if tolerance is None else gap <= tolerance / timedelta(microseconds=1)
    return near, np.minimum(begin, end), np.maximum(begin, end)
