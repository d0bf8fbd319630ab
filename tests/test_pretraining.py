"""Pretraining with language: recipes, runs that go on as if nothing had happened, answers, the road to a detector."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from conftest import Raster, write_raster
from safetensors.torch import load_file
from tiny_pretraining import tiny_pretraining, write_data, write_pretraining
from tiny_recipe import tiny_recipe, write_recipe

from babelrs_geo.cli import main
from babelrs_geo.cli.pretrain import RECIPES
from babelrs_geo.datasets.instruct import Corpus, InstructOptions, write_corpus
from babelrs_geo.datasets.samplers import Numbered
from babelrs_geo.errors import LabelError, ParameterError, TrainingError, WeightsError
from babelrs_geo.models import checkpoints
from babelrs_geo.models.conversation import TextBatch
from babelrs_geo.models.detector import COMPACT
from babelrs_geo.models.official import INTERNVIT
from babelrs_geo.models.pivot import PivotModel, image_token_of
from babelrs_geo.models.plain import from_plain
from babelrs_geo.training.loading import Batches
from babelrs_geo.training.measured import Tally
from babelrs_geo.training.pretrain.answers import Asker, figures, questions, same
from babelrs_geo.training.pretrain.corpora import CorpusData, Groups, corpora, fingerprint, joined
from babelrs_geo.training.pretrain.recipe import AskPart, PretrainRecipe, names, read
from babelrs_geo.training.pretrain.run import ANSWERS, ENCODER, PIVOT, Pretrained, build, encoder_of, fit
from babelrs_geo.training.recipe import Recipe
from babelrs_geo.training.run import build as build_detector
from babelrs_geo.training.schedules import cosine
from babelrs_geo.training.settings import write
from babelrs_geo.training.trainer import Place

# Python 3.12 warns where a loader's workers are forked from a process with threads
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

STEPS = 5
CLOCKS = {"seconds_a_step", "data_wait", "wait_seconds", "tokens_a_second", "minutes"}
"""Columns of the log that no two runs share."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretraining")
    write_data(folder)
    return folder


def recipe(root: Path, steps: int = STEPS, **changes: Any) -> PretrainRecipe:
    return from_plain(PretrainRecipe, tiny_pretraining(root, steps, **changes))


def run(folder: Path, root: Path, how: PretrainRecipe | None = None, **place: Any) -> Pretrained:
    corpus = [root / "corpus.jsonl"]
    return fit(how or recipe(root), corpus, Place(folder=folder, device="cpu", **place), corpus)


