"""Results of an archive in one: a GeoParquet dataset partitioned by date and place, or one file for QGIS.

Everything is streamed result by result; what is in memory is bounded by `_ROWS`, not by the archive.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pyogrio
import shapely

from babelrs_geo.archive.ledger import Ledger
from babelrs_geo.errors import GeorefError, OutputError, ParameterError
from babelrs_geo.vectors import check_name, drop_journals, to_crs

CRS = "EPSG:4326"
DEGREES = 10
"""Side of a cell of the dataset."""

_ROWS = 200_000  # of a part of the dataset, and in memory
_LAYER = "detections"

Progress = Callable[[int, int], None]
"""Called with (scenes exported, scenes in all)."""


@dataclass(frozen=True)
class Exported:
    """What was written."""

    path: Path
    scenes: int
    detections: int
    """Those in it: without doubles that were left out, and, in one file for QGIS, without those that have no place."""
    dropped: int
    """Detections left out because another scene of the same acquisition shows the same object with a better score."""


def export(
    ledger: Ledger,
    path: Path,
    *,
    once: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Write all results that are done or incomplete, none that is stale, to `path` in EPSG:4326.

    A path without suffix is a dataset, `date=YYYY-MM-DD/cell=N40E010/part-0.parquet`: GeoParquet 1.1, bbox covering.
    The cell is the lower left corner of the object's square of `DEGREES` degrees, or `none` without georeference, where
    the geometry is null. `.gpkg` and `.fgb` hold what has a place in one layer `detections`. Rows have the columns of a
    result, and `source`. With `once`, of an object that several scenes of one acquisition show, the row with the best
    score stays.

    Raises OutputError where `path` exists and `overwrite` is False or cannot be written, ParameterError for another
    suffix.
    """
    if path.suffix not in ("", ".gpkg", ".fgb"):
        raise ParameterError(
            f"{path} is no kind of export; name a folder for a dataset, or end it in .gpkg or .fgb"
        )
    check_name(path)
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists; pass --overwrite to replace it, or another name with -o")
    if not path.parent.is_dir():
        raise OutputError(f"{path.parent} is not a directory; create it, or write elsewhere with -o")
    tally = _Tally()
    frames = _pieces(ledger, tally, once, progress)
    try:
        with tempfile.TemporaryDirectory(
            prefix=f".{path.name}.", dir=path.parent, ignore_cleanup_errors=True
        ) as made:
            draft = Path(made) / path.name
            written = _dataset(frames, draft) if path.suffix == "" else _file(frames, draft)
            _replace(path, draft, Path(made) / "old")
    except (OSError, RuntimeError, pa.ArrowException) as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(
            f"{path} cannot be written ({' '.join(str(error).split())}); check the disk's space and permissions"
        ) from error
    return Exported(path, tally.scenes, written, tally.dropped)


@dataclass
class _Tally:
    scenes: int = 0
    dropped: int = 0


def _replace(path: Path, draft: Path, old: Path) -> None:
    """Put a draft, file or folder, where something may be."""
    if path.exists():
        path.replace(old)
    drop_journals(path)
    draft.replace(path)
    if old.is_dir():
        shutil.rmtree(old, ignore_errors=True)


def _pieces(
    ledger: Ledger, tally: _Tally, once: bool, progress: Progress | None
) -> Iterator[gpd.GeoDataFrame]:
    """Features by date, in pieces of about `_ROWS`, or, where doubles are to be dropped, of whole acquisitions."""
    where = "state IN ('done', 'incomplete')"
    total = int(ledger.one(f"SELECT count(*) FROM scenes WHERE {where}"))
    waiting: list[gpd.GeoDataFrame] = []
    rows, begun, ended = 0, "", None
    query = f"SELECT source, output, acquired FROM scenes WHERE {where} ORDER BY acquired, id"
    for row in ledger.rows(query):
        date = (row["acquired"] or "unknown")[:10]
        when = None if row["acquired"] is None else pd.Timestamp(row["acquired"])
        # Scenes of one pass follow one another within a minute, be it over midnight.
        apart = ended is None or when is None or (when - ended).total_seconds() > 60
        if waiting and (date != begun or rows > _ROWS) and (apart or not once):
            yield _joined(waiting, tally, once)
            waiting, rows = [], 0
        if not waiting:
            begun = date
        frame = _read(ledger.folder / row["output"], row["source"])
        tally.scenes += 1
        if len(frame):
            waiting.append(frame)
            rows += len(frame)
        ended = when
        if progress:
            progress(tally.scenes, total)
    if waiting:
        yield _joined(waiting, tally, once)


def _read(path: Path, source: str) -> gpd.GeoDataFrame:
    """A result's features in EPSG:4326, without geometry where there is no place on Earth."""
    frame = (
        gpd.read_parquet(path) if path.suffix == ".parquet" else pyogrio.read_dataframe(path, layer=_LAYER)
    )
    if frame.geometry.name != "geometry":
        frame = frame.rename_geometry("geometry")
    shapes = _places(frame.geometry)
    if shapes.notna().any() and not np.isfinite(shapes.total_bounds).all():
        raise GeorefError(f"{path} has features that {CRS} cannot show; export it by itself")
    frame = frame.set_geometry(shapes)
    frame["acquired"] = pd.to_datetime(frame["acquired"], utc=True).astype("datetime64[ms, UTC]")
    return frame.assign(source=source)


def _places(shapes: gpd.GeoSeries) -> gpd.GeoSeries:
    """Shapes in EPSG:4326, all None in pixels and in a CRS that is not of the Earth."""
    if shapes.crs is not None:
        with suppress(GeorefError):
            return to_crs(shapes, CRS)
    return gpd.GeoSeries([None] * len(shapes), index=shapes.index, crs=CRS)


