"""Scenes: what is read is what is in the file, valid where it was seen, and the same whatever the window."""

from __future__ import annotations

import gc
import pickle
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import rasterio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rasterio._env import get_gdal_config
from rasterio.control import GroundControlPoint
from rasterio.enums import Resampling
from rasterio.features import rasterize, shapes
from rasterio.rpc import RPC
from rasterio.transform import Affine

from babelrs_geo.errors import BabelError, ParameterError, SceneError, SensorError
from babelrs_geo.scenes import SceneOptions, open_scene
from babelrs_geo.scenes.collar import find
from babelrs_geo.scenes.facts import gdal_path
from babelrs_geo.scenes.reader import CACHE_MB, LARGE_CACHE_MB, gdal
from babelrs_geo.sensors import Radiometry, Sensor
from babelrs_geo.tiling import Grid

RGB = ("red", "green", "blue")
RNG = np.random.default_rng(0)
COLOUR = RNG.integers(1, 256, (3, 90, 130), dtype=np.uint8)
GREY = COLOUR[:1]
SHARED = Path(__file__).parents[2] / "shared" / "data" / "scenes"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="the development data in ../shared is not here")


def whole(scene, scale=1.0):
    rows, columns = scene.shape_at(scale)
    return scene.read((0, 0, columns, rows), scale)


def exact(raw):
    return raw.astype(np.float32) / np.float32(255)


# What is read


@pytest.mark.parametrize(
    ("suffix", "creation"),
    [
        (".tif", {}),
        (
            ".tif",
            {"tiled": True, "blockxsize": 16, "blockysize": 32, "compress": "deflate", "interleave": "band"},
        ),
        (".cog", {"COMPRESS": "LZW"}),
        (".vrt", {}),
        (".png", {}),
        (".jp2", {"QUALITY": 100, "REVERSIBLE": "YES"}),
    ],
)
def test_every_format_is_read_exactly(make_raster, suffix, creation):
    path = make_raster(COLOUR, suffix=suffix, creation=creation, colours=RGB)
    with open_scene(path) as scene:
        assert (scene.width, scene.height, scene.count, scene.dtype) == (130, 90, 3, "uint8")
        assert scene.sensor is Sensor.RGB
        np.testing.assert_array_equal(whole(scene).image, exact(COLOUR))
        np.testing.assert_array_equal(scene.read((7, 9, 31, 20)).image, exact(COLOUR[:, 9:29, 7:38]))
        np.testing.assert_array_equal(scene.read_raw((7, 9, 31, 20)), COLOUR[:, 9:29, 7:38])
        assert scene.georef.crs_text == "EPSG:32611"
        assert scene.gsd == pytest.approx(10.0, rel=1e-3)
        assert scene.valid_share == 1.0


def test_pictures_without_georeference(make_raster):
    for suffix in (".png", ".jpg"):
        scene = open_scene(make_raster(COLOUR, suffix=suffix, colours=RGB, crs=None, transform=None))
        assert scene.georef.kind == "none"
        assert scene.gsd is None
        assert "pixels" in scene.describe()["georeference"]


@pytest.mark.parametrize(
    "dtype", ["uint8", "uint16", "int16", "uint32", "int32", "float32", "float64", "complex64"]
)
def test_every_data_type_is_read_by_every_sensor_that_takes_it(make_raster, dtype):
    path = make_raster((RNG.rayleigh(40, (1, 60, 50)) + 5).astype(dtype))
    for sensor in (Sensor.SAR, Sensor.IR):
        scene = open_scene(path, sensor)
        pixels = whole(scene)
        assert pixels.valid.all()
        assert 0 < pixels.image.mean() < 1
        assert whole(scene, 0.5).image.shape == (3, 30, 25)


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (70, 1)])
def test_scenes_one_pixel_wide_work(make_raster, shape):
    scene = open_scene(make_raster(COLOUR[:, : shape[0], : shape[1]], colours=RGB))
    for scale in (1.0, 0.3, 2.5):
        assert whole(scene, scale).image.shape[1:] == scene.shape_at(scale)
        assert whole(scene, scale).valid.all()
    assert scene.describe()
    assert scene.data.shape == (3, *shape)


def test_bands_in_any_order_and_alpha_dropped(make_raster):
    pixels = np.concatenate([COLOUR[::-1], COLOUR[:1], np.full_like(GREY, 255)])
    scene = open_scene(make_raster(pixels, colours=("blue", "green", "red", "undefined", "alpha")))
    assert scene.radiometry.bands == (3, 2, 1)
    np.testing.assert_array_equal(whole(scene).image, exact(COLOUR))


