"""Labels in: objects of any vector file, of DOTA text and of COCO JSON, as boxes in the pixels of a scene.

* **vector file**: any format GDAL reads, and GeoParquet; polygons in map coordinates in any CRS, or in pixels (y down)
  where neither the file nor the scene has a CRS;
* **DOTA text**: a `.txt`, or a folder of them named as the scenes; `x1 y1 ... x4 y4 class difficult` in pixels;
* **COCO JSON**: a `.json` with `images` and `annotations`; `bbox`, or `segmentation`, in pixels of the image that bears
  the scene's name.

A polygon becomes the smallest rectangle around it in the scene's pixels; one with four corners keeps its first side
as the width, so that a box comes back as it was written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import geopandas as gpd
import numpy as np
import pyarrow as pa
import pyogrio
import pyproj
import shapely
from numpy.typing import NDArray

from babelrs_geo.boxes import bounds, corners, from_corners, from_xyxy, smallest_rectangles
from babelrs_geo.errors import LabelError
from babelrs_geo.georef import Georef

Floats = NDArray[np.float64]
Kind = Literal["auto", "oriented", "horizontal"]

_UPRIGHT_PX = 0.5  # a rectangle this near to its upright bounds is one: another CRS turns boxes by a little


@dataclass(frozen=True, eq=False)
class Objects:
    """N labelled objects in the pixels of one scene."""

    boxes: Floats
    """(N, 5) `cx, cy, w, h, r`: pixels, and degrees counter-clockwise on the image."""
    classes: NDArray[np.object_]
    """(N,) names."""
    oriented: NDArray[np.bool_]
    """(N,) False for horizontal boxes, whose r is 0."""

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, rows: Any) -> Objects:
        """The rows that a mask, an array of positions or a slice selects."""
        return Objects(self.boxes[rows], self.classes[rows], self.oriented[rows])

    @classmethod
    def empty(cls) -> Objects:
        """No objects."""
        return cls(np.zeros((0, 5)), np.zeros(0, object), np.zeros(0, bool))

    @classmethod
    def concatenate(cls, parts: Sequence[Objects]) -> Objects:
        """All objects, in order."""
        every = [cls.empty(), *parts]
        return cls(
            *(np.concatenate([getattr(p, k) for p in every]) for k in ("boxes", "classes", "oriented"))
        )


@dataclass(frozen=True, eq=False)
class Labels:
    """What a labels file holds, not yet on a scene. Made by `read_labels`."""

    path: str
    kind: Kind
    frame: gpd.GeoDataFrame | None = None
    """Vector files: columns `class` and geometry, and `box` and `scene` where the file has them."""
    images: dict[str, list[tuple[Floats, str, bool]]] = field(default_factory=dict)
    """Files of pixels: by image (name without suffix), corners (K, 2), class, and whether oriented."""

    @property
    def named(self) -> set[str]:
        """Names (without suffix) of the scenes that labels in pixels say they are of; empty for those on the ground."""
        if self.frame is None:
            return set(self.images)
        if self.frame.crs is not None or "scene" not in self.frame:
            return set()
        return {Path(str(v)).stem for v in self.frame["scene"]}

    def on(self, name: str, georef: Georef, *, alone: bool) -> Objects:
        """The objects in the pixels of the scene `name` (without suffix), in the file's order.

        `alone` says that the run has no other scene: labels that name none are then this scene's. Objects that
        cannot be placed are left out, and of a vector file those that miss the scene. Raises LabelError where
        labels and scene do not go together (one has a CRS, the other none, or none that leads to it; several scenes
        without a place and no column `scene`).
        """
        if self.frame is None:
            found = self.images.get(name)
            if found is None and alone and len(self.images) == 1:
                found = next(iter(self.images.values()))
            points = [p for p, _, _ in found or []]
            classes, oriented = [c for _, c, _ in found or []], [o for _, _, o in found or []]
            return _objects(points, classes, np.array(oriented, bool), "auto")
        frame = self.frame
        if (frame.crs is None) != (georef.crs is None):
            lacking = (
                "the labels have no CRS" if frame.crs is None else f"the labels have a CRS, scene {name} none"
            )
            raise LabelError(
                f"{self.path}: {lacking}, so they cannot be placed on scene {name}: assign the missing CRS "
                "(ogr2ogr -a_srs, gdal_edit.py -a_srs)"
            )
        if georef.kind == "none" and not alone:
            if "scene" not in frame:
                raise LabelError(
                    f"{self.path} lies in pixels but does not say of which scene: add a column scene, or tile "
                    "one scene a run"
                )
            frame = frame[[Path(str(v)).stem == name for v in frame["scene"]]]
        return self._placed(frame, georef)

    def _placed(self, frame: gpd.GeoDataFrame, georef: Georef) -> Objects:
        points, owner = shapely.get_coordinates(frame.geometry.to_numpy(), return_index=True)
        if not len(points):
            return Objects.empty()
        x, y = points[:, 0], points[:, 1]
        if georef.crs is not None and frame.crs != georef.crs:
            x, y = self._to_map(frame.crs, georef.crs).transform(x, y)
        placed = np.stack(georef.to_pixel(x, y), 1)
        first = np.flatnonzero(np.diff(owner, prepend=-1))
        low, high = np.minimum.reduceat(placed, first), np.maximum.reduceat(placed, first)
        kept = np.isfinite(low + high).all(1)
        if georef.size is not None:
            corner = np.array(georef.origin)
            kept &= (high >= -corner).all(1) & (low <= np.array(georef.size) - corner).all(1)
        rows, last = np.flatnonzero(kept), np.append(first[1:], len(placed))
        each = [placed[i:j] for i, j in zip(first[rows], last[rows], strict=True)]
        # a ring of four corners comes without its closing point; all others through their hulls
        each = [p[:4] if len(p) == 5 else p for p in each]
        oriented = np.ones(len(rows), bool)
        kind: Kind = self.kind
        if kind == "auto" and "box" in frame:
            oriented, kind = (frame["box"] != "horizontal").to_numpy(bool)[rows], "oriented"
        return _objects(
            each, list(frame["class"].to_numpy(object)[rows]), oriented, kind, guess=kind == "auto"
        )

    def _to_map(self, source: pyproj.CRS, target: pyproj.CRS) -> pyproj.Transformer:
        try:
            return pyproj.Transformer.from_crs(source, target, always_xy=True)
        except pyproj.exceptions.ProjError as error:
            raise LabelError(
                f"{self.path}: no transformation leads from {source.name} to the scene's {target.name}: pass labels "
                "in the scene's CRS"
            ) from error


def read_labels(path: str | os.PathLike[str], class_column: str = "class", kind: Kind = "auto") -> Labels:
    """Labels of a vector file (`labels.gpkg|layername=ships` for one layer of several), a COCO JSON, a DOTA text
    or a folder of such.

    `kind` says what the boxes shall be; `auto` takes COCO's as horizontal and DOTA's as oriented, a vector file's as
    its column `box` says, else as horizontal where all that are on the scene lie upright in its pixels.

    Raises LabelError where the file cannot be read, lacks the class column, or holds anything but polygons.
    """
    text = os.fspath(path)
    file = Path(text)
    if file.is_dir() or text.lower().endswith(".txt"):
        return Labels(text, kind, images=_dota(file, kind))
    if text.lower().endswith(".json") and (document := _coco_document(file)) is not None:
        return Labels(text, kind, images=_coco(document, text, kind))
    return Labels(text, kind, frame=_vectors(text, class_column))


def _objects(
    points: list[Floats], classes: list[str], oriented: NDArray[np.bool_], kind: Kind, *, guess: bool = False
) -> Objects:
    """Smallest rectangles around point sets (K, 2) each; those without extent are left out."""
    if not points:
        return Objects.empty()
    boxes = _rectangles(points)
    every, first = np.concatenate(points), np.cumsum([0, *map(len, points[:-1])])
    upright = from_xyxy(
        np.concatenate([np.minimum.reduceat(every, first), np.maximum.reduceat(every, first)], 1)
    )
    if kind == "horizontal":
        oriented = np.zeros(len(boxes), bool)
    if guess:
        oriented = np.full(len(boxes), _off_upright(boxes).max() > _UPRIGHT_PX)
    boxes = np.where(oriented[:, None], boxes, upright)
    real = (boxes[:, 2] > 0) & (boxes[:, 3] > 0)
    return Objects(boxes, np.array([str(c) for c in classes], object), oriented)[real]


def _off_upright(boxes: Floats) -> Floats:
    """How far, in pixels, the corners of boxes (N, 5) lie from those of their upright bounds."""
    around, quads = bounds(boxes), corners(boxes)
    away = np.minimum(np.abs(quads - around[:, None, :2]), np.abs(quads - around[:, None, 2:]))
    furthest: Floats = away.max((1, 2))
    return furthest


def _rectangles(points: list[Floats]) -> Floats:
    """The smallest rectangle (N, 5) around each set of points (K, 2)."""
    boxes = np.zeros((len(points), 5))
    four = np.array([len(p) == 4 for p in points], bool)
    if four.any():
        boxes[four] = from_corners(np.stack([p for p in points if len(p) == 4]))
    rest = np.flatnonzero(~four)
    if not len(rest):
        return boxes
    set_of = np.repeat(np.arange(len(rest)), [len(points[i]) for i in rest])
    sets = shapely.multipoints(np.concatenate([points[i] for i in rest]), indices=set_of)
    hulls, hull_of = shapely.get_coordinates(shapely.convex_hull(sets), return_index=True)
    count = np.bincount(hull_of)
    first = np.cumsum(count) - count
    count = np.where(count > 3, count - 1, count)  # without the closing point
    sides = np.maximum(count, 3)  # a hull without extent repeats its last corner
    for size in np.unique(sides).tolist():
        alike = np.flatnonzero(sides == size)
        together = hulls[first[alike, None] + np.minimum(np.arange(size), count[alike, None] - 1)]
        lines = tuple((k, (k + 1) % size) for k in range(size))
        boxes[rest[alike]] = from_corners(together) if size == 4 else smallest_rectangles(together, lines)
    return boxes


def _vectors(text: str, class_column: str) -> gpd.GeoDataFrame:
    name, _, layer = text.partition("|layername=")
    if not Path(name).exists() and "://" not in name and not name.startswith("/vsi"):
        raise LabelError(f"{name} does not exist; check the path of the labels")
    try:
        if name.lower().endswith((".parquet", ".geoparquet")):
            frame = gpd.read_parquet(name)
        else:
            layers = [str(found) for found, kind in pyogrio.list_layers(name) if kind is not None]
            mine = [
                found for found in layers if found != "coverage"
            ]  # what `detect` writes beside its features
            if not layer and len(mine) > 1:
                raise LabelError(
                    f"{name} has {len(mine)} layers ({', '.join(mine[:5])}); choose one: {name}|layername={mine[0]}"
                )
            frame = pyogrio.read_dataframe(name, layer=layer or (mine[0] if mine else None))
    except LabelError:
        raise
    except (OSError, RuntimeError, ValueError, pa.ArrowException) as error:
        raise LabelError(
            f"{name} cannot be read as vectors ({' '.join(str(error).split())}); pass a file of labelled polygons"
        ) from error
    if not isinstance(frame, gpd.GeoDataFrame):
        raise LabelError(f"{name} holds no geometry; labels are polygons with a class column")
    if frame.empty:  # GeoJSON has its columns in its rows
        frame = frame.assign(**{class_column: ""})
    if class_column not in frame:
        others = ", ".join(str(c) for c in frame.columns if c != frame.geometry.name) or "none"
        raise LabelError(
            f"{name} has no column {class_column!r} for the class (it has: {others}); pass --class-column"
        )
    frame = frame[frame.geometry.notna() & ~frame.geometry.is_empty].reset_index(drop=True)
    wrong = sorted(set(frame.geometry.geom_type) - {"Polygon", "MultiPolygon"})
    if wrong:
        raise LabelError(f"{name} holds {', '.join(wrong)}; labels are polygons: buffer or remove the others")
    if frame[class_column].isna().any():
        raise LabelError(
            f"{name} has objects without a class in column {class_column!r}; fill or remove them"
        )
    kept = {"class": frame[class_column].astype(str)}
    kept |= {extra: frame[extra] for extra in ("box", "scene") if extra in frame and extra != class_column}
    return gpd.GeoDataFrame(kept, geometry=shapely.force_2d(frame.geometry.to_numpy()), crs=frame.crs)


def _dota(path: Path, kind: Kind) -> dict[str, list[tuple[Floats, str, bool]]]:
    """Objects of one text or of a folder of them, by the text's name without suffix."""
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise LabelError(f"{path} holds no .txt; a folder of labels holds a DOTA text for each scene")
    found: dict[str, list[tuple[Floats, str, bool]]] = {}
    for file in files:
        rows = found.setdefault(file.stem, [])
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise LabelError(f"{file} cannot be read as DOTA text ({error}); check the file") from error
        for number, line in enumerate(lines, 1):
            words = line.split()
            if not words or words[0].partition(":")[0] in ("imagesource", "gsd"):
                continue
            try:
                quad = np.array([float(v) for v in words[:8]]).reshape(4, 2)
                rows.append((quad, words[8], kind != "horizontal"))
            except (ValueError, IndexError):
                raise LabelError(
                    f"{file}, line {number}: {line.strip()[:60]!r} is no DOTA label; expected x1 y1 x2 y2 x3 y3 "
                    "x4 y4 class difficult"
                ) from None
    return found