def state(folder: Path) -> dict[str, torch.Tensor]:
    """Weights, the clock among them, and what the optimizer remembers."""
    held = torch.load(folder / "last.ckpt", weights_only=True)
    moments = {
        f"{k}.{n}": v for k, own in held["optimizer_states"][0]["state"].items() for n, v in own.items()
    }
    return {**held["state_dict"], **moments}


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def whole(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(folder, root).step == STEPS
    return folder


def test_stopped_and_gone_on_a_run_has_the_same_losses_and_the_same_alpha(
    whole: Path, root: Path, tmp_path: Path
) -> None:
    def interrupt(done: int, total: int) -> None:
        if done in (2, 3):
            signal.raise_signal(signal.SIGTERM)

    for step in (2, 3):
        stopped = run(tmp_path, root, resume=step > 2, progress=interrupt)
        assert (stopped.step, stopped.stopped) == (step, True)
        assert int(state(tmp_path)["model.annealing.step"]) == step - 1
    changed = {**tiny_pretraining(root)["run"], "workers": 1, "checkpoint_minutes": 60}
    assert run(tmp_path, root, recipe(root, run=changed), resume=True).step == STEPS
    mine, theirs = state(tmp_path), state(whole)
    assert mine.keys() == theirs.keys()
    assert not [name for name in mine if not torch.equal(mine[name], theirs[name])]
    for one, other in zip(rows(tmp_path), rows(whole), strict=True):
        assert not [name for name in one.keys() - CLOCKS if one[name] != other[name]]
    other = write_corpus([root / "soi"], tmp_path / "other.jsonl", InstructOptions(per_image=6)).meta
    with pytest.raises(
        ParameterError, match=r"began with \d+ conversations \(\w+\) as corpora, and --data has "
    ):
        fit(recipe(root), [other], Place(folder=tmp_path, device="cpu", resume=True))
    with pytest.raises(ParameterError, match=r"differs from the recipe in model\.tau"):
        run(tmp_path, root, recipe(root, model={**tiny_pretraining(root)["model"], "tau": 5}), resume=True)


def test_the_log_says_what_is_learnt_of_each_sensor_and_task(whole: Path) -> None:
    train = [row for row in rows(whole) if row["loss"]]
    assert [int(row["step"]) for row in train] == list(range(1, STEPS + 1))
    assert [float(row["alpha"]) for row in train] == [0, 0.25, 0.5, 0.75, 1]
    rates = [2e-3 * cosine(step, STEPS, 1) for step in range(STEPS)]
    assert [float(row["lr"]) for row in train] == pytest.approx(rates, rel=1e-4)
    seen = {name for row in train for name, value in row.items() if name.endswith("_loss") and value}
    assert {"sar_loss", "rgb_loss", "ir_loss"} <= seen
    assert any(name.startswith("sar_") and name != "sar_loss" for name in seen)
    for row in train:
        assert float(row["tokens_a_second"]) > 0 and float(row["wait_seconds"]) >= 0
        own = [float(row[f"{sensor}_loss"]) for sensor in ("sar", "rgb", "ir") if row[f"{sensor}_loss"]]
        assert min(own) <= float(row["loss"]) * 1.5 and float(row["gradient"]) > 0
    measured = [row for row in train if row["gradient_block_01"]]
    assert [int(row["step"]) for row in measured] == [1, 3, 5]
    parts = ["block_01", "block_02", "stem", "encoder", "projector", "tokens", "language"]
    for row in measured:
        norms = [float(row[f"gradient_{part}"]) for part in parts]
        assert min(norms) > 0
        assert math.hypot(*norms) == pytest.approx(float(row["gradient"]), rel=1e-4)


def test_a_run_leaves_answers_a_pivot_and_an_encoder_that_say_what_they_are(whole: Path, root: Path) -> None:
    told = [json.loads(line) for line in (whole / ANSWERS).read_text().splitlines()]
    kinds = [(each["sensor"], each["task"]) for each in told]
    assert max(kinds.count(kind) for kind in kinds) == 2
    assert {task for _, task in kinds} == {"classes", "count", "presence", "sensor"}
    assert all({"question", "answer", "seen", "blank", "shuffled"} <= each.keys() for each in told)
    (judged,) = [row for row in rows(whole) if row["val_all"]]
    for name, value in figures(told).items():
        assert float(judged[f"val_{name}"]) == pytest.approx(value, rel=1e-4)
    for name, kind in ((PIVOT, "pivot"), (ENCODER, "backbone")):
        about = checkpoints.read(whole / name)
        assert isinstance(about, checkpoints.Start)
        assert (about.kind, about.name, about.training["steps"]) == (kind, "tiny", STEPS)
        assert about.training["data_sha256"] == fingerprint(corpora([root / "corpus.jsonl"]))
        assert about.training["minutes"] > 0 and about.licence
    trained = state(whole)
    for name, value in load_file(whole / ENCODER).items():
        assert torch.equal(value, trained[f"model.vision_model.{name}"]), name
    assert sorted(p.name for p in whole.iterdir()) == sorted(
        [ANSWERS, ENCODER, PIVOT, "last.ckpt", "log.csv", "recipe.yaml"]
    )


def test_a_pivot_is_a_start_too(whole: Path, root: Path) -> None:
    part = tiny_pretraining(root)["model"]
    language = {"tokenizer": part["language"]["tokenizer"]}
    model, _ = build(
        recipe(root, model={**part, "start": str(whole / PIVOT), "taps": "last", "language": language})
    )
    assert model.config.taps.layers == (2,)
    trained = state(whole)
    assert all(torch.equal(v, trained[f"model.{k}"]) for k, v in model.state_dict().items())
    with pytest.raises(ParameterError, match="weights hold no tokenizer"):
        build(recipe(root, model={"start": str(whole / PIVOT)}))


def call(*words: Any) -> Any:
    done = CliRunner().invoke(main, list(map(str, words)), catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    return done


def test_from_labels_to_detections(root: Path, tmp_path: Path) -> None:
    """The whole road on tiny numbers: ask, pretrain, export, fine-tune, detect."""
    corpus, first, second = tmp_path / "corpus.jsonl", tmp_path / "pretrained", tmp_path / "tuned"
    call("instruct", root / "soi", "-o", corpus, "--quiet")
    config = write_pretraining(tmp_path / "language.yaml", root=root, steps=2)
    told = call(
        "pretrain", "--config", config, "--data", corpus, "--held-out", corpus, "-o", first, "--device", "cpu"
    )
    assert "Pretrained 2 steps in" in told.stdout and "of grey images" in told.stdout
    call("weights", "export", first / PIVOT, "--as", "vit", "-o", tmp_path / "vit.safetensors")
    exported, left = load_file(tmp_path / "vit.safetensors"), load_file(first / ENCODER)
    assert exported.keys() == left.keys() and all(torch.equal(v, left[k]) for k, v in exported.items())
    tiny = write_recipe(tmp_path / "detector.yaml", steps=2)
    how = ["--config", tiny, "--data", root / "soi", "--device", "cpu"]
    call("train", *how, "-o", second, "--start", first / ENCODER)
    plain = tiny_recipe(2)
    plain["model"]["start"] = str(first / ENCODER)
    begun = build_detector(from_plain(Recipe, plain)).state_dict()
    assert left and all(torch.equal(begun[f"backbone.{name}"], value) for name, value in left.items())
    header = checkpoints.read_header(second / "final.safetensors")
    assert header.training["before"]["name"] == "tiny"
    frame = torch.randint(0, 255, (1, 96, 96), dtype=torch.uint8).numpy()
    scene = write_raster(tmp_path / "scene", Raster(frame))
    given = ["--sensor", "sar", "--weights", second / "final.safetensors", "-o", tmp_path / "found.gpkg"]
    call("detect", scene, *given, "--device", "cpu", "--units", "uint8", "--gsd", "native", "--overlap", "16")
    assert (tmp_path / "found.gpkg").is_file()


def test_the_command_line_offers_what_there_is() -> None:
    assert sorted(RECIPES) == names()
    for name in RECIPES:
        how = read(name)
        assert from_plain(PretrainRecipe, yaml.safe_load(write(how))) == how


def test_internvl2_5_1b_is_the_papers() -> None:
    how = read("internvl2_5-1b")
    assert (how.steps, how.micro * how.accumulate * (how.processes or 0)) == (20_000, 128)
    assert (how.lr, how.rates, how.warmup_steps) == (2e-5, {}, 2000)
    assert (how.weight_decay, how.decay, how.betas, how.eps, how.clip) == (0.01, "all", (0.9, 0.999), 1e-8, 1)
    assert (how.precision, how.seed, how.model.tau, how.model.taps) == ("bf16", 42, 6000, "paper")
    view = how.view
    assert (view.tile, view.most_tiles, view.thumbnail, view.longest) == (448, 6, True, 3072)
    assert view.system is not None and view.system.startswith("你是书生")
    assert how.model.freeze == () and how.model.checkpoint_gradients
    assert encoder_of(read("internvl2_5-1b", ["model.encoder.base=internvit"]).model.encoder) == INTERNVIT


def test_compact_is_the_bundled_detectors_backbone() -> None:
    how = read("compact")
    assert encoder_of(how.model.encoder) == COMPACT.backbone
    assert (how.model.encoder.start, how.model.language.source) == ("imagenet", "smollm2")


def test_rates_rise_and_fall_as_the_originals() -> None:
    factors = [cosine(step, 20_000, 2000) for step in (0, 1, 1000, 2000, 11_000, 19_999)]
    assert factors == pytest.approx([0, 1 / 2000, 0.5, 1, 0.5, 7.6e-9], abs=1e-9)
    assert cosine(0, 10, 0) == 1


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"steps": 0}, "steps is 0; expected 1 or more"),
        ({"warmup": 1}, "warmup is 1; expected 0 or more and below 1"),
        ({"rates": {"lm": 1}}, "a key of rates is 'lm'; expected one of stem, encoder, projector"),
        ({"model": {"freeze": ["vit"]}}, "model.freeze.0 is 'vit'; expected one of encoder, projector"),
        (
            {"strategy": "fsdp", "model": {"language": {"lora": {}}}},
            "lora and strategy fsdp do not go together",
        ),
        ({"stepps": 1}, "there is no stepps; did you mean steps?"),
        ({"model": {"taps": "first"}}, "model.taps is 'first'; expected one of paper, original, last"),
    ],
)
def test_what_does_not_fit_a_recipe_is_told(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ParameterError) as caught:
        from_plain(PretrainRecipe, {"name": "x", "steps": 1, "lr": 1.0, **changes})
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_what_a_run_lacks_is_told_before_it_begins(root: Path, tmp_path: Path) -> None:
    part = tiny_pretraining(root)["model"]
    with pytest.raises(ParameterError, match="has no tokenizer; name a folder"):
        build(recipe(root, model={**part, "language": {}}))
    with pytest.raises(WeightsError, match="imagenet, whose trunk this encoder has not"):
        build(recipe(root, model={**part, "encoder": {**part["encoder"], "start": "imagenet"}}))
    with pytest.raises(LabelError, match=r"has no x\.meta\.json beside it"):
        corpora([tmp_path / "x.jsonl"])
    corpus = Corpus(root / "corpus.meta.json")
    grounding = [each for each in map(corpus.__getitem__, range(len(corpus))) if each.task == "ground"]
    with pytest.raises(LabelError, match="no question of caption about one image of a known sensor"):
        questions(grounding, AskPart(tasks=("caption",)))


