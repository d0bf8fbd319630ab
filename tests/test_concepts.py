"""One name for one thing: the benchmarks' classes, and English around them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from babelrs_geo.concepts import ALIASES, concept, counted, indefinite, listed, plural, tidy
from babelrs_geo.errors import LabelError

# BabelRS section 1: SAR, RGB and infrared share one label space, in which a thing has up to three names.
SOI_DET = {
    "sar": "ship aircraft car tank bridge harbor",
    "rgb": "small-vehicle large-vehicle plane Ship Harbor tennis-court soccer-ball-field ground-track-field "
    "baseball-diamond swimming-pool roundabout basketball-court storage-tank Bridge helicopter",
    "ir": "CAR BUS FERIGHT_CAR TRUCK VAN",
}
words = st.text(st.characters(whitelist_categories=["Ll", "Lu", "Nd"], max_codepoint=127), min_size=1)


def test_sensors_share_names():
    named = {sensor: {concept(name) for name in names.split()} for sensor, names in SOI_DET.items()}
    assert {len(named[s]) for s in ("sar", "ir")} == {6, 5} and len(named["rgb"]) == 15
    assert named["sar"] & named["rgb"] == {
        "ship",
        "plane",
        "car",
        "bridge",
        "harbor",
        "storage tank",
    }
    assert named["sar"] & named["ir"] == named["rgb"] & named["ir"] == {"car"}
    assert set().union(*named.values()) <= set(ALIASES)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("FERIGHT_CAR", "freight car"),
        ("freight car", "freight car"),
        ("aircraft", "plane"),
        ("Airplanes", "plane"),
        ("storagetank", "storage tank"),
        ("storage tanks", "storage tank"),
        ("tank", "storage tank"),
        ("golffield", "golf course"),
        ("other-vehicle", "truck"),
        ("OtherVehicle", "truck"),
        ("people", "person"),
        ("  harbours ", "harbor"),
        ("Container_Crane", "container crane"),
        ("Wind-Turbine", "wind turbine"),
        ("SAM_site", "sam site"),
    ],
)
def test_names_come_to_concepts(name, expected):
    assert concept(name) == expected


@given(words)
def test_a_concept_is_its_own_concept(name):
    assert concept(concept(name)) == concept(name)
    assert tidy(tidy(name)) == tidy(name)


def test_every_known_name_in_singular_and_plural_is_its_concept():
    for thing, others in ALIASES.items():
        for name in (thing, *others):
            assert {concept(name), concept(plural(name)), concept(name.title().replace(" ", "-"))} == {thing}


@pytest.mark.parametrize("name", ["", "  ", "-", "__"])
def test_a_class_without_a_name_is_refused(name):
    with pytest.raises(LabelError, match="rename it"):
        concept(name)


def test_english():
    assert [plural(t) for t in ("ship", "person", "bus", "overpass", "factory", "wind turbines", "tank")] == [
        "ships",
        "people",
        "buses",
        "overpasses",
        "factories",
        "wind turbines",
        "tanks",
    ]
    assert [indefinite(t) for t in ("ship", "airport", "overpass", "university", "hourglass", "oil rig")] == [
        "a ship",
        "an airport",
        "an overpass",
        "a university",
        "an hourglass",
        "an oil rig",
    ]
    assert [counted("bus", n) for n in (0, 1, 2, 10, 11)] == [
        "no buses",
        "a bus",
        "two buses",
        "ten buses",
        "many buses",
    ]
    assert [listed(p) for p in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a and b", "a, b and c"]
