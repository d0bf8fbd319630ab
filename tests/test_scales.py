"""Objects larger than a tile: each reported once by all scales together, and none that is small twice."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simple_scenes import (
    BrightHeader,
    BrightWeights,
    as_boxes,
    bright_detector,
    canvas,
    rectangles_of,
    write_scene,
)
from test_inference import ArrayScene

import babelrs_geo as bg
from babelrs_geo.detect import plan_for
from babelrs_geo.detections import Detections
from babelrs_geo.errors import ParameterError, SceneError
from babelrs_geo.inference import InferenceOptions, Look, gather
from babelrs_geo.merging import Seen, merge, merge_scales
from babelrs_geo.scenes import Pixels, open_scene
from babelrs_geo.tiling import Grid

TILE, OVERLAP, SMALL = 64, 32, 16


class Town(ArrayScene):
    """A scene in memory whose coarse pixels are means of those that they cover."""

    def read(self, window, scale=1.0, out=None):
        if scale == 1:
            return super().read(window, scale, out)
        if scale not in self.coarse:
            n = round(1 / scale)
            total = np.pad(self.pixels.astype(np.int64), ((1, n), (1, n))).cumsum(0).cumsum(1)
            means = (total[n:, n:] - total[:-n, n:] - total[n:, :-n] + total[:-n, :-n]) / n**2
            rows, columns = self.shape_at(scale)
            across = (np.arange(columns) * self.width / columns).astype(int)
            down = (np.arange(rows) * self.height / rows).astype(int)
            self.coarse[scale] = means[np.ix_(down, across)] / 255
        x, y, w, h = window
        part = self.coarse[scale][y : y + h, x : x + w].astype(np.float32)
        return Pixels(np.stack([part] * 3), np.ones((h, w), bool))

    @property
    def coarse(self):
        return self.__dict__.setdefault("_coarse", {})


def look_at(scene, scales, tile=TILE, overlap=OVERLAP):
    passes = [(Grid(*reversed(scene.shape_at(s)), tile, overlap), s) for s in scales]
    return Look(scene, *passes[0], InferenceOptions(batch=3), tuple(passes[1:]))


def through(look, detector=bright_detector):
    return gather(look, lambda groups, tick: look.parts([detector], groups, tick))


@st.composite
def towns(draw):
    """A scene's size, a coarser scale, and rectangles 8 px apart: small ones, those up to a tile, and those larger than
    a tile and smaller than one of the coarser scale.
    """
    scale = draw(st.sampled_from([0.5, 0.25]))
    width, height = draw(st.integers(40, 300)), draw(st.integers(40, 300))
    taken, objects = np.zeros((height, width), bool), []
    for _ in range(draw(st.integers(1, 6))):
        least, most = draw(st.sampled_from([(2, SMALL), (SMALL + 1, TILE), (TILE + 1, int(TILE / scale))]))
        w, h = (draw(st.integers(min(least, side), min(most, side))) for side in (width, height))
        x, y = draw(st.integers(0, width - w)), draw(st.integers(0, height - h))
        around = np.s_[max(0, y - 8) : y + h + 8, max(0, x - 8) : x + w + 8]
        if not taken[around].any():
            taken[y : y + h, x : x + w] = True
            objects.append((x, y, w, h))
    return width, height, scale, objects


@settings(max_examples=100)
@given(towns())
def test_large_objects_are_reported_once_and_small_ones_as_without_coarser_scales(town):
    width, height, scale, objects = town
    scene = Town(canvas(width, height, objects))
    found, coverage = through(look_at(scene, (1.0, scale)))
    small = sorted(tuple(map(float, o)) for o in objects if max(o[2:]) <= SMALL)
    assert [one for one in rectangles_of(found) if max(one[2:]) <= SMALL] == small
    large = as_boxes([o for o in objects if max(o[2:]) > SMALL])
    rest = found[found.boxes[:, 2:4].max(1) > SMALL].boxes
    for box in large:  # each has one, that lies where it is but for a coarse pixel on each side
        assert (np.abs(rest[:, :4] - box[:4]).max(1) <= 2 / scale).sum() == 1
    assert len(rest) == len(large)
    assert coverage.looked_at == len(coverage) == len(Grid(width, height, TILE, OVERLAP))


def test_what_no_tile_can_show_is_found_at_a_coarser_scale():
    """By a detector that knows objects by their whole outline alone."""

    def outlined(images):
        every = bright_detector(images)
        side = np.array([[n] for n in images.shape[:1:-1]]).T
        inside = [
            ((d.boxes[:, :2] - d.boxes[:, 2:4] / 2 > 0) & (d.boxes[:, :2] + d.boxes[:, 2:4] / 2 < side))
            for d in every
        ]
        return [d[within.all(1)] for d, within in zip(every, inside, strict=True)]

    scene = Town(canvas(400, 400, [(50, 60, 300, 260), (4, 8, 12, 10)]))
    found = [through(look_at(scene, scales), outlined)[0] for scales in ((1.0,), (1.0, 0.125))]
    assert rectangles_of(found[0]) == [(4, 8, 12, 10)]
    np.testing.assert_allclose(rectangles_of(found[1]), [(4, 8, 12, 10), (50, 60, 300, 260)], atol=8)


def found_of(boxes, scores):
    labels = np.zeros(len(boxes), np.int64)
    return Detections(
        np.array(boxes, float).reshape(-1, 5), np.array(scores, np.float32), labels, ("harbour",), False
    )


def whole(fine, coarse, scale=0.25):
    """What is left of boxes (cx, cy, w, h, score) in fine pixels, of tiles that hold the scene at both scales."""
    side = 4000
    seen = []
    for boxes, share in ((fine, 1.0), (coarse, scale)):
        size = int(side * share)
        rows = [[*(share * v for v in box[:4]), 0.0] for box in boxes]
        outers = np.tile([0, 0, size, size], (len(rows), 1))
        seen.append(Seen(found_of(rows, [b[4] for b in boxes]), outers, (size, size), 640, 128))
    left = merge_scales(seen)
    return sorted(
        (*box[:4].tolist(), round(float(score), 3))
        for box, score in zip(left.boxes, left.scores, strict=True)
    )


def test_who_wins_between_two_scales():
    small, same = (100, 100, 60, 40, 0.6), (104, 100, 60, 40, 0.9)
    assert whole([small], [same]) == [(100, 100, 60, 40, 0.6)]  # what the finer surely holds is its own
    large, off = (1000, 1000, 500, 300, 0.6), (1010, 1000, 500, 300, 0.9)
    assert whole([large], [off]) == [(1000, 1000, 500, 300, 0.9)]  # the finer place, the better score
    part, harbour = (1000, 1000, 200, 200, 0.9), (1100, 1000, 1200, 700, 0.4)
    assert whole([part], [harbour]) == [
        (1100, 1000, 1200, 700, 0.4)
    ]  # no tile could hold it: the inner one is a part
    two, blurred = [(300, 300, 200, 90, 0.8), (300, 420, 200, 90, 0.7)], (300, 360, 220, 210, 0.5)
    assert whole(two, [blurred]) == sorted(two)  # a tile would hold it: the better score stays
    assert whole([], [harbour]) == [harbour] and whole([part], []) == [part]


@settings(max_examples=60)
@given(st.integers(0, 2**32))
def test_neither_order_nor_a_second_scale_without_boxes_matters(seed):
    draw = np.random.default_rng(seed)
    seen = []
    for size in (400, 100):
        n = draw.integers(0, 9)
        corner = draw.integers(0, 2, (n, 2)) * (size - 64)
        boxes = np.column_stack(
            [corner + draw.uniform(0, 64, (n, 2)), draw.uniform(1, 60, (n, 2)), np.zeros(n)]
        )
        outers = np.column_stack([corner, np.full((n, 2), 64)])
        seen.append(Seen(found_of(boxes, draw.integers(0, 4, n) / 4), outers, (size, size), 64, 16))
    mixed = [
        s._replace(found=s.found[p], outers=s.outers[p])
        for s in seen
        for p in [draw.permutation(len(s.found))]
    ]
    one, other = merge_scales(seen), merge_scales(mixed)
    np.testing.assert_array_equal(one.boxes, other.boxes)
    np.testing.assert_array_equal(one.scores, other.scores)
    empty = seen[1]._replace(found=seen[1].found[:0], outers=seen[1].outers[:0])
    alone = merge(seen[0].found, seen[0].outers, seen[0].shape)
    np.testing.assert_array_equal(merge_scales([seen[0], empty]).boxes, alone.boxes)


def test_ground_that_a_coarser_pass_could_not_read_has_failed():
    scene = Town(canvas(500, 500, [(5, 5, 9, 9)]))
    look = look_at(scene, (1.0, 0.25))
    read, broken = scene.read, look.coarser[0][0][3].outer

    def failing(window, scale=1.0, out=None):
        if scale < 1 and tuple(window) == tuple(broken):
            raise SceneError("damaged")
        return read(window, scale, out)

    scene.read = failing
    _, coverage = through(look)
    told = {reason for reason in coverage.reasons if reason}
    assert told == {"read coarser, at scale 0.25: damaged"}
    x, y, w, h = (4 * v for v in look.coarser[0][0][3].inner)
    for inner, state in zip(coverage.inners, coverage.states, strict=True):
        cx, cy = inner[:2] + inner[2:] / 2
        assert (state == "failed") == (x <= cx < x + w and y <= cy < y + h)


def test_the_whole_sentence_with_scales(tmp_path):
    objects = [(300, 200, 380, 300), (40, 40, 12, 8), (800, 60, 14, 9)]
    path = write_scene(tmp_path / "port.tif", canvas(900, 700, objects))
    options = bg.DetectOptions(tile=64, overlap=16, batch=2, scales=(0.0625, 1))
    with open_scene(path, "sar") as scene:
        found = bg.detect(scene, BrightWeights(), options)
        told = []
        again = bg.detect(scene, BrightWeights(), options, progress=lambda *p: told.append(p))
        plain = bg.detect(scene, BrightWeights(), dataclasses.replace(options, scales=(1,)))
    near = rectangles_of(found.detections)
    assert len(near) == 3 and set(near) >= {(40, 40, 12, 8), (800, 60, 14, 9)}
    np.testing.assert_allclose(near[1], objects[0], atol=33)
    assert found.features.equals(again.features)
    assert found.provenance["parameters"]["scales"] == (1.0, 0.0625)
    json.dumps(found.provenance)
    tiles = plain.provenance["tiles"]
    assert sum(found.provenance["tiles"].values()) == sum(tiles.values())
    assert told[-1][1] > sum(tiles.values()) and plain.provenance["parameters"]["scales"] == (1.0,)


def test_a_scene_within_a_tile_is_not_read_coarser(tmp_path):
    path = write_scene(tmp_path / "small.tif", canvas(60, 60, [(5, 5, 9, 5)]))
    with open_scene(path, "sar") as scene:
        options = bg.DetectOptions(tile=64, overlap=16, scales=(1, 0.5, 0.25))
        found = bg.detect(scene, BrightWeights(), options)
    assert found.provenance["parameters"]["scales"] == (1.0,) and len(found.features) == 1


def test_classes_that_no_tile_cuts_are_not_looked_for_at_coarser_scales(tmp_path):
    path = write_scene(tmp_path / "lot.tif", np.stack([canvas(300, 300, [])] * 3))
    with open_scene(path, "rgb") as scene:

        def plan(*classes):
            options = {"tile": 64, "overlap": 16, "gsd": "native", "classes": classes, "scales": (1, 0.5)}
            return plan_for(scene, BrightHeader(), bg.DetectOptions(**options))

        assert plan("vehicle").coarser == () and plan("vehicle").scales == (
            1.0,
        )  # pixels of 10 m: 160 m are held
        assert plan("ship", "vehicle").large == ("ship",) and len(plan("ship", "vehicle").coarser) == 1


@settings(max_examples=20)
@given(towns())
def test_other_classes_are_as_without_coarser_scales(town):
    width, height, scale, objects = town
    scene = Town(canvas(width, height, objects))
    plain, _ = through(look_at(scene, (1.0,)))
    found, _ = through(dataclasses.replace(look_at(scene, (1.0, scale)), large=()))
    np.testing.assert_array_equal(found.boxes, plain.boxes)


@pytest.mark.parametrize("scales", [(), (0.25,), (1, 0), (1, -0.5), (1, 2), (1, 0.5, 0.5), (1, float("nan"))])
def test_scales_that_cannot_be(scales):
    with pytest.raises(
        ParameterError, match=r"scales is .*; expected 1 and numbers between 0 and 1, each once"
    ):
        bg.DetectOptions(scales=scales)
