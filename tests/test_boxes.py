"""Box maths against shapely, the official module's numbers, and its own algebra."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from babelrs_geo import boxes
from babelrs_geo.errors import ParameterError

GOLDEN = Path(os.environ.get("BABELRS_GEO_SHARED", Path(__file__).parents[2] / "shared")) / "golden"


def random_boxes(seed: int, n: int, place: float = 0.0, thin: float = 0.5) -> np.ndarray:
    r = np.random.default_rng(seed)
    return np.column_stack(
        [place + r.uniform(0, 60, (n, 2)), r.uniform(thin, 40, (n, 2)), r.uniform(-400, 400, n)]
    )


def shapely_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Both moved to the first one's centre: shapely itself loses digits far from the origin.

    With a grid its overlay holds (snap rounding); without, some half-turned twins share nothing.
    """
    a, b = a.copy(), b.copy()
    b[:, :2] -= a[:, :2]
    a[:, :2] = 0
    p, q = shapely.polygons(boxes.corners(a)), shapely.polygons(boxes.corners(b))
    inter = shapely.area(shapely.intersection(p, q, grid_size=1e-11))
    return inter / (shapely.area(p) + shapely.area(q) - inter)


pairs = st.tuples(
    st.integers(0, 2**32 - 1), st.sampled_from([0.0, 1e3, 1e5]), st.sampled_from([0.01, 0.5, 10.0])
)


@given(pairs)
@settings(max_examples=30)
def test_iou_equals_shapely_on_random_pairs(drawn):
    seed, place, thin = drawn
    a, b = random_boxes(seed, 100, place, thin), random_boxes(seed + 1, 100, place, thin)
    np.testing.assert_allclose(boxes.rotated_iou_pairs(a, b), shapely_iou(a, b), atol=1e-6)


@given(pairs, st.sampled_from([0.0, 1e-9, 1e-7, 1e-6, 1e-5]), st.sampled_from([0, 180, -180, 360, 540]))
@settings(max_examples=40)
def test_iou_of_coincident_and_almost_coincident_boxes(drawn, move, turn):
    seed, place, thin = drawn
    a = random_boxes(seed, 100, place, max(thin, 0.5))
    b = a + np.random.default_rng(seed).normal(0, 1, a.shape) * move
    b[:, 4] += turn
    iou = boxes.rotated_iou_pairs(a, b)
    np.testing.assert_allclose(iou, shapely_iou(a, b), atol=1e-6)
    assert iou.min() > 1 - 1e-3
    if move == 0:
        assert iou.min() > 1 - 1e-9
    swapped = a[:, [0, 1, 3, 2, 4]] + [0, 0, 0, 0, 90]
    assert boxes.rotated_iou_pairs(a, swapped).min() > 1 - 1e-9


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20)
def test_iou_of_touching_boxes_and_slivers(seed):
    a = random_boxes(seed, 60, 1e4)
    cos, sin = np.cos(np.deg2rad(a[:, 4])), np.sin(np.deg2rad(a[:, 4]))
    beside = a.copy()
    beside[:, :2] += np.stack([cos, -sin], 1) * a[:, 2:3]
    assert boxes.rotated_iou_pairs(a, beside).max() < 1e-9
    thin = a.copy()
    thin[:, 3] = 1e-3
    other = thin + np.random.default_rng(seed).normal(0, 1e-4, a.shape)
    np.testing.assert_allclose(boxes.rotated_iou_pairs(thin, other), shapely_iou(thin, other), atol=1e-6)
    np.testing.assert_allclose(boxes.rotated_iou_pairs(thin, a), shapely_iou(thin, a), atol=1e-6)


def test_empty_boxes_have_no_overlap():
    a = np.array(
        [[5, 5, 0, 10, 30], [5, 5, 10, 0, 0], [5, 5, 0, 0, 45], [5, 5, -4, 6, 0], [5, 5, -4, -6, 0.0]]
    )
    assert boxes.areas(a).tolist() == [0] * 5
    assert not boxes.rotated_iou(a, np.vstack([a, [[5, 5, 20, 20, 10]]])).any()


def test_matrix_and_pairs_agree_and_are_symmetric():
    a, b = random_boxes(1, 40), random_boxes(2, 30)
    matrix = boxes.rotated_iou(a, b)
    assert matrix.shape == (40, 30)
    np.testing.assert_array_equal(np.diag(matrix), boxes.rotated_iou_pairs(a[:30], b))
    np.testing.assert_allclose(matrix, boxes.rotated_iou(b, a).T, atol=1e-12)
    shared_area = boxes.intersection_pairs(a[:30], b)
    np.testing.assert_allclose(
        boxes.rotated_iou_pairs(a[:30], b), shared_area / (boxes.areas(a[:30]) + boxes.areas(b) - shared_area)
    )
    assert boxes.rotated_iou([], b).shape == (0, 30)


