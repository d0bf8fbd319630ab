"""Reader for SOI-Det's folder layout: SAR as COCO JSON, RGB and infrared as DOTA text (BabelRS section 4).

Both spellings of the layout are read: images as `.png` or `.jpg`, infrared under `png_images` or `images`,
splits named train, val or test as each folder has them.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from babelrs_geo.boxes import from_corners, from_xyxy
from babelrs_geo.errors import LabelError, SceneError

FOLDERS = {"sar": "SARDet_50K", "rgb": "DOTA_800pix", "ir": "DroneVehicle"}
"""The sensors' folders under a SOI-Det folder."""


@dataclass(frozen=True)
class Record:
    """One labelled image of a benchmark."""

    sensor: str
    path: Path
    boxes: NDArray[np.float64]
    """(N, 5) cxcywhr in pixels of the image."""
    labels: NDArray[np.int64]
    """(N,) indices into the sensor's own classes."""
    border: int = 0
    """Pixels of white border around the image in the file, which are no part of the image."""
    dropped: int = 0
    """Objects that are labelled, but not well enough to be here: crowds, those to ignore, and the thinnest."""


def frame_pixels(record: Record, mode: str = "RGB") -> NDArray[np.uint8]:
    """Bytes (h, w, 3) of a record's image without its border, (h, w) for the mode `L`.

    Raises SceneError for an image that cannot be read, or whose numbers are not bytes: Pillow would cut those off.
    """
    try:
        with Image.open(record.path) as image:
            if image.mode == "F" or image.mode.startswith("I"):
                raise SceneError(
                    f"{record.path} has numbers of more than 8 bits (mode {image.mode}), and a frame has bytes; "
                    "stretch it to them (gdal_translate -ot Byte -scale), or read it as a scene by SceneDataset"
                )
            array = np.array(image.convert(mode), dtype=np.uint8)
    except SceneError:
        raise
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        cause = " ".join(str(error).split())
        raise SceneError(f"{record.path} cannot be read as an image ({cause}); copy it again") from error
    edge = record.border
    return array[edge : array.shape[0] - edge, edge : array.shape[1] - edge]


def read_split(root: Path, sensor: str, split: str, classes: Sequence[str]) -> list[Record]:
    """Records of one sensor's split under a SOI-Det folder, sorted by file name.

    Images without objects are kept: they are background. Raises LabelError for a missing folder, a broken file, a
    class outside `classes`, or an image that is not there.
    """
    source = _annotations(root, sensor, split)
    if sensor == "sar":
        return _coco(source, classes)
    return _dota(source, ("images", "png_images"), sensor, classes)


def class_names(root: Path, sensor: str, split: str) -> tuple[str, ...]:
    """The classes that a split's objects have, sorted. Raises LabelError for a missing folder or a broken file."""
    source = _annotations(root, sensor, split)
    if sensor == "sar":
        with _as_coco(source) as document:
            used = {item["category_id"] for item in document["annotations"]}
            return tuple(sorted(c["name"] for c in document["categories"] if c["id"] in used))
    return tuple(sorted({name for path in source.glob("*.txt") for _, name in _rows(path)}))


def _annotations(root: Path, sensor: str, split: str) -> Path:
    """The COCO file (SAR) or the folder of DOTA texts of a split."""
    if sensor not in FOLDERS:
        raise LabelError(f"sensor {sensor!r} has no folder in SOI-Det; expected sar, rgb or ir")
    if sensor == "sar":
        path = root / FOLDERS[sensor] / "Annotations" / f"after_merge_{split}.json"
        if not path.is_file():
            raise LabelError(f"{path} is missing; expected the COCO annotations of the {split} split there")
        return path
    path = root / FOLDERS[sensor] / (split if sensor == "rgb" else f"dota_{split}") / "annfiles"
    if not path.is_dir():
        raise LabelError(f"{path} is missing; expected a folder of DOTA text files there")
    return path


