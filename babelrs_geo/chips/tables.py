"""The two tables of a chip folder, and its note of what was asked: written whole or not at all, and read back."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from babelrs_geo.boxes import corners
from babelrs_geo.chips.cut import part_path
from babelrs_geo.chips.plan import Entry, Plan
from babelrs_geo.drafts import draft
from babelrs_geo.errors import LabelError, OutputError
from babelrs_geo.georef import Georef
from babelrs_geo.scenes import Scene, SceneOptions, open_scene
from babelrs_geo.sensors import Radiometry
from babelrs_geo.vectors.antimeridian import polygons

INDEX, LABELS, NOTE = "index.parquet", "labels.parquet", "tile.json"


def read_index(folder: str | os.PathLike[str]) -> gpd.GeoDataFrame:
    """The index of a chip folder, one row a chip. LabelError where the folder holds none, or is not whole yet."""
    return _read(Path(folder), INDEX)


def read_labels(folder: str | os.PathLike[str]) -> gpd.GeoDataFrame:
    """The labels of a chip folder, one row an object in a chip. LabelError as for `read_index`."""
    return _read(Path(folder), LABELS)


def open_chip(folder: str | os.PathLike[str], row: Mapping[str, Any] | pd.Series[Any]) -> Scene:
    """A chip, by its row of the index, as a scene that reads as its window of the scene does, bit for bit, and lies
    where that lies. Raises SceneError where the file is missing or damaged.
    """
    how, ground = Radiometry.from_json(row["radiometry"]), row.get("rpc_height")
    options = SceneOptions(
        collar=False,
        radiometry=how,
        height=None if ground is None or np.isnan(ground) else float(ground),
        dem=row.get("rpc_dem"),
    )
    return open_scene(Path(folder, row["path"]), how.sensor, options)


def _read(folder: Path, name: str) -> gpd.GeoDataFrame:
    if not (folder / INDEX).is_file():
        why = (
            "its run did not end: run the same tile command again"
            if (folder / NOTE).is_file()
            else "pass one"
        )
        raise LabelError(f"{folder} is no whole chip folder ({INDEX} is missing); {why}")
    try:
        return gpd.read_parquet(folder / name)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise LabelError(
            f"{folder / name} cannot be read ({' '.join(str(error).split())}); tile the scenes again"
        ) from error


def write_tables(folder: Path, plan: Plan, entries: Sequence[Entry]) -> dict[str, Any]:
    """Join the parts that tasks left into labels and index, in the plan's order; returns what they count."""
    chips: list[dict[str, Any]] = []
    shapes: list[Any] = []
    labels: list[gpd.GeoDataFrame] = []
    about = {id(entry): _about(entry) for entry in entries}
    told_of: set[str] = set()
    for task in plan.tasks:
        told = _part(folder, task.key)
        planned = {chip.name: chip for region in task.regions for chip in region.chips}
        entry = task.entry
        for name, valid, objects, dropped in told["chips"]:
            chip = planned[name]
            row = {"chip": name, "path": f"images/{entry.folder}/{name}.tif", "split": chip.split}
            row |= dict(zip(("x", "y", "width", "height"), chip.rect, strict=True))
            row |= {"valid": valid, "objects": objects, "dropped": dropped}
            chips.append(row | about[id(entry)])
            shapes.append(chip.footprint)
        fresh = {name for name, *_ in told["chips"]} - told_of  # a co-registered chip's labels count once
        told_of |= fresh
        rows = [row for row in told["labels"] if row[0] in fresh]
        if rows and entry.objects is not None:
            corner = np.array([planned[name].rect[:2] for name, _, _ in rows], np.float64)
            labels.append(_labels(rows, corner, entry))
    index = _index(chips, shapes)
    table = pd.concat(labels, ignore_index=True) if labels else _labels([], np.zeros((0, 2)), None)
    write_parquet(folder / LABELS, gpd.GeoDataFrame(table, geometry="geometry", crs="EPSG:4326"))
    write_parquet(folder / INDEX, index)
    splits = index["split"].value_counts()
    return {
        "chips": {name: int(splits.get(name, 0)) for name in plan.area},
        "objects": len(table),
        "left_out_for_other_splits": plan.conflicts,
    }


