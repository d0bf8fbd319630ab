"""Law 1: inner tiles partition the scene, every outer holds its inner and stays in the scene."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from babelrs_geo.errors import ParameterError
from babelrs_geo.tiling import Grid, Rect, Tile

SIZES = st.integers(1, 400)


@st.composite
def grids(draw):
    tile = draw(st.integers(1, 150))
    return Grid(draw(SIZES), draw(SIZES), tile, draw(st.integers(0, tile - 1)))


@given(grids())
def test_inners_partition_the_scene_and_outers_stay_in_it(grid):
    if len(grid) > 2000:
        return
    owned = np.zeros((grid.height, grid.width), np.int32)
    scene = Rect(0, 0, grid.width, grid.height)
    for i, tile in enumerate(grid):
        assert tile.index == i
        assert tile.outer.contains(tile.inner)
        assert scene.contains(tile.outer)
        assert tile.outer.width == min(grid.tile, grid.width)
        assert tile.outer.height == min(grid.tile, grid.height)
        owned[tile.inner.slices] += 1
    assert (owned == 1).all()


@given(grids(), st.data())
def test_an_object_no_larger_than_the_overlap_is_whole_in_an_outer(grid, data):
    w = data.draw(st.integers(1, min(max(grid.overlap, 1), grid.width)))
    h = data.draw(st.integers(1, min(max(grid.overlap, 1), grid.height)))
    box = Rect(data.draw(st.integers(0, grid.width - w)), data.draw(st.integers(0, grid.height - h)), w, h)
    rows = range(0, len(grid), grid.columns)
    assert any(_within(box.y, box.y1, grid[r].outer.y, grid[r].outer.y1) for r in rows)
    assert any(_within(box.x, box.x1, grid[c].outer.x, grid[c].outer.x1) for c in range(grid.columns))


def _within(low, high, start, stop):
    return start <= low and high <= stop


@given(grids())
def test_neighbours_share_at_least_the_overlap_and_seams_lie_in_its_middle(grid):
    for left, right in zip(range(grid.columns - 1), range(1, grid.columns), strict=True):
        a, b = grid[left], grid[right]
        shared = a.outer.x1 - b.outer.x
        assert shared >= grid.overlap
        assert a.inner.x1 == b.inner.x
        assert abs((a.inner.x1 - b.outer.x) - shared / 2) <= 0.5


def test_a_grid_is_a_sequence_in_row_major_order():
    grid = Grid(1000, 700, 400, 100)
    assert len(grid) == grid.columns * grid.rows == len(list(grid)) == 6
    assert [t.outer.x for t in grid] == [0, 300, 600, 0, 300, 600]
    assert grid[-1] == grid[5]
    assert grid[5].outer == Rect(600, 300, 400, 400)
    with pytest.raises(IndexError):
        grid[6]


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 1000), (640, 640), (639, 1)])
def test_scenes_smaller_than_a_tile_are_one_tile_along_that_axis(width, height):
    grid = Grid(width, height)
    assert grid.columns == 1
    assert grid[0].outer.width == width


def test_a_hundred_thousand_pixels_a_side_cost_nothing_until_asked_for():
    grid = Grid(100_000, 100_000)
    assert grid[len(grid) - 1].inner.x1 == 100_000
    assert pickle.loads(pickle.dumps(grid)) == grid


@pytest.mark.parametrize(
    "wrong",
    [(0, 5, 4, 1), (5, 0, 4, 1), (5, 5, 0, 0), (5, 5, 4, 4), (5, 5, 4, -1), (5, 5, 4.0, 1), (5, 5, 4, None)],
)
def test_numbers_that_make_no_grid_are_refused_in_one_line(wrong):
    with pytest.raises(ParameterError) as caught:
        Grid(*wrong)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("index", "outer", "inner"),
    [
        (-1, Rect(0, 0, 4, 4), Rect(0, 0, 4, 4)),
        (0, Rect(0, 0, 4, 4), Rect(0, 0, 5, 4)),
        (0, Rect(-1, 0, 4, 4), Rect(0, 0, 2, 2)),
        (0, Rect(0, 0, 4, 4), Rect(2, 2, 0, 1)),
    ],
)
def test_an_invalid_tile_cannot_be_built(index, outer, inner):
    with pytest.raises(ParameterError):
        Tile(index, outer, inner)