def test_the_polarisation_may_be_a_metadata_item_of_the_band(make_raster):
    path = make_raster(COLOUR[:2].astype(np.uint16))
    with rasterio.open(path, "r+") as file:
        file.update_tags(1, POLARISATION="VH")
        file.update_tags(2, POLARISATION="VV")
    scene = open_scene(path)
    assert scene.sensor is Sensor.SAR
    assert scene.radiometry.bands == (2,)
    assert open_scene(path, options=SceneOptions(polarisation="VH")).radiometry.bands == (1,)


def test_grey_copied_to_three_bands_is_grey(make_raster):
    scene = open_scene(make_raster(GREY.repeat(3, 0), colours=RGB), "sar")
    assert scene.radiometry.bands == (1,)
    with pytest.raises(SensorError, match="differ"):
        open_scene(make_raster(COLOUR, "colour", colours=RGB), "sar")


# Law 5, the scene's side: radiometry is the scene's, never the tile's


def test_a_tile_and_its_chip_are_bit_identical(make_raster, tmp_path):
    raw = RNG.rayleigh(200, (1, 300, 280)).astype(np.uint16)
    raw[0, :40] = 0
    scene = open_scene(make_raster(raw, nodata=0), "sar")
    saved = scene.radiometry.to_json()
    for tile in Grid(scene.width, scene.height, 128, 32):
        pixels = scene.read(tile.outer)
        np.savez(tmp_path / "chip.npz", raw=scene.read_raw(tile.outer), valid=scene.valid(tile.outer))
        chip = np.load(tmp_path / "chip.npz")
        again = Radiometry.from_json(saved).apply(chip["raw"], chip["valid"])
        np.testing.assert_array_equal(again, pixels.image)
        np.testing.assert_array_equal(chip["valid"], pixels.valid)


def test_the_range_is_estimated_once_from_spread_windows_of_a_large_scene(make_raster):
    raw = RNG.rayleigh(100, (1, 2500, 2300)).astype(np.uint16) + 1
    large = open_scene(make_raster(raw, "large"), "sar")
    small = open_scene(make_raster(raw[:, :600, :600], "small"), "sar")
    assert large.radiometry.high[0] == pytest.approx(small.radiometry.high[0], rel=0.02)
    assert large.valid_share == 1.0


def test_colour_is_judged_by_an_overview_where_there_is_one(make_raster):
    raw = RNG.integers(100, 4000, (3, 2500, 2300)).astype(np.uint16)
    path = make_raster(raw, colours=RGB, overviews=(2, 4))
    with rasterio.open(path, "r+", overview_level=0) as overview:
        overview.write(np.full((3, overview.height, overview.width), 7000, np.uint16))
    assert open_scene(path).radiometry.low[0] == pytest.approx(7000)


def test_limits_and_units_can_be_given(make_raster):
    path = make_raster(GREY.astype(np.float32))
    options = SceneOptions(limits=(0.0, 100.0), units="amplitude")
    image = whole(open_scene(path, "sar", options)).image
    np.testing.assert_allclose(image[0], np.minimum(GREY[0] / 100.0, 1.0), rtol=1e-6)
    with pytest.raises(ParameterError):
        open_scene(path, "sar", SceneOptions(limits=(1.0, 1.0)))


# Validity

LEFT = np.arange(130) < 40


@pytest.mark.parametrize(
    ("pixels", "what"),
    [
        (np.where(LEFT, 0, COLOUR), {"nodata": 0, "colours": RGB}),
        (COLOUR, {"mask": np.broadcast_to(~LEFT, (90, 130)), "colours": RGB}),
        (np.concatenate([COLOUR, np.where(LEFT, 0, 255 + 0 * GREY)]), {"colours": (*RGB, "alpha")}),
        (np.where(LEFT, np.nan, COLOUR).astype(np.float32), {"colours": RGB}),
        (np.where(LEFT, np.inf, COLOUR).astype(np.float32), {"colours": RGB}),
        (np.where(LEFT, -9999.0, COLOUR).astype(np.float32), {"colours": RGB, "nodata": -9999.0}),
        (
            np.where(LEFT, -3.4028234663852886e38, COLOUR).astype(np.float32),
            {"colours": RGB, "nodata": -3.4028234663852886e38},
        ),
        (np.where(LEFT, np.nan, COLOUR).astype(np.float64), {"colours": RGB, "nodata": np.nan}),
        (np.where(LEFT, 0, COLOUR), {"colours": RGB}),
    ],
    ids=["nodata", "mask", "alpha", "nan", "inf", "float nodata", "lowest float", "nan nodata", "collar"],
)
def test_validity_from_every_source(make_raster, pixels, what):
    pixels = pixels.astype(np.uint8) if pixels.dtype.kind == "i" else pixels
    scene = open_scene(make_raster(pixels, **what))
    np.testing.assert_array_equal(whole(scene).valid, np.broadcast_to(~LEFT, (90, 130)))
    assert (whole(scene).image[:, :, LEFT] == 0).all()
    assert scene.valid_share == pytest.approx(90 / 130)
    half = whole(scene, 0.5)
    np.testing.assert_array_equal(half.valid, np.broadcast_to(np.arange(65) >= 20, (45, 65)))
    assert half.image[:, :, 20:].min() > 0.05  # what is not valid takes no part in what is


