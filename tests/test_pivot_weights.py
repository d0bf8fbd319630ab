"""Pretrained pivots on disk: back as they were, exported, and into a detector with every tensor accounted for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from golden import Golden, document, needs_golden
from safetensors.torch import load_file, save_file
from tiny_model import TINY
from tiny_pivot import COMPACT, IMAGE_TOKEN, INTERNVIT, batch_of
from torch import Tensor

from babelrs_geo import cli
from babelrs_geo.errors import WeightsError
from babelrs_geo.models import checkpoints, importing, official
from babelrs_geo.models.annealing import ORIGINAL, Taps
from babelrs_geo.models.checkpoints import Start
from babelrs_geo.models.conversation import TextBatch
from babelrs_geo.models.detector import Detector
from babelrs_geo.models.importing import Targets, export, import_weights
from babelrs_geo.models.language import LoRA
from babelrs_geo.models.official import PivotSizes
from babelrs_geo.models.pivot import PivotConfig, PivotModel
from babelrs_geo.models.pivot_weights import Origin, load_pivot, save_pivot
from babelrs_geo.models.vit import ViTConfig

BOTH = pytest.mark.parametrize("config", [INTERNVIT, COMPACT], ids=["internvit", "compact"])
ORIGIN = Origin("tried", "CC BY-NC 4.0", {"steps": 25})
CLOCK = "annealing.step"


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.manual_seed(0)


def saved(folder: Path, config: PivotConfig, **how: Any) -> tuple[Path, PivotModel]:
    model = PivotModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():  # none as it starts, so that every one is seen to arrive
            p += 0.02 * torch.randn_like(p)
    model.annealing.set_step(25)
    path = folder / "pivot.safetensors"
    save_pivot(path, model, ORIGIN, **how)
    return path, model


def loss(model: PivotModel) -> Tensor:
    torch.manual_seed(1)
    text, tiles = batch_of(
        model.config, ("Where?", "here", 2), ("Q", "A", 1), side=model.config.vit.image_size
    )
    with torch.no_grad():
        return model.eval()(text, tiles, IMAGE_TOKEN).loss


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@BOTH
def test_a_model_comes_back_with_its_clock(tmp_path: Path, config: PivotConfig) -> None:
    path, model = saved(tmp_path, config)
    again, start = load_pivot(path)
    assert (start.kind, start.name, start.licence, start.training) == (
        "pivot",
        "tried",
        ORIGIN.licence,
        {"steps": 25},
    )
    assert same(dict(again.state_dict()), dict(model.state_dict()))
    assert again.annealing.step.item() == 25 and again.config.taps == config.taps
    assert torch.equal(loss(again), loss(model))
    other, _ = load_pivot(path, Taps((1,)), tau=7)
    assert (other.config.taps, other.annealing.tau) == (Taps((1,)), 7)
    save_pivot(tmp_path / "half.safetensors", model, ORIGIN, half=True)
    assert {v.dtype for k, v in load_file(tmp_path / "half.safetensors").items() if k != CLOCK} == {
        torch.float16
    }
    half, _ = load_pivot(tmp_path / "half.safetensors")
    torch.testing.assert_close(loss(half), loss(model), rtol=1e-2, atol=1e-2)


def test_low_rank_updates_are_in_the_file(tmp_path: Path) -> None:
    model = PivotModel(COMPACT).eval()
    model.add_lora(LoRA(4))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p += 0.1
    save_pivot(tmp_path / "w.safetensors", model, ORIGIN)
    again, _ = load_pivot(tmp_path / "w.safetensors")
    torch.testing.assert_close(loss(again), loss(model), rtol=1e-4, atol=1e-5)


def test_the_published_encoder_is_exported_and_starts_a_detector(tmp_path: Path) -> None:
    path, model = saved(tmp_path, INTERNVIT)
    assert export(path, tmp_path / "vit.safetensors", "vit") == len(official.encoder_shapes(INTERNVIT.vit))
    state = load_file(tmp_path / "vit.safetensors")
    assert {k: tuple(v.shape) for k, v in state.items()} == official.encoder_shapes(INTERNVIT.vit)
    assert same(state, dict(model.vision_model.state_dict()))
    header = checkpoints.read(tmp_path / "vit.safetensors")
    assert isinstance(header, Start) and (header.kind, header.licence) == ("encoder", ORIGIN.licence)
    config = replace(
        TINY,
        backbone=replace(TINY.backbone, vit=replace(TINY.backbone.vit, depth=4, mlp_ratio=2), stages=(2, 2)),
    )
    whole, alone = Detector(config), Detector(config)
    alone.load_state_dict(whole.state_dict())
    before = {k: v.clone() for k, v in whole.state_dict().items()}
    checkpoints.start_backbone(whole, path)
    checkpoints.start_backbone(alone, tmp_path / "vit.safetensors")
    assert same(dict(whole.state_dict()), dict(alone.state_dict()))
    changed = {k for k, v in whole.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {k for k in before if k.startswith(("backbone.embeddings.", "backbone.layers."))}
    # and by the road of published files
    state["embeddings.class_embedding"] += 0
    save_file({f"vision_model.{k}": v for k, v in state.items()}, tmp_path / "theirs.safetensors")
    for file in ("vit", "theirs"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(importing, "PAPER", Targets(TINY, INTERNVIT.vit))
            done = import_weights(tmp_path / f"{file}.safetensors", tmp_path / f"{file}2.safetensors")
        checkpoints.start_backbone(alone, done.path)
        assert same(dict(whole.state_dict()), dict(alone.state_dict()))


@pytest.mark.parametrize("taps", [(1, 2), (1,)])
def test_the_compact_encoder_is_exported_and_starts_its_detector(
    tmp_path: Path, taps: tuple[int, ...]
) -> None:
    path, model = saved(tmp_path, replace(COMPACT, taps=Taps(taps)))
    number = export(path, tmp_path / "vit.safetensors", "vit")
    reached = model.vision_model.reached(taps[-1])
    state = load_file(tmp_path / "vit.safetensors")
    assert state.keys() == reached and len(reached) == number
    detector = Detector(TINY)
    before = {k: v.clone() for k, v in detector.state_dict().items()}
    checkpoints.start_backbone(detector, tmp_path / "vit.safetensors")
    after = dict(detector.state_dict())
    for name in before:
        mine = name.removeprefix("backbone.")
        assert torch.equal(after[name], state[mine] if mine in reached else before[name]), name
    assert {"backbone.spm.stem.0.weight", "backbone.level_embed"} <= {f"backbone.{k}" for k in reached}
    again = Detector(TINY)
    again.load_state_dict(before)
    checkpoints.start_backbone(again, path)
    assert same(dict(again.state_dict()), after)
    # what the language model saw is what the detector's transformer gives
    x = torch.rand(1, 3, 64, 64)
    tokens = [m.eval().tokens(x, [taps[-1]])[0] for m in (model.vision_model, detector.backbone)]
    assert torch.equal(*tokens)


def test_a_backbone_of_other_sizes_is_refused(tmp_path: Path) -> None:
    path, _ = saved(tmp_path, COMPACT)
    other = Detector(replace(TINY, backbone=replace(TINY.backbone, prior_width=16)))
    with pytest.raises(
        WeightsError, match=r"does not fit the detector's backbone: \d+ mis-shaped \(backbone\.spm"
    ):
        checkpoints.start_backbone(other, path)
    with pytest.raises(WeightsError, match=r"normalised by mean \(127\.0, .* the detector has \(0,"):
        checkpoints.start_backbone(Detector(replace(TINY, mean=(0, 0, 0))), path)
    export(path, tmp_path / "vit.safetensors", "vit")
    with pytest.raises(
        WeightsError, match="is a backbone pretrained by babelrs-geo; start a detector from it"
    ):
        import_weights(tmp_path / "vit.safetensors", tmp_path / "x.safetensors")
    state = load_file(tmp_path / "vit.safetensors")
    header = checkpoints.read(tmp_path / "vit.safetensors")
    state.pop("level_embed")
    checkpoints.write(tmp_path / "less.safetensors", state, {checkpoints.KEY: header.to_json()})
    with pytest.raises(WeightsError, match=r"1 missing \(backbone.level_embed\)"):
        checkpoints.start_backbone(Detector(TINY), tmp_path / "less.safetensors")


def test_a_pretrained_internvl_goes_out_in_both_layouts(tmp_path: Path) -> None:
    path, model = saved(tmp_path, INTERNVIT)
    vit, lm = INTERNVIT.vit, INTERNVIT.language
    sizes = PivotSizes(
        vit, lm["hidden_size"], lm["num_hidden_layers"], lm["num_attention_heads"], lm["num_key_value_heads"],
        lm["intermediate_size"], lm["vocab_size"],
    )  # fmt: skip
    for layout, names in (("official", "original"), ("transformers", "transformers")):
        out = tmp_path / f"{layout}.safetensors"
        export(path, out, layout)  # type: ignore[arg-type]
        assert {k: tuple(v.shape) for k, v in load_file(out).items()} == official.layout_names(sizes, names)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(importing, "PAPER", Targets(TINY, vit, sizes))
            done = import_weights(out, tmp_path / f"{layout}2.safetensors")
        again, start = load_pivot(done.path, INTERNVIT.taps, INTERNVIT.tau)
        assert start.kind == "vision-language" and again.annealing.step.item() == 0
        again.annealing.set_step(25)
        torch.testing.assert_close(loss(again), loss(model))


def test_layouts_that_there_are_not(tmp_path: Path) -> None:
    path, _ = saved(tmp_path, COMPACT)
    export(path, tmp_path / "vit.safetensors", "vit")
    for file in (path, tmp_path / "vit.safetensors"):
        for layout in ("official", "transformers"):
            with pytest.raises(WeightsError, match="has no published layout; export it --as vit"):
                export(file, tmp_path / "x.safetensors", layout)  # type: ignore[arg-type]
    with pytest.raises(WeightsError, match="holds no language model"):
        load_pivot(tmp_path / "vit.safetensors")
    state = load_file(path)
    state.pop("mlp1.1.bias")
    header = checkpoints.read(path)
    checkpoints.write(tmp_path / "less.safetensors", state, {checkpoints.KEY: header.to_json()})
    with pytest.raises(WeightsError, match=r"does not fit its own architecture: 1 missing \(mlp1.1.bias\)"):
        load_pivot(tmp_path / "less.safetensors")


def test_the_command_line_tells_and_exports(tmp_path: Path) -> None:
    path, model = saved(tmp_path, COMPACT)
    run = CliRunner()
    told = run.invoke(cli.main, ["weights", "info", str(path)])
    assert told.exit_code == 0 and "pivot" in told.stdout
    number = sum(p.numel() for p in model.parameters())
    assert f"{number:,}" in told.stdout and "float32" in told.stdout
    out = str(tmp_path / "vit.safetensors")
    told = run.invoke(cli.main, ["weights", "export", str(path), "--as", "vit", "-o", out])
    assert (
        told.exit_code == 0 and f"{len(model.vision_model.reached(2))} tensors, named as vit" in told.stdout
    )
    assert "backbone" in run.invoke(cli.main, ["weights", "info", out]).stdout
    told = run.invoke(cli.main, ["detect", "scene.tif", "--sensor", "sar", "--weights", out])
    assert told.exit_code == 1


@pytest.mark.shared
@needs_golden
def test_the_originals_checkpoint_comes_in_whole_and_computes_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, data = document("vlm_tiny_config"), Golden("vlm_tiny")
    vision, text = names["vision_config"], names["llm_config"]
    vit = ViTConfig(56, 14, vision["hidden_size"], 24, 4, 2)
    sizes = PivotSizes(vit, text["hidden_size"], 2, 4, 2, text["intermediate_size"], text["vocab_size"])
    monkeypatch.setattr(importing, "PAPER", Targets(TINY, vit, sizes))
    save_file(Golden("vlm_tiny_state").state(), tmp_path / "model.safetensors")
    done = import_weights(tmp_path / "model.safetensors", tmp_path / "vlm.safetensors")
    model, _ = load_pivot(done.path, ORIGINAL)
    model.annealing.set_step(3000)
    batch = TextBatch(*(data[k] for k in ("input_ids", "labels", "attention_mask", "position_ids")))
    tiles = data["px"] * model.std + model.mean
    with torch.no_grad():
        out = model.eval()(batch, tiles, int(data["img_context_token_id"]), all_logits=True)
    data.same("logits of the imported checkpoint", out.logits, data["lm_logits_step3000"])
    data.same("loss of the imported checkpoint", out.loss, data["lm_loss_step3000"])


@pytest.mark.slow
def test_the_papers_model_goes_into_the_papers_detector(tmp_path: Path) -> None:
    """938 million parameters: saved in half precision, its 340 tensors exported, and every one of them put to use."""
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in PivotModel().state_dict().items()}
    state = {k: torch.full(shape, 0.01, dtype=torch.float16) for k, shape in shapes.items() if k != CLOCK}
    state[CLOCK] = torch.tensor(6000)
    start = Start("pivot", "full", PivotConfig().to_dict(), ORIGIN.licence)
    checkpoints.write(tmp_path / "pivot.safetensors", state, {checkpoints.KEY: start.to_json()})
    del state
    assert export(tmp_path / "pivot.safetensors", tmp_path / "vit.safetensors", "vit") == 340
    (tmp_path / "pivot.safetensors").unlink()
    detector = Detector()
    checkpoints.start_backbone(detector, tmp_path / "vit.safetensors")
    for name, p in detector.backbone.named_parameters():
        started = name.startswith(("embeddings.", "layers."))
        near = (p - 0.01).abs().max().item() < 1e-4
        assert near == started, name
