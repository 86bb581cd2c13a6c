"""Allocations spend their budget exactly, and calibration measures what it says."""

import itertools
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fpdm import (
    DenoiserConfig,
    Diffusion,
    allocate,
    build_denoiser,
    calibrate,
    choose_reuse,
    count_blocks,
    measure_residuals,
    rng,
    sample,
)

RULES = ("constant", "more_at_noise", "more_at_data")


@pytest.mark.parametrize("kind", RULES)
def test_every_budget_over_1_to_100_steps_is_spent_exactly_with_at_least_one_iteration_a_step(kind):
    for num_steps in range(1, 101):
        for total in (*range(num_steps, num_steps + 40), *range(num_steps + 40, 60 * num_steps, 97)):
            counts = allocate(kind, num_steps, block_budget=total + 2 * num_steps, outer_depth=2)
            assert len(counts) == num_steps
            assert sum(counts) == total
            assert min(counts) >= 1
            assert count_blocks(counts, 2) == total + 2 * num_steps


@settings(max_examples=300, deadline=None)
@given(num_steps=st.integers(1, 100), spare=st.integers(0, 10_000), outer_depth=st.integers(0, 8))
def test_any_budget_is_spent_exactly_or_refused_with_the_least(num_steps, spare, outer_depth):
    least = num_steps * (1 + outer_depth)
    for kind in RULES:
        counts = allocate(kind, num_steps, block_budget=least + spare, outer_depth=outer_depth)
        assert count_blocks(counts, outer_depth) == least + spare
        assert len(counts) == num_steps
        assert min(counts) >= 1
        assert allocate("list", num_steps, counts, block_budget=least + spare, outer_depth=outer_depth) == counts
        assert sum(allocate(kind, num_steps, sum(counts) / num_steps)) == sum(counts)  # as a mean, not always whole
        with pytest.raises(ValueError, match=f"block_budget: {least - 1} is too small .*; {least} is the least"):
            allocate(kind, num_steps, block_budget=least - 1, outer_depth=outer_depth)


@settings(max_examples=150, deadline=None)
@given(num_steps=st.integers(1, 100), spare=st.integers(0, 300), longest=st.integers(1, 40), seed=st.integers(0, 99))
def test_allocations_from_curves_spend_their_budget_exactly_too(num_steps, spare, longest, seed):
    total = num_steps + min(spare, num_steps * (longest - 1))
    curves = rng.uniform(seed, "curves", torch.arange(num_steps), (longest,))
    for kind in ("adaptive", "calibrated"):
        counts = allocate(kind, num_steps, block_budget=total, residuals=curves)
        assert sum(counts) == total
        assert min(counts) >= 1
        assert max(counts) <= longest


def test_the_budget_that_the_published_controller_missed_by_one_is_met():
    for kind in RULES:
        assert sum(allocate(kind, 40, 3)) == 120


def test_ramps_are_named_by_the_end_that_gets_more_and_never_turn_back():
    for num_steps, total in itertools.product((2, 7, 20, 28, 99), (100, 137, 200, 431)):
        noise = allocate("more_at_noise", num_steps, block_budget=total)
        assert noise == sorted(noise, reverse=True)
        assert noise[0] > noise[-1]
        assert allocate("more_at_data", num_steps, block_budget=total) == noise[::-1]
    assert allocate("more_at_noise", 5, 8) == [12, 10, 8, 6, 4]


def test_the_papers_280_blocks_are_8_iterations_in_28_steps():
    assert allocate("constant", 28, block_budget=280, outer_depth=2) == [8] * 28
    assert allocate("constant", 4, 2.5) == [2, 3, 2, 3]


def test_the_calibrated_allocation_is_the_best_of_all():
    curves = rng.uniform(5, "curves", torch.arange(4), (6,)).double()
    for total in range(4, 25):
        every = [counts for counts in itertools.product(range(1, 7), repeat=4) if sum(counts) == total]
        costs = [sum(float(curves[step, count - 1]) for step, count in enumerate(counts)) for counts in every]
        counts = allocate("calibrated", 4, block_budget=total, residuals=curves)
        assert sum(float(curves[s, c - 1]) for s, c in enumerate(counts)) == pytest.approx(min(costs), abs=1e-12)