def test_a_colour_may_hold_the_number_that_means_nodata_in_one_band(make_raster):
    pixels = COLOUR.copy()
    pixels[0, 10, 10] = 0
    pixels[:, 20, 20] = 0
    valid = whole(
        open_scene(make_raster(pixels, nodata=0, colours=RGB), options=SceneOptions(collar=False))
    ).valid
    assert valid[10, 10]
    assert not valid[20, 20]


@pytest.mark.parametrize("kind", ["alpha", "mask", "all"])
def test_nodata_does_not_hide_a_mask_nor_either_of_them_an_alpha_band(make_raster, kind):
    """To GDAL each of them is the mask, and it names one."""
    third, top = np.arange(130) < 20, np.arange(90)[:, None] < 9
    pixels, what = np.where(LEFT & ~third, 200, COLOUR), {"colours": RGB}
    expected = np.ones((90, 130), bool)
    if kind != "mask":
        pixels = np.concatenate([pixels, np.where(third, 0, 255 + 0 * GREY)])
        what["colours"] = (*RGB, "alpha")
        expected &= ~third
    if kind != "alpha":
        what["mask"] = np.broadcast_to(~top, (90, 130))
        expected &= ~top
    if kind != "all":
        pixels[:3, 60:] = 7
        what["nodata"] = 7
        expected[60:] = False
    scene = open_scene(make_raster(pixels.astype(np.uint8), **what), options=SceneOptions(collar=False))
    np.testing.assert_array_equal(whole(scene).valid, expected)
    told = scene.describe()["validity"]
    assert ("alpha band" in told, "a mask" in told) == (kind != "mask", kind != "alpha")


def source(path, band=1):
    return (
        f"<SimpleSource><SourceFilename>{path}</SourceFilename><SourceBand>{band}</SourceBand></SimpleSource>"
    )


def virtual(path, bands):
    """A VRT of 130 by 90 pixels; each band is its type and what is inside of it."""
    inside = "".join(
        f'<VRTRasterBand dataType="{kind}" band="{k}">{text}</VRTRasterBand>'
        for k, (kind, text) in enumerate(bands, 1)
    )
    path.write_text(f'<VRTDataset rasterXSize="130" rasterYSize="90">{inside}</VRTDataset>')
    return path


def test_bands_may_have_a_mask_each(make_raster, tmp_path):
    """A pixel is valid where one of the bands that are read is."""
    path = make_raster(COLOUR)
    shown = [
        make_raster(np.where(np.arange(130) < n, 0, 255 + 0 * GREY).astype(np.uint8), f"m{n}")
        for n in (40, 60, 80)
    ]
    bands = [
        f'{source(path, k)}<MaskBand><VRTRasterBand dataType="Byte">{source(mask)}</VRTRasterBand></MaskBand>'
        for k, mask in enumerate(shown, 1)
    ]
    made = virtual(tmp_path / "masks.vrt", [("Byte", each) for each in bands])
    np.testing.assert_array_equal(whole(open_scene(made, "rgb")).valid, np.broadcast_to(~LEFT, (90, 130)))
    one = virtual(tmp_path / "one.vrt", [("Byte", bands[2])])
    assert open_scene(one, "ir").valid_share == pytest.approx(50 / 130)


