"""Reader for Airbus's sample of annotated aircraft: large RGB images, and one CSV of upright polygons."""

from __future__ import annotations

import ast
import csv
from collections import defaultdict
from pathlib import Path

import numpy as np

from babelrs_geo.boxes import from_xyxy
from babelrs_geo.datasets.soi import Record
from babelrs_geo.errors import LabelError

CLASS = "plane"
"""What all objects are: whole aircraft and those cut by the image's edge alike."""
GSD = 0.5
"""Metres a pixel, as the source states."""


def read_airbus(folder: Path) -> list[Record]:
    """Records of the images that `annotations.csv` names, sorted by name; labels are 0, for `CLASS`.

    Raises LabelError where the file or an image is missing, or a row is none of its rows.
    """
    path, found = folder / "annotations.csv", defaultdict(list)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                corners = np.asarray(ast.literal_eval(row["geometry"]), np.float64)
                found[row["image_id"]].append([*corners.min(axis=0), *corners.max(axis=0)])
    except (OSError, KeyError, ValueError, SyntaxError) as error:
        raise LabelError(
            f"{path} cannot be read as annotations ({error}); expected columns image_id and geometry"
        ) from error
    for name in found:
        if not (folder / name).is_file():
            raise LabelError(f"{folder / name} is missing; {path} names it")
    return [
        Record("rgb", folder / name, from_xyxy(np.array(boxes)), np.zeros(len(boxes), np.int64))
        for name, boxes in sorted(found.items())
    ]