def data(root: Path, **changes: Any) -> CorpusData:
    how = recipe(root, **changes)
    model, tokenizer = build(how)
    return CorpusData(how, model.config, tokenizer, [root / "corpus.meta.json"])


def test_batches_follow_from_the_step(root: Path) -> None:
    source = data(root)
    steps = list(Batches(lambda: source.loaders(0)))
    assert len(steps) == STEPS and [len(each) for each in steps] == [2] * STEPS
    for micro in steps[0]:
        assert micro["tiles"].shape == (2, 3, 64, 64) and micro["tiles"].dtype == torch.uint8
        assert len(micro["names"]) == len(micro["sensors"]) == len(micro["input_ids"]) == 2
    later = next(iter(Batches(lambda: source.loaders(3))))
    assert [m["names"] for m in later] == [m["names"] for m in steps[3]]
    shares = [list(Batches(lambda rank=rank: source.loaders(0, rank, 2))) for rank in (0, 1)]
    seen = [name for share in shares for step in share for micro in step for name in micro["names"]]
    assert len(set(seen)) == len(seen) == 2 * 4 * STEPS


def test_text_alone_and_several_images_are_learnt_from(root: Path, tmp_path: Path) -> None:
    picture = str(next((root / "soi").rglob("*.png")))

    def record(images: list[str], text: str) -> str:
        turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "Yes."}]
        return json.dumps({"image": images, "conversations": turns}) + "\n"

    mixed = (
        record([], "Is it so?")
        + record([picture] * 2, "<image><image> Alike?")
        + record([picture], "x" * 500)
    )
    (tmp_path / "mixed.jsonl").write_text(mixed)
    meta = {"mixed": {"root": "/", "annotation": "mixed.jsonl"}}
    (tmp_path / "mixed.meta.json").write_text(json.dumps(meta))
    how = recipe(root, 2, micro=2, accumulate=1)
    done = fit(how, [tmp_path / "mixed.meta.json"], Place(folder=tmp_path / "run", device="cpu"))
    assert (done.step, done.figures) == (2, {})  # nothing was held out
    model, tokenizer = build(how)
    encoder = CorpusData(how, model.config, tokenizer, [tmp_path / "mixed.meta.json"]).encoder
    corpus = Corpus(tmp_path / "mixed.meta.json")
    alone, two, long = (encoder.encoded([corpus[k]]) for k in range(3))
    assert alone is not None and not alone.real and bool((alone.tiles == 255).all())
    assert two is not None and len(two.tiles) == 2
    assert long is None  # all answers are beyond the longest


