"""What an archive is made of: folders, globs, manifests, single scenes. Planning lists and touches no scene.

Everything is a stream: a manifest of a million scenes is never in memory as a whole.
"""

from __future__ import annotations

import csv
import glob
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from babelrs_geo.archive.addresses import bare
from babelrs_geo.archive.safe import is_product, is_safe, zipped_safe
from babelrs_geo.errors import LabelError, ParameterError

RASTERS = (".tif", ".tiff", ".jp2", ".png", ".jpg", ".jpeg", ".vrt", ".ntf", ".nitf", ".img")
"""Endings of the files that a folder is searched for, beside Sentinel-1 products (.SAFE folders, and zips of them)."""

MANIFESTS = (".txt", ".csv", ".parquet")
OPTIONS = ("bands", "polarisation", "units", "limits", "collar", "height", "dem")
"""Columns of a manifest that say how a scene is read, as the options of `detect` do."""
_ADDRESS = ("scene", "path", "source", "location", "href", "url")
_KNOWN = (*_ADDRESS, "sensor", "priority", "size", "stamp", "acquired", *OPTIONS)


@dataclass(frozen=True)
class Item:
    """A scene of an archive, before anybody has looked at it."""

    source: str
    """What it is called in the ledger: an absolute path, or an address without anything secret."""
    path: str
    """As it is opened: `source`, or the address with its signature."""
    sensor: str | None = None
    """`sar`, `ir` or `rgb`; None where the run's own, or the metadata, are to say."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of `scenes.SceneOptions`, where they differ from the run's."""
    priority: float = 0.0
    """Higher is earlier."""
    size: int | None = None
    """Bytes, where known."""
    stamp: str | None = None
    """What changes when the scene does: time of modification, or an object store's etag or checksum."""
    fault: str = ""
    """Why it cannot be processed, where the plan already shows it."""
    faulty: str | None = None
    """What it is called as long as nothing but a fault is known of it, where that is not `source`."""


def find(sources: Sequence[str], leave_out: Path | None = None, asset: str | None = None) -> Iterator[Item]:
    """The scenes of folders, globs, manifests (.txt, .csv, .parquet), STAC ItemCollections (.json) and single paths.

    `leave_out` is a folder whose files are no scenes: the results; `asset` names the one of a STAC item that is. Raises
    ParameterError where a source is not there, LabelError where a manifest cannot be read.
    """
    for source in sources:
        yield from _find(source, leave_out, asset)


def _find(source: str, leave_out: Path | None, asset: str | None) -> Iterator[Item]:
    path = Path(source)
    remote = "://" in source or source.startswith("/vsi")
    ending = path.suffix.lower()
    if remote and ending not in MANIFESTS:
        yield Item(bare(source), source, "sar" if is_product(source) else None)
    elif not remote and path.is_dir():
        yield from _folder(path.absolute(), leave_out)
    elif not remote and not path.exists():
        yield from _glob(source, leave_out)
    elif ending in (".json", ".geojson"):
        from babelrs_geo.archive.stac import read_items

        yield from read_items(path, asset)
    elif ending in MANIFESTS:
        yield from read_manifest(source)
    else:
        yield _file(path.absolute())


def _glob(pattern: str, leave_out: Path | None) -> Iterator[Item]:
    if not glob.has_magic(pattern):
        raise ParameterError(
            f"{pattern} does not exist; pass a folder, a glob, a manifest, a STAC file or a scene"
        )
    found, asked = False, Path(pattern)
    start = Path(asked.anchor) if asked.anchor else Path.cwd()  # whose name is no pattern
    for path in sorted(start.glob(str(asked.relative_to(asked.anchor)))):
        if leave_out is not None and path.is_relative_to(leave_out):
            continue
        if is_safe(path) or path.is_file():
            found = True
            yield _file(path)
    if not found:
        raise ParameterError(f"{pattern} matches nothing; quote it, so that the shell leaves it alone")


def _folder(folder: Path, leave_out: Path | None, above: tuple[tuple[int, int], ...] = ()) -> Iterator[Item]:
    """Scenes below a folder, by name, hidden ones left out; a link to a folder `above` leads nowhere new."""
    if is_safe(folder):
        yield _file(folder)
        return
    try:
        status = folder.stat()
        here = (status.st_dev, status.st_ino)
        if here in above:
            return
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise ParameterError(
            f"{folder} cannot be listed ({error.strerror}); check its permissions"
        ) from error
    for entry in entries:
        path = Path(entry.path)
        if entry.name.startswith(".") or path == leave_out:
            continue
        if _is_folder(entry):
            yield from _folder(path, leave_out, (*above, here))
        elif path.suffix.lower() in RASTERS or (path.suffix.lower() == ".zip" and zipped_safe(path)):
            yield _file(path)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _file(path: Path) -> Item:
    shown = os.fsencode(path).decode(errors="backslashreplace")
    if shown != str(path):
        return Item(shown, shown, fault=f"{shown} is not named in UTF-8; rename it")
    item = Item(shown, shown, "sar" if is_safe(path) or path.suffix.lower() == ".zip" else None)
    return stat(item)


def stat(item: Item) -> Item:
    """The item with size and time of what lies on disk now; unchanged where nothing does."""
    path = Path(item.path)
    try:
        status = (path / "manifest.safe" if path.is_dir() else path).stat()
    except (OSError, ValueError):
        return item
    return replace(item, size=status.st_size, stamp=f"{status.st_mtime_ns}")