def test_bands_of_other_types_come_along_in_the_type_that_holds_all(make_raster, tmp_path):
    wide, alpha = make_raster(257 * COLOUR.astype(np.uint16), "wide"), make_raster(GREY + 1, "alpha")
    colours = [
        ("UInt16", f"<ColorInterp>{name}</ColorInterp>{source(wide, k)}")
        for k, name in enumerate(("Red", "Green", "Blue"), 1)
    ]
    made = virtual(
        tmp_path / "mixed.vrt", [*colours, ("Byte", f"<ColorInterp>Alpha</ColorInterp>{source(alpha)}")]
    )
    raw = open_scene(made).read_raw((0, 0, 130, 90))
    assert raw.dtype == np.uint16
    np.testing.assert_array_equal(raw[:3], 257 * COLOUR.astype(np.uint16))
    np.testing.assert_array_equal(raw[3], GREY[0] + 1)


@pytest.mark.parametrize(("dtype", "nodata", "share"), [("Byte", "-9999", 1.0), ("Float32", "0.1", 0.5)])
def test_nodata_that_the_type_holds_only_rounded_or_not_at_all(make_raster, tmp_path, dtype, nodata, share):
    pixels = np.full((1, 10, 20), 50.0, np.float32)
    pixels[..., :10] = 0.1
    path = make_raster(pixels.astype(np.uint8) + 1 if dtype == "Byte" else pixels)
    vrt = tmp_path / "odd.vrt"
    vrt.write_text(
        f'<VRTDataset rasterXSize="20" rasterYSize="10"><VRTRasterBand dataType="{dtype}" band="1">'
        f"<NoDataValue>{nodata}</NoDataValue><SimpleSource><SourceFilename>{path}</SourceFilename>"
        f"<SourceBand>1</SourceBand></SimpleSource></VRTRasterBand></VRTDataset>"
    )
    assert open_scene(vrt, "sar").valid_share == share


def test_a_mask_and_an_alpha_band_come_along_at_overview_levels(make_raster):
    large = np.repeat(np.repeat(COLOUR, 4, 1), 4, 2)
    lit = np.broadcast_to(np.repeat(~LEFT, 4), large.shape[1:])
    alpha = np.concatenate([large, np.where(lit, 255, 0).astype(np.uint8)[None]])
    for name, pixels, what in (("m", large, {"mask": lit}), ("a", alpha, {"colours": (*RGB, "alpha")})):
        scene = open_scene(make_raster(pixels, name, overviews=(2, 4), **{"colours": RGB, **what}))
        np.testing.assert_array_equal(whole(scene, 0.25).valid, np.broadcast_to(~LEFT, (90, 130)))


@pytest.mark.parametrize("scale", [0.05, 0.3, 0.7, 1.4])
def test_what_is_not_valid_takes_no_part_in_what_is(make_raster, scale):
    flat = np.where(RNG.random((1, 200, 160)) < 0.3, -9999.0, 200.0).astype(np.float32)
    scene = open_scene(make_raster(flat, nodata=-9999.0), "sar", SceneOptions(limits=(0.0, 400.0)))
    pixels = whole(scene, scale)
    assert pixels.valid.any()
    np.testing.assert_allclose(pixels.image[:, pixels.valid], 0.5, rtol=1e-5)


# The black collar


def framed(height=300, width=260, turn=0.4):
    """A textured scene turned inside its raster: (3, y, x), and where the raster was really seen."""
    y, x = np.mgrid[:height, :width]
    u = (x - width / 2) * np.cos(turn) + (y - height / 2) * np.sin(turn)
    v = (y - height / 2) * np.cos(turn) - (x - width / 2) * np.sin(turn)
    seen = (abs(u) < width * 0.36) & (abs(v) < height * 0.36)
    pixels = (40 + 100 * RNG.random((3, height, width))).astype(np.uint8)
    pixels[:, 140:150, 120:130] = 0  # black, but not connected to the border
    return np.where(seen, pixels, 0).astype(np.uint8), seen


def test_the_collar_is_found_exactly_and_black_inside_stays(make_raster):
    pixels, seen = framed()
    path = make_raster(pixels, colours=RGB)
    scene = open_scene(path)
    assert (whole(scene).valid != seen).sum() <= 10  # the tips of its wedges, thinner than three pixels
    assert whole(scene).valid[seen].all()
    assert scene.valid_share == pytest.approx(seen.mean(), abs=1e-3)
    assert "collar" in scene.describe()["validity"]
    assert open_scene(path, options=SceneOptions(collar=False)).valid_share == 1.0


