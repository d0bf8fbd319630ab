"""Language as the pivot: the original's numbers, transformers' own InternVL, and what must hold of any encoder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from golden import Golden, document, needs_golden
from tiny_pivot import COMPACT, IMAGE_TOKEN, INTERNVIT, batch_of, byte_tokenizer
from torch import Tensor
from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config

from babelrs_geo.errors import ParameterError
from babelrs_geo.models import language, official
from babelrs_geo.models.adapter import AdapterConfig, ViTAdapter
from babelrs_geo.models.annealing import ORIGINAL, PAPER, Taps
from babelrs_geo.models.conversation import TextBatch
from babelrs_geo.models.detector import DetectorConfig
from babelrs_geo.models.language import LoRA
from babelrs_geo.models.pivot import PARTS, PivotConfig, PivotModel, pixel_shuffle
from babelrs_geo.models.vit import Block, VisionTransformer, ViTConfig

BOTH = pytest.mark.parametrize("config", [INTERNVIT, COMPACT], ids=["internvit", "compact"])
RECORDS = (("How many ships?", "two", 2), ("What is in <image>?", "a long bridge", 1))


def side(config: PivotConfig) -> int:
    """Pixels of a tile."""
    return config.vit.image_size


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield


# ---- the original's numbers


@pytest.fixture(scope="module")
def published() -> tuple[Golden, PivotModel]:
    """The original's tiny model, whose images are normalised already."""
    names = document("vlm_tiny_config")
    vision, text = names["vision_config"], names["llm_config"]
    lm = {k: v for k, v in text.items() if k in language.QWEN2_5} | {"model_type": "qwen2"}
    lm["rope_parameters"] = {"rope_type": "default", "rope_theta": text["rope_theta"]}
    encoder = ViTConfig(
        vision["image_size"], vision["patch_size"], vision["hidden_size"], vision["num_hidden_layers"],
        vision["num_attention_heads"], vision["intermediate_size"] / vision["hidden_size"], class_token=True,
        drop_path=vision["drop_path_rate"],
    )  # fmt: skip
    assert Taps(tuple(names["select_layer"])) == ORIGINAL
    config = PivotConfig(encoder, lm, ORIGINAL, names["warmup_steps"], mean=(0, 0, 0), std=(255, 255, 255))
    model = PivotModel(config).eval()
    state = Golden("vlm_tiny_state").state()
    odd = model.load_state_dict(state, strict=False)
    assert (odd.missing_keys, odd.unexpected_keys) == (["annealing.step"], [])
    return Golden("vlm_tiny"), model


@pytest.mark.shared
@needs_golden
@torch.no_grad()
def test_maps_of_the_layers_are_the_originals(published: tuple[Golden, PivotModel]) -> None:
    data, model = published
    assert data["n_hidden_states"] == model.config.vit.depth + 1
    layers = [0, 1, 2, 3, 8, 9, 17, 18, 23, 24]
    for layer, got in zip(layers, model.vision_model.tokens(data["px"], layers), strict=True):
        data.same("maps of the layers", got, data[f"hidden{layer}"])
    data.same("pixel shuffle", pixel_shuffle(data["ps_in"]), data["ps_v2"])
    data.same("projector alone", model.mlp1(data["mlp1_in"]), data["mlp1_out"])


@pytest.mark.shared
@needs_golden
@pytest.mark.parametrize("step", [0, 1500, 3000, 6000, 9000])
@torch.no_grad()
def test_fused_maps_and_image_tokens_are_the_originals(
    published: tuple[Golden, PivotModel], step: int
) -> None:
    data, model = published
    model.annealing.set_step(step)
    data.same("fused maps", model.fuse(data["px"]), data[f"fused_step{step}"])
    data.same("image tokens", model.see(data["px"]), data[f"feat_step{step}"])


@pytest.mark.shared
@needs_golden
@torch.no_grad()
def test_the_last_layer_alone_is_the_originals(published: tuple[Golden, PivotModel]) -> None:
    data, model = published
    alone = PivotModel(replace(model.config, taps=Taps((24,)))).eval()
    alone.load_state_dict(model.state_dict())
    data.same("image tokens of the last layer", alone.see(data["px"]), data["feat_select_-1"])