def test_conversations_about_one_image_are_learnt_from_together(root: Path) -> None:
    conversations = joined(corpora([root / "corpus.jsonl"]))
    groups = Groups(conversations, 3)
    assert sorted(number for row in groups.rows for number in row) == list(range(len(conversations)))
    assert {len(row) for row in groups.rows} == {2, 3}
    assert all(len({each.images for each in groups[k]}) == 1 for k in range(len(groups)))
    assert Groups(conversations, 1).rows == [[number] for number in range(len(conversations))]
    how = recipe(root, STEPS, micro=2, accumulate=1, together=3)
    model, tokenizer = build(how)
    source = CorpusData(how, model.config, tokenizer, [root / "corpus.jsonl"])
    ((micro,), *_) = Batches(lambda: source.loaders(0))
    assert len(micro["tiles"]) == 2 and 4 <= len(micro["names"]) <= 6
    text = TextBatch(*(micro[name] for name in ("input_ids", "labels", "attention_mask", "position_ids")))
    model.eval()
    image, tiles = image_token_of(tokenizer), micro["tiles"].float() / 255
    with torch.no_grad():
        once = model(text, tiles, image, micro["which"])
        each = model(text, tiles[micro["which"]], image)
    torch.testing.assert_close(once.losses, each.losses)
    first = micro["names"][0]
    (own,) = (k for k in range(len(conversations)) if conversations[k].where == first)
    alone = source.encoder.encoded([conversations[own]])
    assert alone is not None and torch.equal(alone.tiles[0], micro["tiles"][0])