def _joined(frames: list[gpd.GeoDataFrame], tally: _Tally, once: bool) -> gpd.GeoDataFrame:
    frame = frames[0] if len(frames) == 1 else pd.concat(frames, ignore_index=True)
    if not once:
        return frame
    keep = best_of_doubles(frame)
    tally.dropped += int((~keep).sum())
    return frame[keep].reset_index(drop=True)


def best_of_doubles(frame: gpd.GeoDataFrame, iou: float = 0.5, seconds: float = 60.0) -> np.ndarray[Any, Any]:
    """Which rows (N,) stay where scenes of one acquisition overlap: of rows of different scenes, the same sensor and
    class, taken within `seconds`, whose polygons overlap by more than `iou`, the one with the best score; of equal ones
    the first.

    Areas are compared in degrees: the ratio of two at one place is that on the ground.
    """
    keep = np.ones(len(frame), bool)
    shapes = np.array([None if g is None else g for g in frame.geometry], object)
    there = np.flatnonzero(~shapely.is_missing(shapes))
    tree = shapely.STRtree(shapes[there])
    first, second = tree.query(shapes[there], predicate="intersects")
    first, second = there[first], there[second]
    pairs = first < second
    first, second = first[pairs], second[pairs]
    for column in ("sensor", "class"):
        values = frame[column].to_numpy(object)
        same = values[first] == values[second]
        first, second = first[same], second[same]
    sources = frame["source"].to_numpy(object)
    times = (
        frame["acquired"].astype("int64").to_numpy() / 1e3
    )  # NaT is far from every time, and from no other NaT
    apart = (sources[first] != sources[second]) & (np.abs(times[first] - times[second]) <= seconds)
    apart &= frame["acquired"].notna().to_numpy()[first]
    first, second = first[apart], second[apart]
    shared = shapely.area(shapely.intersection(shapes[first], shapes[second]))
    union = shapely.area(shapes[first]) + shapely.area(shapes[second]) - shared
    double = shared > iou * union
    rivals: dict[int, list[int]] = defaultdict(list)
    for a, b in zip(first[double].tolist(), second[double].tolist(), strict=True):
        rivals[a].append(b)
        rivals[b].append(a)
    for row in np.argsort(-frame["score"].to_numpy(), kind="stable").tolist():
        if keep[row]:
            keep[rivals.get(row, [])] = False
    return keep


def cells(frame: gpd.GeoDataFrame) -> np.ndarray[Any, Any]:
    """The cell (N,) of each row: `N40E010` is 40 to 50 degrees north and 10 to 20 east; `none` without a place."""
    lon, lat = frame["lon"].to_numpy(float), frame["lat"].to_numpy(float)
    found = np.full(len(frame), "none", object)
    known = np.isfinite(lon) & np.isfinite(lat)
    for row in np.flatnonzero(known):
        x, y = (int(v // DEGREES) * DEGREES for v in (lon[row], lat[row]))
        found[row] = f"{'S' if y < 0 else 'N'}{abs(y):02d}{'W' if x < 0 else 'E'}{abs(x):03d}"
    return found


def _dataset(frames: Iterator[gpd.GeoDataFrame], folder: Path) -> int:
    """Parts by date and cell; gives how many rows they have."""
    folder.mkdir()
    parts: dict[Path, int] = defaultdict(int)
    written = 0
    for frame in frames:
        dates = frame["acquired"].dt.strftime("%Y-%m-%d").fillna("unknown")
        for (date, cell), rows in frame.groupby([dates.to_numpy(), cells(frame)], sort=True):
            home = folder / f"date={date}" / f"cell={cell}"
            home.mkdir(parents=True, exist_ok=True)
            part = home / f"part-{parts[home]}.parquet"
            parts[home] += 1
            written += len(rows)
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore", RuntimeWarning
                )  # bounds of nothing, where a cell has no place
                rows.to_parquet(
                    part, index=False, write_covering_bbox=True, schema_version="1.1.0", compression="zstd"
                )
    if not parts:  # something a reader can open all the same
        pq.write_table(pa.table({"class": pa.array([], pa.string())}), folder / "part-0.parquet")
    return written


def _file(frames: Iterator[gpd.GeoDataFrame], path: Path) -> int:
    """One layer, of so many rows as it gives; FlatGeobuf cannot be added to, so it goes by way of a GeoPackage."""
    whole = path if path.suffix == ".gpkg" else path.with_suffix(".gpkg")
    written = 0
    for frame in frames:
        placed = frame[frame.geometry.notna()]
        if len(placed):
            pyogrio.write_dataframe(
                placed,
                whole,
                layer=_LAYER,
                driver="GPKG",
                append=written > 0,
                geometry_type="MultiPolygon",
                promote_to_multi=True,
                **({} if written else {"dataset_options": {"VERSION": "1.2"}}),
            )
            written += len(placed)
    if not written:
        raise OutputError("no result has a place on the map: export a dataset, which keeps those without")
    if whole != path:
        meta, table = pyogrio.read_arrow(whole, layer=_LAYER)
        name = meta["geometry_name"] or "wkb_geometry"
        pyogrio.write_arrow(
            table,
            path,
            layer=_LAYER,
            driver="FlatGeobuf",
            geometry_name=name,
            geometry_type="MultiPolygon",
            crs=CRS,
        )
    return written


__all__ = ["CRS", "DEGREES", "Exported", "best_of_doubles", "cells", "export"]
