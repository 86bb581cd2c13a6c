"""The density of timesteps is the one that its name says, and its weights undo it."""

import pytest
import torch

from fpdm.timesteps import MAX_WEIGHT, TimestepDensity

U = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
DENSITIES = [
    TimestepDensity(kind="logit_normal"),
    TimestepDensity(kind="logit_normal", mean=-0.8, deviation=1.6),
    TimestepDensity(shift=3.0),
    TimestepDensity(kind="logit_normal", mean=0.5, shift=0.5),
]


def test_uniform_fractions_are_the_numbers_themselves() -> None:
    u = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(TimestepDensity().fractions(u), u)


def test_the_logit_of_a_logit_normal_fraction_is_normal() -> None:
    logits = TimestepDensity(kind="logit_normal", mean=0.3, deviation=0.7).fractions(U).double().logit()
    assert float(logits.mean()) == pytest.approx(0.3, abs=1e-3)
    assert float(logits.std()) == pytest.approx(0.7, rel=1e-3)


def test_a_shift_moves_the_median_as_its_formula_says() -> None:
    median = TimestepDensity(kind="logit_normal", shift=3.0).fractions(torch.tensor([0.5]))
    assert float(median) == pytest.approx(3 * 0.5 / (1 + 2 * 0.5))


@pytest.mark.parametrize("density", DENSITIES)
def test_weights_are_the_slope_of_the_fractions(density: TimestepDensity) -> None:
    """The density at a fraction is 1 / (d fraction / d u)."""
    inner = U[(U > 0.01) & (U < 0.99)]
    step = 1e-5
    slope = (density._quantile_and_slope(inner + step)[0] - density._quantile_and_slope(inner - step)[0]) / (2 * step)
    assert torch.allclose(density.weights(inner).double(), slope.clamp_max(MAX_WEIGHT), rtol=1e-4)


@pytest.mark.parametrize("density", DENSITIES)
def test_weighted_means_are_those_of_uniform_timesteps_but_for_the_ends(density: TimestepDensity) -> None:
    """Of a function that is small at the ends; weights above MAX_WEIGHT, which are rare, are cut."""
    x, slope = density._quantile_and_slope(U)
    assert float((slope * (1 - x) * x).mean()) == pytest.approx(1 / 6, rel=1e-3)
    assert float((density.weights(U).double() * (1 - x) * x).mean()) == pytest.approx(1 / 6, rel=0.03)
    assert float(density.weights(U).max()) <= MAX_WEIGHT


@pytest.mark.parametrize("density", DENSITIES)
def test_every_fraction_is_a_timestep_that_there_is(density: TimestepDensity) -> None:
    ends = density.fractions(torch.tensor([0.0, 2.0**-24, 1 - 2.0**-24]))
    assert ((ends >= 0) & (ends < 1) & ((ends * 1000).long() < 1000)).all()
    assert density.weights(torch.tensor([0.0, 1 - 2.0**-24])).isfinite().all()
