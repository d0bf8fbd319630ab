"""The whole network in half precision, with gradient checkpointing, compiled, and at any size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_models import same
from tiny_model import TINY
from torch import Tensor

from babelrs_geo.models.adapter import AdapterConfig, Interaction
from babelrs_geo.models.detector import (
    PLAIN_SUM,
    RGB_HEAVIER,
    Detector,
    DetectorConfig,
    HorizontalTarget,
    OrientedTarget,
)
from babelrs_geo.models.rotated import outer
from babelrs_geo.models.vit import PatchEmbeddings, ViTConfig

FULL = replace(
    DetectorConfig(),
    backbone=AdapterConfig(vit=ViTConfig(64, 16, 24, 2, 2), stages=(1, 1), heads=2, prior_width=8),
    neck_channels=32,
    gfl=replace(TINY.gfl, convs=1),
    rpn=TINY.rpn,
    roi=TINY.roi,
)
"""The full configuration's classes with tiny numbers: dropout, extra extractors and all."""
COMPACT = replace(TINY, backbone=replace(TINY.backbone, prior="efficientnet_lite0"))
"""The compact configuration's, with its ImageNet trunk."""


def batch(model: Detector, size: int = 64) -> dict[str, tuple[Tensor, list[Any]]]:
    box = torch.tensor([[size / 2, size / 2, size * 0.4, size * 0.2, 0.5]])
    turned = {
        s: OrientedTarget(box, torch.tensor([model.config.labels(s).start]), (size, size))
        for s in ("rgb", "ir")
    }
    sar = HorizontalTarget(outer(box), torch.tensor([0]), (size, size))
    return {s: (torch.rand(1, 3, size, size), [turned.get(s, sar)]) for s in ("sar", "rgb", "ir")}


@pytest.fixture
def model() -> Iterator[Detector]:
    torch.manual_seed(0)
    yield Detector(FULL)


def losses_and_gradients(model: Detector, data: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(1)  # samplers and dropout draw
    model.zero_grad()
    losses = model.losses(data)
    torch.stack(list(losses.values())).sum().backward()
    return losses, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_checkpointing_changes_no_gradient(model: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    model.train()
    data = batch(model)
    plain, wanted = losses_and_gradients(model, data)
    model.checkpoint_gradients()
    calls = []
    forward = Interaction._run
    monkeypatch.setattr(
        Interaction, "_run", lambda self, *a: (calls.append(self.checkpointing), forward(self, *a))[1]
    )
    losses, gradients = losses_and_gradients(model, data)
    assert all(calls) and len(calls) == 2 * 3 + FULL.backbone.extra_extractors
    assert gradients.keys() == wanted.keys()
    for name, value in plain.items():
        assert torch.equal(losses[name], value), name
    for name, value in wanted.items():
        same(gradients[name], value, 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", [FULL, COMPACT], ids=["full", "compact"])
def test_half_precision_trains_and_predicts(config: DetectorConfig, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Detector(config).eval()
    # Not 64 px, where the last level is convolved from one pixel: oneDNN's bf16 kernel then reads memory
    # nobody wrote, and its weight gradient is whatever lay there.
    data = batch(model, 128)
    plain, wanted = losses_and_gradients(model, data)
    with torch.autocast("cpu", dtype=dtype):
        losses, gradients = losses_and_gradients(model, data)
        found = {s: model.predict(images, s)[0] for s, (images, _) in data.items()}
    for name, value in losses.items():
        assert value.dtype == torch.float32
        # RoIs are another choice of proposals where scores are rounded; the others see the same targets.
        assert value.item() == pytest.approx(plain[name].item(), rel=0.05, abs=0.02), name
    assert gradients.keys() == wanted.keys()
    broken = [n for n, g in gradients.items() if g.dtype != torch.float32 or not g.isfinite().all()]
    assert not broken
    for boxes, scores, _ in found.values():
        assert boxes.dtype == scores.dtype == torch.float32
        assert len(boxes) and boxes.isfinite().all()


@pytest.mark.parametrize("config", [FULL, COMPACT], ids=["full", "compact"])
def test_backbone_and_neck_compile_into_one_graph(config: DetectorConfig) -> None:
    """`fullgraph` raises at the first graph break; in training, with dropout and checkpointing, and predicting."""
    torch.manual_seed(0)
    model = Detector(config).eval()

    def trunk(images: Tensor) -> list[Tensor]:
        maps = model.features(images)
        return [*model.neck(maps, 1), *model.neck(maps)]

    image = torch.rand(1, 3, 64, 96)
    torch._dynamo.reset()
    compiled = torch.compile(trunk, fullgraph=True, backend="eager")
    with torch.no_grad():
        for got, wanted in zip(compiled(image), trunk(image), strict=True):
            same(got, wanted, 1e-6)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert compiled(image)[0].isfinite().all()
    model.train().checkpoint_gradients()
    torch.stack([m.mean() for m in compiled(image)]).sum().backward()
    assert model.backbone.level_embed.grad is not None
    torch._dynamo.reset()


def test_positions_are_the_stored_ones_at_the_stored_size() -> None:
    torch.manual_seed(0)
    stored = PatchEmbeddings(ViTConfig(image_size=96, dim=8, heads=2))
    assert torch.equal(stored.positions(6, 6), stored.position_embedding[:, 1:])
    wide = stored.positions(4, 9)
    assert wide.shape == (1, 36, 8)
    # What varies along x alone still does, and rises as it did.
    with torch.no_grad():
        stored.position_embedding[0, 1:] = torch.arange(6.0).repeat(6).unsqueeze(1)
    finer = stored.positions(5, 12)[0, :, 0].view(5, 12)
    same(finer, finer[:1].expand(5, 12), 1e-6)
    assert (finer[0].diff() > 0).all()


@pytest.mark.parametrize("size", [(64, 64), (33, 95), (96, 32), (17, 200)])
def test_any_size_gives_maps_of_its_own_size(model: Detector, size: tuple[int, int]) -> None:
    maps = model.eval().features(torch.rand(1, 3, *size))
    for stride, found in zip((4, 8, 16, 32), maps, strict=True):
        assert found.shape[2:] == tuple(-(-side // 32) * 32 // stride for side in size)


def test_the_loss_is_the_papers_sum_or_the_codes() -> None:
    torch.manual_seed(0)
    papers, codes = (
        Detector(replace(FULL, loss_weights=PLAIN_SUM)).eval(),
        Detector(replace(FULL, loss_weights=RGB_HEAVIER)).eval(),
    )
    codes.load_state_dict(papers.state_dict())
    data = batch(papers)
    plain, heavier = losses_and_gradients(papers, data)[0], losses_and_gradients(codes, data)[0]
    for name, value in plain.items():
        factor = 1.5 if name.startswith("rgb") else 1.0
        assert heavier[name].item() == pytest.approx(factor * value.item(), rel=1e-5)
    assert DetectorConfig().loss_weights == PLAIN_SUM
