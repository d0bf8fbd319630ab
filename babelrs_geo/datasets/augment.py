"""From a labelled image to a training crop: one affine map, one resampling, boxes carried along."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from babelrs_geo.boxes import areas, clip, corners, from_corners, from_xyxy, intersection_pairs
from babelrs_geo.datasets.soi import Record, frame_pixels
from babelrs_geo.datasets.transforms import check_cut


@dataclass(frozen=True)
class Augment:
    """How crops are drawn. Scales are output pixels an input pixel. Raises ParameterError for numbers out of range."""

    size: int = 384
    scale: tuple[float, float] = (0.7, 1.4)
    turn: bool = True
    """Any rotation in half of the crops; quarter turns and flips always. Not of SAR, whose horizontal boxes would
    become loose bounds.
    """
    gamma: float = 0.25
    contrast: float = 0.2
    visible: float = 0.4
    """A box cut by the crop's edge is kept, clipped, from this visible share on."""
    smallest: float = 4.0
    """Boxes with a shorter long side, in output pixels, are dropped."""
    border: float = 0.0
    """Share of crops that end at a scene's border: beyond a random line, which cuts no box, all is zero, as for
    invalid pixels.
    """
    seam: float = 0.0
    """Share of crops in which another image begins at a random row or column: what lies beside an object then says
    nothing of it, as where frames lie beside each other in a mosaic or a tile's edge cuts a scene elsewhere.
    """

    def __post_init__(self) -> None:
        check_cut("crops", self.size, self.scale, self.visible)


def load_image(record: Record) -> Tensor:
    """Image of a record as (3, H, W) float32 in [0, 1]; grey is repeated. Raises SceneError as `frame_pixels`."""
    return torch.from_numpy(frame_pixels(record)).permute(2, 0, 1).float() / 255


View = tuple[Tensor, NDArray[np.float64], NDArray[np.int64]]
"""An image (3, size, size) with boxes (n, 5) cxcywhr and labels (n,)."""
Part = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels."""


def augment(
    image: Tensor,
    record: Record,
    options: Augment,
    rng: np.random.Generator,
    other: Callable[[np.random.Generator], tuple[Tensor, Record]] | None = None,
) -> View:
    """A random crop (3, size, size) with its boxes (n, 5) cxcywhr and labels (n,).

    `other` draws the image beyond a seam; without it there are none.
    """
    crop, boxes, labels = _view(image, record, options, rng)
    part: Part = (0, 0, options.size, options.size)
    beyond: Part | None = None
    if other is not None and options.seam and rng.random() < options.seam:
        part, beyond = _halves(options.size, rng)
    seen, shown = _seen(boxes, part, options)
    if options.border and rng.random() < options.border:
        shown &= _end_at_border(crop, corners(boxes), shown, rng)
    seen, labels = seen[shown], labels[shown]
    if other is not None and beyond is not None:
        pixels, boxes, more = _view(*other(rng), options, rng)
        left, top, right, bottom = beyond
        crop[:, top:bottom, left:right] = pixels[:, top:bottom, left:right]
        clipped, shown = _seen(boxes, beyond, options)
        seen, labels = np.concatenate([seen, clipped[shown]]), np.concatenate([labels, more[shown]])
    return crop, seen, labels


def _halves(size: int, rng: np.random.Generator) -> tuple[Part, Part]:
    """A square in two at a random row or column, in random order."""
    line = int(rng.integers(size // 8, size - size // 8))
    halves: tuple[Part, Part] = ((0, 0, line, size), (line, 0, size, size))
    if rng.random() < 0.5:
        halves = ((0, 0, size, line), (0, line, size, size))
    return halves if rng.random() < 0.5 else halves[::-1]


def _seen(
    boxes: NDArray[np.float64], part: Part, options: Augment
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Boxes clipped to a part of the crop, and which of them show enough."""
    seen = clip(boxes, part)
    window = from_xyxy(np.tile(np.array([part], np.float64), (len(boxes), 1)))
    keep = intersection_pairs(boxes, window) >= options.visible * areas(boxes) * (1 - 1e-9)
    keep &= seen[:, 2:4].max(1, initial=0) >= options.smallest
    keep &= seen[:, 2:4].min(1, initial=np.inf) >= 1
    return seen, keep