def _coco_document(path: Path) -> dict[str, Any] | None:
    """The JSON where it is COCO's; None where it is something else (GeoJSON has the suffix too)."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LabelError(f"{path} cannot be read as JSON ({error}); check the file") from error
    is_coco = isinstance(document, dict) and {"images", "annotations"} <= document.keys()
    return document if is_coco else None


def _coco(document: dict[str, Any], path: str, kind: Kind) -> dict[str, list[tuple[Floats, str, bool]]]:
    """Objects by image name without suffix; crowds and ignored regions are left out."""
    try:
        names = {c["id"]: str(c["name"]) for c in document["categories"]}
        images = {im["id"]: Path(im["file_name"]).stem for im in document["images"]}
        found: dict[str, list[tuple[Floats, str, bool]]] = {stem: [] for stem in images.values()}
        for item in document["annotations"]:
            if item.get("iscrowd") or item.get("ignore"):
                continue
            x, y, w, h = (float(v) for v in item["bbox"])
            points = np.array([[x, y], [x + w, y], [x + w, y + h], [x, y + h]])
            drawn = item.get("segmentation")
            turned = kind == "oriented" and isinstance(drawn, list) and bool(drawn)
            if turned:
                points = np.concatenate([np.array(part, np.float64).reshape(-1, 2) for part in drawn])
            found[images[item["image_id"]]].append((points, names[item["category_id"]], turned))
    except (KeyError, TypeError, ValueError) as error:
        raise LabelError(
            f"{path} is no whole COCO document ({type(error).__name__} {error}); expected images, annotations "
            "with bbox, and categories"
        ) from error
    return found
