"""Weights on disk: what is saved comes back; what is damaged says so in one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import TINY

from babelrs_geo.errors import OutputError, ParameterError, WeightsError
from babelrs_geo.models import checkpoints, zoo
from babelrs_geo.models.checkpoints import Header
from babelrs_geo.models.detector import Detector, DetectorConfig


def header(config: DetectorConfig = TINY) -> Header:
    return Header(
        name="tiny",
        classes=dict(config.classes),
        box_kind={"sar": "horizontal", "rgb": "oriented", "ir": "oriented"},
        gsd={"sar": (1.0, 15.0), "rgb": (0.08, 2.0), "ir": (0.05, 0.3)},
        thresholds={s: dict.fromkeys(names, 0.0) for s, names in config.classes.items()},
        radiometry={},
        architecture=config.to_dict(),
        licence="none",
    )


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    checkpoints.save(path, Detector(TINY), header())
    return path


def test_weights_come_back_with_their_header(file: Path) -> None:
    model, told = checkpoints.load(file)
    assert told.config == TINY
    assert told.to_json() == header().to_json()
    assert all(v.dtype == torch.float16 for v in load_file(file).values())
    assert not model.training
    assert list(file.parent.iterdir()) == [file]


def test_reading_weights_draws_no_number_of_the_callers(file: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    checkpoints.load(file)
    assert torch.equal(torch.rand(4), expected)


def test_a_detector_gives_detections_of_its_sensor(file: Path) -> None:
    weights = zoo.load(file)
    images = np.random.default_rng(0).random((2, 3, 64, 64), np.float32)
    for sensor, kind in header().box_kind.items():
        found = weights.detector(sensor)(images)
        assert len(found) == 2
        assert found[0].classes == TINY.classes[sensor]
        assert found[0].oriented == (kind == "oriented")
        assert len(found[0])
        assert len(weights.detector(sensor, score=2.0)(images)[0]) == 0
    chosen = weights.detector("rgb", classes=["ship"])(images)[0]
    assert set(chosen.class_names) <= {"ship"}


def test_bytes_are_found_in_as_what_they_stand_for(file: Path) -> None:
    weights = zoo.load(file)
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 64, 64), np.uint8)
    for sensor in header().box_kind:
        find = weights.detector(sensor)
        assert not find.takes_bytes and replace(weights, device="cuda:0").detector(sensor).takes_bytes
        for one, other in zip(find(images), find(images.astype(np.float32) / 255), strict=True):
            assert len(one) and one.boxes.tobytes() == other.boxes.tobytes()
            assert one.scores.tobytes() == other.scores.tobytes()


def test_what_weights_do_not_know_is_said(file: Path) -> None:
    weights = zoo.load(file)
    with pytest.raises(ParameterError, match='unknown class "truck" for sar: the weights know ship'):
        weights.detector("sar", classes=["truck"])
    lacking = replace(weights, header=replace(weights.header, classes={"sar": ("ship",)}))
    with pytest.raises(WeightsError, match=r'"tiny" know nothing of ir \(they know sar\)'):
        lacking.detector("ir")
    with pytest.raises(WeightsError, match='there are no weights "none"'):
        zoo.load("none")


def test_damage_is_named(file: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(WeightsError, match="not a readable safetensors file"):
        zoo.load(cut)
    state = load_file(file)
    save_file(state, tmp_path / "bare.safetensors")
    with pytest.raises(WeightsError, match="no babelrs-geo header"):
        zoo.load(tmp_path / "bare.safetensors")
    state.pop("backbone.level_embed")
    state["other"] = torch.zeros(1)
    save_file(state, tmp_path / "odd.safetensors", metadata={checkpoints.KEY: header().to_json()})
    with pytest.raises(WeightsError, match=r"1 missing \(backbone.level_embed\); 1 unexpected \(other\)"):
        zoo.load(tmp_path / "odd.safetensors")
    start = checkpoints.Start("encoder", "e", {}, "none", format=99)
    save_file(state, tmp_path / "start.safetensors", metadata={checkpoints.KEY: start.to_json()})
    with pytest.raises(WeightsError, match="header format 99"):
        checkpoints.read(tmp_path / "start.safetensors")
    newer = replace(header(), format=99)
    save_file(state, tmp_path / "newer.safetensors", metadata={checkpoints.KEY: newer.to_json()})
    with pytest.raises(WeightsError, match="header format 99"):
        zoo.load(tmp_path / "newer.safetensors")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"classes": []}, r"header cannot be read \(classes is \[\]; expected a mapping\)"),
        ({"gsd": {"sar": [1]}}, r"gsd\.sar is \[1\]; expected a list of 2"),
        ({"licence": None}, "licence is None; expected a text"),
        ({"kind": "detector"}, "kind is 'detector'; expected one of encoder"),
        (
            {"architecture": {"rpn": {"soft_nms": True}}},
            r'weights "tiny" cannot be read \(there is no rpn\.soft_nms;',
        ),
        ({"architecture": {"neck_channels": "many"}}, "neck_channels is 'many'; expected a whole number"),
    ],
)
def test_a_header_that_does_not_fit_is_told(
    file: Path, tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    odd = tmp_path / "odd.safetensors"
    values = json.loads(header().to_json()) | change
    if "kind" in change:
        values = {"kind": "detector", "name": "e", "architecture": {}, "licence": "none", "format": 1}
    save_file(load_file(file), odd, metadata={checkpoints.KEY: json.dumps(values)})
    with pytest.raises(WeightsError, match=told) as caught:
        checkpoints.describe(odd)
    assert "\n" not in str(caught.value)


def test_weights_that_cannot_be_written_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        checkpoints.save(tmp_path / "missing" / "w.safetensors", Detector(TINY), header())
    assert not list(tmp_path.iterdir())
