"""A detector as ONNX: what ONNX Runtime computes gives the boxes that torch finds."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from tiny_model import TINY

from babelrs_geo.cli import main
from babelrs_geo.errors import OutputError, ParameterError, WeightsError
from babelrs_geo.models import checkpoints
from babelrs_geo.models.checkpoints import Header
from babelrs_geo.models.detector import Detector
from babelrs_geo.models.onnx import Dense, export_onnx


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector with random weights that knows SAR and RGB."""
    torch.manual_seed(0)
    classes = {sensor: TINY.classes[sensor] for sensor in ("sar", "rgb")}
    header = Header(
        name="tiny",
        classes=classes,
        box_kind={"sar": "horizontal", "rgb": "oriented"},
        gsd=dict.fromkeys(classes, (0.1, 10.0)),
        thresholds={sensor: dict.fromkeys(names, 0.1) for sensor, names in classes.items()},
        radiometry=dict.fromkeys(classes, "as it is"),
        architecture=TINY.to_dict(),
        licence="none",
    )
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    checkpoints.write(path, Detector(TINY).state_dict(), {checkpoints.KEY: header.to_json()})
    return path


@pytest.mark.slow
@pytest.mark.parametrize("sensor", ["sar", "rgb"])
def test_boxes_of_the_exported_program_are_those_of_torch(weights: Path, tmp_path: Path, sensor: str) -> None:
    target = tmp_path / "program.onnx"
    done = CliRunner().invoke(
        main, ["weights", "export", str(weights), "-o", str(target), "--as", "onnx", "--sensor", sensor]
    )
    assert done.exit_code == 0, done.output
    model, header = checkpoints.load(weights)
    dense = Dense(model, sensor)
    session = onnxruntime.InferenceSession(target, providers=["CPUExecutionProvider"])
    told = session.get_modelmeta().custom_metadata_map
    assert Header.from_json(told["babelrs_geo"]) == header and told["sensor"] == sensor
    assert [output.name for output in session.get_outputs()] == dense.names()
    for batch in (1, 3):
        images = torch.rand(batch, 3, header.tile, header.tile)
        result = tuple(map(torch.from_numpy, session.run(None, {"images": images.numpy()})))
        sizes = [(header.tile, header.tile)] * batch
        found = model.finish(*dense.unpack(result), sensor, sizes)
        for (a, s, k), (b, t, m) in zip(model.predict(images, sensor), found, strict=True):
            assert len(a) == len(b) > 0
            torch.testing.assert_close(b[:, :4], a[:, :4], atol=0.01, rtol=0)
            torch.testing.assert_close(t, s, atol=1e-3, rtol=0)
            assert torch.equal(k, m)


def test_what_cannot_be_exported_is_told(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="know nothing of ir"):
        export_onnx(weights, tmp_path / "a.onnx", "ir")
    with pytest.raises(ParameterError, match=r"ends with \.onnx"):
        export_onnx(weights, tmp_path / "a.bin", "sar")
    there = tmp_path / "there.onnx"
    there.write_text("")
    with pytest.raises(OutputError, match="exists already"):
        export_onnx(weights, there, "sar")
    assert there.read_text() == ""
    for words in (["--as", "onnx"], ["--sensor", "sar"]):
        done = CliRunner().invoke(
            main, ["weights", "export", str(weights), "-o", str(tmp_path / "b.onnx"), *words]
        )
        assert done.exit_code == 2 and "--as onnx alone" in done.output
    assert [p.name for p in tmp_path.iterdir()] == ["there.onnx"]
