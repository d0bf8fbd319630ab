"""Dynamic tiling of images for a vision-language model: as many square tiles as the image's shape asks for,
and a thumbnail of the whole.

InternVL's way, which BabelRS pretrains with: of all grids of at most `most` tiles the one whose aspect ratio is
nearest to the image's; the image is resized to fill it and cut row by row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from babelrs_geo.errors import ParameterError

Grid = tuple[int, int]
"""Columns and rows."""


@dataclass(frozen=True)
class TileOptions:
    """How images are cut. Defaults are the paper's."""

    size: int = 448
    """Side of a tile in pixels."""
    most: int = 6
    """Most tiles an image, the thumbnail aside; 1 resizes every image to one square."""
    thumbnail: bool = True
    """Add the whole image as one tile where it was cut into several."""

    def __post_init__(self) -> None:
        if self.size < 1 or self.most < 1:
            raise ParameterError(f"tiles of {self.size} px, at most {self.most}; expected both from 1 on")

    def shared_by(self, images: int) -> TileOptions:
        """The options for each image of a record that has several: they share the tiles."""
        return TileOptions(self.size, max(1, self.most // max(1, images)), self.thumbnail)


@cache
def grids(most: int) -> tuple[Grid, ...]:
    """All grids of 1 to `most` tiles, smaller ones first.

    The order among grids of one area plays no part: between two of them always lies a nearer one.
    """
    every = [(cols, rows) for cols in range(1, most + 1) for rows in range(1, most // cols + 1)]
    return tuple(sorted(every, key=lambda grid: (grid[0] * grid[1], grid)))


def choose_grid(width: int, height: int, options: TileOptions | None = None) -> Grid:
    """The grid for an image of `width` x `height` pixels.

    Where several are equally near, a larger one is taken if the image has more than half the pixels of it.
    Raises ParameterError for an image without pixels.
    """
    options = options or TileOptions()
    if width < 1 or height < 1:
        raise ParameterError(f"an image has {width} x {height} pixels; expected at least one each way")
    ratio = width / height
    nearest, best = float("inf"), (1, 1)
    for cols, rows in grids(options.most):
        distance = abs(ratio - cols / rows)
        if distance < nearest:
            nearest, best = distance, (cols, rows)
        elif distance == nearest and width * height > 0.5 * options.size**2 * cols * rows:
            best = (cols, rows)
    return best


def tile_count(width: int, height: int, options: TileOptions | None = None) -> int:
    """How many tiles an image is cut into, its thumbnail included."""
    options = options or TileOptions()
    cols, rows = choose_grid(width, height, options)
    return cols * rows + (options.thumbnail and cols * rows > 1)


def cut(image: NDArray[Any], options: TileOptions | None = None) -> Tensor:
    """An image (3, H, W), uint8 or float32 in [0, 1], as tiles (T, 3, size, size) float32 in [0, 1].

    Resizing is Pillow's bicubic, on 8-bit values as in the original or on floats, clipped to [0, 1].
    Raises ParameterError for another shape or type.
    """
    options = options or TileOptions()
    if image.ndim != 3 or image.shape[0] != 3 or image.dtype not in (np.uint8, np.float32):
        raise ParameterError(
            f"an image to tile is {image.dtype} {image.shape}; expected uint8 or float32 (3, height, width)"
        )
    cols, rows = choose_grid(image.shape[2], image.shape[1], options)
    size = options.size
    whole = _resized(image, size * cols, size * rows)
    tiles = [
        whole[:, y * size : (y + 1) * size, x * size : (x + 1) * size]
        for y in range(rows)
        for x in range(cols)
    ]
    if options.thumbnail and len(tiles) > 1:
        tiles.append(_resized(image, size, size))
    return torch.from_numpy(np.stack(tiles))


def _resized(image: NDArray[Any], width: int, height: int) -> NDArray[np.float32]:
    from PIL import Image

    if image.dtype == np.uint8:
        picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
        resized = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC), np.float32)
        return resized.transpose(2, 0, 1) / np.float32(255)
    bands = [Image.fromarray(np.ascontiguousarray(band)) for band in image]
    resized = np.stack([np.asarray(b.resize((width, height), Image.Resampling.BICUBIC)) for b in bands])
    return resized.clip(0, 1)