@pytest.mark.shared
@needs_golden
@pytest.mark.parametrize("step", [0, 3000, 6000])
def test_logits_loss_and_gradients_are_the_originals(published: tuple[Golden, PivotModel], step: int) -> None:
    data, model = published
    model.annealing.set_step(step)
    text = TextBatch(*(data[k] for k in ("input_ids", "labels", "attention_mask", "position_ids")))
    token = int(data["img_context_token_id"])
    with torch.no_grad():
        whole = model(text, data["px"], token, all_logits=True)
    data.same("logits", whole.logits, data[f"lm_logits_step{step}"])
    data.same("loss", whole.loss, data[f"lm_loss_step{step}"])
    model.zero_grad(set_to_none=True)
    out = model(text, data["px"], token)
    data.same("loss from the logits that count", out.loss, data[f"lm_loss_step{step}"])
    data.same("logits that count", out.logits, data[f"lm_logits_step{step}"][:, out.places])
    out.loss.backward()
    wanted = document(f"vlm_tiny_gradnorms_step{step}")
    ours = {name: p.grad for name, p in model.named_parameters()}
    assert ours.keys() == wanted.keys()
    assert {k for k, g in ours.items() if g is None} == {k for k, norm in wanted.items() if norm is None}
    for name, norm in wanted.items():
        grad = ours[name]
        if grad is not None:
            data.same("norms of gradients", grad.norm(), norm)


@pytest.mark.shared
@needs_golden
def test_with_the_papers_layers_the_last_block_learns_too(published: tuple[Golden, PivotModel]) -> None:
    data, model = published
    paper = PivotModel(replace(model.config, taps=PAPER)).eval()
    paper.load_state_dict(model.state_dict())
    text = TextBatch(*(data[k] for k in ("input_ids", "labels", "attention_mask", "position_ids")))
    for step in (0, 3000, 6000):
        paper.annealing.set_step(step)
        paper.zero_grad(set_to_none=True)
        paper(text, data["px"], int(data["img_context_token_id"])).loss.backward()
        assert all(p.grad is not None and p.grad.norm() > 0 for p in paper.parameters())


# ---- transformers' own InternVL, and plain formulas


def transformers_internvl(model: PivotModel) -> InternVLForConditionalGeneration:
    """The same weights in transformers' classes."""
    vit, lm = model.config.vit, dict(model.config.language)
    lm.pop("model_type")
    vision = InternVLVisionConfig(
        hidden_size=vit.dim, num_attention_heads=vit.heads, intermediate_size=int(vit.dim * vit.mlp_ratio),
        num_hidden_layers=vit.depth, image_size=[vit.image_size] * 2, patch_size=[vit.patch] * 2,
        attention_bias=True, use_mean_pooling=True,
    )  # fmt: skip
    config = InternVLConfig(
        vision_config=vision,
        text_config=Qwen2Config(**lm),
        image_token_id=IMAGE_TOKEN,
        tie_word_embeddings=False,
    )
    theirs = InternVLForConditionalGeneration(config).eval()
    state = {k: v for k, v in model.state_dict().items() if k != "annealing.step"}
    theirs.load_state_dict(official.renamed(state, official.PIVOT))
    return theirs


@torch.no_grad()
def test_from_the_last_layer_alone_it_is_transformers_internvl() -> None:
    config = replace(INTERNVIT, taps=Taps((INTERNVIT.vit.depth,)))
    model = PivotModel(config).eval()
    text, tiles = batch_of(config, *RECORDS, side=side(config))
    theirs = transformers_internvl(model)(
        input_ids=text.input_ids,
        pixel_values=(tiles - model.mean) / model.std,
        attention_mask=text.attention_mask.long(),
        position_ids=text.position_ids,
        labels=text.labels,
    )
    ours = model(text, tiles, IMAGE_TOKEN, all_logits=True)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("step", [0, 25, 100, 1000])