def read_manifest(source: str) -> Iterator[Item]:
    """The scenes of a text file (a path or address a line), a CSV or a GeoParquet table; touches none of them.

    Columns: `scene` (or path, source, location, href, url), and where wanted `sensor`, `priority`, `size`, `stamp`, and
    what `OPTIONS` names. Relative paths are relative to the manifest. A row that cannot be understood is an item with a
    `fault`. Raises LabelError where the file as a whole cannot.
    """
    path = Path(source)
    base = path.absolute().parent
    read = {".csv": _csv_rows, ".parquet": _parquet_rows}.get(path.suffix.lower(), _text_rows)
    try:
        for columns, rows in read(path):
            here = _Columns.of(columns)
            for row in rows:
                yield _item(row, here, base)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise LabelError(f"{source} cannot be read as a manifest ({error}); see docs/archive.md") from error


_Rows = Iterator[tuple[Sequence[str], Iterable[Sequence[Any]]]]
"""Column names and the rows below them, in pieces."""


def _text_rows(path: Path) -> _Rows:
    with path.open(encoding="utf-8-sig") as lines:
        texts = (line.strip() for line in lines)
        yield ("scene",), ((text,) for text in texts if text and not text.startswith("#"))


def _csv_rows(path: Path) -> _Rows:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines)
        header = [name.strip().lower() for name in next(reader, [])]
        _check_columns(path, header)
        yield header, (row for row in reader if row)


def _parquet_rows(path: Path) -> _Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = [name for name in file.schema_arrow.names if name.lower() in _KNOWN]
            _check_columns(path, [name.lower() for name in names])
            for batch in file.iter_batches(batch_size=20_000, columns=names):
                columns = [column.to_pylist() for column in batch.columns]
                yield [name.lower() for name in batch.schema.names], zip(*columns, strict=True)
    except pa.ArrowException as error:
        raise LabelError(
            f"{path} cannot be read as a GeoParquet manifest ({error}); see docs/archive.md"
        ) from error


def _check_columns(path: Path, header: Iterable[str]) -> None:
    if not set(header) & set(_ADDRESS):
        raise LabelError(
            f"{path} has no column of scenes: it has {', '.join(header) or 'none'}, expected one called "
            f"{' or '.join(_ADDRESS)}"
        )


@dataclass(frozen=True)
class _Columns:
    """Where a manifest has what: places in its rows."""

    addresses: tuple[int, ...]
    own: Mapping[str, int]
    """Of sensor, priority, size and stamp."""
    options: Mapping[str, int]

    @classmethod
    def of(cls, names: Sequence[str]) -> _Columns:
        place = {name: n for n, name in enumerate(names)}
        return cls(
            tuple(place[name] for name in _ADDRESS if name in place),
            {name: place[name] for name in ("sensor", "priority", "size", "stamp") if name in place},
            {name: place[name] for name in OPTIONS if name in place},
        )


def _item(row: Sequence[Any], columns: _Columns, base: Path) -> Item:
    """A manifest's row."""
    cells = len(row)
    address = ""
    for place in columns.addresses:
        if place < cells and row[place]:
            address = str(row[place])
            break
    if not address.startswith("/") and "://" not in address:
        address = str((base / address).resolve()) if ".." in address else f"{base}{os.sep}{address}"
    source = bare(address)
    own = {name: row[at] for name, at in columns.own.items() if at < cells and not _missing(row[at])}
    sensor = str(own["sensor"]).strip().lower() if "sensor" in own else None
    if sensor not in (None, "sar", "ir", "rgb"):
        return Item(
            source,
            address,
            fault=f'its row in the manifest has the sensor "{sensor}", expected sar, ir or rgb',
        )
    options: dict[str, Any] = {}
    try:
        for name, place in columns.options.items():
            if place < cells and not _missing(row[place]):
                options[name] = _option(name, row[place])
        priority = float(own.get("priority", 0))
        if priority != priority:
            raise ValueError("priority is nan, expected a number")
        size = _whole(own["size"]) if "size" in own else None
    except (ValueError, TypeError) as error:
        return Item(source, address, fault=f"its row in the manifest cannot be understood: {error}")
    stamp = str(own["stamp"]) if "stamp" in own else None
    return Item(source, address, sensor, options, priority, size, stamp)


def _missing(value: Any) -> bool:
    """Whether a cell says nothing; NaN is what pandas makes of one."""
    return value is None or value == "" or value != value


def _whole(value: Any) -> int:
    """A whole number, as which pandas writes a float where another row's is missing."""
    number = float(value)
    if not (number.is_integer() and abs(number) < 2**53):
        raise ValueError(f"{value} is no whole number")
    return int(number)


def _option(name: str, value: Any) -> Any:
    """A cell as `SceneOptions` wants it: lists are separated by blanks, semicolons or commas."""
    if name in ("bands", "limits"):
        parts = (
            value
            if isinstance(value, list | tuple)
            else str(value).replace(",", " ").replace(";", " ").split()
        )
        numbers = [_whole(part) if name == "bands" else float(part) for part in parts]
        if name == "limits" and len(numbers) != 2:
            raise ValueError(f"limits is {value!r}, expected two numbers")
        return numbers
    if name == "height":
        return float(value)
    if name == "collar":
        if str(value).lower() not in ("true", "false", "1", "0", "yes", "no"):
            raise ValueError(f"collar is {value!r}, expected true or false")
        return str(value).lower() in ("true", "1", "yes")
    return str(value)


def options_text(options: Mapping[str, Any]) -> str:
    """Options as the ledger keeps them; empty where there are none."""
    return json.dumps(options, sort_keys=True) if options else ""
