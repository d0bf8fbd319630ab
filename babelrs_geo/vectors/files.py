"""Files out: GeoPackage, GeoParquet and GeoJSON, whole or absent."""

from __future__ import annotations

import datetime as dt
import io
import json
import os
import sqlite3
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyogrio

from babelrs_geo import qgis
from babelrs_geo.errors import OutputError
from babelrs_geo.georef import on_earth

SUFFIXES = (".gpkg", ".parquet", ".geojson")
"""What `write` can write."""

PROVENANCE_KEY = b"babelrs-geo:provenance"
"""Where a GeoParquet file's metadata holds the provenance, as JSON."""


def check_target(path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Raise OutputError where `write` could not, or should not, put its files: ask before the work.

    It must end in one of `SUFFIXES`, in a writable directory, and be free unless `overwrite`; see `check_name`, too.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise OutputError(f"{path}: unknown kind of output {path.suffix!r}; name it {', '.join(SUFFIXES)}")
    check_name(path)
    for target in _targets(path):
        if target.is_dir():
            raise OutputError(f"{target} is a directory; name a file in it")
        if target.exists() and not overwrite:
            raise OutputError(f"{target} exists; pass --overwrite to replace it, or another name with -o")
    if not path.parent.is_dir():
        raise OutputError(f"{path.parent} is not a directory; create it, or write elsewhere with -o")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OutputError(
            f"{path.parent} is not writable; change its permissions, or write elsewhere with -o"
        )


def check_name(path: Path) -> None:
    """Raise OutputError where a file would land in another place: what GDAL writes by way of pyogrio, which takes a
    "!" for the way into an archive.
    """
    if path.suffix.lower() in (".gpkg", ".geojson", ".fgb") and "!" in str(path.absolute()):
        raise OutputError(
            f'{path} cannot be written: a "!" in the name of a file or folder leads pyogrio elsewhere; rename it, or'
            " write elsewhere with -o"
        )


def write(
    path: str | os.PathLike[str],
    features: gpd.GeoDataFrame,
    coverage: gpd.GeoDataFrame,
    provenance: Mapping[str, Any],
    *,
    overwrite: bool = False,
) -> Path:
    """Write features, coverage and provenance in the format of the suffix, whole or not at all; returns the
    path.

    `.gpkg`: layers `detections` and `coverage`, both with a default style (QGIS reads it by itself), and a
    table `provenance` of keys and values, nested keys joined by dots, values other than text as JSON. With
    the GDAL option or environment variable OGR_CURRENT_DATE set, the same content gives the same bytes.
    `.parquet`: GeoParquet; the coverage beside it as NAME_coverage.parquet; the provenance as JSON in both
    files' metadata under `babelrs-geo:provenance`.
    `.geojson`: RFC 7946, hence EPSG:4326 and cut at the antimeridian; the coverage beside it as
    NAME_coverage.geojson; the provenance as the collection's member `provenance`.

    Args:
        path: where to, ending in one of `SUFFIXES`.
        features: what `features` gives, in any CRS; rows keep their order.
        coverage: what `coverage` gives, in the same CRS.
        provenance: text keys; values JSON can hold, dates and paths.
        overwrite: replace files that exist.

    Raises OutputError where the files exist or cannot be written, or where features without a CRS should become
    GeoJSON. An exception or Ctrl-C leaves nothing behind. A killed process (SIGKILL, power) may leave a hidden
    folder `.NAME.*`, which can be deleted; a file of the output's own name is always whole.
    """
    path = Path(path)
    check_target(path, overwrite=overwrite)
    writer = {".gpkg": _write_gpkg, ".parquet": _write_parquet, ".geojson": _write_geojson}[
        path.suffix.lower()
    ]
    with (
        _told_as_output_error(path),
        tempfile.TemporaryDirectory(
            prefix=f".{path.name}.", dir=path.parent, ignore_cleanup_errors=True
        ) as folder,
    ):
        drafts = [Path(folder) / target.name for target in _targets(path)]
        with warnings.catch_warnings():
            # Features in pixels have no CRS; `features` said so already.
            warnings.filterwarnings("ignore", message="'crs' was not provided", category=UserWarning)
            writer(drafts, features, coverage, _plain(provenance))
        for draft in drafts:
            _flush(draft)
        check_target(path, overwrite=overwrite)  # another run may have finished meanwhile
        drop_journals(path)
        for draft in reversed(drafts):  # the named file last: where it is, all is
            draft.replace(path.parent / draft.name)
        _flush(path.parent)
    return path


def drop_journals(path: Path) -> None:
    """Remove what SQLite, or QGIS that was ended, left beside a GeoPackage that goes: it would be replayed into the
    one that comes. Of other files there is nothing.
    """
    if path.suffix.lower() == ".gpkg":
        for ending in ("-wal", "-shm", "-journal"):
            path.with_name(path.name + ending).unlink(missing_ok=True)


def _targets(path: Path) -> list[Path]:
    """The files of an output, the named one first."""
    if path.suffix.lower() == ".gpkg":
        return [path]
    return [path, path.with_name(f"{path.stem}_coverage{path.suffix}")]


@contextmanager
def _told_as_output_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OutputError:
        raise
    except (
        OSError,
        RuntimeError,
        sqlite3.Error,
        pa.ArrowException,
    ) as error:  # pyogrio's errors are RuntimeErrors
        cause = " ".join(str(error).split()) or type(error).__name__
        raise OutputError(
            f"{path} cannot be written ({cause}); check the disk's space and permissions, or write elsewhere"
            " with -o"
        ) from error


def _flush(path: Path) -> None:
    """Have the system put a file, or a directory's entries, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _plain(value: Any) -> Any:
    """Provenance as JSON has it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, dt.datetime | dt.date):
        return value.isoformat()
    if isinstance(value, np.generic):
        return value.item()
    return str(value) if isinstance(value, Path) else value


