"""Law 4: pixel to map and back is the identity, whichever way the georeference is given."""

from __future__ import annotations

import pickle
import threading

import numpy as np
import pyproj
import pytest
import rasterio
from affine import Affine
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from rasterio.rpc import RPC
from rasterio.transform import from_origin

from babelrs_geo.errors import GeorefError
from babelrs_geo.georef import Georef

LOCAL = (
    'LOCAL_CS["Local Coordinates (m)",LOCAL_DATUM["Local Datum",0],UNIT["metre",1],AXIS["X",EAST],'
    'AXIS["Y",NORTH]]'
)
PIXELS = st.floats(-500.0, 20_000.0, allow_nan=False)


def slant_gcps(columns=8, rows=6, width=2000.0, height=1500.0):
    """Control points of a made-up side-looking scene: curved, skewed, longitude and latitude."""
    px, py = (g.ravel() for g in np.meshgrid(np.linspace(0, width, columns), np.linspace(0, height, rows)))
    u, v = px / width, py / height
    lon = 78.2 - 0.30 * u - 0.05 * v + 0.01 * u * v + 0.004 * u**2 + 0.002 * np.sin(5 * u + 3 * v)
    lat = 10.7 + 0.06 * u - 0.22 * v + 0.006 * u * v - 0.003 * v**2 + 0.002 * np.cos(4 * v - 2 * u)
    return list(zip(px, py, lon, lat, strict=True))


def made_up_rpc(long_off=121.0):
    """RPCs of a nadir-looking camera: cubic terms, a tilt with height, 1 m pixels or so."""
    line, sample, line_den, sample_den = (np.zeros(20) for _ in range(4))
    line[[0, 1, 2, 3, 7]] = 0.01, 0.1, -1.0, 0.02, 1e-3
    sample[[1, 2, 3, 8, 11]] = 1.0, 0.1, -0.03, 2e-3, 1e-3
    line_den[[0, 1]] = 1.0, 1e-3
    sample_den[[0, 2]] = 1.0, -1e-3
    return RPC(
        height_off=100.0,
        height_scale=500.0,
        lat_off=14.5,
        lat_scale=0.05,
        line_den_coeff=line_den.tolist(),
        line_num_coeff=line.tolist(),
        line_off=5000.0,
        line_scale=5000.0,
        long_off=long_off,
        long_scale=0.06,
        samp_den_coeff=sample_den.tolist(),
        samp_num_coeff=sample.tolist(),
        samp_off=6000.0,
        samp_scale=6000.0,
    )


def there_and_back(georef, px, py):
    x, y = georef.to_map(px, py)
    qx, qy = georef.to_pixel(x, y)
    return float(np.abs(qx - px).max()), float(np.abs(qy - py).max())


@given(
    size=st.floats(0.01, 1000.0),
    ratio=st.floats(0.2, 5.0),
    turn=st.floats(-180.0, 180.0),
    shear=st.floats(-40.0, 40.0),
    corner=st.tuples(st.floats(-2e7, 2e7), st.floats(-2e7, 2e7)),
    px=PIXELS,
    py=PIXELS,
)
def test_affine_is_the_identity_there_and_back(size, ratio, turn, shear, corner, px, py):
    affine = (
        Affine.translation(*corner)
        @ Affine.rotation(turn)
        @ Affine.shear(shear)
        @ Affine.scale(size, -size * ratio)
    )
    assert (
        max(there_and_back(Georef.from_affine(affine, "EPSG:32611"), np.array([px]), np.array([py]))) < 1e-6
    )


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1))
def test_control_points_are_the_identity_there_and_back(seed):
    rng = np.random.default_rng(seed)
    georef = Georef.from_gcps(slant_gcps(), "EPSG:4326")
    px, py = rng.uniform(-20, 2020, 50), rng.uniform(-20, 1520, 50)
    assert max(there_and_back(georef, px, py)) < 1e-6


def test_control_points_in_a_projection_and_scattered_ones():
    rng = np.random.default_rng(1)
    px, py = rng.uniform(0, 3000, (2, 30))
    x, y = 500_000 + 9.8 * px + 0.4 * py + 3 * np.sin(px / 700), 4_000_000 - 10.1 * py + 0.3 * px
    georef = Georef.from_gcps(list(zip(px, py, x, y, strict=True)), "EPSG:32611")
    assert max(there_and_back(georef, *rng.uniform(100, 2900, (2, 200)))) < 1e-6
    assert georef.gcp_residuals().max() < 1e-6