def test_a_smeared_collar_is_found_too(make_raster):
    pixels, seen = framed()
    creation = {"compress": "jpeg", "photometric": "ycbcr", "tiled": True, "jpeg_quality": 75}
    scene = open_scene(make_raster(pixels, creation=creation))
    valid = whole(scene).valid
    assert (valid != seen).mean() < 0.03  # two pixels along the edge: the texture is noise
    assert valid[144, 124]


def test_a_dark_sea_is_no_collar_and_keeps_its_values(make_raster):
    sea = RNG.poisson(1.5, (1, 120, 160)).astype(np.uint8)  # a fifth of it 0, and connected
    scene = open_scene(make_raster(sea), "sar")
    assert whole(scene).valid.all()
    picture = open_scene(make_raster(sea, "frame", suffix=".jpg", crs=None, transform=None), "sar")
    np.testing.assert_array_equal(whole(picture).image[:1], exact(picture.read_raw((0, 0, 160, 120))))


@pytest.mark.parametrize("width", [3, 4, 9])
def test_thin_collars_count(make_raster, width):
    pixels = COLOUR.copy()
    pixels[:, :width] = 0
    valid = whole(open_scene(make_raster(pixels, colours=RGB))).valid
    assert not valid[:width].any()
    assert valid[width:].all()


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1), share=st.sampled_from([0.5, 0.65, 0.8, 0.95]))
def test_the_flood_equals_a_plain_one(monkeypatch, seed, share):
    """Blocks, seams and snakes, against a flood of the whole picture at once."""
    monkeypatch.setattr("babelrs_geo.scenes.collar._BLOCK", 32)
    rng = np.random.default_rng(seed)
    black = np.repeat(np.repeat(rng.random((15, 22)) < share, 9, 0), 9, 1)[:133, :195]
    found = find(195, 133, 0, lambda w, shape: black[w[1] : w[1] + w[3], w[0] : w[0] + w[2]])
    near = found.covers(np.arange(133), np.arange(195))
    near = np.zeros_like(black) if near is None else near
    solid = minimum(black, outside=True)
    patches = [patch for patch, _ in shapes(solid.astype(np.uint8), mask=solid, connectivity=4)]
    flood = np.zeros_like(black)
    for patch in patches:
        cells = rasterize([patch], black.shape).astype(bool)
        if cells[[0, -1]].any() or cells[:, [0, -1]].any():
            flood |= cells
    np.testing.assert_array_equal(near, ~minimum(~flood, outside=True))


def minimum(mask, outside):
    """True where the 5 by 5 pixels around are: the plain way."""
    padded = np.pad(mask, 2, constant_values=outside)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (5, 5))
    return windows.all(axis=(2, 3))


def test_scenes_beyond_the_lattice_agree_tile_by_tile(make_raster, monkeypatch):
    monkeypatch.setattr("babelrs_geo.scenes.collar.LATTICE", 64)  # cells of 5 pixels
    pixels, seen = framed()
    scene = open_scene(make_raster(pixels, colours=RGB))
    valid = whole(scene).valid
    assert (valid == seen).mean() > 0.995
    assert (valid >= seen).all()  # black inside, far from the border, is not taken for collar
    for tile in Grid(260, 300, 90, 20):
        np.testing.assert_array_equal(scene.valid(tile.outer), valid[tile.outer.slices])


# Scale


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), scale=st.one_of(st.sampled_from([1.0, 0.5, 2.0, 0.11]), st.floats(0.07, 3.0)))
@pytest.mark.parametrize("overviews", [(), (2, 4)])
def test_overlapping_windows_agree_bit_for_bit_at_any_scale(make_raster, overviews, data, scale):
    pixels, _ = framed(150, 170)
    scene = open_scene(make_raster(pixels, colours=RGB, overviews=overviews))
    rows, columns = scene.shape_at(scale)
    x, y = data.draw(st.integers(0, columns - 1)), data.draw(st.integers(0, rows - 1))
    w, h = data.draw(st.integers(1, columns - x)), data.draw(st.integers(1, rows - y))
    every, part = whole(scene, scale), scene.read((x, y, w, h), scale)
    np.testing.assert_array_equal(part.image, every.image[:, y : y + h, x : x + w])
    np.testing.assert_array_equal(part.valid, every.valid[y : y + h, x : x + w])


def test_windows_agree_for_decibels_too(make_raster):
    scene = open_scene(make_raster(RNG.normal(-15, 6, (1, 150, 170))), "sar")
    for scale in (1.0, 0.4, 1.6):
        every = whole(scene, scale)
        rows, columns = every.valid.shape
        for x, y, w, h in ((0, 0, 7, 5), (3, 2, 31, 40), (columns - 13, rows - 9, 13, 9)):
            part = scene.read((x, y, w, h), scale)
            np.testing.assert_array_equal(part.image, every.image[:, y : y + h, x : x + w])


