"""Calibration measures what it says, and takes another way only where it brings latents nearer to the limit."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from fpdm import (
    Choices,
    DenoiserConfig,
    Diffusion,
    SamplerSettings,
    Way,
    allocate_adaptively,
    build_denoiser,
    calibrate,
    count_blocks,
    measure_residuals,
    rng,
    sample,
)
from fpdm.calibration import distances, fitting_ways, limit_way

V = Diffusion(prediction="v")
FLOW = Diffusion(schedule="flow", prediction="flow", learned_variance=False)
WAY = Way(sampler="ddim", sampler_settings=SamplerSettings(), num_steps=6, iterations=(2,) * 6, reuse=True)
LIMIT = replace(limit_way(V), num_steps=40, iterations=(6,) * 40)
FEW = Choices(
    iterations=(0.5, 1, 2, 4), orders=(1, 2), spacings=(("linspace", 1.0), ("trailing", 1.0)), starts=(None, 0.0, 0.5)
)


def drawing(index, diffusion=V, kind="fpdm", seed=1, **options):
    """`sample` bound to a small network whose iteration converges but slowly."""
    config = DenoiserConfig(kind=kind, depth=1, input_size=4, hidden_size=16, num_heads=2, num_classes=3)
    model = build_denoiser(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = rng.normal(seed, name, torch.arange(len(parameter)), tuple(parameter.shape[1:]))
            parameter.copy_(0.15 * noise)
    return partial(sample, model, diffusion, rng.normal(0, "start", index, (4, 4, 4)), index % 3, **options)


@pytest.fixture
def draw():
    return drawing(torch.arange(6))


@pytest.fixture
def judge():
    return drawing(torch.arange(6, 12))


def test_residual_curves_have_one_number_an_iteration_and_fall(draw):
    curves = measure_residuals(draw, replace(WAY, num_steps=3, iterations=(6, 3, 5)))
    assert [len(curve) for curve in curves] == [6, 3, 5]
    assert all(curve.isfinite().all() and curve[-1] < curve[0] for curve in curves)


def test_iterations_are_spread_adaptively_at_the_same_blocks(draw):
    way = allocate_adaptively(draw, WAY)
    assert sum(way.iterations) == 12
    assert min(way.iterations) >= 1
    assert replace(way, iterations=WAY.iterations) == WAY


def test_a_dit_has_nothing_to_calibrate():
    draw, way = drawing(torch.arange(2), kind="dit"), replace(WAY, iterations=None)
    with pytest.raises(ValueError, match="DiT"):
        measure_residuals(draw, way)
    with pytest.raises(ValueError, match="DiT"):
        calibrate(draw, draw, V, way, outer_depth=2)


@pytest.mark.parametrize("budget", [3, 7, 24, 41, 160])
@pytest.mark.parametrize("diffusion", [V, FLOW])
def test_every_way_costs_the_budget_exactly_and_none_begins_without_an_iteration(budget, diffusion):
    ways = fitting_ways(diffusion, Choices(), budget, 2)
    assert ways
    for way in ways.values():
        assert count_blocks(way.iterations, 2) == budget
        assert way.iterations[0] >= 1
        assert way.reuse or 0 not in way.iterations


def test_calibration_finds_what_trying_all_ways_finds(draw, judge):
    ways = fitting_ways(V, FEW, 24, 2)
    limit = draw(**vars(LIMIT))
    errors = {point: float(distances(draw, way, limit).mean()) for point, way in ways.items()}
    found = calibrate(draw, judge, V, WAY, outer_depth=2, choices=FEW, limit=LIMIT)
    assert found.way == ways[min(errors, key=errors.get)]
    assert found.tried < len(ways)
    assert found.error < found.error_before


def test_a_way_that_is_no_nearer_to_the_limit_on_other_samples_is_not_taken(draw, judge):
    best = fitting_ways(V, FEW, 24, 2)[1, 2, ("linspace", 1.0), 0.5]
    worse = Choices(iterations=(4,), orders=(1,), spacings=(("linspace", 1),), starts=(None,))
    again = calibrate(draw, judge, V, best, outer_depth=2, choices=worse, limit=LIMIT)
    assert again.way == best
    assert again.error == again.error_before
    equal = Choices(iterations=(2,), orders=(1,), spacings=(("linspace", 1),), starts=(0.0,))  # DDIM, but for rounding
    assert calibrate(draw, judge, V, WAY, outer_depth=2, choices=equal, limit=LIMIT).way == WAY


@pytest.mark.parametrize("seed", range(3))
def test_what_is_chosen_is_never_further_from_the_limit_than_constant_beyond_noise(seed):
    """For networks, budgets and guidance at random, on samples that neither chose nor judged."""
    steps, iterations, guided = (int(rng.integers(seed, name, torch.tensor([0]), 5)) for name in ("s", "i", "g"))
    options = {"seed": seed, "guidance_scale": 1 + guided / 4}
    draw, judge, other = (drawing(index, **options) for index in torch.arange(36).split(12))
    way = replace(WAY, num_steps=3 + steps, iterations=(1 + iterations,) * (3 + steps))
    found = calibrate(draw, judge, V, way, outer_depth=2, choices=FEW, limit=LIMIT)
    limit = other(**vars(LIMIT))
    loss = distances(other, found.way, limit) - distances(other, way, limit)
    assert loss.mean() <= 2 * loss.std() / len(loss) ** 0.5
    assert count_blocks(found.way.iterations, 2) == count_blocks(way.iterations, 2)


def test_a_way_that_adds_noise_has_no_limit(draw, judge):
    with pytest.raises(ValueError, match="ddpm adds noise"):
        calibrate(draw, judge, V, replace(WAY, sampler="ddpm"), outer_depth=2)
    with pytest.raises(ValueError, match="choices: none fits"):
        calibrate(draw, judge, V, WAY, outer_depth=2, choices=Choices(spacings=()))