def _part(folder: Path, key: str) -> dict[str, list[Any]]:
    """What a task left. OutputError where it is gone."""
    try:
        part: dict[str, list[Any]] = json.loads(part_path(folder, key).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise OutputError(
            f"{folder} lost part {key} of its index, as where another run of the same folder ended first; run the same "
            "again, once no other does: it goes on from what is there"
        ) from error
    return part


def _about(entry: Entry) -> dict[str, Any]:
    """Columns that all chips of a scene share."""
    scene = entry.scene
    gsd = scene.gsd
    return {
        "scene": entry.name,
        "source": entry.source,
        "sensor": str(scene.sensor),
        "acquired": None if scene.acquired is None else pd.Timestamp(scene.acquired),
        "radiometry": scene.radiometry.to_json(),
        "gsd": np.nan if gsd is None else gsd,
        "georef": scene.georef.kind,
        "crs": scene.georef.crs_text,
        "rpc_height": scene.georef.height if scene.georef.kind == "rpcs" else np.nan,
        "rpc_dem": scene.georef.dem,
    }


_COLUMNS = {
    "chip": str,
    "path": str,
    "scene": str,
    "source": str,
    "sensor": str,
    "split": str,
    "x": np.int64,
    "y": np.int64,
    "width": np.int64,
    "height": np.int64,
    "valid": np.float64,
    "objects": np.int64,
    "dropped": np.int64,
    "acquired": "datetime64[ms, UTC]",
    "radiometry": str,
    "gsd": np.float64,
    "georef": str,
    "crs": object,
    "rpc_height": np.float64,
    "rpc_dem": object,
}


def _index(rows: list[dict[str, Any]], shapes: list[Any]) -> gpd.GeoDataFrame:
    columns = {name: pd.Series([row[name] for row in rows], dtype=kind) for name, kind in _COLUMNS.items()}
    return gpd.GeoDataFrame(columns, geometry=np.array(shapes, object), crs="EPSG:4326")


def _labels(rows: list[list[Any]], corner: NDArray[np.float64], entry: Entry | None) -> gpd.GeoDataFrame:
    """Labels of one task: rows of chip, object and truncated share; `corner` (N, 2) of each chip in the scene."""
    which = np.array([row for _, row, _ in rows], np.int64)
    boxes, classes, oriented = np.zeros((0, 5)), np.zeros(0, object), np.zeros(0, bool)
    if entry is not None and entry.objects is not None:
        objects = entry.objects[which]
        boxes, classes, oriented = objects.boxes, objects.classes, objects.oriented
    columns = {
        "chip": pd.Series([name for name, _, _ in rows], dtype=str),
        "class": pd.Series(classes, dtype=str),
        "cx": boxes[:, 0] - corner[:, 0],
        "cy": boxes[:, 1] - corner[:, 1],
        "w": boxes[:, 2],
        "h": boxes[:, 3],
        "r": boxes[:, 4],
        "oriented": oriented,
        "truncated": np.array([share for _, _, share in rows], np.float64),
    }
    shapes = np.zeros(0, object) if entry is None else _on_the_map(boxes, entry.scene.georef)
    return gpd.GeoDataFrame(columns, geometry=shapes, crs="EPSG:4326")


def _on_the_map(boxes: NDArray[np.float64], georef: Georef) -> NDArray[np.object_]:
    """The boxes in EPSG:4326; None where there is no place."""
    if not georef.on_earth or not len(boxes):
        return np.full(len(boxes), None, object)
    quads = corners(boxes)
    return polygons(*georef.to_lonlat(quads[..., 0], quads[..., 1]))


def write_parquet(path: Path, frame: gpd.GeoDataFrame) -> None:
    """A GeoParquet file, whole or not at all."""
    with draft(path, failures=(pa.ArrowException,)) as hidden:
        frame.to_parquet(hidden, index=False)


def write_text(path: Path, text: str) -> None:
    """A text file, whole or not at all."""
    with draft(path) as hidden:
        hidden.write_text(text, encoding="utf-8")