@pytest.mark.parametrize("scale", [0.06, 0.2, 0.5, 0.77, 1.5, 3.0])
@pytest.mark.parametrize("overviews", [(), (2, 4, 8)])
def test_resampling_keeps_places_and_brightness(make_raster, scale, overviews):
    """A linear ramp comes back as itself: no shift, no gain."""
    y, x = np.mgrid[:192, :256]
    ramp = np.stack([x + 0.5, y + 0.5, x + y + 1.0]).astype(np.float32)
    scene = open_scene(
        make_raster(ramp, colours=RGB, overviews=overviews), options=SceneOptions(limits=(0.0, 512.0))
    )
    rows, columns = scene.shape_at(scale)
    image = whole(scene, scale).image * 512
    v, u = np.mgrid[:rows, :columns]
    edge = max(1, int(2 * scale))
    inner = (slice(edge, -edge), slice(edge, -edge))
    np.testing.assert_allclose(
        image[0][inner], ((u + 0.5) * 256 / columns)[inner], atol=0.08 * max(1, 1 / scale)
    )
    np.testing.assert_allclose(
        image[1][inner], ((v + 0.5) * 192 / rows)[inner], atol=0.08 * max(1, 1 / scale)
    )


def test_a_smaller_scale_reads_overviews_and_strips_bound_the_memory(make_raster, monkeypatch):
    path = make_raster(np.repeat(np.repeat(COLOUR, 4, 1), 4, 2), colours=RGB, overviews=(2, 4))
    with rasterio.open(path, "r+", overview_level=1) as overview:
        overview.write(np.full((3, 90, 130), 77, np.uint8))
    assert np.ptp(whole(open_scene(path), 0.2).image - np.float32(77) / np.float32(255)) < 1e-6
    with rasterio.open(path, "r+") as later:
        later.build_overviews([3], Resampling.nearest)  # comes after 1:4 in the file
    assert np.ptp(whole(open_scene(path), 0.2).image - np.float32(77) / np.float32(255)) < 1e-6
    plain = open_scene(make_raster(np.repeat(np.repeat(COLOUR, 4, 1), 4, 2), "plain", colours=RGB))
    at_once = whole(plain, 0.05).image
    monkeypatch.setattr("babelrs_geo.scenes.resample._STRIP_PIXELS", 2000)
    np.testing.assert_array_equal(whole(plain, 0.05).image, at_once)


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf])
def test_scales_that_make_no_sense(make_raster, scale):
    with pytest.raises(ParameterError):
        open_scene(make_raster(COLOUR, colours=RGB)).shape_at(scale)


@pytest.mark.parametrize("window", [(-1, 0, 5, 5), (0, 0, 131, 5), (0, 0, 0, 5), (129, 89, 2, 1)])
def test_windows_that_leave_the_scene(make_raster, window):
    with pytest.raises(ParameterError, match="130 by 90"):
        open_scene(make_raster(COLOUR, colours=RGB)).read(window)


# Threads, pickles, views


def test_threads_and_pickles_read_the_same(make_raster):
    pixels, _ = framed()
    scene = open_scene(make_raster(pixels, colours=RGB))
    windows = [tile.outer for tile in Grid(scene.width, scene.height, 64, 16)]
    expected = [scene.read(w).image for w in windows]
    copy = pickle.loads(pickle.dumps(scene))
    with ThreadPoolExecutor(4) as pool:
        for reader in (scene, copy):
            for image, known in zip(
                pool.map(lambda w, r=reader: r.read(w).image, windows), expected, strict=True
            ):
                np.testing.assert_array_equal(image, known)
    scene.close()
    np.testing.assert_array_equal(scene.read(windows[0]).image, expected[0])


def test_threads_that_end_leave_no_file_open(make_raster):
    scene = open_scene(make_raster(COLOUR, colours=RGB))
    for _ in range(5):
        with ThreadPoolExecutor(1) as pool:
            pool.submit(scene.read, (0, 0, 5, 5)).result()
    gc.collect()
    assert len(scene._reader._held) <= 1
    scene.close()
    assert len(scene._reader._held) == 0