def test_wrong_shapes_are_told():
    with pytest.raises(ValueError, match=r"\(2, 4\); expected \(N, 5\)"):
        boxes.bounds(np.zeros((2, 4)))
    with pytest.raises(ValueError, match="3 and 2 boxes do not pair up"):
        boxes.rotated_iou_pairs(np.ones((3, 5)), np.ones((2, 5)))
    with pytest.raises(ValueError, match=r"expected \(N, 4, 2\)"):
        boxes.from_corners(np.zeros((2, 8)))


def test_a_positive_angle_turns_the_width_up_the_screen():
    box = np.array([[100.0, 50.0, 40.0, 10.0, 90.0], [100.0, 50.0, 40.0, 10.0, 30.0]])
    upright = boxes.corners(box[:1])[0]
    np.testing.assert_array_equal(upright, [[95, 70], [95, 30], [105, 30], [105, 70]])
    first, second = boxes.corners(box[1:])[0, :2]
    assert second[0] > first[0] and second[1] < first[1]
    np.testing.assert_allclose(boxes.bounds(box[:1]), [[95, 30, 105, 70]], atol=0)


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 1e5]))
@settings(max_examples=30)
def test_conversions_come_back(seed, place):
    a = random_boxes(seed, 50, place)
    corner = boxes.corners(a)
    back = boxes.from_corners(corner)
    np.testing.assert_allclose(back[:, :4], a[:, :4], atol=1e-8)
    np.testing.assert_allclose(np.cos(np.deg2rad(2 * (back[:, 4] - a[:, 4]))), 1, atol=1e-9)
    any_order = corner[:, np.random.default_rng(seed).permutation(4)]
    assert boxes.rotated_iou_pairs(boxes.from_corners(any_order), a).min() > 1 - 1e-6
    le90 = boxes.to_le90(a)
    assert (
        (le90[:, 2] >= le90[:, 3]).all()
        and (le90[:, 4] >= -np.pi / 2).all()
        and (le90[:, 4] < np.pi / 2).all()
    )
    assert boxes.rotated_iou_pairs(boxes.from_le90(le90), a).min() > 1 - 1e-9
    np.testing.assert_allclose(boxes.bounds(a), np.column_stack([corner.min(1), corner.max(1)]), atol=1e-8)
    upright = np.array([[3.0, 4.0, 10.0, 20.0]])
    np.testing.assert_array_equal(boxes.bounds(boxes.from_xyxy(upright)), upright)


def test_quadrilaterals_get_the_smallest_rectangle():
    quads = np.random.default_rng(3).uniform(0, 100, (300, 4, 2))
    found = boxes.areas(boxes.from_corners(quads))
    best = shapely.area(shapely.minimum_rotated_rectangle(shapely.multipoints(quads)))
    assert (found <= best * (1 + 1e-9)).all()
    covered = shapely.covers(
        shapely.buffer(shapely.polygons(boxes.corners(boxes.from_corners(quads))), 1e-6)[:, None],
        shapely.points(quads),
    )
    assert covered.all()
    line = np.array([[[0, 0], [3, 4], [6, 8], [9, 12]], [[7, 7], [7, 7], [7, 7], [7, 7]]], float)
    np.testing.assert_allclose(boxes.from_corners(line)[:, 2:4], [[15, 0], [0, 0]], atol=1e-12)


def test_clip_is_the_rectangle_of_what_is_seen():
    a = random_boxes(5, 300)
    extent = (10.0, 12.0, 45.0, 40.0)
    seen = boxes.clip(a, extent)
    visible = shapely.intersection(shapely.polygons(boxes.corners(a)), shapely.box(*extent))
    np.testing.assert_allclose(boxes.areas(seen), shapely.area(shapely.oriented_envelope(visible)), atol=1e-6)
    inside = shapely.area(visible) > boxes.areas(a) - 1e-9
    assert inside.any() and (seen[inside] == a[inside]).all()
    flat = np.array([[10, 20, 30, 8, 0], [10, 20, 8, 30, 90], [50, 50, 4, 4, 0], [45, 20, 10, 6, 180.0]])
    np.testing.assert_allclose(
        boxes.clip(flat, extent),
        [[17.5, 20, 15, 8, 0], [14.5 + 3, 20, 8, 15, 90], [50, 50, 0, 0, 0], [42.5, 20, 5, 6, 180]],
    )