@contextmanager
def _as_coco(path: Path) -> Iterator[Any]:
    """A file of COCO annotations; whatever shows in the block that it is none is a LabelError."""
    try:
        yield json.loads(path.read_text(encoding="utf-8"))
    except LabelError:
        raise
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise LabelError(
            f"{path} cannot be read as COCO's annotations ({type(error).__name__}: {error}); get a whole copy"
        ) from error


def _coco(path: Path, classes: Sequence[str]) -> list[Record]:
    folder = path.parents[1]
    with _as_coco(path) as document:
        names = {c["id"]: c["name"] for c in document["categories"]}
        found: dict[int, tuple[list[list[float]], list[int]]] = {
            im["id"]: ([], []) for im in document["images"]
        }
        dropped: Counter[int] = Counter()
        for item in document["annotations"]:
            x, y, w, h = item["bbox"]
            if item.get("iscrowd") or item.get("ignore") or w < 1 or h < 1:
                dropped[item["image_id"]] += 1
                continue
            boxes, labels = found[item["image_id"]]
            boxes.append([x, y, x + w, y + h])
            labels.append(_index(names[item["category_id"]], classes, path))
        records = []
        for image in sorted(document["images"], key=lambda im: im["file_name"]):
            boxes, labels = found[image["id"]]
            file = _existing(folder / "JPEGImages" / image["file_name"], path)
            rows = from_xyxy(np.array(boxes, np.float64).reshape(-1, 4))
            records.append(
                Record("sar", file, rows, np.array(labels, np.int64), dropped=dropped[image["id"]])
            )
        return records


def _dota(annotations: Path, images: Sequence[str], sensor: str, classes: Sequence[str]) -> list[Record]:
    folder = annotations.parent
    by_stem = {p.stem: p for name in images for p in (folder / name).glob("*")}
    records = []
    for path in sorted(annotations.glob("*.txt")):
        if path.stem not in by_stem:
            raise LabelError(f"{path} has no image; expected {path.stem}.png or .jpg in {folder / images[0]}")
        rows = _rows(path)
        quads = np.array([corners for corners, _ in rows]).reshape(-1, 4, 2)
        labels = np.array([_index(name, classes, path) for _, name in rows], np.int64)
        boxes = from_corners(quads)
        thick = boxes[:, 2:4].min(1, initial=np.inf) >= 2
        thin = int((~thick).sum())
        records.append(Record(sensor, by_stem[path.stem], boxes[thick], labels[thick], dropped=thin))
    return records


def _rows(path: Path) -> list[tuple[list[float], str]]:
    """Corners and class of each object of a DOTA text, whose header is left out. Raises LabelError."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        words = line.split()
        if not words or words[0].partition(":")[0] in ("imagesource", "gsd"):
            continue
        try:
            rows.append(([float(v) for v in words[:8]], words[8]))
        except (ValueError, IndexError):
            raise LabelError(
                f"{path} has the row {line.strip()!r}; expected x and y of four corners, and a class"
            ) from None
    return rows


def _index(name: str, classes: Sequence[str], path: Path) -> int:
    try:
        return list(classes).index(name)
    except ValueError:
        raise LabelError(f"{path} has class {name!r}; expected one of {', '.join(classes)}") from None


def _existing(path: Path, source: Path) -> Path:
    if path.is_file():
        return path
    other = path.with_suffix(".png" if path.suffix == ".jpg" else ".jpg")
    if other.is_file():
        return other
    raise LabelError(f"{path} is missing; {source} names it")


def content(record: Record) -> bytes:
    """A record's image file and boxes as bytes: what tells data apart."""
    return record.path.read_bytes() + record.boxes.tobytes() + record.labels.tobytes()


def fingerprint(records: Sequence[Record]) -> str:
    """SHA-256 of the records' image bytes and boxes: which data some weights were trained on."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(content(record))
    return digest.hexdigest()
