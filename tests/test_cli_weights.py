"""The verbs of `babelrs-geo weights`: what they write, what they say, how they end; the full model end to end."""

from __future__ import annotations

import json
from pathlib import Path

import geopandas as gpd
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import Raster, write_raster
from golden import GOLDEN
from rasterio.transform import from_origin
from safetensors.torch import load_file, save_file
from tiny_model import TINY

from babelrs_geo import cli
from babelrs_geo.models import checkpoints, importing, official
from babelrs_geo.models.detector import Detector, DetectorConfig
from babelrs_geo.models.vit import ViTConfig

VIT = ViTConfig(image_size=56, patch=14, dim=24, depth=2, heads=2)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with an official-style detector and encoder of tiny sizes, and an empty cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(importing, "PAPER", importing.Targets(TINY, VIT))
    torch.manual_seed(0)
    torch.save({"state_dict": Detector(TINY).state_dict(), "meta": {}}, "official.pth")
    shapes = official.encoder_shapes(VIT)
    save_file({k: torch.randn(shape) for k, shape in shapes.items()}, "vit.safetensors")
    return tmp_path


def call(*arguments: object) -> Result:
    return CliRunner().invoke(cli.main, [str(each) for each in arguments])


def told(*arguments: object) -> str:
    result = call(*arguments)
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