def _rows(provenance: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str | None]]:
    """Nested provenance as keys joined by dots; text as it is, None as null, the rest as JSON."""
    for key, value in provenance.items():
        if isinstance(value, dict) and value:
            yield from _rows(value, f"{prefix}{key}.")
        elif value is None or isinstance(value, str):
            yield prefix + key, value
        else:
            yield prefix + key, json.dumps(value, ensure_ascii=False)


def clock() -> str:
    """Now, or the fixed time of OGR_CURRENT_DATE, as GeoPackage writes it: UTC to the millisecond."""
    fixed = pyogrio.get_gdal_config_option("OGR_CURRENT_DATE")
    return (
        str(fixed)
        if fixed
        else f"{dt.datetime.now(dt.UTC).replace(tzinfo=None).isoformat(timespec='milliseconds')}Z"
    )


@dataclass(frozen=True)
class _Layer:
    """A layer of a GeoPackage."""

    name: str
    frame: gpd.GeoDataFrame
    style: qgis.Style
    about: str
    parts: bool = False
    """Multipolygons in any case."""


def _coverage_layer(coverage: gpd.GeoDataFrame) -> _Layer:
    about = "Ground that babelrs-geo looked at, by how its tiles ended"
    return _Layer("coverage", coverage, qgis.coverage_style(), about, parts=True)


def _write_gpkg(
    drafts: list[Path], features: gpd.GeoDataFrame, coverage: gpd.GeoDataFrame, provenance: dict[str, Any]
) -> None:
    style = qgis.detections_style(features["class"])
    found = _Layer("detections", features, style, "Objects found by babelrs-geo")
    _write_layers(drafts[0], (found, _coverage_layer(coverage)), provenance)


def write_matches(
    path: Path, matches: gpd.GeoDataFrame, coverage: gpd.GeoDataFrame, provenance: Mapping[str, Any]
) -> None:
    """A styled GeoPackage of what was hit, missed and false (column `outcome`), over the ground looked at.

    The file is written in place: the caller sees to it that it is whole or absent. OutputError where it cannot be.
    """
    check_name(path)
    about = "Objects that were hit or missed, and false ones"
    layers = (_Layer("matches", matches, qgis.matches_style(), about), _coverage_layer(coverage))
    with _told_as_output_error(path), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="'crs' was not provided", category=UserWarning)
        _write_layers(path, layers, _plain(provenance))