def test_the_block_cache_is_bounded_and_kept_between_reads(make_raster, monkeypatch):
    monkeypatch.delenv("GDAL_CACHEMAX", raising=False)
    open_scene(make_raster(COLOUR, colours=RGB)).read((0, 0, 5, 5))
    with gdal():
        held = int(get_gdal_config("GDAL_CACHEMAX"))
        assert held in (CACHE_MB << 20, LARGE_CACHE_MB << 20)  # large from the first VRT on
    open_scene(make_raster(COLOUR, suffix=".vrt", colours=RGB)).read((0, 0, 5, 5))
    with gdal():
        assert int(get_gdal_config("GDAL_CACHEMAX")) == LARGE_CACHE_MB << 20


def test_a_lazy_view(make_raster):
    scene = open_scene(
        make_raster(COLOUR, colours=RGB, creation={"tiled": True, "blockxsize": 32, "blockysize": 16})
    )
    view = scene.data
    assert view.dims == ("band", "y", "x")
    assert view.dtype == np.uint8
    np.testing.assert_array_equal(view.compute(), COLOUR)
    np.testing.assert_array_equal(view.isel(band=1, y=slice(5, 40, 3), x=7), COLOUR[1, 5:40:3, 7])
    assert view.x.values[0] == 380_005.0
    assert "32611" in view.spatial_ref.attrs["crs_wkt"]
    assert pickle.loads(pickle.dumps(view)).equals(view)


# Georeference and time


def test_georeferences_of_every_kind(make_raster):
    turned = Affine.translation(5e5, 4e6) @ Affine.rotation(30) @ Affine.scale(2, -2)
    assert open_scene(make_raster(GREY, "t", transform=turned), "sar").gsd == pytest.approx(2, rel=1e-3)
    corners = [
        GroundControlPoint(r, c, -118 + c * 1e-4, 33 - r * 1e-4) for r in (0, 45, 90) for c in (0, 65, 130)
    ]
    points = open_scene(make_raster(GREY, "g", gcps=corners, crs="EPSG:4326"), "sar")
    assert points.georef.kind == "gcps"
    assert points.gsd == pytest.approx(10.2, abs=0.2)
    rpc = RPC(
        height_off=0,
        height_scale=500,
        lat_off=33,
        lat_scale=0.01,
        long_off=-118,
        long_scale=0.01,
        line_off=45,
        line_scale=45,
        samp_off=65,
        samp_scale=65,
        line_num_coeff=[0.0, 0.0, -1.0] + [0.0] * 17,
        samp_num_coeff=[0.0, 1.0] + [0.0] * 18,
        line_den_coeff=[1.0] + [0.0] * 19,
        samp_den_coeff=[1.0] + [0.0] * 19,
    )
    rational = open_scene(make_raster(GREY, "r", rpcs=rpc), "sar", SceneOptions(height=12.0))
    assert (rational.georef.kind, rational.georef.height) == ("rpcs", 12.0)
    assert "12 m" in rational.describe()["georeference"]
    with pytest.raises(BabelError, match=r"no_such_dem\.tif"):
        open_scene(make_raster(GREY, "r", rpcs=rpc), "sar", SceneOptions(dem="no_such_dem.tif"))
    flat = make_raster(
        np.full((1, 50, 50), 30, np.int16),
        "dem",
        crs="EPSG:4326",
        transform=Affine(0.001, 0, -118.02, 0, -0.001, 33.02),
    )
    over = open_scene(make_raster(GREY, "r", rpcs=rpc), "sar", SceneOptions(dem=str(flat)))
    # these RPCs know no height, so the ground's makes no difference
    np.testing.assert_allclose(over.georef.to_map(65, 45), rational.georef.to_map(65, 45), atol=1e-8)
    assert open_scene(make_raster(GREY, "n", crs=None), "sar").georef.crs is None
    assert open_scene(make_raster(GREY, "i", transform=None), "sar").georef.kind == "none"


@pytest.mark.parametrize(
    ("name", "tags", "expected"),
    [
        ("scene", {}, None),
        ("scene", {"TIFFTAG_DATETIME": "2018:07:16 06:06:23"}, datetime(2018, 7, 16, 6, 6, 23, tzinfo=UTC)),
        ("scene", {"ACQUISITION_TIME": "2020-05-01T10:00:00+02:00"}, datetime(2020, 5, 1, 8, tzinfo=UTC)),
        (
            "S1A_IW_GRDH_1SDV_20201222T135018_20201222T135043_035796_0430B1_9AE3",
            {"TIFFTAG_DATETIME": "2021:01:01 00:00:00"},
            datetime(2020, 12, 22, 13, 50, 18, tzinfo=UTC),
        ),
        (
            "s1b-ew-grd-hh-20190105t040506-20190105t040606-014374-01abf3-001",
            {},
            datetime(2019, 1, 5, 4, 5, 6, tzinfo=UTC),
        ),
        ("scene", {"TIFFTAG_DATETIME": "yesterday"}, None),
    ],
)
def test_when_it_was_taken(make_raster, name, tags, expected):
    assert open_scene(make_raster(GREY, name, tags=tags), "sar").acquired == expected


