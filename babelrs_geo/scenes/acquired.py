"""When a picture was taken, as far as metadata and file name tell."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime


def _sentinel1(name: str) -> str | None:
    """The start of the acquisition in a Sentinel-1 product or measurement file name."""
    found = re.match(r"s1[abcd][-_](?:\w{2,4}[-_]){2,4}?(\d{8}t\d{6})", name, re.IGNORECASE)
    return found.group(1) if found else None


def acquired(tags: dict[str, str], name: str) -> datetime | None:
    """The first of: a tag that says ACQUISITION, a Sentinel-1 name, EXIF's and TIFF's date. Zone-less times
    are UTC.
    """
    asked = [v for k, v in tags.items() if re.search("ACQUISITION|SENSING|COLLECT", k, re.IGNORECASE)]
    asked += [_sentinel1(name) or "", tags.get("EXIF_DateTimeOriginal", ""), tags.get("TIFFTAG_DATETIME", "")]
    parsers: tuple[Callable[[str], datetime], ...] = (
        datetime.fromisoformat,
        lambda text: datetime.strptime(text, "%Y:%m:%d %H:%M:%S"),
        lambda text: datetime.strptime(text.upper(), "%Y%m%dT%H%M%S"),
    )
    for text in asked:
        for parse in parsers:
            try:
                when = parse(text.strip())
            except ValueError:
                continue
            return when.replace(tzinfo=when.tzinfo or UTC).astimezone(UTC)
    return None