def _write_layers(draft: Path, layers: Sequence[_Layer], provenance: dict[str, Any]) -> None:
    for layer in layers:
        # Boxes stay plain polygons, unless an area of interest or the antimeridian cut some into parts.
        parts = layer.parts or bool((layer.frame.geom_type == "MultiPolygon").any())
        pyogrio.write_dataframe(
            layer.frame,
            draft,
            layer=layer.name,
            driver="GPKG",
            geometry_type="MultiPolygon" if parts else "Polygon",
            promote_to_multi=parts,
            dataset_options={"VERSION": "1.2"},  # nothing here needs more, and older QGIS warns of later ones
            layer_options={"GEOMETRY_NAME": "geom", "IDENTIFIER": layer.name, "DESCRIPTION": layer.about},
        )
    now = clock()
    first = layers[0]
    database = sqlite3.connect(draft)
    try:
        with database:
            _add_tables(database, now)
            database.executemany("INSERT INTO provenance (key, value) VALUES (?, ?)", _rows(provenance))
            database.executemany(
                "INSERT INTO layer_styles (f_table_catalog, f_table_schema, f_table_name, f_geometry_column,"
                " styleName, styleQML, styleSLD, useAsDefault, description, owner, ui, update_time)"
                " VALUES ('', '', ?, 'geom', ?, ?, ?, 1, ?, '', NULL, ?)",
                [
                    (each.name, s.name, s.qml, s.sld, s.description, now)
                    for each in layers
                    for s in [each.style]
                ],
            )
        (written,) = database.execute(f"SELECT count(*) FROM {first.name}").fetchone()
    finally:
        database.close()
    if written != len(first.frame):
        raise OutputError(
            f"{draft.name}: {written} of {len(first.frame)} features reached the file; write it again"
        )


def _add_tables(database: sqlite3.Connection, now: str) -> None:
    """The tables beside the layers: `layer_styles` in the columns QGIS itself makes, and `provenance`."""
    database.execute(
        "CREATE TABLE layer_styles (id INTEGER PRIMARY KEY AUTOINCREMENT NOT NULL, f_table_catalog TEXT(256),"
        " f_table_schema TEXT(256), f_table_name TEXT(256), f_geometry_column TEXT(256), styleName TEXT(30),"
        " styleQML TEXT, styleSLD TEXT, useAsDefault BOOLEAN, description TEXT, owner TEXT(30), ui TEXT(30),"
        " update_time DATETIME)"
    )
    database.execute(
        "CREATE TABLE provenance (id INTEGER PRIMARY KEY AUTOINCREMENT NOT NULL, key TEXT NOT NULL UNIQUE,"
        " value TEXT)"
    )
    database.executemany(
        "INSERT INTO gpkg_contents (table_name, data_type, identifier, description, last_change)"
        " VALUES (?, 'attributes', ?, ?, ?)",
        [
            ("layer_styles", "layer_styles", "", now),
            ("provenance", "provenance", "How the detections were made: keys and values", now),
        ],
    )


def _write_parquet(
    drafts: list[Path], features: gpd.GeoDataFrame, coverage: gpd.GeoDataFrame, provenance: dict[str, Any]
) -> None:
    told = json.dumps(provenance, ensure_ascii=False).encode()
    for draft, frame in zip(drafts, (features, coverage), strict=True):
        buffer = io.BytesIO()
        frame.to_parquet(buffer, index=False, write_covering_bbox=True, compression=None)
        table = pq.read_table(buffer)
        metadata = {**(table.schema.metadata or {}), PROVENANCE_KEY: told}
        pq.write_table(table.replace_schema_metadata(metadata), draft, compression="zstd")


def _write_geojson(
    drafts: list[Path], features: gpd.GeoDataFrame, coverage: gpd.GeoDataFrame, provenance: dict[str, Any]
) -> None:
    if not on_earth(features.crs):
        raise OutputError(
            f"{drafts[0].name}: GeoJSON holds longitude and latitude only, which do not follow from these features' "
            "CRS, or lack of one; write .gpkg or .parquet instead"
        )
    members = {"type": "FeatureCollection", "provenance": provenance}
    for draft, frame, kind in zip(drafts, (features, coverage), ("Unknown", "MultiPolygon"), strict=True):
        pyogrio.write_dataframe(
            frame,
            draft,
            driver="GeoJSON",
            layer=draft.stem,
            geometry_type=kind,
            layer_options={
                "RFC7946": "YES",
                "COORDINATE_PRECISION": "8",
                "NATIVE_DATA": json.dumps(members, ensure_ascii=False),
                "NATIVE_MEDIA_TYPE": "application/vnd.geo+json",
            },
        )