# Bad input


def test_urls_become_virtual_paths():
    assert gdal_path("s3://bucket/a.tif") == "/vsis3/bucket/a.tif"
    assert gdal_path("https://host/a.tif") == "/vsicurl/https://host/a.tif"
    assert gdal_path("/vsizip/a.zip/b.tif") == "/vsizip/a.zip/b.tif"


def bad_files(folder, make_raster):
    yield folder / "missing.tif"
    (folder / "text.tif").write_text("no raster")
    yield folder / "text.tif"
    (folder / "empty.tif").write_bytes(b"")
    yield folder / "empty.tif"
    yield folder
    whole_file = make_raster(COLOUR, "header", colours=RGB)
    (folder / "header_cut.tif").write_bytes(whole_file.read_bytes()[:5000])
    yield folder / "header_cut.tif"
    (folder / "bandless.vrt").write_text('<VRTDataset rasterXSize="5" rasterYSize="5"></VRTDataset>')
    yield folder / "bandless.vrt"


def test_what_cannot_be_opened_is_told_in_one_line(tmp_path, make_raster):
    for path in bad_files(tmp_path, make_raster):
        with pytest.raises(SceneError) as caught:
            open_scene(path, "rgb")
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("suffix", "creation"),
    [
        (".cog", {"COMPRESS": "DEFLATE"}),
        (".cog", {"COMPRESS": "JPEG"}),
        (".png", {}),
        (".jpg", {}),
        (".jp2", {}),
    ],
)
def test_a_file_cut_short_names_file_and_window(make_raster, suffix, creation):
    large = np.repeat(np.repeat(COLOUR, 12, 1), 12, 2)
    path = make_raster(large, suffix=suffix, creation=creation, colours=RGB)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * 0.6)])
    with pytest.raises(SceneError, match=r"scene\.\w+ cannot be (read at x \d+, y \d+|opened)") as caught:
        whole(open_scene(path, "rgb", SceneOptions(collar=False)))
    assert "\n" not in str(caught.value)


def test_nothing_valid_can_be_told_before_detecting(make_raster):
    scene = open_scene(make_raster(np.full((1, 50, 50), -9999.0, np.float32), nodata=-9999.0), "sar")
    assert scene.valid_share == 0.0
    assert not whole(scene).valid.any()
    assert (whole(scene).image == 0).all()


@pytest.mark.parametrize(
    ("pixels", "sensor", "what"),
    [
        (GREY, None, {}),
        (GREY, "rgb", {}),
        (GREY, "lidar", {}),
        (COLOUR[:2], "ir", {}),
        (GREY.repeat(5, 0), "sar", {}),
    ],
)
def test_sensors_that_do_not_fit(make_raster, pixels, sensor, what):
    with pytest.raises(BabelError) as caught:
        open_scene(make_raster(pixels, **what), sensor)
    assert "\n" not in str(caught.value)


# Real scenes


@pytest.mark.shared
@needs_shared
def test_real_scenes():
    harbour = open_scene(SHARED / "sentinel1_port_la_db.tif", "sar")
    image = whole(harbour).image
    sea = image[0, 400:, 50:350]
    assert 10 < np.median(sea) * 255 < 45
    assert (image[0, 100:, 350:] == 1).any()

    points = open_scene(SHARED / "sentinel1_grd_gcps.tif")
    assert points.sensor is Sensor.SAR
    assert points.georef.gcp_residuals().max() < 0.1
    assert points.acquired == datetime(2018, 7, 16, 6, 6, 23, tzinfo=UTC)
    assert points.valid_share == pytest.approx(0.98, abs=0.01)

    drone = open_scene(SHARED / "rgb_manila_drone.tif")
    assert drone.gsd == pytest.approx(0.0968, abs=1e-4)  # not the .1 of its projection
    assert drone.valid_share == pytest.approx(0.815, abs=0.005)
    assert not whole(drone).valid[:500, :500].any()
    assert open_scene(SHARED / "rgb_dutch_orthophoto.tif").valid_share == 1.0