def test_areas_within_equal_shapely():
    r = np.random.default_rng(9)
    a, b = random_boxes(1, 300), random_boxes(2, 300)
    low = r.uniform(0, 40, (300, 2))
    extents = np.column_stack([low, low + r.uniform(0, 40, (300, 2))])
    p, q, e = shapely.polygons(boxes.corners(a)), shapely.polygons(boxes.corners(b)), shapely.box(*extents.T)
    pe, qe = shapely.intersection(p, e), shapely.intersection(q, e)
    true = np.column_stack([shapely.area(pe), shapely.area(qe), shapely.area(shapely.intersection(pe, qe))])
    np.testing.assert_allclose(boxes.areas_within(a, b, extents), true, atol=1e-9)
    seen = shapely.area(shapely.polygons(boxes.outlines(a, extents)))
    np.testing.assert_allclose(seen, true[:, 0], atol=1e-9)
    np.testing.assert_array_equal(boxes.clip(a[:5], extents[:5])[2], boxes.clip(a[2:3], extents[2])[0])
    with pytest.raises(ParameterError, match="do not pair up"):
        boxes.areas_within(a, b, extents[:3])


ONE_KERNEL = """
import numpy, babelrs_geo.boxes
square = numpy.array([[0, 2, 2, 0.0], [0, 0, 2, 2]])
kernel = babelrs_geo.boxes._area
print(kernel(square, 4), sum(kernel.stats.cache_hits.values()))
"""


def package_without_cache(folder: Path) -> Path:
    """A copy of the package where no kernel can be kept, whoever runs it: a file is where their folder would be."""
    package = folder / "babelrs_geo"
    source = Path(boxes.__file__).parent
    package.mkdir()
    (package / "__init__.py").write_text("")
    for name in ("errors.py", "kernels.py", "boxes.py"):
        (package / name).write_bytes((source / name).read_bytes())
    (package / "__pycache__").write_text("")
    return folder


def start(folder: Path, **places: Path) -> subprocess.Popen[str]:
    """The kernel in a process of its own, with these folders for temporary files and the user."""
    quiet = {k: v for k, v in os.environ.items() if not k.startswith(("NUMBA_", "XDG_"))}
    where = {"HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null"} | {k: str(v) for k, v in places.items()}
    command = [sys.executable, "-c", ONE_KERNEL]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command,
        stdout=pipe,
        stderr=pipe,
        text=True,
        cwd=folder,
        env=quiet | where | {"PYTHONPATH": str(folder)},
    )


def hits(process: subprocess.Popen[str]) -> int:
    """How many kernels came from disk; what was computed was right."""
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    value, found = out.split()
    assert float(value) == 4.0
    return int(found)


@pytest.mark.slow
def test_compiled_kernels_are_kept_where_the_package_is_read_only_and_many_start_at_once(tmp_path):
    folder = package_without_cache(tmp_path)
    home = tmp_path / "cache"
    at_once = [start(folder, XDG_CACHE_HOME=home, HOME=home) for _ in range(4)]
    assert all(hits(process) in (0, 1) for process in at_once)
    assert list(home.rglob("*._area-*.nbc"))
    assert hits(start(folder, XDG_CACHE_HOME=home, HOME=home)) == 1
    # no home, no cache folder: among the temporary files, if nobody else may write there
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    assert hits(start(folder, TMPDIR=temporary)) == 0
    assert hits(start(folder, TMPDIR=temporary)) == 1
    (kept,) = temporary.iterdir()
    assert kept.stat().st_mode & 0o777 == 0o700
    kept.chmod(0o777)
    assert hits(start(folder, TMPDIR=temporary)) == 0


@pytest.mark.shared
@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the official module's numbers (shared/golden) are not here")
def test_official_numbers():
    z = np.load(GOLDEN / "rotated_iou_nms.npz")
    a, b = boxes.from_le90(z["b1"]), boxes.from_le90(z["b2"])
    np.testing.assert_allclose(boxes.rotated_iou(a, b), z["iou"], atol=2e-6)
    np.testing.assert_allclose(boxes.rotated_iou_pairs(a[:70], b[:70]), z["iou_aligned70"], atol=2e-6)
    z = np.load(GOLDEN / "coders.npz")
    official = boxes.from_le90(z["obb"])
    np.testing.assert_allclose(boxes.corners(official).reshape(-1, 8), z["obb2poly"], atol=1e-4)
    np.testing.assert_allclose(boxes.bounds(official), z["obb2xyxy"], atol=1e-4)
    kept = np.setdiff1d(np.arange(len(z["quads"])), z["quad_none_idx"])
    ours = boxes.from_corners(z["quads"][kept].reshape(-1, 4, 2))
    # a triangle has the same smallest area along each of its sides: areas are unique, rectangles are not
    np.testing.assert_allclose(boxes.areas(ours), boxes.areas(z["quad2obb_cv2"][kept]), rtol=1e-5)
