"""Calibration measures what it says, and takes another way only where it brings latents nearer to the limit."""

from dataclasses import replace
from functools import lru_cache, partial
from itertools import product

import pytest
import torch

from fpdm import (
    Coefficients,
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
    model = network(kind, seed, diffusion.learned_variance)
    return partial(sample, model, diffusion, rng.normal(0, "start", index, (4, 4, 4)), index % 3, **options)


@lru_cache
def network(kind, seed, learned_variance):
    sizes = {"depth": 1, "input_size": 4, "hidden_size": 16, "num_heads": 2, "num_classes": 3}
    config = DenoiserConfig(kind=kind, learned_variance=learned_variance, **sizes)
    model = build_denoiser(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = rng.normal(seed, name, torch.arange(len(parameter)), tuple(parameter.shape[1:]))
            parameter.copy_(0.15 * noise)
    return model


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


def test_a_fit_leaves_the_network_without_gradients():
    model = drawing(torch.arange(1)).args[0]

    def bind(index):
        return partial(sample, model, V, rng.normal(0, "start", index, (4, 4, 4)), index % 3)

    fit(bind, V, fit_start(V, 8, 2, 2), bind(torch.arange(4))(**vars(LIMIT)), 1)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("diffusion", [V, FLOW])
def test_a_fit_comes_nearer_to_the_limit_and_is_a_function_of_its_arguments(diffusion):
    bind = partial(drawing, diffusion=diffusion)
    limit = bind(torch.arange(24))(**vars(LIMIT))
    start = fit_start(diffusion, 20, 2, 2)
    first, again = (fit(bind, diffusion, start, limit, 30) for _ in range(2))
    assert first == again
    before, after = (distances(bind(torch.arange(24))(**vars(way)), limit).mean() for way in (start, first))
    assert after < 0.9 * before


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
        (coefficients.timesteps[1:-1], before.timesteps[1:-1]),  # those at the ends may be held there
        (coefficients.kept, before.kept),
        *zip(coefficients.weights, before.weights, strict=True),
        (moved.start_extrapolation[2:], start.start_extrapolation[2:]),
        (moved.relaxation, start.relaxation),
    ):
        assert all(abs(one - other) > 1e-4 for one, other in zip(new, old, strict=True))
    assert all(0 <= t <= 999 for t in coefficients.timesteps)


def test_the_gradients_of_the_numbers_are_those_of_finite_differences():
    """Of timesteps near both ends, a step's coefficients, a start and a relaxation."""
    bind = partial(drawing, diffusion=V)
    start = fit_start(V, 12, 2, 2)
    form = start.sampler_settings.coefficients
    values = torch.tensor([998.0, 400.0, 1.0, form.kept[1], form.weights[2][0], 0.5, 0.9])

    def latents(numbers: torch.Tensor) -> torch.Tensor:
        times, kept, weight, moved, relaxed = numbers[:3], numbers[3], numbers[4], numbers[5], numbers[6]
        rows = (form.weights[0], form.weights[1], [weight, *form.weights[2][1:]])
        changed = Coefficients(timesteps=list(times), kept=[form.kept[0], kept, form.kept[2]], weights=rows)
        way = replace(
            start,
            sampler_settings=SamplerSettings(coefficients=changed),
            start_extrapolation=[0.0, 0.0, moved],
            relaxation=[1.0, relaxed, 1.0],
        )
        return bind(torch.arange(2))(**vars(way), with_graph=True).double().square().sum()

    values.requires_grad_()
    (gradient,) = torch.autograd.grad(latents(values), values)
    for place, step in enumerate((0.05, 0.05, 0.05, 1e-2, 1e-2, 1e-2, 1e-2)):
        with torch.no_grad():
            moved = [latents(values + sign * step * torch.eye(len(values))[place]) for sign in (1, -1)]
        found = float(moved[0] - moved[1]) / (2 * step)
        assert float(gradient[place]) == pytest.approx(found, rel=0.03, abs=1e-3)


def test_in_twenty_settings_what_is_chosen_is_never_farther_from_the_limit_than_constant_beyond_noise():
    """Networks, budgets and guidance at random; on samples that neither chose nor judged."""
    taken = 0
    for seed in range(20):
        steps, iterations, guided = (int(rng.integers(seed, name, torch.tensor([0]), 4)) for name in ("s", "i", "g"))
        bind = partial(drawing, seed=seed, guidance_scale=1 + guided / 4)
        way = replace(WAY, num_steps=3 + steps, iterations=(1 + iterations,) * (3 + steps))
        found = calibrate(bind, V, way, outer_depth=2, samples=12, updates=8, limit=LIMIT)
        other = bind(torch.arange(24, 36))
        limit = other(**vars(LIMIT))
        errors = (distances(other(**vars(each)), limit) for each in (found.way, way))
        loss = next(errors) - next(errors)
        assert loss.mean() <= 2 * loss.std() / len(loss) ** 0.5
        assert count_blocks(found.way.iterations, 2) == count_blocks(way.iterations, 2)
        taken += found.way != way
    assert taken >= 10


def test_a_fit_that_is_no_nearer_to_the_limit_on_other_samples_is_not_taken():
    """The way to beat is the limit itself."""
    found = calibrate(drawing, V, LIMIT, outer_depth=2, samples=2, updates=1, limit=LIMIT)
    assert found.way == LIMIT
    assert found.error == found.error_before == 0


def test_a_way_that_adds_noise_has_no_limit():
    with pytest.raises(ValueError, match="ddpm adds noise"):
        calibrate(drawing, V, replace(WAY, sampler="ddpm"), outer_depth=2)