def test_blank_and_shuffled_images_are_what_they_say(root: Path) -> None:
    class Teller:
        """In place of a model: tells what it was shown."""

        def answer(
            self, tokenizer: Any, texts: list[str], tiles: list[torch.Tensor], *rest: Any
        ) -> list[str]:
            return [f"{float(each.std()):.4f}" for each in tiles]

    conversations: Numbered = joined(corpora([root / "corpus.jsonl"]))
    asked = questions(conversations, AskPart(most=3))
    assert all(each.path != each.other and each.path.parent == each.other.parent for each in asked)
    how = recipe(root)
    told = Asker(None, how.view, how.ask, nullcontext)(Teller(), asked)  # type: ignore[arg-type]
    assert len(told) == len(asked)
    assert {each["blank"] for each in told} == {"0.0000"}
    assert all(float(each["seen"]) > 0 and float(each["shuffled"]) > 0 for each in told)


def test_figures_count_right_answers() -> None:
    def told(sensor: str, task: str, answer: str, *said: str) -> dict[str, str]:
        return {
            "sensor": sensor,
            "task": task,
            "answer": answer,
            **dict(zip(("seen", "blank", "shuffled"), said, strict=True)),
        }

    found = figures(
        [
            told("sar", "count", "2", "2", "1", "2"),
            told("sar", "count", "3", "3", "1", "2"),
            told("sar", "presence", "Yes.", "no", "yes", "Yes"),
            told("ir", "count", "1", "1", "1", "1"),
        ]
    )
    assert (found["sar_count"], found["sar_count_blank"], found["sar_count_shuffled"]) == (1, 0, 0.5)
    assert (found["sar"], found["sar_blank"], found["all"]) == (0.5, 0.5, 0.75)
    assert same("Cars and a bus.", "cars and  a bus") and not same("Yes.", "Yes, no.")


def test_a_tally_is_the_mean_of_all_that_was_measured() -> None:
    tally = Tally()
    tally.add({"a": 1.0, "b": 2.0})
    tally.add({"a": torch.tensor(3.0)})
    other = Tally()
    other.restore(tally.state())
    assert other.take() == {"a": 2.0, "b": 2.0} and other.take() == {}


def test_a_loss_that_is_no_number_stops_with_the_records(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fuse = PivotModel.fuse
    monkeypatch.setattr(PivotModel, "fuse", lambda self, tiles: fuse(self, tiles) * float("nan"))
    with pytest.raises(TrainingError, match=r"step 0: the loss is nan, by record \S+corpus\.jsonl:\d+ nan"):
        run(tmp_path, root)
    assert not (tmp_path / "last.ckpt").exists()


@pytest.fixture(scope="module")
def alone(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of one process, each of four conversations that count the same."""
    folder = tmp_path_factory.mktemp("alone")
    run(folder, root, recipe(root, 3, micro=1, accumulate=4))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_learn_as_one_with_twice_the_batch(
    alone: Path, root: Path, tmp_path: Path, strategy: str
) -> None:
    script = tmp_path / "two.py"
    script.write_text(_TWO)
    given = {"strategy": strategy, "micro": 1, "accumulate": 2}
    config = write_pretraining(tmp_path / "tiny.yaml", root=root, steps=3, **given)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    words = [sys.executable, str(script), str(config), str(root / "corpus.jsonl"), str(tmp_path / "run")]
    for more in (
        ([], ["--resume"]) if strategy == "fsdp" else (["--whole"],)
    ):  # the second goes on after step 2
        subprocess.run([*words, *more], env=environment, check=True, timeout=600)
    assert int(state(tmp_path / "run")["model.annealing.step"]) == 2
    for mine, theirs in zip(rows(tmp_path / "run"), rows(alone), strict=True):
        for name in ("loss", "gradient", "gradient_block_02", "gradient_stem", "alpha", "val_sar"):
            assert bool(mine[name]) == bool(theirs[name])
            if mine[name]:
                assert float(mine[name]) == pytest.approx(float(theirs[name]), rel=1e-3), name
    mine, theirs = (load_file(folder / PIVOT) for folder in (tmp_path / "run", alone))
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-2, atol=1e-3)


_TWO = """
import sys, signal
from pathlib import Path
from babelrs_geo.training.pretrain.recipe import read
from babelrs_geo.training.pretrain.run import Place, fit

config, corpus, folder, *more = sys.argv[1:]

def stop(done, total):
    if done == 2 and not more:  # the first alone is told: all stop
        signal.raise_signal(signal.SIGTERM)

place = Place(folder=Path(folder), device="cpu", devices=2, resume="--resume" in more, progress=stop)
done = fit(read(config), [Path(corpus)], place, [Path(corpus)])
assert done.step == (3 if more else 2), done
"""
