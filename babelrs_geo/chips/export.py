"""Chips for other tools: pictures as the model sees them, 8-bit PNG, with labels as COCO JSON or DOTA text."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.errors import NotGeoreferencedWarning
from rasterio.session import DummySession

from babelrs_geo.boxes import bounds, corners
from babelrs_geo.chips.tables import open_chip, read_index, read_labels, write_text
from babelrs_geo.drafts import draft
from babelrs_geo.errors import ParameterError

KINDS = ("coco", "dota")


def export(folder: str | os.PathLike[str], kind: str) -> list[Path]:
    """Write the chips of a folder in another layout beside its own, and give what was written.

    Pictures: `png/<sensor>/<split>/<chip>.png`, the model's input times 255, rounded; grey where the sensor has one
    band. `coco`: `coco_<sensor>_<split>.json`, horizontal bounds clipped to the chip, and the corners of oriented
    boxes as segmentation. `dota`: `dota/<sensor>/<split>/<chip>.txt`, corners and class, difficult 1 for boxes that are
    cut. What is there already is kept or replaced by the same.

    Raises LabelError where the folder holds no chips, ParameterError for another kind, OutputError where a file
    cannot be written.
    """
    if kind not in KINDS:
        raise ParameterError(f"export to {kind!r} was asked; expected one of {', '.join(KINDS)}")
    root = Path(folder)
    index, labels = read_index(root), read_labels(root)
    found = dict(iter(labels.groupby("chip", sort=False)))
    classes = sorted(labels["class"].unique())
    written: list[Path] = []
    for (sensor, split), rows in index.groupby(["sensor", "split"], sort=True):
        chips = [(row, found.get(row.chip, labels[:0])) for row in rows.itertuples()]
        for row, _ in chips:
            path = root / "png" / sensor / split / f"{row.chip}.png"
            if not path.exists():
                write_picture(root, path, row)
        if kind == "coco":
            path = root / f"coco_{sensor}_{split}.json"
            write_text(path, json.dumps(_coco(chips, classes, f"png/{sensor}/{split}")))
            written.append(path)
        else:
            place = root / "dota" / sensor / split
            place.mkdir(parents=True, exist_ok=True)
            for row, objects in chips:
                write_text(place / f"{row.chip}.txt", _dota(objects))
            written.append(place)
    return written


def write_picture(root: Path, path: Path, row: Any) -> None:
    """A chip as the model sees it, in 8 bits: a PNG at `path` of the chip that is `row` of the index of `root`.

    It is the model's input times 255, rounded, by the radiometry that the index holds. Raises SceneError where the
    chip is missing or damaged, OutputError where the picture cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_chip(root, row._asdict()) as chip:
        image = np.rint(chip.read((0, 0, chip.width, chip.height)).image * 255.0).astype(np.uint8)
    planes: NDArray[np.uint8] = image if row.sensor == "rgb" else image[:1]
    with (
        draft(path, failures=(rasterio.errors.RasterioError,)) as hidden,
        warnings.catch_warnings(),
        rasterio.Env(session=DummySession(), GDAL_PAM_ENABLED=False),
    ):
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        count, height, width = planes.shape
        with rasterio.open(
            hidden, "w", driver="PNG", count=count, height=height, width=width, dtype="uint8"
        ) as file:
            file.write(planes)


def _coco(chips: list[tuple[Any, gpd.GeoDataFrame]], classes: list[str], place: str) -> dict[str, Any]:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (row, objects) in enumerate(chips, 1):
        images.append(
            {"id": number, "file_name": f"{place}/{row.chip}.png", "width": row.width, "height": row.height}
        )
        boxes = objects[["cx", "cy", "w", "h", "r"]].to_numpy(np.float64)
        edges, quads = bounds(boxes), corners(boxes)
        edges = np.clip(edges, 0, [row.width, row.height, row.width, row.height])
        for each, (x0, y0, x1, y1), quad in zip(objects.itertuples(), edges, quads, strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": classes.index(each[2]) + 1,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": each.w * each.h * (1 - each.truncated),
                    "iscrowd": 0,
                    "truncated": each.truncated,
                    "segmentation": [quad.ravel().tolist()] if each.oriented else [],
                }
            )
    categories = [{"id": i, "name": name} for i, name in enumerate(classes, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _dota(objects: gpd.GeoDataFrame) -> str:
    quads = corners(objects[["cx", "cy", "w", "h", "r"]].to_numpy(np.float64)).reshape(-1, 8)
    lines = [
        " ".join(f"{v:.3f}" for v in quad) + f" {name.replace(' ', '-')} {int(cut > 0)}"
        for quad, name, cut in zip(quads, objects["class"], objects["truncated"], strict=True)
    ]
    return "".join(line + "\n" for line in lines)
