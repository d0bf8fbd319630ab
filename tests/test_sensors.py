"""Which sensor, which bands, which unit; and that numbers become model input as the documentation says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from babelrs_geo.errors import ParameterError, SensorError
from babelrs_geo.sensors import (
    Bands,
    Radiometry,
    Sensor,
    choose_bands,
    choose_kind,
    estimate,
    infer,
)

RGB = ("red", "green", "blue")
RNG = np.random.default_rng(0)


def bands(dtype="uint16", interpretations=("gray",), **what):
    return Bands(dtype=dtype, interpretations=interpretations, **{"name": "scene.tif", **what})


def eight_bit(sensor, count):
    return Radiometry(
        sensor=sensor,
        kind="uint8",
        bands=tuple(range(1, count + 1)),
        low=(0.0,) * count,
        high=(255.0,) * count,
    )


@pytest.mark.parametrize("sensor", Sensor)
def test_eight_bit_is_x_over_255_exactly(sensor):
    count = 3 if sensor is Sensor.RGB else 1
    raw = np.arange(256, dtype=np.uint8).reshape(1, 16, 16).repeat(count, 0)
    image = eight_bit(sensor, count).apply(raw, np.ones((16, 16), bool))
    assert image.dtype == np.float32
    assert image.shape == (3, 16, 16)
    for plane in image:
        np.testing.assert_array_equal(plane.ravel(), np.arange(256, dtype=np.float32) / np.float32(255))


@given(
    arrays.arrays(np.float32, (1, 5, 4), elements=st.floats(width=32, allow_nan=True, allow_infinity=True)),
    arrays.arrays(bool, (5, 4)),
    st.sampled_from(["amplitude", "intensity", "db"]),
)
def test_model_input_lies_in_0_to_1_and_is_0_where_not_valid(raw, valid, kind):
    valid = valid & np.isfinite(raw[0])
    radiometry = Radiometry(sensor=Sensor.SAR, kind=kind, bands=(1,), low=(-30.0,), high=(5.0,))
    image = radiometry.apply(raw, valid)
    assert np.isfinite(image).all()
    assert image.min() >= 0
    assert image.max() <= 1
    assert (image[:, ~valid] == 0).all()
    assert (image[0] == image[1]).all()
    assert (image[0] == image[2]).all()


def test_amplitude_intensity_and_db_of_one_scene_look_the_same():
    amplitude = RNG.rayleigh(30.0, (1, 64, 64)).astype(np.float64) + 1e-3
    valid = np.ones((64, 64), bool)
    versions = {"amplitude": amplitude, "intensity": amplitude**2, "db": 20 * np.log10(amplitude)}
    seen = []
    for kind, raw in versions.items():
        found = estimate(Sensor.SAR, kind, (1,), raw.reshape(1, -1), bands("float64"))
        seen.append(found.apply(raw, valid))
    np.testing.assert_allclose(seen[1], seen[0], atol=1e-6)
    np.testing.assert_allclose(seen[2], seen[0], atol=1e-6)


def test_sar_puts_open_sea_where_the_training_frames_have_it():
    """SSDD: the median of the sea is 24 of 255 and ships saturate, with and without land in the scene."""
    sea, land = RNG.rayleigh(20.0, 60_000), RNG.rayleigh(150.0, 40_000)
    for scene in (sea, np.concatenate([sea, land])):
        found = estimate(Sensor.SAR, "amplitude", (1,), scene[None], bands("float32"))
        image = found.apply(sea[None, None], np.ones((1, sea.size), bool))
        assert 12 < np.median(image) * 255 < 40
        assert found.apply(np.full((1, 1, 1), 400.0), np.ones((1, 1), bool)).min() == 1.0


def test_infrared_looks_the_same_in_every_unit_and_like_the_frames():
    celsius = RNG.normal(20.0, 5.0, 10_000)
    seen = []
    for kind, raw in (
        ("celsius", celsius),
        ("kelvin", celsius + 273.15),
        ("centikelvin", (celsius + 273.15) * 100),
    ):
        found = estimate(Sensor.IR, kind, (1,), raw[None], bands("float64"))
        seen.append(found.apply(raw[None, None], np.ones((1, raw.size), bool)))
        assert np.percentile(seen[-1], [0.5, 99.5]) * 255 == pytest.approx([24, 224], abs=0.5)
    np.testing.assert_allclose(seen[1], seen[0], atol=1e-6)
    np.testing.assert_allclose(seen[2], seen[0], atol=1e-6)


def test_sixteen_bit_colour_is_stretched_a_band_at_a_time():
    raw = RNG.integers(300, 3000, (3, 5000)).astype(np.uint16) * np.array([[1], [2], [3]], np.uint16)
    found = estimate(Sensor.RGB, "reflectance", (1, 2, 3), raw, bands(interpretations=RGB))
    image = found.apply(raw[:, None], np.ones((1, 5000), bool))
    assert np.ptp(image.mean(axis=(1, 2))) < 0.02
    assert found.high[2] == pytest.approx(3 * found.high[0], rel=0.02)


def test_scale_and_offset_lead_to_the_unit():
    found = estimate(
        Sensor.SAR,
        "db",
        (1,),
        np.array([[-2000, -1500, -1000]], np.int16),
        bands("int16", scale=(0.01,), offset=(1.0,)),
    )
    raw = np.array([[[-1600]]], np.int16)  # -15 dB
    amplitude = 10 ** (-15 / 20) / 10 ** (found.high[0] / 20)
    assert found.apply(raw, np.ones((1, 1), bool)).max() == pytest.approx(amplitude, abs=1e-6)


@pytest.mark.parametrize(
    "sample", [np.zeros((1, 0)), np.zeros((1, 9)), np.full((1, 9), 7.0), np.full((1, 9), np.nan)]
)
@pytest.mark.parametrize("kind", ["amplitude", "intensity", "db", "counts"])
def test_empty_and_constant_scenes_still_have_a_range(sample, kind):
    sensor = Sensor.IR if kind == "counts" else Sensor.SAR
    found = estimate(sensor, kind, (1,), sample, bands("float32"))
    assert found.low[0] < found.high[0]


def test_json_there_and_back():
    found = Radiometry(
        sensor=Sensor.RGB,
        kind="reflectance",
        bands=(4, 3, 2),
        low=(0.1, 2, 3),
        high=(1 / 3, 5, 6),
        scale=(1e-4,) * 3,
    )
    assert Radiometry.from_json(found.to_json()) == found
    assert "\n" not in found.to_json()


@pytest.mark.parametrize(
    ("about", "expected"),
    [
        (bands("uint8", RGB), Sensor.RGB),
        (bands("uint16", (*RGB, "nir")), Sensor.RGB),
        (bands("uint8", (*RGB, "alpha"), tags="TIFFTAG_SOFTWARE=Sentinel-1 Toolbox"), Sensor.RGB),
        (bands(descriptions=("VV",)), Sensor.SAR),
        (bands("float32", ("gray", "undefined"), descriptions=("Sigma0_VH_db", "Sigma0_VV_db")), Sensor.SAR),
        (bands(tags="TIFFTAG_IMAGEDESCRIPTION=Sentinel-1A IW GRD HR L1"), Sensor.SAR),
        (bands("uint8", tags="platform=Umbra-04"), Sensor.SAR),
        (bands(name="s1a-iw-grd-vv-20201222t135000-20201222t135025-035796-0430b1-001.tiff"), Sensor.SAR),
        (bands("float32", ("sar_c",)), Sensor.SAR),
        (bands("float32", units=("K",)), Sensor.IR),
        (bands("float32", units=("degC",)), Sensor.IR),
        (bands("float32", ("tir",)), Sensor.IR),
        (bands("uint16", descriptions=("Thermal",)), Sensor.IR),
        (bands("uint16", tags="EXIF_Model=FLIR Vue Pro R"), Sensor.IR),
    ],
)
def test_metadata_that_settles_the_sensor(about, expected):
    sensor, reason = infer(about)
    assert sensor is expected
    assert reason


@pytest.mark.parametrize(
    "about",
    [
        bands("uint8"),
        bands("float32", ("gray", "undefined", "undefined")),
        bands("uint16", ("gray", "undefined"), descriptions=("B8", "B4")),
        bands(tags="platform=Sentinel-2"),
        bands(tags="TIFFTAG_SOFTWARE=have a VVide day"),
    ],
)
def test_metadata_that_settles_nothing_is_told_with_the_remedy(about):
    with pytest.raises(SensorError, match="--sensor sar, ir or rgb"):
        infer(about)


@pytest.mark.parametrize(
    ("sensor", "about", "expected"),
    [
        (Sensor.RGB, bands("uint8", RGB), (1, 2, 3)),
        (Sensor.RGB, bands("uint8", ("alpha", "blue", "green", "red")), (4, 3, 2)),
        (
            Sensor.RGB,
            bands(interpretations=("undefined",) * 4, descriptions=("Blue", "Green", "Red", "NIR")),
            (3, 2, 1),
        ),
        (
            Sensor.RGB,
            bands(
                interpretations=("gray", *("undefined",) * 5),
                descriptions=("Coastal blue", "1: Blue", "green_band", "near infra-red", "Red edge", "Red"),
            ),
            (6, 3, 2),
        ),
        (Sensor.RGB, bands(interpretations=("gray", *("undefined",) * 3)), (1, 2, 3)),
        (
            Sensor.RGB,
            bands(
                interpretations=("gray", *("undefined",) * 3),
                descriptions=[f"Band_{k}" for k in (1, 2, 3, 4)],
            ),
            (1, 2, 3),
        ),
        (Sensor.SAR, bands(interpretations=("gray", "undefined"), descriptions=("VH", "VV")), (2,)),
        (Sensor.SAR, bands(interpretations=("gray", "undefined")), (1,)),
        (Sensor.SAR, bands(interpretations=("gray", "alpha")), (1,)),
        (Sensor.IR, bands(interpretations=(*RGB, "tir")), (4,)),
        (Sensor.IR, bands(), (1,)),
    ],
)
def test_bands_are_chosen_by_colour_and_polarisation(sensor, about, expected):
    assert choose_bands(sensor, about) == expected


def test_numbers_that_are_no_decibels_are_refused():
    hundredths = 100 * RNG.normal(-12, 3, (1, 4000))
    about = bands("int16", descriptions=("VV dB",))
    assert choose_kind(Sensor.SAR, about, (1,), hundredths) == "db"
    with pytest.raises(
        SensorError, match=r"a median of -1\d{3}\S* expected -100 to 100; give the file its scale"
    ):
        estimate(Sensor.SAR, "db", (1,), hundredths, about)
    scaled = replace(about, scale=(0.01,))
    assert 0 < estimate(Sensor.SAR, "db", (1,), hundredths, scaled).high[0] < 30


def test_a_polarisation_and_bands_can_be_asked_for():
    about = bands(interpretations=("gray", "undefined"), descriptions=("VH", "VV"))
    assert choose_bands(Sensor.SAR, about, polarisation="vh") == (1,)
    assert choose_bands(Sensor.SAR, about, bands=(2,)) == (2,)
    measurement = bands(name="s1a-iw-grd-vh-20201222t135000-x.tiff")
    assert choose_bands(Sensor.SAR, measurement, polarisation="VH") == (1,)


@pytest.mark.parametrize(
    ("sensor", "about", "options"),
    [
        (Sensor.RGB, bands(), {}),
        (Sensor.RGB, bands("uint8", ("palette",)), {}),
        (Sensor.RGB, bands(interpretations=("gray", *("undefined",) * 4)), {}),
        (
            Sensor.RGB,
            bands(interpretations=("gray", *("undefined",) * 3), descriptions=("B02", "B03", "B04", "B08")),
            {},
        ),
        (Sensor.RGB, bands("uint8", RGB), {"polarisation": "VV"}),
        (Sensor.RGB, bands("uint8", RGB), {"bands": (1, 2)}),
        (Sensor.RGB, bands("uint8", RGB), {"bands": (1, 2, 4)}),
        (Sensor.IR, bands(interpretations=("gray", "undefined")), {}),
        (Sensor.SAR, bands(interpretations=("gray", *("undefined",) * 4)), {}),
        (Sensor.SAR, bands(interpretations=("alpha",)), {}),
        (Sensor.SAR, bands(descriptions=("VV",)), {"polarisation": "HH"}),
    ],
)
def test_bands_that_do_not_fit_are_refused_in_one_line(sensor, about, options):
    with pytest.raises(SensorError) as caught:
        choose_bands(sensor, about, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("sensor", "colours", "asked", "told"),
    [
        (Sensor.SAR, ("gray",), (4,), "bands is 4, but x.tif has 1 band, and sar takes one: pass 1"),
        (
            Sensor.RGB,
            RGB,
            (4, 2),
            "bands is 4,2, but x.tif has 3 bands, and rgb takes three: pass three from 1 to 3",
        ),
    ],
)
def test_bands_that_are_not_there_are_told_with_those_that_are(sensor, colours, asked, told):
    with pytest.raises(SensorError) as caught:
        choose_bands(sensor, bands("uint8", colours, name="x.tif"), asked)
    assert str(caught.value) == told


DB, POWER, NUMBERS = (
    RNG.normal(-15, 5, (1, 500)),
    RNG.exponential(0.05, (1, 500)),
    RNG.integers(0, 900, (1, 500)),
)


@pytest.mark.parametrize(
    ("sensor", "about", "sample", "expected"),
    [
        (Sensor.SAR, bands("uint8"), NUMBERS, "uint8"),
        (Sensor.SAR, bands("float64"), DB, "db"),
        (Sensor.SAR, bands("float32", descriptions=("Sigma0_VV",)), DB, "db"),
        (Sensor.SAR, bands("float32", units=("dB",)), DB + 60, "db"),
        (Sensor.SAR, bands("float32", descriptions=("Sigma0_VV_db",)), DB + 60, "db"),
        (
            Sensor.SAR,
            bands("float32", units=("amplitude_db",), descriptions=("Amplitude_VV",)),
            DB + 60,
            "db",
        ),
        (Sensor.SAR, bands("float32"), POWER, "intensity"),
        (Sensor.SAR, bands("float32", descriptions=("Gamma0_VV",)), POWER - 0.02, "intensity"),
        (Sensor.SAR, bands("float32"), POWER - 0.02, "intensity"),
        (Sensor.SAR, bands("float32", descriptions=("Amplitude_VV",)), POWER, "amplitude"),
        (Sensor.SAR, bands("float32"), NUMBERS, "amplitude"),
        (Sensor.SAR, bands("uint16"), NUMBERS, "amplitude"),
        (Sensor.SAR, bands("int16", scale=(0.01,), offset=(0.0,)), DB * 100, "db"),
        (Sensor.SAR, bands("complex64"), POWER * 1j, "amplitude"),
        (Sensor.IR, bands("float32"), DB + 300, "kelvin"),
        (Sensor.IR, bands("uint16"), DB + 29_000, "centikelvin"),
        (Sensor.IR, bands("uint16"), NUMBERS + 7000, "counts"),
        (Sensor.IR, bands("float32"), DB + 30, "celsius"),
        (Sensor.IR, bands("float32", units=("K",)), DB + 30, "kelvin"),
        (Sensor.RGB, bands("float32", RGB), NUMBERS, "reflectance"),
    ],
)
def test_the_unit_is_told_from_metadata_and_values(sensor, about, sample, expected):
    assert choose_kind(sensor, about, (1,), sample) == expected


def test_units_can_be_asked_for_but_must_fit():
    assert choose_kind(Sensor.SAR, bands(), (1,), DB, "dB") == "db"
    with pytest.raises(SensorError, match="kelvin"):
        choose_kind(Sensor.SAR, bands(), (1,), DB, "kelvin")


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "kelvin"},
        {"low": (2.0,), "high": (1.0,)},
        {"high": (np.inf,)},
        {"bands": (1, 2)},
        {"sensor": Sensor.RGB, "kind": "uint8"},
    ],
)
def test_a_radiometry_that_makes_no_sense_cannot_be_built(wrong):
    fields = {"sensor": Sensor.SAR, "kind": "db", "bands": (1,), "low": (0.0,), "high": (1.0,)}
    with pytest.raises((ParameterError, SensorError)):
        Radiometry(**{**fields, **wrong})


def test_a_range_the_wrong_way_round_is_told_as_it_was_given():
    with pytest.raises(
        ParameterError, match="range is 5 to 1, expected two numbers, the first below the second"
    ):
        Radiometry(sensor=Sensor.SAR, kind="db", bands=(1,), low=(5.0,), high=(1.0,))


def test_an_unknown_sensor_is_told_the_known_ones():
    assert Sensor.parse("SAR") is Sensor.SAR
    with pytest.raises(SensorError, match="sar, ir, rgb"):
        Sensor.parse("lidar")