def test_a_spline_goes_through_its_points_where_a_polynomial_misses():
    georef = Georef.from_gcps(slant_gcps(), "EPSG:4326")
    assert georef.gcp_residuals().shape == (48,)
    assert georef.gcp_residuals().max() < 1e-6
    table = np.array(slant_gcps())
    px, py = table[:, 0], table[:, 1]
    terms = np.stack([np.ones_like(px), px, py, px * py, px**2, py**2], axis=1)
    fit = terms @ np.linalg.lstsq(terms, table[:, 2], rcond=None)[0]
    assert np.abs(fit - table[:, 2]).max() / (0.3 / 2000) > 1.0  # a pixel and more


@pytest.mark.parametrize("height", [0.0, 30.0, 800.0])
def test_rpcs_are_the_identity_at_the_stated_height(height):
    georef = Georef.from_rpcs(made_up_rpc().to_gdal(), height)
    rng = np.random.default_rng(2)
    assert max(there_and_back(georef, rng.uniform(0, 12_000, 200), rng.uniform(0, 10_000, 200))) < 0.05


def test_rpcs_follow_their_definition():
    # RPC00B counts from the centre of the first pixel, we from its corner; the offsets leave only constants
    georef = Georef.from_rpcs(made_up_rpc().to_gdal(), height=100.0)
    px, py = georef.to_pixel(121.0, 14.5)
    assert (float(px), float(py)) == pytest.approx((6000.0 + 0.5, 5000.0 + 0.01 * 5000.0 + 0.5), abs=1e-6)


def test_without_a_height_the_rpcs_own_mean_is_taken():
    rpcs = made_up_rpc().to_gdal()
    assert Georef.from_rpcs(rpcs) == Georef.from_rpcs(rpcs, 100.0)
    assert Georef.from_rpcs(rpcs, dem="ground.tif").height == 0.0


def test_rpcs_are_the_identity_over_hills(tmp_path):
    y, x = np.mgrid[:400, :400]
    hills = (100 + 80 * np.sin(x / 40) + 60 * np.cos(y / 30)).astype(np.float32)
    place = {"crs": "EPSG:4326", "transform": from_origin(120.9, 14.6, 0.0005, 0.0005)}
    shape = {"width": 400, "height": 400, "count": 1, "dtype": "float32"}
    with rasterio.open(tmp_path / "hills.tif", "w", driver="GTiff", **shape, **place) as file:
        file.write(hills[None])
    over = Georef.from_rpcs(made_up_rpc().to_gdal(), dem=str(tmp_path / "hills.tif"))
    px, py = np.random.default_rng(4).uniform(1000, 9000, (2, 200))
    assert max(there_and_back(over, px, py)) < 0.05
    flat = np.array(Georef.from_rpcs(made_up_rpc().to_gdal()).to_map(px, py))
    assert np.abs(np.array(over.to_map(px, py)) - flat).max() > 1e-5  # the hills move what is seen


def test_height_moves_what_an_oblique_camera_sees():
    rpcs = made_up_rpc().to_gdal()
    low, high = (Georef.from_rpcs(rpcs, h).to_pixel(121.0, 14.5) for h in (100.0, 600.0))
    assert float(high[0] - low[0]) == pytest.approx(-0.03 * 6000.0, abs=1e-6)


@pytest.mark.parametrize(
    "georef",
    [
        Georef.from_affine(Affine.rotation(20) @ Affine.scale(2, -2), "EPSG:32611"),
        Georef.from_gcps(slant_gcps(), "EPSG:4326"),
        Georef.from_rpcs(made_up_rpc().to_gdal()),
        Georef(),
    ],
    ids=lambda g: g.kind,
)
def test_plain_numbers_windows_pickles_and_hashes(georef):
    again = pickle.loads(pickle.dumps(georef))
    assert again == georef
    assert hash(again) == hash(georef)
    cut = georef.window((300, 200, 64, 32))
    np.testing.assert_array_equal(cut.to_map([0, 7.5], [0, 3.25]), georef.to_map([300, 307.5], [200, 203.25]))
    assert cut.window((1, 2, 3, 4)) == georef.window((301, 202, 3, 4))
    assert georef.to_map(np.zeros((2, 3)), 5.0)[0].shape == (2, 3)
    assert georef.to_map([], [])[0].shape == (0,)
    there = cut.to_pixel(*cut.to_map(10.0, 20.0))
    np.testing.assert_allclose(there, (10.0, 20.0), atol=1e-3)


