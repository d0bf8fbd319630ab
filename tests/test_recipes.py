"""Recipes: those that come with the package, what may be changed, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_recipe import tiny_recipe, write_recipe

from babelrs_geo.cli import main
from babelrs_geo.cli.train import RECIPES
from babelrs_geo.datasets.augment import Augment
from babelrs_geo.datasets.published import Published
from babelrs_geo.errors import ParameterError
from babelrs_geo.models import checkpoints, zoo
from babelrs_geo.models.detector import COMPACT, DetectorConfig
from babelrs_geo.models.plain import from_plain, to_plain
from babelrs_geo.training import LayerDecay, StepSchedule
from babelrs_geo.training.recipe import Recipe, names, read
from babelrs_geo.training.run import configuration
from babelrs_geo.training.settings import differing, write


def test_the_command_line_offers_what_there_is() -> None:
    assert sorted(RECIPES) == names()


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_survives_being_written(name: str) -> None:
    recipe = read(name)
    assert from_plain(Recipe, yaml.safe_load(write(recipe))) == recipe


def test_soi_det_is_the_papers() -> None:
    recipe = read("soi-det")
    assert configuration(recipe.model) == DetectorConfig()
    assert recipe.layer_decay == LayerDecay(lr=5e-5, decay=0.95, weight_decay=0.05)
    assert recipe.schedule == StepSchedule(500, 1 / 3, (22_312, 30_679), 0.1)
    assert (recipe.clip, recipe.precision, recipe.processes, recipe.seed) == (35.0, "32", 8, 0)
    (phase,) = recipe.phases
    assert phase.steps == 33_468
    assert recipe.quota(phase) == {"sar": 2, "rgb": 1, "ir": 1}
    assert list(recipe.quota(phase)) == ["sar", "rgb", "ir"]
    assert all(phase.views[s].chosen == Published() for s in ("sar", "rgb", "ir"))
    assert not recipe.averaged
    assert not recipe.data.background


def test_compact_is_what_the_bundled_weights_are() -> None:
    recipe = read("compact")
    assert configuration(recipe.model) == COMPACT == checkpoints.read_header(zoo.find("compact")).config
    assert all(isinstance(p.views[s].chosen, Augment) for p in recipe.phases for s in ("sar", "rgb", "ir"))
    assert recipe.averaged


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe") / "tiny.yaml", steps=6)


def test_changes_reach_what_they_name(tiny: Path) -> None:
    recipe = read(
        tiny,
        [
            "phases.*.lr=1e-4",
            "phases.1.quota.sar=9",
            "data.sensors=[rgb, ir]",
            "model.architecture={}",
            "model.classes.rgb=[plane]",
            "model.start=compact",
        ],
    )
    assert {p.lr for p in recipe.phases} == {1e-4}
    assert [p.quota["sar"] for p in recipe.phases] == [1, 9]
    assert recipe.quota(recipe.phases[0]) == {"rgb": 1, "ir": 1}
    assert configuration(recipe.model).classes == {**COMPACT.classes, "rgb": ("plane",)}
    assert recipe.model.start == "compact"
    changed = differing(to_plain(read(tiny)), to_plain(read(tiny, ["clip=1", "run.workers=9"])))
    assert changed == ["clip"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("run.worker=2", "there is no run.worker; did you mean run.workers?"),
        ("workers=2", "there is no workers; did you mean run.workers?"),
        ("phases.0.quotas=1", "there is no phases.0.quotas; did you mean phases.0.quota?"),
        ("phases.7.lr=1", "phases.7.lr: 7 is none of the 2 elements; count from 0, or * for all"),
        ("clip=much", "clip is 'much'; expected a number"),
        ("seed=1.5", "seed is 1.5; expected a whole number"),
        ("precision=8", "precision is 8; expected one of 32, bf16, 16"),
        ("data.background=1", "data.background is 1; expected true or false"),
        ("phases.0.views.sar.crop.scale=[1]", "phases.0.views.sar.crop.scale is [1]; expected a list of 2"),
        (
            "phases.0.views.sar.published={}",
            "phases.0.views.sar has 2 kinds; give one of crop, affine, published",
        ),
        (
            "phases.0.views.sar.crop.size=32",
            "phases.0.views have sizes 32, 64; the images of a batch have one",
        ),
        (
            "phases.1.views.sar={affine: {size: 64}}",
            "phases.1.views.sar.affine turns horizontal boxes, which become loose; give oriented: false",
        ),
        ("data.sensors=[sar,lidar]", "data.sensors.1 is 'lidar'; expected one of sar, rgb, ir"),
        (
            "phases.0.quota.sar=0",
            "phases.0.quota has no sar; give 1 or more, or leave it out of data.sensors",
        ),
        ("phases.1.steps=2", "phases.1.steps is 2; a phase ends after the one before it (3)"),
        ("phases.0.mean_decay=0", "mean_decay is 0 in some phases"),
        ("seed.x=1", "seed.x: seed holds a value, in which there is no x"),
        ("seed", '"seed" is no change; expected key=value'),
        ("seed=[", "the value is no YAML"),
        ("layer_decay={}", "layer_decay and schedule go together"),
        ("model.classes.thermal=[a,b]", "a key of model.classes is 'thermal'; expected one of sar, rgb, ir"),
        ("phases.*.quota.irr=3", "a key of phases.0.quota is 'irr'; expected one of sar, rgb, ir"),
        ("data.train.infrared=val", "a key of data.train is 'infrared'; expected one of sar, rgb, ir"),
        ("phases.1.lr=-1", "phases.1.lr is -1; expected 0 or more"),
        ("phases.0.prior_lr=.nan", "phases.0.prior_lr is nan; expected a number"),
        ("phases.*.mean_decay=1.5", "phases.0.mean_decay is 1.5; expected 0 or more and below 1"),
        ("phases.*.warmup=-1", "phases.0.warmup is -1; expected 0 or more"),
        ("phases.0.views.sar.crop.size=0", "crops of 0 px"),
        ("phases.0.views.sar.crop.scale=[0,1]", "crops of 64 px at scales (0.0, 1.0)"),
        (
            "phases.0.views={sar: &v {published: {size: 0}}, rgb: *v, ir: *v}",
            "phases.0.views have size 0; expected 1 or more",
        ),
        ("clip=0", "clip is 0; expected above 0"),
        ("processes=0", "processes is 0; expected 1 or more"),
        ("run.log_every=0", "run.log_every is 0; expected 1 or more"),
        ("model.freeze=-3", "model.freeze is -3; expected 0 or more"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(tiny: Path, change: str, told: str) -> None:
    with pytest.raises(ParameterError) as caught:
        read(tiny, [change])
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_recipes_are_told(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    for text, told in (
        ("[1]", "holds no mapping"),
        ("a: [", "is no YAML"),
        ("phases: []", "name is missing"),
        ("name: x\nphases: []", "has no phases"),
    ):
        path.write_text(text)
        with pytest.raises(ParameterError, match=told):
            read(path)
    with pytest.raises(ParameterError, match=r"there is no recipe .*one of compact, soi-det"):
        read(tmp_path / "none.yaml")
    with pytest.raises(ParameterError, match=r"there is no model\.architecture\.neck"):
        configuration(read("compact", ["model.architecture.neck=3"]).model)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("gfl.convs=two", "model.architecture.gfl.convs is 'two'; expected a whole number"),
        ("gfl.groups=7", "gfl.groups is 7; expected a divisor of gfl.channels, 96"),
        ("backbone.stages=[3,4]", "stages are 3, 4; expected blocks that add up to vit.depth, 6"),
        ("backbone.vit.heads=5", "vit.heads is 5; expected a divisor of vit.dim, 192"),
    ],
)
def test_an_architecture_that_there_is_not_is_told(change: str, told: str) -> None:
    with pytest.raises(ParameterError) as caught:
        configuration(read("compact", [f"model.architecture.{change}"]).model)
    assert str(caught.value) == told


@given(st.text())
def test_a_value_that_is_given_by_itself_is_taken_as_it_is(tiny: Path, text: str) -> None:
    assert read(tiny, values={"model.start": text}).model.start == text


@settings(max_examples=30)
@given(st.integers(1, 10**6), st.floats(1e-9, 1e3), st.booleans(), st.sampled_from(["32", "bf16", "16"]))
def test_what_is_set_is_what_is_read(seed: int, clip: float, background: bool, precision: str) -> None:
    made: Recipe = from_plain(
        Recipe, tiny_recipe(seed=seed, clip=clip, precision=precision, data={"background": background})
    )
    assert (made.seed, made.clip, made.precision, made.data.background) == (seed, clip, precision, background)
    assert from_plain(Recipe, to_plain(made)) == made


def call(*words: Any) -> Any:
    return CliRunner().invoke(main, ["train", *map(str, words)])


@pytest.mark.parametrize("start", ["a #2.safetensors", "null", "@x", "[1"])
def test_a_start_is_the_name_that_was_typed(tmp_path: Path, start: str) -> None:
    refused = call("--recipe", "compact", "--data", tmp_path, "-o", tmp_path / "run", "--start", start)
    assert f'there are no weights "{start}"' in refused.stderr


def test_the_verb_refuses_in_one_line(tmp_path: Path) -> None:
    both = call("--recipe", "compact", "--config", "x", "--data", "d", "-o", tmp_path)
    assert (both.exit_code, both.stderr.count("\n")) == (2, 1)
    assert "one of --recipe and --config" in both.stderr
    wrong = call("--recipe", "compact", "--set", "phases.*.lrs=1", "--data", "d", "-o", tmp_path)
    assert (wrong.exit_code, wrong.stderr) == (
        1,
        "babelrs-geo: error: there is no phases.0.lrs; did you mean phases.0.lr?\n",
    )
    nowhere = call(
        "--recipe", "compact", "--data", tmp_path / "d", "-o", tmp_path / "run", "--start", "nothing"
    )
    assert nowhere.exit_code == 1
    assert 'there are no weights "nothing"' in nowhere.stderr


def test_reading_a_recipe_needs_no_lightning() -> None:
    code = "import sys, babelrs_geo.training.recipe; print('lightning' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
