"""Allocations spend their budget exactly."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fpdm import allocate, count_blocks, rng

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
    for kind in RULES:
        least = num_steps * outer_depth + (1 if kind == "constant" else num_steps)
        counts = allocate(kind, num_steps, block_budget=least + spare, outer_depth=outer_depth)
        assert count_blocks(counts, outer_depth) == least + spare
        assert len(counts) == num_steps
        assert min(counts) >= min(1, sum(counts) // num_steps)
        assert max(counts[0], 1) == counts[0]
        assert allocate("list", num_steps, counts, block_budget=least + spare, outer_depth=outer_depth) == counts
        assert sum(allocate(kind, num_steps, sum(counts) / num_steps)) == sum(counts)  # as a mean, not always whole
        with pytest.raises(ValueError, match=f"block_budget: {least - 1} is too small .*; {least} is the least"):
            allocate(kind, num_steps, block_budget=least - 1, outer_depth=outer_depth)


@settings(max_examples=150, deadline=None)
@given(num_steps=st.integers(1, 100), spare=st.integers(0, 300), longest=st.integers(1, 40), seed=st.integers(0, 99))
def test_allocations_from_curves_spend_their_budget_exactly_too(num_steps, spare, longest, seed):
    total = num_steps + min(spare, num_steps * (longest - 1))
    curves = rng.uniform(seed, "curves", torch.arange(num_steps), (longest,))
    counts = allocate("adaptive", num_steps, block_budget=total, residuals=curves)
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


def test_fewer_iterations_than_steps_are_spread_evenly_and_begin_in_the_first():
    assert allocate("constant", 6, 0.5) == [1, 0, 1, 0, 1, 0]
    assert allocate("constant", 5, block_budget=11, outer_depth=2) == [1, 0, 0, 0, 0]


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
        (("constant", 5, [1] * 5), r"iterations: \[1, 1, 1, 1, 1\]: only allocation 'list' takes a list"),
        (
            ("constant", 3, 2.5),
            "iterations: a mean of 2.5 over 3 steps is 7.5, not a whole number; 2.66667 is the nearest",
        ),
        (("more_at_data", 4, 0.5), "iterations: a mean of 0.5 is below the floor of 4 in 4 steps"),
        (("constant", 4, 0), "iterations: a mean of 0 is below the floor of 1 in 4 steps"),
        (("list", 5, [1, 2]), "iterations: 2 values for 5 steps"),
        (("list", 2, [0, 1]), "iterations: "),
        (("list", 2, [1, -1]), "iterations: "),
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
            "block_budget: 83 is too small for 28 steps of 2 outer layers and at least 28 iterations; 84 is the least",
        ),
        ({"block_budget": 200, "residuals": torch.ones(28, 7)}, "exceeds 28 steps x 7 measured; measure at least 8"),
        ({"block_budget": 28, "residuals": torch.full((28, 2), torch.nan)}, "non-finite"),
        ({"block_budget": 28, "residuals": torch.ones(27, 2)}, r"residuals: shape \(27, 2\)"),
    ],
)
def test_an_impossible_budget_is_refused_with_the_numbers(options, message):
    with pytest.raises(ValueError, match=message):
        allocate("adaptive", 28, **options)
    with pytest.raises(ValueError, match="block_budget: 9, but the list takes 7"):
        allocate("list", 2, [1, 2], block_budget=9, outer_depth=2)