def test_many_threads_get_the_same_answer():
    georef = Georef.from_gcps(slant_gcps(), "EPSG:4326")
    px, py = np.random.default_rng(3).uniform(0, 1500, (2, 500))
    expected = np.array(georef.to_pixel(*georef.to_map(px, py)))
    found = [None] * 8

    def work(i):
        found[i] = np.array(georef.to_pixel(*georef.to_map(px, py)))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(each, expected) for each in found)


def test_longitude_comes_first_whatever_the_axis_order_of_the_crs():
    lonlat = Georef.from_affine((0.01, 0, 120.0, 0, -0.01, 15.0), "EPSG:4326").to_lonlat(100, 50)
    assert np.array(lonlat) == pytest.approx([121.0, 14.5])
    gauss = Georef.from_affine((10, 0, 3_500_000, 0, -10, 5_600_000), "EPSG:31467")
    lon, lat = gauss.to_lonlat(0, 0)
    assert (float(lon), float(lat)) == pytest.approx((9.0, 50.5), abs=0.1)


def test_ground_sampling_distance_is_in_true_metres():
    utm = Georef.from_affine((10, 0, 500_000, 0, -10, 3_735_000), "EPSG:32611")
    assert utm.ground_sampling_distance(0, 0) == pytest.approx(10 / 0.9996, rel=1e-4)
    mercator = pyproj.Transformer.from_crs("EPSG:4326", "EPSG:3395", always_xy=True).transform(121, 60)
    stretched = Georef.from_affine((1, 0, mercator[0], 0, -1, mercator[1]), "EPSG:3395")
    assert stretched.ground_sampling_distance(0, 0) == pytest.approx(
        0.5, rel=5e-3
    )  # half a metre at 60 north
    degrees = Georef.from_affine((1e-5, 0, 0, 0, -1e-5, 0), "EPSG:4326")
    assert degrees.ground_sampling_distance(0, 0) == pytest.approx(np.sqrt(1.11319 * 1.10574), rel=1e-4)
    turned = Georef.from_affine(
        Affine.translation(5e5, 4e6) @ Affine.rotation(33) @ Affine.scale(2, -8), "EPSG:32611"
    )
    assert turned.ground_sampling_distance(0, 0) == pytest.approx(
        4.0, rel=1e-3
    )  # the geometric mean of 2 and 8
    north = Georef.from_affine((1e-5, 0, 20, 0, -1e-5, 65), "EPSG:4326")
    assert north.pixel_sides(0, 0) == pytest.approx((0.4713, 1.1148), rel=1e-3)
    assert Georef().ground_sampling_distance(0, 0) is None
    assert Georef.from_affine((1, 0, 0, 0, -1, 0)).ground_sampling_distance(0, 0) is None


def test_a_scene_across_the_antimeridian_stays_in_one_piece():
    points = [
        (px, py, (179.9 + px * 1e-3 + 180) % 360 - 180, -17 - py * 1e-3)
        for px in (0, 100, 200)
        for py in (0, 100)
    ]
    georef = Georef.from_gcps(points, "EPSG:4326")
    assert max(there_and_back(georef, np.array([50.0, 190.0]), np.array([50.0, 20.0]))) < 1e-6
    lon, _ = georef.to_lonlat([50, 190], [50, 50])
    assert lon == pytest.approx([179.95, -179.91])
    px, _ = georef.to_pixel(-179.91, -17.05)
    assert float(px) == pytest.approx(190.0)
    assert georef.ground_sampling_distance(100, 50) == pytest.approx(108.0, rel=0.02)


@given(
    west=st.floats(-360.0, 360.0),
    reach=st.floats(1e-3, 361.0),
    width=st.integers(1, 100_000),
    turn=st.sampled_from([0.0, 30.0, 180.0]),
    sized=st.booleans(),
    share=st.floats(0.0, 1.0),
)
def test_grids_in_degrees_are_the_identity_there_and_back_in_whichever_turn(
    west, reach, width, turn, sized, share
):
    width = min(width, int(1e6 * reach))  # to pixels of a decimetre: float64 holds no smaller ones to 1e-6 px
    assume(sized or reach < 360.0)  # of a scene of unknown size, more than a turn cannot be told from less
    affine = Affine.translation(west, 10.0) @ Affine.rotation(turn) @ Affine.scale(reach / width, -1e-3)
    georef = Georef.from_affine(affine, "EPSG:4326", (width, 100) if sized else None)
    px, py = np.array([0.0, share * width, float(width)]), np.array([0.0, 50.0, 100.0])
    assert max(there_and_back(georef, px, py)) < 1e-6
    inside = 1e-9 < share * reach < reach - 1e-9  # where a turn ends, either edge is right
    if inside and reach < (360.0 if sized else 180.0):
        back = georef.to_pixel(*georef.to_lonlat(px, py))
        assert np.abs(back[0] - px)[1] * reach / width < 1e-9


