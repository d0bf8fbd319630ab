"""Tiles to merged detections: nothing depends on threads or luck, and every tile is accounted for."""

from __future__ import annotations

import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simple_scenes import SHIPS, bright_detector, canvas, pictures, rectangles_of

from babelrs_geo.detections import Detections
from babelrs_geo.errors import ParameterError, SceneError
from babelrs_geo.inference import InferenceOptions, Look, run
from babelrs_geo.scenes import Pixels
from babelrs_geo.tiling import Grid


@dataclass
class ArrayScene:
    """A scene in memory, 8-bit, read at scale 1 or by whole factors; its reads can be slow, and can fail."""

    pixels: np.ndarray  # (y, x) uint8
    mask: np.ndarray | None = None  # (y, x) bool
    broken: frozenset[tuple[int, int]] = frozenset()  # upper left corners of windows that cannot be read
    pause: float = 0.0
    name: str = "array"
    reads: list[tuple[int, int, int, int]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def height(self):
        return self.pixels.shape[0]

    @property
    def width(self):
        return self.pixels.shape[1]

    def shape_at(self, scale):
        return max(1, round(self.height * scale)), max(1, round(self.width * scale))

    is_tiled = False
    radiometry = SimpleNamespace(bands=(1, 2, 3), is_exact=False)

    def strip(self, scale):
        return self.width

    def expecting(self, windows, scale):
        return nullcontext()

    def read(self, window, scale=1.0, out=None):
        x, y, w, h = window
        with self.lock:
            self.reads.append(tuple(window))
        time.sleep(self.pause * ((x * 7 + y * 13) % 5) / 5)
        if (x, y) in self.broken:
            raise SceneError(f"block at {x}, {y}\nis damaged")
        mask = np.ones(self.pixels.shape, bool) if self.mask is None else self.mask
        rows = (np.arange(y, y + h) / scale).astype(int)
        columns = (np.arange(x, x + w) / scale).astype(int)
        valid = mask[np.ix_(rows, columns)]
        grey = np.where(valid, self.pixels[np.ix_(rows, columns)], 0).astype(np.float32) / 255
        return Pixels(np.stack([grey] * 3), valid)


def scene_of(width=100, height=100, ships=SHIPS, **more):
    return ArrayScene(canvas(width, height, ships), **more)


def grid_of(scene, tile=48, overlap=16, scale=1.0):
    height, width = scene.shape_at(scale)
    return Grid(width, height, tile, overlap)


def nothing(images):
    return [Detections.empty(("ship",), False) for _ in images]


@settings(max_examples=60)
@given(pictures(), st.integers(1, 5), st.integers(1, 3))
def test_every_object_no_larger_than_the_overlap_is_reported_once(picture, batch, readers):
    width, height, tile, overlap, ships = picture
    scene = scene_of(width, height, ships)
    options = InferenceOptions(batch=batch, readers=readers)
    found, coverage = run(scene, bright_detector, grid_of(scene, tile, overlap), options=options)
    assert rectangles_of(found) == sorted(tuple(map(float, ship)) for ship in ships)
    assert coverage.looked_at == len(coverage)


def test_content_and_batches_are_the_same_whatever_the_readers_and_the_order_they_finish_in():
    def watched(seen):
        def detector(images):
            seen.append(images.copy())
            return bright_detector(images)

        return detector

    outcomes = []
    for readers, ahead, pause in ((1, 1, 0.0), (1, 8, 0.0), (4, 8, 0.01), (8, 3, 0.01)):
        scene = scene_of(pause=pause)
        seen = []
        options = InferenceOptions(batch=3, readers=readers, ahead=ahead)
        outcomes.append((*run(scene, watched(seen), grid_of(scene), options=options), np.concatenate(seen)))
        assert len(seen) == -(-len(outcomes[-1][1]) // 3)
    first, ground, images = outcomes[0]
    assert len(first) == len(SHIPS)
    assert len(images) == len(ground)
    for found, coverage, seen in outcomes[1:]:
        np.testing.assert_array_equal(found.boxes, first.boxes)
        np.testing.assert_array_equal(found.scores, first.scores)
        np.testing.assert_array_equal(seen, images)
        assert coverage.states == ground.states


def test_several_detectors_compute_batches_in_turn_and_the_order_they_finish_in_does_not_matter():
    turns = []

    def named(name, pause):
        def detector(images):
            time.sleep(pause)
            turns.append(name)
            return bright_detector(images)

        return detector

    scene = scene_of()
    grid = grid_of(scene)
    alone, _ = run(scene, bright_detector, grid, options=InferenceOptions(batch=2))
    found, _ = run(scene, [named("slow", 0.02), named("fast", 0.0)], grid, options=InferenceOptions(batch=2))
    np.testing.assert_array_equal(found.boxes, alone.boxes)
    batches = -(-len(grid) // 2)
    assert turns.count("slow") == -(-batches // 2) and turns.count("fast") == batches // 2


@settings(max_examples=40)
@given(pictures(), st.data())
def test_every_tile_is_accounted_for_once_and_the_inners_partition_the_scene(picture, data):
    width, height, tile, overlap, ships = picture
    mask = np.ones((height, width), bool)
    mask[: data.draw(st.integers(0, height // 2)), :] = False
    scene = scene_of(width, height, ships, mask=mask)
    grid = grid_of(scene, tile, overlap)
    corners = [tuple(t.outer[:2]) for t in grid]
    scene.broken = data.draw(st.frozensets(st.sampled_from(corners), max_size=len(corners) - 1))
    told = []
    try:
        found, coverage = run(
            scene,
            bright_detector,
            grid,
            options=InferenceOptions(batch=2),
            progress=lambda *p: told.append(p),
        )
    except SceneError as error:  # what could be read had no valid pixel
        assert "could be read" in str(error)
        return
    painted = np.zeros((height, width), int)
    for (x, y, w, h), t, state, reason in zip(
        coverage.inners, grid, coverage.states, coverage.reasons, strict=True
    ):
        painted[y : y + h, x : x + w] += 1
        assert (state == "failed") == (tuple(t.outer[:2]) in scene.broken)
        assert bool(reason) == (state == "failed") and "\n" not in reason
        if state != "failed":
            assert (state == "invalid") == (not mask[t.outer.slices].any())
        centres = found.boxes[:, :2]
        inside = ((centres >= (x, y)) & (centres < (x + w, y + h))).all(1)
        if state in ("detected", "empty"):
            assert (state == "detected") == inside.any()
    assert (painted == 1).all()
    assert sum(coverage.counts().values()) == len(coverage) == len(grid)
    assert told[-1] == (len(grid), len(grid)) and told == sorted(set(told))
    assert sorted(scene.reads) == sorted(tuple(t.outer) for t in grid)


def test_a_tile_that_cannot_be_read_does_not_change_what_the_others_are_computed_with():
    def slots(broken):
        seen = []

        def detector(images):
            seen.append(images.copy())
            return nothing(images)

        scene = scene_of(broken=broken)
        run(scene, detector, grid_of(scene), options=InferenceOptions(batch=4))
        return np.concatenate(seen)

    whole, holed = slots(frozenset()), slots(frozenset({(32, 0)}))
    assert not holed[1].any() and whole[1].any()
    np.testing.assert_array_equal(np.delete(holed, 1, 0), np.delete(whole, 1, 0))


def test_only_valid_tiles_are_computed_and_those_of_a_group_are_packed():
    mask = np.zeros((700, 700), bool)
    mask[90:, 90:600] = True
    scene = scene_of(700, 700, mask=mask)
    sizes = []

    def detector(images):
        sizes.append(len(images))
        return nothing(images)

    grid = grid_of(scene)
    _, coverage = run(scene, detector, grid, options=InferenceOptions(batch=4))
    valid = [mask[t.outer.slices].any() for t in grid]
    assert coverage.looked_at == sum(valid) == sum(sizes) < len(grid)
    groups = Look(scene, grid, options=InferenceOptions(batch=4)).groups(np.ones(len(grid), bool))
    assert {len(group.tiles) for group in groups} == {len(grid) // 4 // 32 * 4, len(groups[-1].tiles)}
    packed = [divmod(sum(valid[i] for i in group.tiles), 4) for group in groups]
    assert sizes == [n for whole, rest in packed for n in [4] * whole + [rest] * int(rest > 0)]


def test_what_is_centred_outside_its_tile_or_on_invalid_pixels_is_dropped():
    def everywhere(images):
        boxes = np.array([[5.5, 5.5, 4, 4, 0], [25.5, 5.5, 4, 4, 0], [5.5, 45.5, 4, 4, 0], [-3, 5, 4, 4, 0]])
        one = Detections(boxes, np.ones(4, np.float32), np.zeros(4, np.int64), ("ship",), False)
        return [one] * len(images)

    mask = np.ones((40, 40), bool)
    mask[:, 25] = False
    scene = scene_of(40, 40, [], mask=mask)
    found, _ = run(scene, everywhere, grid_of(scene))
    np.testing.assert_allclose(found.boxes, [[5.5, 5.5, 4, 4, 0]])


@pytest.mark.parametrize(("height", "width"), [(40, 30), (100, 1), (1, 1), (60, 200)])
def test_small_and_thin_scenes_are_read_as_they_are(height, width):
    shapes = []

    def detector(images):
        shapes.append(images.shape)
        return nothing(images)

    scene = scene_of(width, height, [])
    _, coverage = run(scene, detector, Grid(width, height, 48, 16), options=InferenceOptions(batch=2))
    assert {shape[1:] for shape in shapes} == {(3, min(height, 48), min(width, 48))}
    assert max(n for n, *_ in shapes) <= 2 and sum(n for n, *_ in shapes) == len(coverage)
    assert coverage.counts()["empty"] == len(coverage)


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_boxes_come_back_in_scene_pixels_at_any_scale(scale):
    ships = [(8, 12, 10, 6), (60, 40, 6, 12), (70, 80, 8, 8)]
    scene = scene_of(100, 100, ships)
    found, coverage = run(scene, bright_detector, grid_of(scene, scale=scale), scale)
    np.testing.assert_allclose(rectangles_of(found), ships, atol=1e-9)
    assert coverage.inners[:, 2:].prod(1).sum() == 100 * 100


@settings(max_examples=20)
@given(pictures(), st.floats(0.2, 3.0))
def test_inners_partition_the_scene_at_any_scale(picture, scale):
    width, height, tile, overlap, _ = picture
    scene = scene_of(width, height, [])
    _, coverage = run(scene, nothing, grid_of(scene, tile, overlap, scale), scale)
    painted = np.zeros((height, width), int)
    for x, y, w, h in coverage.inners:
        painted[y : y + h, x : x + w] += 1
    assert (painted == 1).all()


class LeftHalf:
    """An area of interest: the scene's columns below 40."""

    def touches(self, rects):
        return rects[:, 0] < 40

    def holds(self, px, py):
        return px < 40


def test_an_area_limits_the_tiles_read_and_the_detections_kept():
    scene = scene_of()
    grid = grid_of(scene)
    told = []
    found, coverage = run(scene, bright_detector, grid, area=LeftHalf(), progress=lambda *p: told.append(p))
    assert rectangles_of(found) == sorted(tuple(map(float, s)) for s in SHIPS if s[0] + s[2] / 2 < 40)
    outside = [t for t, state in zip(grid, coverage.states, strict=True) if state == "outside"]
    assert outside and all(t.inner.x >= 40 for t in outside)
    assert told[-1] == (len(scene.reads), len(grid) - len(outside))


def test_memory_is_bounded_reads_never_run_further_ahead_than_asked():
    scene = scene_of(300, 300, [])
    computed = 0
    worst = 0

    def slow(images):
        nonlocal computed, worst
        time.sleep(0.002)
        worst = max(worst, len(scene.reads) - computed)
        computed += len(images)
        return nothing(images)

    options = InferenceOptions(batch=2, readers=3, ahead=4)
    _, coverage = run(scene, slow, grid_of(scene), options=options)
    assert len(coverage) > 60
    # Read and waiting (4), in the batch being packed and the one in hand (2 + 2), and in two under way (2 x
    # 2).
    assert worst <= 4 + 2 + 2 + 4


def test_reading_goes_on_while_the_detector_computes():
    scene = scene_of(300, 300, [])
    options = InferenceOptions(batch=2, readers=1, ahead=4)
    seen = []

    def slow(images):
        ahead = len(seen) * 2 + 2 + options.ahead  # what is in hand, and as many tiles more as may wait
        until = time.monotonic() + 10
        while len(scene.reads) < min(ahead, 20) and time.monotonic() < until:
            time.sleep(0.001)
        seen.append(len(scene.reads) >= min(ahead, 20))
        return nothing(images)

    run(scene, slow, grid_of(scene), options=options)
    assert all(seen)


def test_nothing_readable_is_an_error_that_tells_why():
    scene = scene_of()
    grid = grid_of(scene)
    scene.broken = frozenset(tuple(t.outer[:2]) for t in grid)
    with pytest.raises(SceneError, match=r"none of the 9 tiles .* block at 0, 0 is damaged; .*check it"):
        run(scene, nothing, grid)


def test_nothing_valid_is_served_as_invalid_coverage():
    scene = scene_of(mask=np.zeros((100, 100), bool))
    found, coverage = run(scene, nothing, grid_of(scene))
    assert len(found) == 0 and coverage.looked_at == 0
    assert set(coverage.states) == {"invalid"}


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_becomes_advice(error):
    def hungry(images):
        raise error

    with pytest.raises(
        ParameterError, match="out of memory with a batch of 4 tiles of 48 px: pass a smaller"
    ):
        run(scene := scene_of(), hungry, grid_of(scene))


def test_other_faults_of_a_detector_and_interruptions_pass_through_and_leave_no_thread():
    for error in (RuntimeError("shapes do not match"), KeyboardInterrupt()):

        def broken(images, error=error):
            raise error

        scene = scene_of(400, 400, [], pause=0.02)
        with pytest.raises(type(error)):
            run(scene, broken, grid_of(scene), options=InferenceOptions(ahead=100))
        assert len(scene.reads) < 60  # what was queued is not read any more
    assert not [t for t in threading.enumerate() if t.name.startswith("babelrs-geo")]


def test_wrong_numbers_are_refused():
    scene = scene_of()
    with pytest.raises(ValueError, match="1 results for 4 images"):
        run(scene, lambda images: nothing(images[:1]), grid_of(scene))
    with pytest.raises(ParameterError, match="grid spans 50 x 50 px"):
        run(scene, nothing, Grid(50, 50))
    for name in ("batch", "readers", "ahead"):
        with pytest.raises(ParameterError, match=f"{name} is 0"):
            InferenceOptions(**{name: 0})


def test_the_time_of_a_tile_is_measured_on_a_full_batch():
    scene = scene_of()
    shapes = []

    def detector(images):
        shapes.append(images.shape)
        return nothing(images)

    assert Look(scene, grid_of(scene), options=InferenceOptions(batch=4)).seconds_per_tile(detector) > 0
    assert shapes == [(4, 3, 48, 48)] * 2