def refused(*arguments: object) -> str:
    result = call(*arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    return line.removeprefix("babelrs-geo: error: ")


def test_imported_weights_are_listed_described_used_and_exported(folder: Path) -> None:
    said = told("weights", "import", "official.pth").splitlines()
    assert said[0] == f"Imported the detector babelrs: {len(Detector(TINY).state_dict())} tensors."
    assert said[1] == "Licence of these weights: CC BY-NC 4.0"
    assert said[2].endswith("babelrs-geo detect scene.tif --sensor sar --weights babelrs")
    assert "assumptions" in said[3]
    assert told("weights", "import", "vit.safetensors").endswith("which detects nothing by itself\n")

    rows = {row["name"]: row for row in json.loads(told("weights", "list", "--json"))}
    assert list(rows) == ["compact", "babelrs", "babelrs-vit"]
    assert (rows["compact"]["from"], rows["babelrs"]["from"]) == ("bundled", "yours")
    assert rows["babelrs"]["licence"] == "CC BY-NC 4.0" and rows["babelrs-vit"]["kind"] == "encoder"
    table = told("weights", "list").splitlines()
    assert len(table) == 5 and table[2].split()[:2] == ["babelrs", "detector"]
    assert table[-1] == f"Your own lie in {folder / 'cache/babelrs-geo/weights'}"

    own = json.loads(told("weights", "info", "babelrs", "--json"))
    parameters = sum(p.numel() for p in Detector(TINY).parameters())
    assert (own["parameters"], own["precision"], own["input"]) == (parameters, "float32", 64)
    assert own["sha256"] == checkpoints.sha256(own["file"]) and own["licence"] == "CC BY-NC 4.0"
    assert own["sensors"]["rgb"]["classes"] == list(TINY.classes["rgb"])
    assert "CC BY-NC 4.0" in told("weights", "info", "babelrs-vit")

    pixels = np.random.default_rng(0).integers(1, 255, (3, 70, 90), dtype=np.uint8)
    write_raster(folder / "scene", Raster(pixels, transform=from_origin(380_000, 3_735_000, 1, 1)))
    told("detect", "scene.tif", "--sensor", "rgb", "--weights", "babelrs", "--overlap", 16, "--score", 0.05)
    assert len(gpd.read_file("scene_detections.gpkg", layer="detections"))
    line = refused("detect", "scene.tif", "--sensor", "rgb", "--weights", "babelrs-vit", "--overwrite")
    assert "holds no detector but what one is trained from (kind encoder)" in line

    said = told("weights", "export", "babelrs", "-o", "out.safetensors")
    assert said.startswith("Written to out.safetensors: ")
    state = torch.load("official.pth", weights_only=True)["state_dict"]
    assert all(torch.equal(value, state[key]) for key, value in load_file("out.safetensors").items())


def test_info_tells_the_bundled_weights_figures_and_terms(folder: Path) -> None:
    text = told("weights", "info", "compact")
    header = checkpoints.read_header(Path(cli.__file__).parents[1] / "models/weights/compact.safetensors")
    figures = header.metrics["sar"]
    low, high = figures["ap50_interval"]
    assert f"{figures['ap50']:.3f} ({low:.3f} to {high:.3f}) on {figures['images']} images" in text
    for words in (
        "horizontal boxes at ",
        "oriented boxes at ",
        "person from ",
        header.licence,
        "tiles of 640 px",
    ):
        assert words in text
    assert len(text.splitlines()) < 40 and "phases" not in text
    assert text.splitlines()[-1] == "recipe              --json shows it (before, config)"
    assert "phases" in json.loads(told("weights", "info", "compact", "--json"))["training"]["config"]


def test_what_cannot_be_done_is_said_in_one_line(folder: Path) -> None:
    Path("page.pth").write_text("<html>404</html>")
    assert "page.pth is a web page" in refused("weights", "import", "page.pth")
    assert "there is no file none.pth" in refused("weights", "import", "none.pth")
    assert "there are no weights" in refused("weights", "info", "none")
    assert "weights import" in refused("weights", "info", "vit.safetensors")
    told(
        "weights",
        "import",
        "official.pth",
        "-o",
        "w.safetensors",
        "--name",
        "mine",
        "--half",
        "--licence",
        "own",
    )
    before = Path("w.safetensors").read_bytes()
    assert "--overwrite" in refused("weights", "import", "official.pth", "-o", "w.safetensors")
    assert Path("w.safetensors").read_bytes() == before
    told("weights", "import", "official.pth", "-o", "w.safetensors", "--overwrite")
    text = told("weights", "info", "w.safetensors")
    assert "float32" in text and "none in the file" in text
    assert "--overwrite" in refused("weights", "export", "w.safetensors", "-o", "vit.safetensors")
    assert "no layout in transformers" in refused(
        "weights", "export", "w.safetensors", "-o", "o.safetensors", "--as", "transformers"
    )


def test_a_damaged_file_among_the_users_own_spoils_nothing(folder: Path) -> None:
    told("weights", "import", "official.pth")
    Path("cache/babelrs-geo/weights/odd.safetensors").write_text("odd")
    rows = {row["name"]: row for row in json.loads(told("weights", "list", "--json"))}
    assert rows["odd"]["kind"] == "damaged" and rows["babelrs"]["kind"] == "detector"


# ---- the paper's sizes


def published() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published detector: the original's where they are at hand, ours otherwise."""
    if GOLDEN.is_dir():
        entries = json.loads((GOLDEN / "official_state_dict.json").read_text())["state_dict"]
        return {entry["key"]: tuple(entry["shape"]) for entry in entries}
    with torch.device("meta"):
        return {k: tuple(v.shape) for k, v in Detector(DetectorConfig()).state_dict().items()}


@pytest.mark.slow
def test_the_full_model_goes_from_a_published_file_to_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shapes = published()
    assert len(shapes) == 630
    made = torch.Generator().manual_seed(0)
    state = {k: torch.empty(shape).normal_(0, 0.02, generator=made) for k, shape in shapes.items()}
    state["sar_bbox_head.integral.project"] = torch.linspace(0, 16, 17)
    state["sar_bbox_head.gfl_cls.bias"].fill_(0.0)
    torch.save({"meta": {"epoch": 12}, "state_dict": {f"module.{k}": v for k, v in state.items()}}, "b.pth")
    del state
    said = told("weights", "import", "b.pth", "-o", "b.safetensors")
    assert "630 tensors" in said and "CC BY-NC 4.0" in said
    Path("b.pth").unlink()

    pixels = np.random.default_rng(0).integers(1, 255, (300, 380), dtype=np.uint8)
    write_raster(tmp_path / "scene", Raster(pixels))
    done = told(
        "detect",
        "scene.tif",
        "--sensor",
        "sar",
        "--weights",
        "b.safetensors",
        "--score",
        0.1,
        "--gsd",
        "native",
        "--json",
        "--batch",
        1,
    )
    summary = json.loads(done)
    assert summary["parameters"]["tile"] == 800 and summary["tiles"]["detected"] == 1
    found = gpd.read_file("scene_detections.gpkg", layer="detections")
    assert (
        set(found["class"]) <= set(DetectorConfig().classes["sar"])
        and len(found) == summary["detections"] > 0
    )


@pytest.mark.slow
def test_the_published_encoder_comes_in_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shapes = official.encoder_shapes(official.INTERNVIT)
    save_file({k: torch.full(s, 0.01, dtype=torch.bfloat16) for k, s in shapes.items()}, "vit.safetensors")
    assert "340 tensors" in told("weights", "import", "vit.safetensors", "-o", "encoder.safetensors")
    own = json.loads(told("weights", "info", "encoder.safetensors", "--json"))
    assert (own["parameters"], own["precision"]) == (304_012_288, "bfloat16")
    with torch.device("meta"):
        model = Detector(DetectorConfig())
    backbone = official.backbone_of(load_file("encoder.safetensors"), model.config.backbone.vit)
    transformer = ("backbone.embeddings.", "backbone.layers.")
    wanted = {k: v.shape for k, v in model.state_dict().items() if k.startswith(transformer)}
    assert {k: v.shape for k, v in backbone.items()} == wanted