def test_the_adaptive_allocation_stops_every_step_at_one_threshold():
    curves = torch.tensor([[1.0, 0.1, 0.01, 0.001], [1.0, 0.8, 0.6, 0.4], [0.3, 0.2, 0.1, 0.05]])
    assert allocate("adaptive", 3, block_budget=3, residuals=curves) == [1, 1, 1]
    assert allocate("adaptive", 3, block_budget=7, residuals=curves) == [2, 4, 1]
    assert allocate("adaptive", 3, block_budget=12, residuals=curves) == [4, 4, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("increasing", 5, 3), "kind: 'increasing' is unknown; choose one of constant"),
        (("constant", 0, 3), "num_steps: 0"),
        (("constant", 5), "iterations, block_budget: give exactly one"),
        (("constant", 5, [1] * 5), r"iterations: \[1, 1, 1, 1, 1\] is a list"),
        (
            ("constant", 3, 2.5),
            "iterations: a mean of 2.5 over 3 steps is 7.5, not a whole number; 2.66667 is the nearest",
        ),
        (("constant", 4, 0.5), "iterations: a mean of 0.5 is below the floor"),
        (("list", 5, [1, 2]), "iterations: 2 values for 5 steps"),
        (("list", 2, [1, 0]), "iterations: "),
        (("list", 2, [1, 1.5]), "iterations: "),
        (("adaptive", 3, 2), "residuals: kind 'adaptive' needs curves"),
    ],
)
def test_an_impossible_allocation_is_refused_by_name_and_number(arguments, message):
    with pytest.raises(ValueError, match=message):
        allocate(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"block_budget": 83, "outer_depth": 2},
            "block_budget: 83 is too small for 28 steps of 2 outer layers .* 84 is the least",
        ),
        ({"block_budget": 200, "residuals": torch.ones(28, 7)}, "exceeds 28 steps x 7 measured; measure at least 8"),
        ({"block_budget": 28, "residuals": torch.full((28, 2), torch.nan)}, "non-finite"),
        ({"block_budget": 28, "residuals": torch.ones(27, 2)}, r"residuals: shape \(27, 2\)"),
    ],
)
def test_an_impossible_budget_is_refused_with_the_numbers(options, message):
    with pytest.raises(ValueError, match=message):
        allocate("calibrated", 28, **options)
    with pytest.raises(ValueError, match="block_budget: 9, but the list takes 7"):
        allocate("list", 2, [1, 2], block_budget=9, outer_depth=2)


@pytest.fixture
def draw():
    """`sample` bound to a small network whose iteration converges but slowly."""
    config = DenoiserConfig(input_size=4, hidden_size=16, num_heads=2, num_classes=3)
    model = build_denoiser(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = rng.normal(1, name, torch.arange(len(parameter)), tuple(parameter.shape[1:]))
            parameter.copy_(0.15 * noise)
    noise = rng.normal(0, "start", torch.arange(3), (4, 4, 4))
    return partial(sample, model, Diffusion(prediction="v"), noise, torch.arange(3))


def test_residual_curves_have_one_number_an_iteration_and_fall(draw):
    curves = measure_residuals(draw, [6, 3, 5])
    assert [len(curve) for curve in curves] == [6, 3, 5]
    assert all(curve.isfinite().all() and curve[-1] < curve[0] for curve in curves)


def test_reuse_is_chosen_exactly_where_it_lowered_the_last_residual(draw):
    chosen = choose_reuse(draw, [2] * 6)
    cold, warm = measure_residuals(draw, [2] * 6), measure_residuals(draw, [2] * 6, reuse=True)
    assert chosen == [bool(w[-1] < c[-1]) for c, w in zip(cold, warm, strict=True)]
    assert chosen[0] is False  # there is no last step yet
    assert any(chosen)


def test_calibration_picks_the_number_of_steps_nearest_to_the_reference_within_the_budget(draw):
    plan = calibrate(
        draw, block_budget=48, outer_depth=2, step_choices=[3, 12], reference_steps=30, reference_iterations=10
    )
    assert plan.errors[plan.num_steps] == min(plan.errors.values())
    assert set(plan.errors) == {3, 12}
    assert count_blocks(plan.iterations, 2) == 48
    assert len(plan.iterations) == len(plan.reuse) == plan.num_steps


def test_a_dit_has_nothing_to_calibrate():
    model = build_denoiser(
        DenoiserConfig(kind="dit", depth=1, input_size=4, hidden_size=16, num_heads=2, num_classes=3)
    )
    draw = partial(sample, model, Diffusion(prediction="v"), torch.zeros(1, 4, 4, 4), torch.zeros(1, dtype=torch.long))
    with pytest.raises(ValueError, match="DiT"):
        measure_residuals(draw, [1, 1])