@torch.no_grad()
def test_the_fused_map_is_made_of_the_layers_named(step: int) -> None:
    model = PivotModel(INTERNVIT).eval()
    tiles = torch.rand(2, 3, 56, 56)
    tower: Any = transformers_internvl(model).model.vision_tower
    hidden = tower((tiles - model.mean) / model.std, output_hidden_states=True).hidden_states
    assert len(hidden) == INTERNVIT.vit.depth + 1
    alpha = min(step / INTERNVIT.tau, 1)
    mean = sum(hidden[layer] for layer in INTERNVIT.taps.layers) / 3
    model.annealing.set_step(step)
    torch.testing.assert_close(
        model.fuse(tiles), (1 - alpha) * hidden[-1] + alpha * mean, rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def test_the_compact_encoder_is_the_detectors_own() -> None:
    """What the language model sees is what the backbone adds to its maps."""
    model = PivotModel(COMPACT).eval()
    encoder = model.vision_model
    assert isinstance(encoder, ViTAdapter)
    seen: list[Tensor] = []
    encoder.interactions[-1].register_forward_hook(lambda _m, _i, out: seen.append(out[0]))
    x = torch.randn(2, 3, 64, 64)
    encoder(x)
    first, last = encoder.tokens(x, [1, 2])
    torch.testing.assert_close(last, seen[0])
    assert not torch.equal(first, last)
    assert torch.equal(encoder.tokens(x, [1])[0], first)


def test_pixel_shuffle_puts_squares_of_places_together() -> None:
    maps = torch.arange(2 * 4 * 6 * 3.0).view(2, 4, 6, 3)
    made = pixel_shuffle(maps)
    assert made.shape == (2, 2, 3, 12)
    for y in range(2):
        for x in range(3):
            square = maps[:, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
            assert torch.equal(made[:, y, x], square.reshape(2, 12))


# ---- gradients


def norms(model: torch.nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


@pytest.mark.parametrize("encoder", [INTERNVIT.encoder, COMPACT.encoder], ids=["internvit", "compact"])
def test_a_layer_depends_on_what_it_says(encoder: ViTConfig | AdapterConfig) -> None:
    model: ViTAdapter | VisionTransformer
    if isinstance(encoder, AdapterConfig):
        vit = replace(encoder.vit, depth=3)
        model, depth, size = ViTAdapter(replace(encoder, stages=(1, 2), vit=vit, extra_extractors=1)), 3, 64
    else:
        model, depth, size = VisionTransformer(encoder), encoder.depth, 56
    for part in model.modules():  # a bias of zero weights would get no gradient
        if isinstance(part, torch.nn.Linear):
            torch.nn.init.normal_(part.weight, std=0.2)
    for layer in range(1, depth + 1):
        model.zero_grad(set_to_none=True)
        model.tokens(torch.rand(1, 3, size, size), [layer])[0].square().sum().backward()
        got = {name for name, p in model.named_parameters() if p.grad is not None}
        assert got == model.reached(layer), layer


@BOTH
@pytest.mark.parametrize("taps", [(1, 2), (2,), (1,)])
@pytest.mark.parametrize("step", [0, 50, 100])
def test_the_gradient_reaches_exactly_the_layers_before_the_last_that_is_fused(
    config: PivotConfig, taps: tuple[int, ...], step: int
) -> None:
    config = replace(config, taps=Taps(taps))
    model = PivotModel(config)
    model.annealing.set_step(step)
    text, tiles = batch_of(config, *RECORDS, side=side(config))
    model(text, tiles, IMAGE_TOKEN).loss.backward()
    got = {name for name, p in model.named_parameters() if p.grad is not None}
    reached = {f"vision_model.{name}" for name in model.vision_model.reached(taps[-1])}
    assert {name for name in got if name.startswith("vision_model.")} == reached
    assert got == {name for name, p in model.named_parameters() if p.requires_grad}
    if isinstance(config.encoder, AdapterConfig):  # stem and transformer learn together
        assert {"vision_model.spm.stem.0.weight", "vision_model.layers.0.attn.qkv.weight"} <= norms(model)
    else:
        last = f"vision_model.encoder.layers.{taps[-1]}."
        assert not any(name.startswith(last) for name in got)


@BOTH
def test_checkpointing_gives_the_same_loss_and_gradients(config: PivotConfig) -> None:
    model = PivotModel(config).eval()
    model.annealing.set_step(50)
    text, tiles = batch_of(config, *RECORDS, side=side(config))
    kept: list[tuple[Tensor, dict[str, Tensor]]] = []
    for on in (False, True):
        model.train(on)  # transformers checkpoints in training alone; nothing is random here but drop path
        for block in model.modules():
            if isinstance(block, Block):
                block.drop_path = 0.0
        model.checkpoint_gradients(on)
        model.zero_grad(set_to_none=True)
        loss = model(text, tiles, IMAGE_TOKEN).loss
        loss.backward()
        kept.append((loss, {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(kept[0], kept[1])


def test_drop_path_grows_with_depth_and_keeps_the_mean() -> None:
    tower = VisionTransformer(replace(INTERNVIT.vit, depth=5, drop_path=0.4))
    blocks: Any = tower.encoder["layers"]
    assert [block.drop_path for block in blocks] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    x = torch.randn(4000, 2, 24)
    block = blocks[4]
    with torch.no_grad():
        calm = block.eval()(x) - x
        branch = block._drop(calm)
        assert branch is calm
        dropped = block.train()._drop(calm)
    gone = (dropped == 0).flatten(1).all(1)
    assert gone.float().mean().item() == pytest.approx(0.4, abs=0.04)
    torch.testing.assert_close(dropped[~gone], calm[~gone] / 0.6)


# ---- text and images


@BOTH
def test_losses_are_means_over_labelled_tokens(config: PivotConfig) -> None:
    model = PivotModel(config).eval()
    text, tiles = batch_of(config, *RECORDS, side=side(config))
    with torch.no_grad():
        out = model(text, tiles, IMAGE_TOKEN, all_logits=True)
        alone = model(text, tiles, IMAGE_TOKEN)
    assert out.labelled.tolist() == [len("two") + 1, len("a long bridge") + 1]
    sums = []
    for row in range(2):
        total = 0.0
        for place in range(text.labels.shape[1] - 1):
            label = int(text.labels[row, place + 1])
            if label >= 0:
                total -= float(out.logits[row, place].log_softmax(-1)[label])
        sums.append(total)
        assert out.losses[row].item() == pytest.approx(total / out.labelled[row].item(), rel=1e-5)
    assert out.loss.item() == pytest.approx(sum(sums) / out.labelled.sum().item(), rel=1e-5)
    assert len(alone.places) < text.labels.shape[1]
    torch.testing.assert_close(alone.loss, out.loss)
    torch.testing.assert_close(alone.logits, out.logits[:, alone.places])


def test_each_image_stands_in_its_own_place() -> None:
    model = PivotModel(COMPACT).eval()
    text, tiles = batch_of(COMPACT, *RECORDS, side=64)
    with torch.no_grad():
        embedded, seen = model.embed(text.input_ids, tiles, IMAGE_TOKEN), model.see(tiles)
        marked = text.input_ids == IMAGE_TOKEN
        torch.testing.assert_close(embedded[0][marked[0]], seen[:2].flatten(0, 1))
        torch.testing.assert_close(embedded[1][marked[1]], seen[2])
        torch.testing.assert_close(embedded[~marked], model.table(text.input_ids)[~marked])


def test_stand_ins_for_missing_images_do_not_count_but_have_gradients() -> None:
    model = PivotModel(COMPACT).eval()
    text, tiles = batch_of(COMPACT, ("Q", "A", 0), ("Why?", "B", 1), side=64)
    blank = torch.cat([torch.ones(1, 3, 64, 64), tiles])
    torch.testing.assert_close(
        model(text, blank, IMAGE_TOKEN, torch.tensor([1])).loss, model(text, tiles, IMAGE_TOKEN).loss
    )
    none = torch.zeros(0, dtype=torch.long)
    text, _ = batch_of(COMPACT, ("Q", "A", 0), side=64)
    model(text, blank[:1], IMAGE_TOKEN, none).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    plain = model(text, None, IMAGE_TOKEN)
    torch.testing.assert_close(plain.loss, model(text, blank[:1], IMAGE_TOKEN, none).loss)


def test_a_tile_that_several_conversations_are_about_is_seen_once() -> None:
    model = PivotModel(COMPACT).eval()
    text, tiles = batch_of(COMPACT, ("Q", "A", 1), ("Why?", "B", 1), ("Where?", "C", 1), side=64)
    which = torch.tensor([1, 0, 1])

    def learnt(tiles: torch.Tensor, which: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad()
        loss = model(text, tiles, IMAGE_TOKEN, which).loss
        loss.backward()
        return loss, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    torch.testing.assert_close(learnt(tiles[:2], which), learnt(tiles[:2][which], None))


def test_images_that_do_not_fit_the_text_are_refused() -> None:
    model = PivotModel(COMPACT)
    text, tiles = batch_of(COMPACT, *RECORDS, side=64)
    with pytest.raises(ParameterError, match="12 image tokens and tiles for 8; expected the same"):
        model(text, tiles[:2], IMAGE_TOKEN)
    with pytest.raises(ParameterError, match="tiles have 48 px; this encoder takes multiples of 32 px"):
        model(text, tiles[:, :, :48, :48], IMAGE_TOKEN)
    assert [INTERNVIT.tokens(56), COMPACT.tokens(96), PivotConfig().tokens(448)] == [4, 9, 256]
    with pytest.raises(ParameterError, match="multiples of 28 px"):
        INTERNVIT.tokens(70)


# ---- answers


@BOTH
def test_answers_are_the_likeliest_tokens_one_by_one(config: PivotConfig) -> None:
    tokenizer = byte_tokenizer()
    model = PivotModel(config).train()
    torch.nn.init.normal_(model.table.weight, std=0.5)
    questions = ["Where?", "How many ships are there?"]
    tiles = [torch.rand(1, 3, side(config), side(config)), torch.rand(2, 3, side(config), side(config))]
    given = model.answer(tokenizer, questions, tiles, longest=5, system="s")
    assert model.training
    model.eval()
    for question, seen, answer in zip(questions, tiles, given, strict=True):
        text, _ = batch_of(config, (question, "", len(seen)), side=side(config))
        ids = text.input_ids[0, :-2]  # without the end of the turn
        said: list[int] = []
        for _ in range(5):
            row = torch.cat([ids, torch.tensor(said, dtype=torch.long)])[None]
            every = torch.ones_like(row, dtype=torch.bool)
            places = torch.arange(row.shape[1])[None]
            with torch.no_grad():
                out = model(TextBatch(row, row, every, places), seen, IMAGE_TOKEN, all_logits=True)
            said.append(int(out.logits[0, -1].argmax()))
        expected = tokenizer.decode(said).partition("<|im_end|>")[0].strip()
        assert answer == expected
        assert model.answer(tokenizer, [question], [seen], longest=5, system="s") == [answer]


def test_it_learns_to_tell_images_apart() -> None:
    """From pixels to words and back: two images, one question, answers that only the image tells."""
    tokenizer = byte_tokenizer()
    model = PivotModel(replace(COMPACT, tau=10))
    tiles = [torch.zeros(1, 3, 64, 64), torch.ones(1, 3, 64, 64)]
    tiles[1][:, :, 20:40, 20:40] = 0
    text, _ = batch_of(COMPACT, ("<image>?", "no", 1), ("<image>?", "ship", 1), side=64)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 5e-3)
    for step in range(25):
        model.annealing.set_step(step)
        optimizer.zero_grad()
        model(text, torch.cat(tiles), IMAGE_TOKEN).loss.backward()
        optimizer.step()
    assert model.answer(tokenizer, ["?", "?"], tiles, 8, system="s") == ["no", "ship"]


# ---- what is trained


def trained(model: PivotModel) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


@BOTH
def test_parts_are_frozen_by_name(config: PivotConfig) -> None:
    model = PivotModel(config)
    everything = trained(model)
    begins = {"encoder": "vision_model.", "projector": "mlp1.", "tokens": "language_model."}
    taken: set[str] = set()
    for part in PARTS:
        model.freeze([part])
        gone = everything - trained(model)
        assert gone and all(name.startswith(begins.get(part, "language_model.model.")) for name in gone)
        assert not gone & taken
        taken |= gone
    assert taken == everything
    model.freeze(["tokens"])
    tables = {"language_model.model.embed_tokens.weight", "language_model.lm_head.weight"}
    assert everything - trained(model) == tables & everything
    model.freeze(())
    assert trained(model) == everything
    with pytest.raises(
        ParameterError, match="llm cannot be frozen; choose from encoder, projector, tokens, language"
    ):
        model.freeze(["llm"])


def test_low_rank_updates_are_trained_in_place_of_the_language_models_layers() -> None:
    pytest.importorskip("peft")
    model = PivotModel(COMPACT)
    model.freeze(["tokens"])
    text, tiles = batch_of(COMPACT, *RECORDS, side=64)
    before = model.eval()(text, tiles, IMAGE_TOKEN).loss
    plain = language.plain_state(model.language_model)
    model.add_lora(LoRA(rank=4, dropout=0.0))
    torch.testing.assert_close(model.eval()(text, tiles, IMAGE_TOKEN).loss, before)
    mine = {name for name in trained(model) if name.startswith("language_model.")}
    assert mine and all("lora_" in name for name in mine)
    assert {f"{p}_proj" for p in ("q", "k", "v", "o", "gate", "up", "down")} == {
        name.split(".lora_")[0].rsplit(".", 1)[1] for name in mine
    }
    model.checkpoint_gradients()
    model.train()(text, tiles, IMAGE_TOKEN).loss.backward()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                assert p.grad is not None
                p += 0.1
    after = model.eval()(text, tiles, IMAGE_TOKEN).loss
    merged = language.plain_state(model.language_model)
    assert merged.keys() == plain.keys()
    torch.testing.assert_close(model(text, tiles, IMAGE_TOKEN).loss, after)  # put apart again
    whole = PivotModel(COMPACT).eval()
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("language_model.")}
    odd = whole.load_state_dict(state | {f"language_model.{k}": v for k, v in merged.items()}, strict=False)
    assert odd.missing_keys == ["language_model.lm_head.weight"]  # the table of tokens
    torch.testing.assert_close(whole(text, tiles, IMAGE_TOKEN).loss, after, rtol=1e-4, atol=1e-5)
    model.freeze(["tokens", "language"])
    assert not any(name.startswith("language_model.") for name in trained(model))


# ---- configurations


@BOTH
def test_a_configuration_comes_back_from_json(config: PivotConfig) -> None:
    assert PivotConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    model = PivotModel(config)
    again = PivotModel(replace(config, language={}), model.language_model)
    rebuilt = PivotModel(PivotConfig.from_dict(json.loads(json.dumps(again.config.to_dict()))))
    assert {k: v.shape for k, v in rebuilt.state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }


def test_layers_beyond_the_encoder_are_refused() -> None:
    with pytest.raises(ParameterError, match=r"layers \(1, 9\) are to be fused in an encoder of 2"):
        replace(COMPACT, taps=Taps((1, 9)))


def test_the_papers_model_has_its_size_and_makes_a_step() -> None:
    """InternVL2.5-1B's shapes, without memory: forward, backward, and an encoder that the detector takes whole."""
    lm = {**language.QWEN2_5, "attn_implementation": "eager"}  # the others look at the mask's values
    with torch.device("meta"):
        model = PivotModel(replace(PivotConfig(), language=lm)).train()
        detector = ViTAdapter(DetectorConfig().backbone)
    assert sum(p.numel() for p in model.parameters()) == 938_193_024
    shapes = {k: tuple(v.shape) for k, v in model.vision_model.state_dict().items()}
    assert len(shapes) == 340 and shapes == official.encoder_shapes(official.INTERNVIT)
    wanted = official.layout_names(official.PivotSizes(), "original")
    assert {k: tuple(v.shape) for k, v in model.state_dict().items() if k != "annealing.step"} == wanted
    ids = torch.zeros(1, 300, dtype=torch.long, device="meta")
    text = TextBatch(ids, ids, torch.ones_like(ids, dtype=torch.bool), ids)
    model.checkpoint_gradients()
    model(text, torch.zeros(1, 3, 448, 448, device="meta"), 151_667).loss.backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
    backbone = official.backbone_of(dict(model.vision_model.state_dict()), DetectorConfig().backbone.vit)
    transformer = ("embeddings.", "layers.")
    assert {k: v.shape for k, v in backbone.items()} == {
        f"backbone.{k}": v.shape for k, v in detector.state_dict().items() if k.startswith(transformer)
    }
