"""Calibration measures what it says, and takes another way only where it brings latents nearer to the limit."""

from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch

from fpdm import (
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
from fpdm.calibration import MOVED_ON, distances, fit, fit_start, limit_way

V = Diffusion(prediction="v")
FLOW = Diffusion(schedule="flow", prediction="flow", learned_variance=False)
WAY = Way(sampler="ddim", sampler_settings=SamplerSettings(), num_steps=6, iterations=(2,) * 6, reuse=True)
LIMIT = replace(limit_way(V), num_steps=24, iterations=(4,) * 24)


def drawing(index, diffusion=V, kind="fpdm", seed=1, **options):
    """`sample` bound to a small network whose iteration converges but slowly."""
    sizes = {"depth": 1, "input_size": 4, "hidden_size": 16, "num_heads": 2, "num_classes": 3}
    config = DenoiserConfig(kind=kind, learned_variance=diffusion.learned_variance, **sizes)
    model = build_denoiser(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = rng.normal(seed, name, torch.arange(len(parameter)), tuple(parameter.shape[1:]))
            parameter.copy_(0.15 * noise)
    return partial(sample, model, diffusion, rng.normal(0, "start", index, (4, 4, 4)), index % 3, **options)


@pytest.fixture
def draw():
    return drawing(torch.arange(6))


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
        calibrate(partial(drawing, kind="dit"), V, way, outer_depth=2)


@pytest.mark.parametrize("budget", [3, 7, 24, 41, 160])
@pytest.mark.parametrize("diffusion", [V, FLOW])
@pytest.mark.parametrize("iterations", [1, 2.5, 8])
def test_a_fit_begins_at_the_budget_exactly_with_what_multistep_draws(budget, diffusion, iterations):
    way = fit_start(diffusion, budget, iterations, 2)
    assert count_blocks(way.iterations, 2) == budget
    spacing = "trailing" if diffusion.is_flow else "linspace"
    usual = replace(way, sampler="multistep", sampler_settings=SamplerSettings(spacing=spacing), relaxation=None)
    usual = replace(usual, start_extrapolation=MOVED_ON)
    draw = drawing(torch.arange(3), diffusion)
    torch.testing.assert_close(draw(**vars(way)), draw(**vars(usual)), rtol=0, atol=1e-4)


def test_a_budget_below_one_step_has_no_fit():
    assert fit_start(V, 2, 1, 2) is None


def test_a_fit_comes_nearer_to_the_limit_and_is_a_function_of_its_arguments():
    bind = partial(drawing, diffusion=V)
    limit = bind(torch.arange(24))(**vars(LIMIT))
    start = fit_start(V, 20, 2, 2)
    first, again = (fit(bind, V, start, limit, 30) for _ in range(2))
    assert first == again
    before, after = (distances(bind(torch.arange(24))(**vars(way)), limit).mean() for way in (start, first))
    assert after < 0.8 * before


def test_a_fit_of_one_step_finds_what_trying_all_its_weights_finds():
    bind = partial(drawing, diffusion=V)
    every, start = bind(torch.arange(24)), fit_start(V, 4, 2, 2)
    limit = every(**vars(LIMIT))
    found = fit(bind, V, start, limit, 250)
    coefficients = found.sampler_settings.coefficients

    def error(kept, weight):
        changed = replace(coefficients, kept=(kept,), weights=((weight,),))
        return float(
            distances(
                every(**vars(replace(found, sampler_settings=SamplerSettings(coefficients=changed)))), limit
            ).mean()
        )

    around = [step / 20 for step in range(-4, 5)]
    kept, weight = coefficients.kept[0], coefficients.weights[0][0]
    least = min(error(kept + more, weight + other) for more, other in product(around, around))
    assert error(kept, weight) < least + 0.01


def test_a_sample_of_a_fitted_sampler_does_not_depend_on_its_batch():
    bind = partial(drawing, diffusion=V, guidance_scale=1.5)
    way = fit(bind, V, fit_start(V, 12, 1.5, 2), bind(torch.arange(6))(**vars(LIMIT)), 3)
    alone = torch.cat([bind(torch.tensor([i]))(**vars(way)) for i in range(5)])
    torch.testing.assert_close(bind(torch.arange(5))(**vars(way)), alone, rtol=0, atol=1e-4)


def test_each_of_the_fitted_numbers_has_a_gradient():
    """Of starts those from the third step on: before there are no two solutions to move on from."""
    bind = partial(drawing, diffusion=V)
    limit = bind(torch.arange(8))(**vars(LIMIT))
    start = fit_start(V, 20, 2, 2)
    moved = fit(bind, V, start, limit, 1)
    coefficients, before = (way.sampler_settings.coefficients for way in (moved, start))
    for new, old in (
        (coefficients.timesteps[1:-1], before.timesteps[1:-1]),  # the first and the last may be held at the ends
        (coefficients.kept, before.kept),
        *zip(coefficients.weights, before.weights, strict=True),
        (moved.start_extrapolation[2:], start.start_extrapolation[2:]),
        (moved.relaxation, start.relaxation),
    ):
        assert all(abs(one - other) > 1e-4 for one, other in zip(new, old, strict=True))
    assert all(0 <= t <= 999 for t in coefficients.timesteps)


@pytest.mark.parametrize("seed", range(20))
def test_what_is_chosen_is_never_further_from_the_limit_than_constant_beyond_noise(seed):
    """For networks, budgets and guidance at random, on samples that neither chose nor judged."""
    steps, iterations, guided = (int(rng.integers(seed, name, torch.tensor([0]), 4)) for name in ("s", "i", "g"))
    bind = partial(drawing, seed=seed, guidance_scale=1 + guided / 4)
    way = replace(WAY, num_steps=3 + steps, iterations=(1 + iterations,) * (3 + steps))
    found = calibrate(bind, V, way, outer_depth=2, samples=12, updates=6, limit=LIMIT)
    other = bind(torch.arange(24, 36))
    limit = other(**vars(LIMIT))
    errors = (distances(other(**vars(each)), limit) for each in (found.way, way))
    loss = next(errors) - next(errors)
    assert loss.mean() <= 2 * loss.std() / len(loss) ** 0.5
    assert count_blocks(found.way.iterations, 2) == count_blocks(way.iterations, 2)


def test_a_fit_that_is_no_nearer_to_the_limit_on_other_samples_is_not_taken():
    """The way to beat is the limit itself."""
    found = calibrate(drawing, V, LIMIT, outer_depth=2, samples=2, updates=1, limit=LIMIT)
    assert found.way == LIMIT
    assert found.error == found.error_before == 0


def test_a_way_that_adds_noise_has_no_limit():
    with pytest.raises(ValueError, match="ddpm adds noise"):
        calibrate(drawing, V, replace(WAY, sampler="ddpm"), outer_depth=2)
