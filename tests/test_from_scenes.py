"""The whole road from scenes and labels to weights that are judged, in one command."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_checkpoints import header
from test_datasets import write_soi
from tiny_model import TINY
from tiny_recipe import write_recipe

from babelrs_geo.chips import read_index, read_labels
from babelrs_geo.models import checkpoints
from babelrs_geo.models.detector import Detector

sys.path.insert(0, str(Path(__file__).parents[1] / "pipelines"))

import from_scenes

SHARED = Path(os.environ.get("BABELRS_GEO_SHARED", Path(__file__).parents[2] / "shared"))


def write_data(root: Path) -> None:
    """Frames of three sensors with a val split that is the train split again, and two scenes of aircraft."""
    soi, aircraft = root / "soi_mini", root / "airbus_aircraft"
    write_soi(soi, images=36)
    for train, val in (
        ("DOTA_800pix/train", "DOTA_800pix/val"),
        ("DroneVehicle/dota_train", "DroneVehicle/dota_val"),
    ):
        shutil.copytree(soi / train, soi / val)
    marks = soi / "SARDet_50K" / "Annotations"
    shutil.copy(marks / "after_merge_train.json", marks / "after_merge_val.json")
    aircraft.mkdir()
    rows = ["id,image_id,geometry,class"]
    for k in range(2):
        picture = np.full((150, 150, 3), 40, np.uint8)
        for i, (x, y) in enumerate((a, b) for a in range(10, 130, 40) for b in range(10, 130, 40)):
            picture[y : y + 14, x : x + 18] = 230
            ring = [(x, y), (x + 18, y), (x + 18, y + 14), (x, y + 14), (x, y)]
            rows.append(f'{i},{k}.jpg,"{ring}",Airplane')
        Image.fromarray(picture).save(aircraft / f"{k}.jpg")
    (aircraft / "annotations.csv").write_text("\n".join(rows))


def check(out: Path) -> dict[str, dict]:
    """What the road leaves, whatever the data."""
    figures = json.loads((out / "report.json").read_text())
    for sensor in ("sar", "rgb", "ir"):
        own, index = figures[sensor], read_index(out / "chips" / sensor)
        assert set(index["sensor"]) == {sensor} and set(index["split"]) == {"train", "val"}
        assert set(index["georef"]) == {"affine"} and (index["gsd"] > 0).all()
        assert own["objects"] == len(read_labels(out / "chips" / sensor)) > 0
        assert own["windows"] == 8
        assert own["ground"]["objects"] > 0
        for when in ("before", "after"):
            assert 0 <= own[when]["map"] <= own[when]["ap50"] <= 1
    training = checkpoints.read_header(out / "run" / "final.safetensors").training
    assert training["images"] == {s: figures[s]["chips"]["train"] for s in ("sar", "rgb", "ir")}
    return figures


def test_generated_scenes_go_all_the_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_data(tmp_path / "data")
    torch.manual_seed(0)
    checkpoints.save(tmp_path / "start.safetensors", Detector(TINY), header())
    recipe = write_recipe(tmp_path / "tiny.yaml")
    out = tmp_path / "out"
    small = ["--frames", "36", "--size", "128", "--crop", "64", "--steps", "2", "--device", "cpu"]
    given = ["--recipe", str(recipe), "--start", str(tmp_path / "start.safetensors")]
    from_scenes.main([str(tmp_path / "data"), str(out), *small, *given])
    figures = check(out)
    assert figures["rgb"]["scenes"] == 2
    assert {"airbus_0", "rgb_train"} == set(read_index(out / "chips" / "rgb")["scene"])
    told = capsys.readouterr().out
    assert all(f"\n| {sensor} | " in told for sensor in ("sar", "rgb", "ir"))
    before = checkpoints.read_header(out / "run" / "final.safetensors").training["before"]
    assert before["sha256"] == checkpoints.sha256(tmp_path / "start.safetensors")


@pytest.mark.shared
@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="the shared data are not here")
def test_real_scenes_go_all_the_way(tmp_path: Path) -> None:
    few = ["--frames", "8", "--size", "256", "--crop", "128", "--steps", "2", "--device", "cpu"]
    from_scenes.main([str(SHARED / "data"), str(tmp_path / "out"), *few])
    check(tmp_path / "out")
