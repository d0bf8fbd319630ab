"""LVSA by itself: its clock, its weights, and which layers it looks at."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from babelrs_geo.errors import ParameterError
from babelrs_geo.models.adapter import AdapterConfig
from babelrs_geo.models.annealing import ORIGINAL, PAPER, LayerAnnealing, Taps, taps_of
from babelrs_geo.models.detector import COMPACT
from babelrs_geo.models.vit import ViTConfig

STEPS = st.integers(0, 10**6)
TAUS = st.integers(1, 10**5)


@given(STEPS, TAUS)
def test_alpha_rises_from_nothing_to_one_at_tau(step: int, tau: int) -> None:
    fuse = LayerAnnealing(4, tau)
    fuse.set_step(step)
    assert fuse.alpha().item() == pytest.approx(min(step / tau, 1), abs=1e-6)


@given(STEPS, TAUS, st.integers(1, 8))
def test_weights_sum_to_one_and_end_equal(step: int, tau: int, layers: int) -> None:
    fuse = LayerAnnealing(layers, tau)
    fuse.set_step(step)
    weights = fuse.weights()
    assert weights.sum().item() == pytest.approx(1, abs=1e-6)
    assert (weights >= 0).all() and (weights[:-1] <= weights[-1] + 1e-6).all()
    if step >= tau:
        torch.testing.assert_close(weights, torch.full((layers,), 1 / layers))
    if step == 0:
        assert weights[-1] == 1


@given(STEPS, st.integers(1, 4), st.integers(0, 99))
def test_the_fused_map_is_the_papers_formula(step: int, layers: int, seed: int) -> None:
    maps = list(torch.randn(layers, 2, 5, 3, generator=torch.Generator().manual_seed(seed)))
    fuse = LayerAnnealing(layers, 6000)
    fuse.set_step(step)
    alpha = min(step / 6000, 1)
    torch.testing.assert_close(fuse(maps), (1 - alpha) * maps[-1] + alpha * sum(maps) / layers)


def test_the_clock_is_saved_with_the_weights() -> None:
    fuse = LayerAnnealing(3)
    fuse.set_step(1234)
    again = LayerAnnealing(3)
    again.load_state_dict(fuse.state_dict())
    assert again.step.item() == 1234 and torch.equal(again.weights(), fuse.weights())
    assert fuse.to(torch.bfloat16).step.dtype == torch.int64, "bf16 counts to 256 only"


def test_half_precision_stays_half_and_keeps_the_weights_exact() -> None:
    fuse = LayerAnnealing(4)
    fuse.set_step(1)
    maps = list(torch.full((4, 1, 3, 2), 256.0, dtype=torch.bfloat16))
    assert torch.equal(fuse(maps), maps[0]) and fuse(maps).dtype == torch.bfloat16


def test_layers_by_name() -> None:
    assert taps_of(ViTConfig()) == taps_of(AdapterConfig()) == PAPER == Taps((3, 9, 18, 24))
    assert (
        taps_of(ViTConfig(), "original")
        == taps_of(AdapterConfig(), "original")
        == ORIGINAL
        == Taps((2, 8, 17, 23))
    )
    assert taps_of(ViTConfig(), "last") == Taps((24,))
    assert taps_of(COMPACT.backbone) == Taps((3, 6)) and taps_of(COMPACT.backbone, "original") == Taps((2, 5))
    assert taps_of(ViTConfig(depth=2)) == Taps((1, 2))
    with pytest.raises(ParameterError, match='called "first"'):
        taps_of(ViTConfig(), "first")
    with pytest.raises(ParameterError, match=r"\(0, 1\); expected numbers from 1 on"):
        taps_of(ViTConfig(depth=2), "original")


@pytest.mark.parametrize("layers", [(), (0, 1), (3, 3), (4, 2)])
def test_layers_that_make_no_sense_are_refused(layers: tuple[int, ...]) -> None:
    with pytest.raises(ParameterError, match="each larger than the one before"):
        Taps(layers)


def test_maps_and_tau_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ParameterError, match="2 maps were given to fuse; expected 3"):
        LayerAnnealing(3)([torch.zeros(1)] * 2)
    with pytest.raises(ParameterError, match="tau is 0"):
        LayerAnnealing(3, 0)