@pytest.mark.parametrize("crs", ["EPSG:4326", "EPSG:4269"])
@pytest.mark.parametrize("west", [179.5, -180.5, 200.0, 0.0])
def test_a_grid_in_degrees_takes_longitudes_of_any_turn(west, crs):
    georef = Georef.from_affine((0.001, 0, west, 0, -0.001, 10), crs, (1000, 1000))
    lon, lat = georef.to_lonlat(800, 500)
    assert float(lon) == pytest.approx((west + 0.8 + 180) % 360 - 180)
    for turn in (-360, 0, 360):
        assert np.array(georef.to_pixel(lon + turn, lat)) == pytest.approx([800, 500], abs=1e-6)
        assert np.array(georef.to_pixel(west - 0.01 + turn, lat)) == pytest.approx([-10, 500], abs=1e-6)
    globe = Georef.from_affine((0.25, 0, 0, 0, -0.25, 90), crs, (1440, 720))
    assert np.array(globe.to_pixel([-90.0, 90.0], 0.0)[0]).tolist() == [1080.0, 360.0]


def test_rpcs_take_longitudes_of_any_turn():
    georef = Georef.from_rpcs(made_up_rpc(long_off=179.99).to_gdal())
    px, py = np.array([1000.0, 11_000.0]), np.array([5000.0, 5000.0])
    lon, lat = georef.to_lonlat(px, py)
    assert lon[0] > 0 > lon[1]
    np.testing.assert_allclose(georef.to_pixel(lon, lat), (px, py), atol=0.05)


def test_no_georeference_gives_pixels_and_refuses_the_ground():
    assert Georef().crs is None
    np.testing.assert_array_equal(Georef().to_map([1.5], [2.5]), ([1.5], [2.5]))
    with pytest.raises(GeorefError, match="no georeference"):
        Georef().to_lonlat(0, 0)
    with pytest.raises(GeorefError, match="no CRS"):
        Georef.from_affine((1, 0, 0, 0, -1, 0)).to_lonlat(0, 0)
    assert Georef().gcp_residuals().size == 0


@pytest.mark.parametrize("crs", [LOCAL, "+proj=longlat +R=1737400 +no_defs"], ids=["site", "moon"])
def test_a_crs_that_is_not_of_the_earth_has_a_map_and_no_longitude(crs):
    georef = Georef.from_affine((0.5, 0, 10, 0, -0.5, 50), crs)
    assert georef.crs is not None and not georef.on_earth
    assert np.array(georef.to_map(2, 4)).tolist() == [11, 48]
    assert georef.ground_sampling_distance(0, 0) is None
    with pytest.raises(GeorefError, match="not of the Earth"):
        georef.to_lonlat(0, 0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Georef.from_affine((1, 1, 0, 1, 1, 0)),
        lambda: Georef.from_affine((np.nan, 0, 0, 0, 1, 0)),
        lambda: Georef.from_affine((1, 0, 0, 0, -1, 0), "no such CRS"),
        lambda: Georef.from_gcps([(0, 0, 1, 1), (1, 0, 2, 1)]),
        lambda: Georef.from_gcps([(i, i, i, i * i) for i in range(5)]),
        lambda: Georef.from_gcps([(i, i * i, i, i) for i in range(5)]),
        lambda: Georef.from_gcps([(0, 0, 1, 1), (0, 0, 2, 1), (0, 1, 2, 2), (1, 1, 3, 2)]),
        lambda: Georef.from_gcps([(0, 0, 1, 1), (0, 1, np.inf, 1), (1, 1, 2, 2)]),
        lambda: Georef("rpcs"),
        lambda: Georef("gcps"),
    ],
)
def test_degenerate_georeferences_are_refused_in_one_line(make):
    with pytest.raises(GeorefError) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_points_off_the_map_are_nan_and_do_not_spoil_the_others():
    polar = Georef.from_affine((1e7, 0, 0, 0, -1e7, 0), "EPSG:3857")
    lon, lat = polar.to_lonlat([0.0, np.nan], [0.0, 1.0])
    assert float(lon[0]) == 0.0
    assert np.isnan(lat[1])
    gcps = Georef.from_gcps(slant_gcps(), "EPSG:4326")
    px, _ = gcps.to_pixel([78.1, np.nan], [10.6, 10.6])
    assert np.isfinite(px[0])
    assert np.isnan(px[1])
