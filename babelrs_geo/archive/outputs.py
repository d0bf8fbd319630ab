"""What is kept of a scene: where its files lie, and its STAC item."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from babelrs_geo.archive.ledger import Row, key_of

RESULTS = "results"
DRAFTS = ".drafts"
PARTS = ".parts"
"""Where scenes that several workers share are put together; what a killed run leaves there is used by the next."""
_NAME = 80  # bytes of a scene's name in that of its result; file systems allow 255 in all
_AT_ONCE = 32  # folders flushed
_EDGE = 8  # points a side of a footprint: rows of a scene placed by control points are no straight lines


def output_of(source: str, recipe: str, suffix: str) -> str:
    """Where a scene's result lies, relative to the folder: by recipe, then in 256 folders by a hash of the source."""
    stem = re.sub(r"[^\w.-]+", "_", PurePosixPath(source.partition("?")[0].rstrip("/")).stem) or "scene"
    stem = stem.encode()[:_NAME].decode(errors="ignore")
    key = key_of(source)
    return f"{RESULTS}/{recipe[:12]}/{key[:2]}/{stem}-{key}{suffix}"


def parts_of(folder: Path, output: str, row: Row) -> Path:
    """Where a scene, as it is now, is put together by several workers."""
    path = PurePosixPath(output)
    return (
        folder
        / PARTS
        / path.relative_to(RESULTS).parts[0]
        / f"{path.stem}-{key_of(f'{row.size} {row.stamp}')}"
    )


def files_of(output: str) -> list[str]:
    """All files of a result, relative to the folder, the one that the ledger names last."""
    path = PurePosixPath(output)
    found = [str(path.with_suffix(".json"))]
    if path.suffix == ".parquet":
        found.append(str(path.with_name(f"{path.stem}_coverage.parquet")))
    return [*found, output]


def place(folder: Path, drafts: Path, output: str) -> set[Path]:
    """Give a draft's files their final names; gives the folders that are to be flushed to the disk.

    The file that the ledger names comes last: where it is, all are.
    """
    from babelrs_geo.vectors import drop_journals

    target = folder / output
    target.parent.mkdir(parents=True, exist_ok=True)
    for name in files_of(output):
        final = folder / name
        draft = drafts / final.name
        if draft.exists() or not final.exists():  # else it was placed, and the run was stopped before its row
            drop_journals(final)
            draft.replace(final)
    return {target.parent}


def remove(folder: Path, output: str) -> None:
    """Remove a result's files."""
    from babelrs_geo.vectors import drop_journals

    for name in reversed(files_of(output)):
        (folder / name).unlink(missing_ok=True)
        drop_journals(folder / name)


def flush(folders: Iterable[Path]) -> None:
    """Have the system put names on the disk; asked for many folders at once, it does so in one go."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for _ in pool.map(_flush, folders):
            pass


def _flush(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def footprint(scene: Any) -> list[list[float]] | None:
    """The ring around a scene in longitude and latitude, closed and counter-clockwise; None without a place on Earth.

    Across the antimeridian it comes back at the other side.
    """
    import numpy as np
    import shapely

    if not scene.georef.on_earth:
        return None
    run = np.linspace(0, 1, _EDGE + 1)[:-1]
    one, zero = np.ones_like(run), np.zeros_like(run)
    across = np.concatenate([run, one, 1 - run, zero]) * scene.width
    down = np.concatenate([zero, run, one, 1 - run]) * scene.height
    lon, lat = scene.georef.to_lonlat(across, down)
    if not np.isfinite(lon).all() or not np.isfinite(lat).all():
        return None
    ring = shapely.Polygon(np.stack([np.round(lon, 7), np.round(lat, 7)], axis=1))
    return shapely.get_coordinates(shapely.geometry.polygon.orient(ring)).tolist()


def stac_item(
    name: str,
    source: str,
    ring: list[list[float]] | None,
    provenance: Mapping[str, Any],
    found: Mapping[str, int],
) -> dict[str, Any]:
    """A result as a STAC item (1.0.0). Its time is the scene's, or, where that is unknown, that of the detection."""
    stem = PurePosixPath(name).stem
    media = (
        "application/vnd.apache.parquet" if name.endswith(".parquet") else "application/geopackage+sqlite3"
    )
    assets = {"detections": {"href": f"./{name}", "type": media, "roles": ["data"]}}
    if name.endswith(".parquet"):
        assets["coverage"] = {"href": f"./{stem}_coverage.parquet", "type": media, "roles": ["metadata"]}
    # A path on disk would tell of the host.
    if "://" in source:
        assets["scene"] = {"href": source, "roles": ["source"]}
    acquired = provenance["scene"]["acquired"]
    item: dict[str, Any] = {
        "type": "Feature",
        "stac_version": "1.0.0",
        "id": stem,
        "geometry": None,
        "properties": {
            "datetime": acquired or provenance["finished"],
            "created": provenance["finished"],
            "babelrs_geo:acquired": acquired,
            "babelrs_geo:scene": provenance["scene"]["name"],
            "babelrs_geo:sensor": provenance["scene"]["sensor"],
            "babelrs_geo:weights": provenance["weights"],
            "babelrs_geo:software": provenance["software"],
            "babelrs_geo:tiles": provenance["tiles"],
            "babelrs_geo:detections": sum(found.values()),
            "babelrs_geo:classes": dict(found),
        },
        "links": [],
        "assets": assets,
    }
    return item if ring is None else item | _extent(ring)


def _extent(ring: list[list[float]]) -> dict[str, Any]:
    """A ring as geometry and bounds of GeoJSON: in pieces across the antimeridian, where west is the larger of west and
    east (RFC 7946, 3.1.9 and 5.2).
    """
    import numpy as np
    import shapely

    from babelrs_geo.vectors.antimeridian import polygons

    lon, lat = np.array(ring).T
    pieces = [shapely.geometry.polygon.orient(p) for p in shapely.get_parts(polygons(lon[None], lat[None]))]
    shape = pieces[0] if len(pieces) == 1 else shapely.MultiPolygon(pieces)
    west, south, east, north = shape.bounds
    ends = shapely.bounds(pieces)
    at_west, at_east = np.isclose(ends[:, 0], -180.0, rtol=0), np.isclose(ends[:, 2], 180.0, rtol=0)
    if at_west.any() and at_east.any() and not (at_west & at_east).any():
        west, east = ends[~at_west, 0].min(), ends[at_west, 2].max()
    bbox = [float(side) for side in (west, south, east, north)]
    return {"geometry": json.loads(shapely.to_geojson(shape)), "bbox": bbox}


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON and have it on the disk."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
