"""The published fine-tuning pipeline: from a labelled frame to what the full detector was trained on (BabelRS
section 4).

Resize to a long side of 800, flip, turn, normalise, pad right and bottom to a square. Boxes are `cxcywhr` rows
as everywhere; images are (H, W, 3) uint8, RGB. Section 9 of the original's pipelines gives the rules, their
oddities included: rotated boxes keep their angle when an axis is scaled more than the other; a flip moves
centres by a pixel; frames with squares or circles turn by quarter turns only; objects of five pixels or less,
or with their centre outside, are dropped even when nothing is turned.

Interpolation is bilinear in floating point, rounded. The original's library reckons with 1/2048 of a cell when
it resizes and 1/32 when it turns, so pixels differ from its own by rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from babelrs_geo.boxes import Floats, bounds, from_xyxy
from babelrs_geo.errors import ParameterError

Direction = Literal["horizontal", "vertical", "diagonal"]
Image = NDArray[np.uint8]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Published:
    """The pipeline's numbers. Defaults are the original's."""

    size: int = 800
    flips: float = 0.75
    """Share of the rotated frames that are flipped: a third each horizontally, vertically and both ways."""
    horizontal_flip: float = 0.5
    """Share of the SAR frames that are flipped, horizontally."""
    turns: float = 0.5
    """Share of the rotated frames that are turned."""
    quarter_turns_only: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 16, 18)
    """Labels of the shared space that allow quarter turns only: in RGB roundabout and storage-tank."""
    smallest: float = 5.0
    """Rotated objects with a side of so many pixels or less are dropped."""
    flip_shift: float = 1.0
    """Pixels by which the original's flips miss: x becomes W - x - shift. 0 is where objects really are in our
    coordinates, in which the first pixel's outer corner is zero.
    """
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    """What padding is filled with: zero once the detector has normalised, by ImageNet's mean for every sensor."""


def resize(image: Image, boxes: Floats, size: int, oriented: bool) -> tuple[Image, Floats]:
    """Image and boxes scaled to a long side of `size` pixels.

    Oriented boxes keep their angle, and their sides grow by the geometric mean of the axes' factors;
    horizontal ones are cut at the image's edge.
    """
    height, width = image.shape[:2]
    factor = size / max(height, width)
    new_h, new_w = int(height * factor + 0.5), int(width * factor + 0.5)
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1).unsqueeze(0).float()
    scaled = F.interpolate(pixels, size=(new_h, new_w), mode="bilinear", align_corners=False)
    sx, sy = new_w / width, new_h / height
    if oriented:
        moved = boxes * [sx, sy, math.sqrt(sx * sy), math.sqrt(sx * sy), 1]
    else:
        corners = bounds(boxes) * [sx, sy, sx, sy]
        moved = from_xyxy(corners.clip(0, [new_w, new_h, new_w, new_h]))
    return _as_bytes(scaled), moved


def flip(image: Image, boxes: Floats, direction: Direction, shift: float = 0.0) -> tuple[Image, Floats]:
    """Image and boxes mirrored left to right, top to bottom, or both (half a turn)."""
    height, width = image.shape[:2]
    out = boxes.copy()
    if direction in ("horizontal", "diagonal"):
        image, out[:, 0] = image[:, ::-1], width - boxes[:, 0] - shift
    if direction in ("vertical", "diagonal"):
        image, out[:, 1] = image[::-1], height - boxes[:, 1] - shift
    if direction != "diagonal":
        out[:, 4] = -boxes[:, 4]
    return np.ascontiguousarray(image), out


def turn(image: Image, boxes: Floats, degrees: float) -> tuple[Image, Floats]:
    """Image and boxes turned counter-clockwise about the image's centre; the canvas stays, corners are black."""
    height, width = image.shape[:2]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1).unsqueeze(0).float()
    # Where each output pixel looks, as grid_sample counts: -1 to 1 from edge to edge.
    theta = torch.tensor([[cos, -sin * height / width, 0.0], [sin * width / height, cos, 0.0]])
    grid = F.affine_grid(theta.unsqueeze(0), list(pixels.shape), align_corners=False)
    seen = F.grid_sample(pixels, grid, align_corners=False)
    away = boxes[:, :2] - [width / 2, height / 2]
    out = boxes.copy()
    out[:, 0] = width / 2 + cos * away[:, 0] + sin * away[:, 1]
    out[:, 1] = height / 2 - sin * away[:, 0] + cos * away[:, 1]
    out[:, 4] = np.mod(boxes[:, 4] + degrees + 90, 180) - 90
    return _as_bytes(seen), out


def kept(boxes: Floats, size: tuple[int, int], smallest: float) -> NDArray[np.bool_]:
    """Which boxes (N,) stay after turning: centre strictly inside (height, width), both sides over `smallest`."""
    inside = (boxes[:, :2] > 0).all(1) & (boxes[:, 0] < size[1]) & (boxes[:, 1] < size[0])
    return inside & (boxes[:, 2:4] > smallest).all(1)


def pad(image: Image, size: int, mean: Sequence[float]) -> Tensor:
    """Image as (3, size, size) float32 in [0, 1], filled right and bottom with `mean` of 8-bit values."""
    height, width = image.shape[:2]
    if max(height, width) > size:
        raise ParameterError(f"an image of {width} x {height} does not fit {size} pixels; resize it first")
    out = torch.tensor(mean, dtype=torch.float32).view(3, 1, 1).expand(3, size, size).clone()
    out[:, :height, :width] = torch.from_numpy(image.copy()).permute(2, 0, 1).float()
    return out / 255


def prepare(image: Image, options: Published | None = None) -> tuple[Tensor, tuple[int, int]]:
    """A frame as it is tested: resized and padded (3, size, size), and its (height, width) without padding."""
    options = options or Published()
    image, _ = resize(image, np.zeros((0, 5)), options.size, True)
    return pad(image, options.size, options.mean), (image.shape[0], image.shape[1])


def train_sample(
    image: Image,
    boxes: Floats,
    labels: Labels,
    oriented: bool,
    rng: np.random.Generator,
    options: Published | None = None,
) -> tuple[Tensor, Floats, Labels, tuple[int, int]] | None:
    """A frame as it is trained on: image (3, size, size), boxes, labels of the shared space, unpadded size.

    None where an oriented frame has no object left: the caller draws another.
    """
    options = options or Published()
    image, boxes = resize(image, boxes, options.size, oriented)
    if not oriented:
        if rng.random() < options.horizontal_flip:
            image, boxes = flip(image, boxes, "horizontal")
        return pad(image, options.size, options.mean), boxes, labels, (image.shape[0], image.shape[1])
    draw = rng.random()
    if draw < options.flips:
        directions: tuple[Direction, ...] = ("horizontal", "vertical", "diagonal")
        image, boxes = flip(image, boxes, directions[int(draw / options.flips * 3)], options.flip_shift)
    if rng.random() < options.turns:
        quarter = bool(np.isin(labels, options.quarter_turns_only).any())
        angle = float(rng.choice([90, 180, -90, -180])) if quarter else float(rng.uniform(-180, 180))
        image, boxes = turn(image, boxes, angle)
    keep = kept(boxes, (image.shape[0], image.shape[1]), options.smallest)
    if not keep.any():
        return None
    size = (image.shape[0], image.shape[1])
    return pad(image, options.size, options.mean), boxes[keep], labels[keep], size


def _as_bytes(pixels: Tensor) -> Image:
    return pixels[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8).numpy()
