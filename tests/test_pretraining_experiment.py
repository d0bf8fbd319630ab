"""The experiment on pretraining: its arms are what the protocol says, and a short one runs and goes on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_pretraining import write_data, write_pretraining
from tiny_recipe import tiny_recipe

from babelrs_geo.models.plain import from_plain
from babelrs_geo.training.pretrain.recipe import read
from babelrs_geo.training.pretrain.run import encoder_of
from babelrs_geo.training.recipe import Recipe
from babelrs_geo.training.run import configuration

sys.path.insert(0, str(Path(__file__).parents[1] / "pipelines"))

import pretraining_experiment as experiment

# Python 3.12 warns where a loader's workers are forked from a process with threads
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def test_the_arms_of_the_protocol_differ_in_what_it_says_alone() -> None:
    protocol = yaml.safe_load(experiment.PROTOCOL.read_text())
    every = experiment.arms(protocol)
    assert [arm.folder for arm in every][:6] == ["A.1", "C.1", "B.1", "D.1.sar", "D.1.rgb", "D.1.ir"]
    assert [arm.folder for arm in every if arm.precision == "bf16"] == ["A16.1", "C16.1", "B16.1"]
    assert {arm.steps for arm in every if arm.precision == "bf16"} == {300}
    assert [arm.folder for arm in every if arm.architecture] == ["A192.1", "A256.1"]
    assert [arm.folder for arm in every if arm.frozen] == ["AF.1", "CF.1", "BF.1"]
    assert {arm.name: arm.every for arm in every if arm.every != 1} == {"AT": 10, "CT": 10}
    assert len(every) == 3 * 3 + 3 + 3 + 2 + 3 + 2 * 3
    assert [arm.folder for arm in every if arm.name == "D"] == ["D.1.sar", "D.1.rgb", "D.1.ir"]
    assert [arm.taps for arm in every[:4]] == [None, "paper", "last", None]
    recipe = from_plain(Recipe, protocol["train"])
    assert {view.chosen.size for view in recipe.phases[0].views.values()} == {160}
    pretrained = read(protocol["pretrain"]["recipe"], protocol["pretrain"]["set"])
    assert pretrained.steps == 900
    # what is pretrained is what is fine-tuned
    assert encoder_of(pretrained.model.encoder) == configuration(recipe.model).backbone
    # what an arm without language came to does not depend on how others were pretrained
    other = {**protocol, "pretrain": {}}
    same = [experiment.fingerprint(each, every[0], None) for each in (protocol, other)]
    assert same[0] == same[1]
    assert experiment.fingerprint(protocol, every[1], None) != experiment.fingerprint(other, every[1], None)


@pytest.mark.slow
def test_a_short_one_runs_arm_by_arm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_data(tmp_path)
    train = {**tiny_recipe(2), "name": "tiny"}
    train["phases"] = train["phases"][:1]
    asked = {"split": "train", "per_image": 4}
    protocol = {
        "seeds": [0],
        "arms": {
            "A": {},
            "C": {"taps": "paper"},
            "CF": {"taps": "paper", "frozen": True},
            "D": {"alone": True},
            "A16": {"steps": 1},
        },
        "instruct": asked,
        "held_out": asked,
        "pretrain": {
            "recipe": str(write_pretraining(tmp_path / "tiny.yaml", root=tmp_path)),
            "set": ["ask.most=1"],
        },
        "train": train,
    }
    (tmp_path / "protocol.yaml").write_text(yaml.safe_dump(protocol, sort_keys=False))
    out = tmp_path / "out"
    words = [str(tmp_path / "soi"), str(out), "--protocol", str(tmp_path / "protocol.yaml"), "--steps", "1"]
    experiment.main([*words, "--only", "C.0,CF.0"])
    experiment.main([*words, "--only", "A.0,D.0.ir"])
    told = capsys.readouterr().out.split("\n")
    assert told == ["C.0 is done", "CF.0 is done", "A.0 is done", "D.0.ir is done", ""]
    records = {path.name: json.loads(path.read_text()) for path in (out / "records").glob("*.json")}
    assert {name: list(each["sensors"]) for name, each in records.items()} == {
        "A.0.json": ["sar", "rgb", "ir"],
        "C.0.json": ["sar", "rgb", "ir"],
        "CF.0.json": ["sar", "rgb", "ir"],
        "D.0.ir.json": ["ir"],
    }
    assert "cosine_sar_rgb" in records["A.0.json"]["gradients"]
    assert records["A.0.json"]["curves"]["loss"]["step"] == [1]
    page = (out / "records" / "results.md").read_text()
    assert page.count("\n") == 6 + 1 + 2 + 3 and "| C.0, CF.0 | sar |" in page  # of one encoder
    assert (out / "records" / "results.png").stat().st_size > 10_000
    experiment.main([*words, "--only", "A16.0"])  # for its curves alone
    early = json.loads((out / "records" / "A16.0.json").read_text())
    assert early["sensors"] == {} and early["curves"]["loss"]["step"] == [1]
    assert "| A16 | 1 | – | – | – | – | – | – | – | " in (out / "records" / "results.md").read_text()
    assert capsys.readouterr().out == "A16.0 is done\n"
    monkeypatch.setattr(experiment, "ROUNDS", 1)
    experiment.main([*words, "--time"])
    costs = json.loads((out / "records" / "costs.json").read_text())
    assert (
        list(costs) == ["A", "C", "CF", "D", "A16"]
        and costs["A"] == costs["C"]
        and min(costs["A"].values()) > 0
    )
    cost = round(sum(costs["A"].values()) / len(costs["A"]))
    assert f" {cost} |" in (out / "records" / "results.md").read_text().split("| A | 1 |")[1].split("\n")[0]
    with pytest.raises(SystemExit, match="names no arm"):
        experiment.main([*words, "--only", "E.0"])
    # what has a record is done, wherever it ran; a record of another protocol is not taken for one of this
    elsewhere = [words[0], str(tmp_path / "elsewhere"), *words[2:], "--records", str(out / "records")]
    experiment.main([*elsewhere, "--only", "C.0"])
    assert not (tmp_path / "elsewhere" / "C.0").exists() and not capsys.readouterr().out
    with pytest.raises(SystemExit, match="is of another protocol"):
        experiment.main([*elsewhere[:-4], "--steps", "2", "--records", str(out / "records"), "--only", "C.0"])
    protocol["held_out"] = {**asked, "seed": 7}
    (tmp_path / "protocol.yaml").write_text(yaml.safe_dump(protocol, sort_keys=False))
    with pytest.raises(SystemExit, match=r"out has questions of another protocol"):
        experiment.main([*words, "--records", str(tmp_path / "new"), "--only", "C.0"])


def test_specialists_of_all_sensors_count_as_one_detector() -> None:
    def told(arm: str, seed: int, **maps: float) -> dict[str, Any]:
        return {"arm": arm, "seed": seed, "sensors": {s: {"map": v, "ap50": v} for s, v in maps.items()}}

    alone = [told("D", 1, sar=0.5), told("D", 1, rgb=0.25), told("D", 2, sar=0.4)]
    results = [told("A", 1, sar=0.3, rgb=0.3, ir=0.3), *alone]
    assert experiment.all_of(results) == [("A", pytest.approx(0.3))]
    results.append(told("D", 1, ir=0.25))
    assert experiment.all_of(results)[1:] == [("D", pytest.approx(3 / (2 + 4 + 4)))]
    assert experiment.all_of([told("A16", 1)]) == []
