"""Reader for DroneVehicle as its authors publish it: XML, and frames with a white border of 100 px.

    train/trainimg  train/trainlabel     colour: frames, XML of the same name
    train/trainimgr train/trainlabelr    infrared, the same; val and test likewise

Boxes come in pixels of the frame without its border (840 x 712 becomes 640 x 512). What the labels call freight car
is spelt in several ways, as are others: they are one class here. Objects named `*`, whose class nobody knows, and
those given as a point are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from babelrs_geo.boxes import bounds, from_corners
from babelrs_geo.datasets.soi import Record
from babelrs_geo.errors import LabelError

CLASSES = ("CAR", "BUS", "FERIGHT_CAR", "TRUCK", "VAN")
"""As SOI-Det spells them, in its order."""

BORDER = 100
"""Pixels of white on each side of a published frame."""

_SPELT = {"FREIGHT_CAR": "FERIGHT_CAR", "FERIGHT": "FERIGHT_CAR", "FREIGHT": "FERIGHT_CAR", "TRUVK": "TRUCK"}
_THINNEST = 2.0  # pixels, as for DOTA's


def read_dronevehicle(
    root: Path, split: str, sensor: str = "ir", classes: Sequence[str] = CLASSES, border: int = BORDER
) -> list[Record]:
    """Records of one sensor (`ir` or `rgb`) and split (`train`, `val`, `test`), sorted by file name.

    `classes` may be spelt in lower case too. Raises LabelError for a missing folder, a class outside `classes`, a
    frame that is not there, or XML that cannot be read.
    """
    if sensor not in ("ir", "rgb"):
        raise LabelError(f"sensor {sensor!r} is not in DroneVehicle; expected ir or rgb")
    end = "r" if sensor == "ir" else ""
    images, labels = Path(root, split, f"{split}img{end}"), Path(root, split, f"{split}label{end}")
    if not labels.is_dir():
        raise LabelError(
            f"{labels} is missing; expected DroneVehicle's XML labels of the {split} split there"
        )
    place = {_name(name): i for i, name in enumerate(classes)}
    by_stem = {path.stem: path for path in images.glob("*")}
    return [_record(path, by_stem, sensor, place, border) for path in sorted(labels.glob("*.xml"))]


def _record(path: Path, images: dict[str, Path], sensor: str, classes: dict[str, int], border: int) -> Record:
    if path.stem not in images:
        raise LabelError(f"{path} has no image; expected {path.stem}.jpg beside the other frames")
    try:
        root = ElementTree.parse(path).getroot()
        width, height = (float(root.findtext(f"size/{side}") or "nan") for side in ("width", "height"))
        quads, labels, dropped = [], [], 0
        for item in root.iter("object"):
            quad, name = _corners(item), _name(item.findtext("name") or "")
            if quad is None or name == "*":
                dropped += 1
                continue
            if name not in classes:
                raise LabelError(
                    f"{path} has class {item.findtext('name')!r}; expected one of {', '.join(classes)}"
                )
            quads.append(quad)
            labels.append(classes[name])
    except (ElementTree.ParseError, ValueError, OSError) as error:
        if isinstance(error, LabelError):
            raise
        raise LabelError(f"{path} cannot be read as DroneVehicle's XML ({error})") from error
    boxes = from_corners(np.array(quads).reshape(-1, 4, 2) - border)
    edge = bounds(boxes)
    thick = boxes[:, 2:4].min(1, initial=np.inf) >= _THINNEST
    shown = (edge[:, 2:] > 0).all(1)
    if np.isfinite(width + height):
        shown &= (edge[:, :2] < (width - 2 * border, height - 2 * border)).all(1)
    kept, dropped = thick & shown, dropped + int((shown & ~thick).sum())
    return Record(sensor, images[path.stem], boxes[kept], np.array(labels, np.int64)[kept], border, dropped)


def _corners(item: ElementTree.Element) -> NDArray[np.float64] | None:
    """Corners (4, 2) of an object's polygon or box; None for a point."""
    polygon, box = item.find("polygon"), item.find("bndbox")
    if polygon is not None:
        values = [float(polygon.findtext(f"{axis}{k}") or "nan") for k in (1, 2, 3, 4) for axis in "xy"]
        corners = np.array(values).reshape(4, 2)
    elif box is not None:
        x0, y0, x1, y1 = (float(box.findtext(k) or "nan") for k in ("xmin", "ymin", "xmax", "ymax"))
        corners = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])
    else:
        return None
    if not np.isfinite(corners).all():
        raise ValueError("an object lacks a corner")
    return corners


def _name(text: str) -> str:
    plain = text.strip().upper().replace(" ", "_").replace("-", "_")
    return _SPELT.get(plain, plain)
