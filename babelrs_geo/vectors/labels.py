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

    def on(self, name: str, georef: Georef, *, alone: bool) -> Objects:
        """The objects in the pixels of the scene `name` (without suffix), in the file's order.

        `alone` says that the run has no other scene: labels that name none are then this scene's. Objects that
        cannot be placed are left out; those beyond the scene are not. Raises LabelError where labels and scene do
        not go together (one has a CRS, the other none; several scenes without a place and no column `scene`).
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
        shapes = frame.geometry.to_numpy()
        points, owner = shapely.get_coordinates(shapes, return_index=True)
        x, y = points[:, 0], points[:, 1]
        if georef.crs is not None and frame.crs != georef.crs and len(points):
            x, y = pyproj.Transformer.from_crs(frame.crs, georef.crs, always_xy=True).transform(x, y)
        px, py = georef.to_pixel(x, y) if len(points) else (x, y)
        placed = np.stack([px, py], 1)
        each = np.split(placed, np.flatnonzero(np.diff(owner)) + 1) if len(placed) else []
        # a ring of four corners comes without its closing point; all others through their hulls
        each = [p[:4] if len(p) == 5 else p for p in each]
        kept = np.array([bool(np.isfinite(p).all()) for p in each], bool)
        classes = frame["class"].to_numpy(object)
        oriented = np.ones(len(frame), bool)
        kind: Kind = self.kind
        if kind == "auto" and "box" in frame:
            oriented, kind = (frame["box"] != "horizontal").to_numpy(bool), "oriented"
        chosen = [p for p, ok in zip(each, kept, strict=True) if ok]
        return _objects(chosen, list(classes[kept]), oriented[kept], kind, guess=kind == "auto")


def read_labels(path: str | os.PathLike[str], class_column: str = "class", kind: Kind = "auto") -> Labels:
    """Labels of a vector file (`labels.gpkg|layername=ships` for one layer of several), a COCO JSON, a DOTA text
    or a folder of such.

    `kind` says what the boxes shall be; `auto` takes COCO's as horizontal and DOTA's as oriented, a vector file's as
    its column `box` says, else as horizontal where all of them lie upright in the scene's pixels.

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
    boxes = _rectangles(points)
    if kind == "horizontal":
        oriented = np.zeros(len(boxes), bool)
    upright = from_xyxy([[*p.min(0), *p.max(0)] for p in points]) if points else np.zeros((0, 5))
    if guess and len(boxes):
        oriented = np.full(len(boxes), max(_off_upright(b) for b in boxes) > _UPRIGHT_PX)
    boxes = np.where(oriented[:, None], boxes, upright)
    real = (boxes[:, 2] > 0) & (boxes[:, 3] > 0)
    return Objects(boxes, np.array([str(c) for c in classes], object), oriented)[real]


def _off_upright(box: Floats) -> float:
    """How far, in pixels, the corners of a box lie from those of its upright bounds."""
    (x0, y0, x1, y1), quad = bounds(box[None])[0], corners(box[None])[0]
    across = np.minimum(np.abs(quad[:, 0] - x0), np.abs(quad[:, 0] - x1))
    down = np.minimum(np.abs(quad[:, 1] - y0), np.abs(quad[:, 1] - y1))
    return float(max(across.max(), down.max()))


def _rectangles(points: list[Floats]) -> Floats:
    """The smallest rectangle (N, 5) around each set of points (K, 2)."""
    boxes = np.zeros((len(points), 5))
    hulls = [p if len(p) == 4 else _hull(p) for p in points]
    for size in {len(h) for h in hulls}:
        rows = [i for i, h in enumerate(hulls) if len(h) == size]
        together = np.stack([hulls[i] for i in rows])
        lines = tuple((k, (k + 1) % size) for k in range(size))
        boxes[rows] = from_corners(together) if size == 4 else smallest_rectangles(together, lines)
    return boxes


def _hull(points: Floats) -> Floats:
    """Corners of the convex hull, at least three (repeated where there are fewer)."""
    found: Floats = shapely.get_coordinates(shapely.convex_hull(shapely.multipoints(points)))
    found = found[:-1] if len(found) > 3 else found
    return np.concatenate([found, np.repeat(found[-1:], max(0, 3 - len(found)), 0)])


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
