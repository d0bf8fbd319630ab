"""Dynamic tiling: the original's grids and pixels, and what holds for any image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from golden import Golden, document, needs_golden
from hypothesis import given, settings
from hypothesis import strategies as st

from babelrs_geo.errors import ParameterError
from babelrs_geo.models.dynamic_tiles import TileOptions, choose_grid, cut, grids, tile_count

SIDES = st.integers(1, 4000)
MOST = st.integers(1, 12)


@pytest.mark.shared
@needs_golden
def test_grids_are_the_originals() -> None:
    told = document("tiling")
    assert set(grids(6)) == {(cols, rows) for cols, rows in told["target_ratios"]}
    for case in told["cases"]:
        assert choose_grid(case["w"], case["h"]) == tuple(case["grid_cols_rows"]), case
        assert tile_count(case["w"], case["h"]) == case["n_tiles_with_thumbnail"]


@pytest.mark.shared
@needs_golden
def test_pixels_of_tiles_are_the_originals() -> None:
    data = Golden("vlm_data")
    image = data["tile_img"].permute(2, 0, 1).numpy()
    tiles = cut(image, TileOptions(size=28))
    assert torch.equal((tiles * 255).round().byte(), data["tile_pngs"].permute(0, 3, 1, 2))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    data.same("tiles", (tiles - mean) / std, data["tile_pixels"])


@given(SIDES, SIDES, MOST)
def test_the_grid_is_the_nearest_there_is(width: int, height: int, most: int) -> None:
    cols, rows = choose_grid(width, height, TileOptions(most=most))
    assert 1 <= cols * rows <= most
    ratio = width / height
    every = [(c, r) for c in range(1, most + 1) for r in range(1, most + 1) if c * r <= most]
    assert abs(ratio - cols / rows) == min(abs(ratio - c / r) for c, r in every)


@given(SIDES, SIDES, MOST, st.integers(16, 600))
def test_of_equal_shapes_the_larger_needs_half_its_pixels(
    width: int, height: int, most: int, size: int
) -> None:
    options = TileOptions(size, most)
    cols, rows = choose_grid(width, height, options)
    same = [g for g in grids(most) if g[0] * rows == g[1] * cols]
    enough = [g for g in same if width * height > 0.5 * size**2 * g[0] * g[1]]
    assert (cols, rows) == max([same[0], *enough], key=lambda g: g[0] * g[1])


def test_half_the_pixels_of_the_larger_grid_is_the_border() -> None:
    assert 633**2 < 0.5 * 4 * 448**2 < 634**2
    assert [choose_grid(side, side) for side in (633, 634)] == [(1, 1), (2, 2)]
    assert [choose_grid(2 * side, side, TileOptions(most=8)) for side in (633, 634)] == [(2, 1), (4, 2)]


@pytest.mark.parametrize("most", range(1, 25))
def test_no_image_lies_between_two_grids_of_one_area(most: int) -> None:
    """Else the order in which grids are tried would decide, which in the original is that of a set."""
    every = grids(most)
    for a in every:
        for b in every:
            if a[0] * a[1] == b[0] * b[1] and a[0] / a[1] < b[0] / b[1]:
                middle = (a[0] / a[1] + b[0] / b[1]) / 2
                distance = middle - a[0] / a[1]
                assert any(abs(middle - c / r) < distance - 1e-9 for c, r in every), (a, b)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 6), st.booleans())
@settings(max_examples=50)
def test_tiles_put_together_are_the_resized_image(
    width: int, height: int, most: int, thumbnail: bool
) -> None:
    from PIL import Image

    options = TileOptions(8, most, thumbnail)
    image = np.random.default_rng(width * 41 + height).integers(0, 256, (3, height, width), dtype=np.uint8)
    tiles = cut(image, options)
    cols, rows = choose_grid(width, height, options)
    many = cols * rows > 1
    assert len(tiles) == tile_count(width, height, options) == cols * rows + (many and thumbnail)
    picture = Image.fromarray(image.transpose(1, 2, 0))

    def resized(w: int, h: int) -> torch.Tensor:
        return torch.from_numpy(np.asarray(picture.resize((w, h), Image.Resampling.BICUBIC)).copy())

    whole = resized(8 * cols, 8 * rows).permute(2, 0, 1)
    together = torch.cat([torch.cat(list(tiles[y * cols : (y + 1) * cols]), 2) for y in range(rows)], 1)
    assert torch.equal((together * 255).round().byte(), whole)
    if many and thumbnail:
        assert torch.equal((tiles[-1] * 255).round().byte(), resized(8, 8).permute(2, 0, 1))


def test_floats_are_resized_as_bytes_are_but_not_rounded() -> None:
    # not so wide that the bytes overshoot: those are clipped on the way; they are rounded after each of two directions
    image = np.random.default_rng(0).integers(80, 180, (3, 30, 50), dtype=np.uint8)
    rounded, fine = cut(image, TileOptions(16)), cut((image / 255).astype(np.float32), TileOptions(16))
    assert fine.dtype == torch.float32 and fine.min() >= 0 and fine.max() <= 1
    assert 0 < (rounded - fine).abs().max() < 1.5 / 255
    exact = np.random.default_rng(0).random((3, 16, 16), np.float32)
    assert torch.equal(cut(exact, TileOptions(16))[0], torch.from_numpy(exact))


def test_a_record_of_several_images_shares_its_tiles() -> None:
    assert [TileOptions().shared_by(n).most for n in (0, 1, 2, 4, 9)] == [6, 6, 3, 1, 1]


def test_what_cannot_be_tiled_is_said() -> None:
    with pytest.raises(ParameterError, match=r"float64 \(3, 4, 4\); expected uint8 or float32"):
        cut(np.zeros((3, 4, 4)))
    with pytest.raises(ParameterError, match=r"uint8 \(4, 4, 3\)"):
        cut(np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(ParameterError, match="0 x 3 pixels"):
        choose_grid(0, 3)
    with pytest.raises(ParameterError, match="at most 0"):
        TileOptions(most=0)
