"""Reading: any windows in any order by any threads hold what is in the file, and a walk in the grid's order decodes
each block once, in memory for a row of blocks.
"""

from __future__ import annotations

import gc
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from threading import Barrier, get_native_id

import numpy as np
import pytest
import rasterio
from conftest import Raster, write_raster
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from babelrs_geo.detections import Detections
from babelrs_geo.errors import ParameterError, SceneError
from babelrs_geo.inference import InferenceOptions, run
from babelrs_geo.scenes import SceneOptions, open_scene, reader
from babelrs_geo.scenes.blocks import STORE, Key, Mosaic, Patch, Piece, Store
from babelrs_geo.scenes.develop import develop, develop_mosaic, sheet
from babelrs_geo.scenes.memory import Memory
from babelrs_geo.sensors import Radiometry, Sensor
from babelrs_geo.tiling import Grid

RGB = ("red", "green", "blue")
LAYOUTS = {
    "tiles": {"tiled": True, "blockxsize": 16, "blockysize": 32},
    "strips": {"blockysize": 3},
    "one strip": {"blockysize": 4096},
}


def noise(width, height, bands=3, dtype=np.uint8):
    top = np.iinfo(dtype).max if np.dtype(dtype).kind in "ui" else 255
    return np.random.default_rng(width * height).integers(1, top, (bands, height, width)).astype(dtype)


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces of single blocks, so that small rasters have many."""
    monkeypatch.setattr(reader, "_PIECE", 1)
    monkeypatch.setattr(reader, "_STRIP_PIECE", 500)


def test_grids_are_walked_in_strips():
    grid = Grid(1000, 300, 100, 20)
    for strip in (None, 100, 130, 500, 999, 1000, 5000):
        order = list(grid.order(strip))
        assert sorted(order) == list(range(len(grid)))
        if strip is None or strip >= 1000:
            assert order == list(range(len(grid)))
            continue
        for left, right in pairwise(order):  # down a strip, else on to the next one
            assert right > left or grid[right].outer.y == 0 or grid[right].outer.y > grid[left].outer.y
        runs = np.split(order, 1 + np.flatnonzero(np.diff(order) != 1))
        widest = max(grid[run[-1]].inner.x1 - grid[run[0]].inner.x for run in runs)
        assert widest <= strip + 100


@pytest.mark.parametrize("strip", [None, 130, 500])
def test_the_last_two_rows_are_walked_together(strip):
    grid = Grid(1000, 300, 100, 20)
    order = list(grid.order(strip, paired=True))
    assert sorted(order) == list(range(len(grid)))
    first = (grid.rows - 2) * grid.columns
    assert [i for i in order if i < first] == [i for i in grid.order(strip) if i < first]
    assert [i for i in order if i >= first] == [
        i for c in range(grid.columns) for i in (first + c, first + grid.columns + c)
    ]
    assert list(Grid(1000, 90, 100, 20).order(strip, paired=True)) == list(range(grid.columns))


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    layout=st.sampled_from(sorted(LAYOUTS)),
    size=st.tuples(st.integers(20, 140), st.integers(20, 140)),
    scale=st.sampled_from([1.0, 0.4, 0.13, 1.7]),
    seed=st.integers(0, 99),
    announced=st.booleans(),
)
def test_order_threads_and_announcements_change_no_pixel(
    tmp_path_factory, small_pieces, layout, size, scale, seed, announced
):
    pixels = noise(*size)
    pixels[:, :4, :5] = 0  # nodata, in a corner
    kept = {"nodata": 0, "colours": RGB, "creation": LAYOUTS[layout] | {"interleave": "band"}}
    path = write_raster(tmp_path_factory.mktemp("s") / "s", Raster(pixels, overviews=(2, 4), **kept))
    with open_scene(path, options=SceneOptions(collar=False)) as scene:
        rows, columns = scene.shape_at(scale)
        whole = scene.read((0, 0, columns, rows), scale)
        if scale == 1:
            np.testing.assert_array_equal(whole.image, pixels.astype(np.float32) / np.float32(255))
        tiles = [tile.outer for tile in Grid(columns, rows, 24, 8)]
        random.Random(seed).shuffle(tiles)
        with ThreadPoolExecutor(3) as pool, scene.expecting(tiles if announced else [], scale):
            for tile, read in zip(tiles, pool.map(lambda t: scene.read(t, scale), tiles), strict=True):
                np.testing.assert_array_equal(read.image, whole.image[:, *tile.slices])
                np.testing.assert_array_equal(read.valid, whole.valid[tile.slices])


def bytes_asked(threads) -> int:
    """Bytes that threads of this process have asked the kernel for, from files and all else."""
    texts = (Path(f"/proc/self/task/{thread}/io").read_text() for thread in threads)
    return sum(int(text.split("rchar: ")[1].split()[0]) for text in texts)


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the kernel does not count here")
@pytest.mark.parametrize("layout", ["tiles", "strips"])
@pytest.mark.parametrize("threads", [1, 2])
def test_each_block_is_decoded_once_in_memory_for_a_row(make_raster, monkeypatch, layout, threads):
    side = 1536
    monkeypatch.setattr(reader, "_PIECE", 128)
    monkeypatch.setattr(reader, "_STRIP_PIECE", 64 * side)
    creation = {"tiled": True, "blockxsize": 128, "blockysize": 128} if layout == "tiles" else {}
    path = make_raster(noise(side, side), colours=RGB, creation=creation | {"interleave": "pixel"})
    with open_scene(path) as scene, ThreadPoolExecutor(threads) as pool:
        together = Barrier(threads)

        def ready(thread):
            """Load kernels; let each thread open the file, and what tells it of the CRS."""
            together.wait()
            scene.read((thread * side // 2, 0, 5, 5))
            return get_native_id()

        readers = list(pool.map(ready, range(threads)))
        STORE.forget(scene._reader._token)
        grid = Grid(side, side, 160, 32)
        tiles = [grid[i].outer for i in grid.order(scene.strip(), paired=scene.is_tiled)]
        pieces = {key for tile in tiles for key in scene._reader.pieces(scene._bands, tile)}
        before, decoded, most = bytes_asked(readers), STORE.decoded, 0
        with scene.expecting(tiles):
            for _ in pool.map(scene.read, tiles):
                most = max(most, STORE._bytes)
        asked = bytes_asked(readers) - before
        assert STORE.decoded - decoded == len(pieces)
        assert STORE._bytes == 0
        size = path.stat().st_size
        page = 4096  # the C library reads whole ones, so the last of a block twice where threads take turns
        assert 0.95 * size < asked < 1.05 * size + page * len(pieces)  # the file is not compressed
        assert most < 0.14 * side * side * 3  # a row of blocks is 1/12; the end, shifted back, needs no more


def test_a_search_for_a_collar_decodes_no_block_twice(make_raster, monkeypatch):
    side = 1536
    monkeypatch.setattr(reader, "_PIECE", 128)
    pixels = np.maximum(noise(side, side), 1)
    pixels[:, :200] = 0
    creation = {"tiled": True, "blockxsize": 128, "blockysize": 128, "interleave": "pixel"}
    with open_scene(make_raster(pixels, colours=RGB, creation=creation)) as scene:
        tiles = [tile.outer for tile in Grid(side, side, 160, 32)]
        looked, decoded = [], STORE.decoded
        monkeypatch.setattr(scene._reader, "look", lambda *args, **_: looked.append(args))
        with scene.expecting(tiles):
            valid = [scene.read(tile).valid.sum() for tile in tiles]
        assert not looked
        alone = 1  # the first tile had let go of what no other needs when it saw black
        assert STORE.decoded - decoded == (side // 128) ** 2 + alone
        assert STORE._bytes == 0
        assert sum(valid) == sum(max(y + h - max(y, 200), 0) * w for _, y, w, h in tiles)


def test_wide_scenes_in_strips_decode_few_blocks_twice(make_raster, small_pieces, monkeypatch):
    wide, high, block = 16 * 90, 160, 16
    monkeypatch.setattr(reader, "_ROW", 16 * 3 * 16 * 25)  # a strip of 25 blocks
    monkeypatch.setattr(reader, "_STRIP", 0)
    layout = {"tiled": True, "blockxsize": block, "blockysize": block, "interleave": "pixel"}
    with open_scene(make_raster(noise(wide, high), colours=RGB, creation=layout)) as scene:
        assert scene.strip() == 400
        grid = Grid(wide, high, 20, 4)
        tiles = [grid[i].outer for i in grid.order(scene.strip(), paired=True)]
        blocks = (wide // block) * (high // block)
        decoded, row = STORE.decoded, 400 * block * 3
        with scene.expecting(tiles):  # announced: a row and a little, whatever the scene's height
            for tile in tiles:
                scene.read(tile)
                assert STORE._bytes < 1.5 * row + 5 * high * block * 3
        assert STORE.decoded - decoded == blocks  # all of it fits, so what strips share was kept
        monkeypatch.setattr(STORE, "limit", 3 * row)
        decoded = STORE.decoded
        for tile in tiles:  # not announced: least recently used pieces go
            scene.read(tile)
        assert blocks < STORE.decoded - decoded <= 1.05 * blocks
        STORE.forget(scene._reader._token)
        decoded = STORE.decoded
        with scene.expecting(tiles):
            for tile in tiles:
                scene.read(tile)
                assert STORE._bytes < 2 * row
        assert blocks < STORE.decoded - decoded <= 1.05 * blocks


def test_what_is_not_announced_is_bounded_and_goes_with_the_scene(make_raster, small_pieces, monkeypatch):
    layout = {"tiled": True, "blockxsize": 16, "blockysize": 16}
    monkeypatch.setattr(STORE, "limit", 10_000)
    scene = open_scene(make_raster(noise(160, 160), colours=RGB, creation=layout))
    for tile in Grid(160, 160, 32, 8):
        scene.read(tile.outer)
        assert STORE._bytes <= 10_000
    assert STORE._bytes > 0
    scene.close()
    assert STORE._bytes == 0
    scene.read((0, 0, 20, 20))
    del scene
    gc.collect()
    STORE.fetch([], lambda keys: [])
    assert STORE._bytes == 0 and not STORE._held


def test_a_damaged_block_fails_no_window_but_those_on_it(make_raster, monkeypatch):
    monkeypatch.setattr(reader, "_PIECE", 64)
    layout = {"tiled": True, "blockxsize": 16, "blockysize": 16, "compress": "deflate"}
    path = make_raster(noise(96, 96, 1), creation=layout)
    with rasterio.open(path) as file:
        offset = file.get_tag_item("BLOCK_OFFSET_1_1", "TIFF", 1)
    with path.open("r+b") as file:
        file.seek(int(offset))
        file.write(b"\xff" * 40)
    with open_scene(path, "sar", SceneOptions(collar=False)) as scene:
        assert scene.read((32, 0, 32, 96)).valid.all()
        assert scene.read((0, 32, 96, 16)).valid.all()  # on the same piece
        with pytest.raises(SceneError, match="x 10, y 10, 8 by 8"):
            scene.read((10, 10, 8, 8))
        STORE.forget(scene._reader._token)
        windows = [(10, 10, 8, 8), (0, 32, 96, 16), (32, 0, 64, 96)]
        with scene.expecting(windows):
            for window in windows[1:]:
                assert scene.read(window).valid.all()
            with pytest.raises(SceneError):
                scene.read(windows[0])
            assert not STORE._expected and STORE._bytes == 0  # a read that failed was a read


def test_who_waits_for_a_piece_that_fails_is_told():
    key = Key(0, None, (1,), None, 0, 0)
    store = Store()

    def fail(keys):
        raise SceneError("no")

    with pytest.raises(SceneError):
        store.fetch([key], fail)
    piece = Piece(np.zeros((1, 2, 2)), None)
    assert store.fetch([key], lambda keys: [piece]) == [piece]  # and may be tried again


def test_threads_that_need_the_same_pieces_share_the_work():
    keys = [Key(0, None, (1,), None, 0, column) for column in range(4)]
    store, both, decoded = Store(), Barrier(2), []

    def decode(wanted):
        both.wait(10)  # broken unless the other thread decodes at the same time
        decoded.extend((key, get_native_id()) for key in wanted)
        return [Piece(np.full((1, 2, 2), key.column), None) for key in wanted]

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: store.fetch(keys, decode), range(2)))
    for pieces in found:
        assert [int(piece.raw[0, 0, 0]) for piece in pieces] == [0, 1, 2, 3]
    assert sorted(key for key, _ in decoded) == keys and store.decoded == 4
    assert len({thread for _, thread in decoded}) == 2
    assert store.fetch(keys, decode) == found[0]
    calls = []

    def together(wanted):
        calls.append(list(wanted))
        return [Piece(np.zeros((1, 2, 2)), None)] * len(wanted)

    store.forget(0)
    store.fetch(keys, together, at_once=True)
    assert calls == [keys]


def test_memory_comes_back_once_no_view_of_it_is_left():
    memory = Memory(limit=1 << 20)
    shape = (3, 200, 200)
    first, second = memory.empty(shape, np.float32), memory.empty(shape, np.float32)
    place = first.ctypes.data
    assert first.flags.c_contiguous and first.flags.writeable and place != second.ctypes.data
    view = first[0, 5:]
    del first
    assert memory.empty(shape, np.float32).ctypes.data not in (place, second.ctypes.data)
    del view
    again = memory.empty(shape, np.float32), memory.empty((6, 100, 200), np.int32)
    assert place in {each.ctypes.data for each in again}
    assert len({each.ctypes.data for each in (*again, second)}) == 3
    del again, second
    for side in range(200, 300):  # sizes that never come again
        memory.empty((3, side, side), np.float32)
        assert memory._bytes == sum(n * len(held) for n, held in memory._free.items()) <= 1 << 20
    assert not memory._lent


def test_threads_are_never_given_the_same_memory():
    memory = Memory()

    def fill(number):
        for _ in range(200):
            array = memory.empty((128, 256), np.int32)
            array[:] = number
            view = array[3:]
            del array
            assert (view == number).all()
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(fill, range(4)))


def test_images_are_the_callers_own(make_raster, small_pieces):
    pixels = noise(400, 300)
    layout = {"tiled": True, "blockxsize": 16, "blockysize": 16}
    with open_scene(make_raster(pixels, colours=RGB, creation=layout)) as scene:
        first = scene.read((10, 20, 200, 200))
        kept = first.image.copy()
        first.image[:] = -1
        first.valid[:] = False
        second = scene.read((10, 20, 200, 200))
        np.testing.assert_array_equal(second.image, kept)
        assert second.valid.all() and (first.image == -1).all()
        out = np.zeros((200, 3, 200), np.float32).transpose(1, 0, 2)  # not in the order of memory
        assert scene.read((10, 20, 200, 200), out=out).image is out
        np.testing.assert_array_equal(out, kept)


KINDS = [
    (Sensor.RGB, "uint8", 0.0, 255.0),
    (Sensor.RGB, "uint8", 11.5, 201.0),
    (Sensor.SAR, "amplitude", 0.0, 120.3),
    (Sensor.SAR, "intensity", 0.0, 1e4),
    (Sensor.SAR, "db", -25.0, 3.5),
    (Sensor.IR, "kelvin", 270.1, 310.9),
    (Sensor.RGB, "reflectance", 30.5, 3000.7),
]


@settings(max_examples=40)
@given(
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(["uint8", "uint16", "int16", "float32", "float64", "int32"]),
    scaled=st.booleans(),
    plane=st.booleans(),
    seed=st.integers(0, 999),
)
def test_one_pass_gives_the_bits_of_the_radiometry(kind, dtype, scaled, plane, seed):
    sensor, unit, low, high = kind
    bands = 3 if sensor is Sensor.RGB else 1
    scale, offset = ((0.37,) * bands, (-1.1,) * bands) if scaled and unit != "uint8" else ((), ())
    radiometry = Radiometry(
        sensor=sensor,
        kind=unit,
        bands=tuple(range(1, bands + 1)),
        low=(low,) * bands,
        high=(high,) * bands,
        scale=scale,
        offset=offset,
    )
    rng = np.random.default_rng(seed)
    raw = (rng.normal(100, 200, (bands, 9, 11)) * rng.choice([1, 10, -0.0], (bands, 9, 11))).astype(dtype)
    valid = rng.random((9, 11)) < 0.8
    if raw.dtype.kind == "f":
        raw[:, ~valid] = rng.choice([np.nan, np.inf, -np.inf], (~valid).sum())
    out = np.empty((3, 9, 11), np.float32)
    if plane:
        out = sheet(radiometry, 2, 9, 11)[1]
    out[:] = 7
    with np.errstate(invalid="ignore"):
        assert develop(radiometry, raw, valid, out).tobytes() == radiometry.apply(raw, valid).tobytes()
        seen = np.ones_like(valid)
        every = Patch(Piece(np.nan_to_num(raw), None), (2, 3), (0, 0), (7, 8))
        if develop_mosaic(radiometry, Mosaic(7, 8, (every,)), out[:, :7, :8]):
            wanted = radiometry.apply(every.piece.raw, seen)[:, 2:, 3:]
            assert out[:, :7, :8].tobytes() == wanted.tobytes()


@settings(max_examples=40)
@given(bands=st.sampled_from([1, 3]), masked=st.booleans(), seed=st.integers(0, 999))
def test_bytes_stay_bytes_where_they_are_asked_for(bands, masked, seed):
    sensor = Sensor.RGB if bands == 3 else Sensor.SAR
    radiometry = Radiometry(
        sensor=sensor,
        kind="uint8",
        bands=tuple(range(1, bands + 1)),
        low=(0.0,) * bands,
        high=(255.0,) * bands,
    )
    rng = np.random.default_rng(seed)
    raw, valid = rng.integers(0, 256, (bands, 9, 11), np.uint8), rng.random((9, 11)) < (0.7 if masked else 2)
    out = develop(radiometry, raw, valid, sheet(radiometry, 2, 9, 11, np.uint8)[1])
    assert out.dtype == np.uint8
    assert (out.astype(np.float32) / 255).tobytes() == radiometry.apply(raw, valid).tobytes()
    with pytest.raises(ParameterError, match="bytes were asked"):
        develop(radiometry, raw.astype(np.float32), valid, out)


@pytest.mark.parametrize(
    ("dtype", "scale", "plain"), [("uint8", 1.0, True), ("uint8", 0.5, False), ("uint16", 1.0, False)]
)
def test_a_detector_that_takes_bytes_gets_those_of_a_file_of_bytes(make_raster, dtype, scale, plain):
    class Sees:
        def __init__(self, takes_bytes):
            self.takes_bytes, self.shown = takes_bytes, []

        def __call__(self, images):
            self.shown += [image.copy() for image in images]
            return [Detections.empty(("ship",), False)] * len(images)

    pixels = noise(90, 70).astype(dtype) * (1 if dtype == "uint8" else 200)
    bytes_too, floats = Sees(True), Sees(False)
    with open_scene(make_raster(pixels, colours=RGB)) as scene:
        grid = Grid(*reversed(scene.shape_at(scale)), 32, 8)
        for detectors in (bytes_too, floats, [bytes_too, floats]):
            run(scene, detectors, grid, scale=scale)
    whole = len(floats.shown) + len(bytes_too.shown)
    assert whole == 3 * len(grid)
    assert {image.dtype for image in floats.shown} == {np.dtype(np.float32)}
    first = bytes_too.shown[: len(grid)]
    assert {image.dtype for image in first} == {np.dtype(np.uint8 if plain else np.float32)}
    assert {image.dtype for image in bytes_too.shown[len(grid) :]} == {np.dtype(np.float32)}
    shown = [image.astype(np.float32) / 255 if plain else image for image in first]
    np.testing.assert_array_equal(shown, floats.shown[: len(grid)])


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_batches_hold_the_tiles_whatever_is_left_out_between_them(make_raster, batch):
    pixels = noise(200, 160)
    pixels[:, 40:110, 60:140] = 0  # tiles without a valid pixel
    shown = []

    def record(images):
        shown.append(images.copy())
        return [Detections.empty(("ship",), False)] * len(images)

    with open_scene(make_raster(pixels, colours=RGB, nodata=0), options=SceneOptions(collar=False)) as scene:
        grid = Grid(200, 160, 32, 8)
        _, coverage = run(scene, record, grid, options=InferenceOptions(batch=batch, readers=3))
        tiles = [scene.read(tile.outer) for tile in grid]
    seen = [tile.image for tile in tiles if tile.valid.any()]
    assert len(seen) < len(tiles) and coverage.looked_at == len(seen)
    told = [image for images in shown for image in images if image.any()]  # without padding
    np.testing.assert_array_equal(told, seen)


def test_a_scene_is_visited_without_torch(make_raster):
    path = make_raster(noise(300, 200), colours=RGB)
    code = f"""
import sys
from babelrs_geo.detections import Detections
from babelrs_geo.inference import run
from babelrs_geo.scenes import open_scene
from babelrs_geo.tiling import Grid
scene = open_scene({str(path)!r})
nothing = lambda images: [Detections.empty(("ship",), False)] * len(images)
_, coverage = run(scene, nothing, Grid(300, 200, 64, 16))
assert coverage.looked_at == len(coverage)
print(*sorted({{"torch", "torchvision", "geopandas"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