def _view(image: Tensor, record: Record, options: Augment, rng: np.random.Generator) -> View:
    """A crop with all boxes of the image, those beyond its edges too.

    It is centred near a random object three times in four, so that rare objects are seen.
    """
    height, width = image.shape[1:]
    size = options.size
    scale = math.exp(rng.uniform(math.log(options.scale[0]), math.log(options.scale[1])))
    angle = math.radians(90 * int(rng.integers(4)))
    if options.turn and record.sensor != "sar" and rng.random() < 0.5:
        angle += rng.uniform(-math.pi / 4, math.pi / 4)
    flip = -1.0 if rng.random() < 0.5 else 1.0
    if len(record.boxes) and rng.random() < 0.75:
        focus = record.boxes[rng.integers(len(record.boxes)), :2]
    else:
        focus = rng.uniform((0, 0), (width, height))
    reach = size / scale * 0.4
    centre = np.asarray(focus + rng.uniform(-reach, reach, 2), np.float64)
    # Keep the view over the image where the image is larger than the view.
    margin = np.minimum(np.array([width, height]) / 2, size / scale / 2)
    centre = np.clip(centre, margin, np.array([width, height]) - margin)

    # Output pixel o looks at input pixel centre + inverse @ (o - size / 2).
    cos, sin = math.cos(angle), math.sin(angle)
    forward = scale * np.array([[cos * flip, -sin], [sin * flip, cos]])
    inverse = np.asarray(np.linalg.inv(forward), np.float64)
    crop = _sample(image, inverse, centre, size)

    quads = (corners(record.boxes) - centre) @ forward.T + size / 2
    boxes = from_corners(quads)
    if record.sensor == "sar":
        low, high = quads.min(1), quads.max(1)
        boxes = np.column_stack([(low + high) / 2, high - low, np.zeros(len(quads))])
    return _tone(crop, options, rng), boxes, record.labels


def _sample(image: Tensor, inverse: NDArray[np.float64], centre: NDArray[np.float64], size: int) -> Tensor:
    height, width = image.shape[1:]
    half = torch.tensor([width / 2, height / 2])
    linear = torch.from_numpy(inverse).float() * (size / 2) / half.unsqueeze(1)
    offset = torch.from_numpy(centre).float() / half - 1
    theta = torch.cat([linear, offset.unsqueeze(1)], 1).unsqueeze(0)
    grid = F.affine_grid(theta, [1, 3, size, size], align_corners=False)
    return F.grid_sample(image.unsqueeze(0), grid, align_corners=False)[0]


def _end_at_border(
    crop: Tensor, quads: NDArray[np.float64], there: NDArray[np.bool_], rng: np.random.Generator
) -> NDArray[np.bool_]:
    """Blank a square crop beyond a random line; which boxes (n,) lie before it. `quads` (n, 4, 2) are the corners of
    all boxes that show in the crop; the line is moved outwards until it cuts none of those that are `there`.
    """
    size = crop.shape[1]
    angle = rng.uniform(0, 2 * math.pi)
    normal = np.array([math.cos(angle), math.sin(angle)])
    low, high = ((quads - size / 2) @ normal).min(1), ((quads - size / 2) @ normal).max(1)
    line = rng.uniform(-0.3, 0.5) * size
    while (cut := there & (low < line) & (high > line)).any():
        line = high[cut].max()
    axis = np.arange(size) + 0.5 - size / 2
    beyond = axis[None, :] * normal[0] + axis[:, None] * normal[1] > line
    crop[:, torch.from_numpy(beyond)] = 0
    return high <= line


def _tone(crop: Tensor, options: Augment, rng: np.random.Generator) -> Tensor:
    """Random gamma, contrast and brightness; zero stays zero, as it does for invalid pixels."""
    gamma = math.exp(rng.uniform(-options.gamma, options.gamma))
    gain = math.exp(rng.uniform(-options.contrast, options.contrast))
    return (crop.clamp(0, 1) ** gamma * gain).clamp(0, 1)
