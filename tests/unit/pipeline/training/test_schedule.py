"""A step's rate and iterations are functions of the samples seen."""

from collections import Counter

import pytest

from common.loading import parse_recipe
from common.recipe import Train
from common.recipe.reference import explanations
from pipeline.training.schedule import GROWTH_EVERY, has_ended, largest_counts, learning_rate, step_iterations
from pipeline.training.step import ALLOWED_GROWTH


def train_with(*overrides: str) -> Train:
    return parse_recipe(
        "name: a", [f"train.{each}" for each in ("total_samples=1000", "batch_size=10", *overrides)]
    ).train


def test_the_largest_counts_rise_in_equal_steps_and_end_at_the_recipes() -> None:
    train = train_with("max_no_grad_iterations=3", "max_grad_iterations=4", "iterations_rise=0.8")
    counts = [largest_counts(train, seen) for seen in range(0, 1000, 10)]
    assert Counter(n for n, _ in counts) == {0: 20, 1: 20, 2: 20, 3: 40}
    assert Counter(m for _, m in counts) == {1: 20, 2: 20, 3: 20, 4: 40}
    assert counts == sorted(counts)


@pytest.mark.parametrize("rise", [0.0, 1.0])
def test_without_a_rise_every_step_has_the_recipes_counts(rise: float) -> None:
    train = train_with("max_no_grad_iterations=3", "max_grad_iterations=4", f"iterations_rise={rise}")
    assert largest_counts(train, 1000) == (3, 4)
    assert largest_counts(train, 0) == ((3, 4) if rise == 0 else (0, 1))


def test_intermediate_iterates_are_drawn_evenly_from_those_before_the_last_and_only_where_they_have_a_loss() -> None:
    seen = range(0, 10_000, 10)
    plain, train = train_with("max_grad_iterations=4"), train_with("max_grad_iterations=4", "intermediate_loss=0.5")
    assert all(step_iterations(plain, 0, each).intermediate == 0 for each in seen[:50])
    drawn = [step_iterations(train, 0, each) for each in seen]
    assert all(step.intermediate == 0 for step in drawn if step.with_graph == 1)
    counted = Counter(step.intermediate for step in drawn if step.with_graph == 4)  # about 250 steps, 83 each
    assert counted.keys() == {1, 2, 3}
    assert min(counted.values()) > 60
    assert [step[:2] for step in drawn] == [
        step_iterations(plain, 0, each)[:2] for each in seen
    ]  # the loss leaves the counts as they are


def test_growth_is_measured_in_every_16th_step_and_only_where_it_is_limited() -> None:
    plain, train = train_with(), train_with("contraction=1", "precision=fp32")
    seen = range(0, 640, 10)
    measured = [number for number, each in enumerate(seen) if step_iterations(train, 0, each).with_growth]
    assert measured == [0, 16, 32, 48]
    assert not any(step_iterations(plain, 0, each).with_growth for each in seen)


def test_the_recipes_words_say_when_growth_is_measured_and_what_is_allowed() -> None:
    words = explanations(Train)["contraction"]
    assert f"every {GROWTH_EVERY}th step" in words
    assert f"more than {ALLOWED_GROWTH} of" in words


def test_iterations_are_sparse_until_the_dense_end() -> None:
    train = train_with("sparse_tokens=0.25", "dense_end=0.3")
    shares = [step_iterations(train, 0, seen).share for seen in range(0, 1000, 10)]
    assert shares == [0.25] * 70 + [1.0] * 30
    assert step_iterations(train, 0, 0).tokens(16) == 4
    assert step_iterations(train, 0, 0).tokens(1) == 1
    assert {step_iterations(train_with("sparse_tokens=0.25"), 0, seen).share for seen in (0, 990)} == {0.25}
    assert {step_iterations(train_with(), 0, seen).share for seen in (0, 990)} == {1.0}


@pytest.mark.parametrize(
    ("decay", "expected"),
    [("constant", [0.5, 1, 1, 1]), ("cosine", [0.5, 0.75, 0.5, 0]), ("linear", [0.5, 2 / 3, 0.5, 0])],
)
def test_learning_rates_warm_up_and_fall_with_samples_seen(decay: str, expected: list[float]) -> None:
    settings = (
        "train.total_samples=960",
        "train.batch_size=32",
        "train.optimizer.learning_rate=1.0",
        "train.optimizer.warmup_samples=64",
    )
    train = parse_recipe("name: a", (*settings, f"train.optimizer.learning_rate_decay={decay}")).train
    assert [learning_rate(train, samples) for samples in (0, 320, 480, 960)] == pytest.approx(expected)


def test_each_gradient_has_its_iterations_after_the_same_ones_without() -> None:
    sjfb, jfb, multi = (
        [step_iterations(train, 0, seen) for seen in range(0, 2000, 10)]
        for train in (
            train_with("max_grad_iterations=4"),
            train_with("gradient=jfb", "max_grad_iterations=1"),
            train_with("gradient=multi_step", "max_grad_iterations=4"),
        )
    )
    assert {step.with_graph for step in sjfb} == {1, 2, 3, 4}
    assert {step.with_graph for step in jfb} == {1}
    assert {step.with_graph for step in multi} == {4}
    assert [step.without_graph for step in multi] == [step.without_graph for step in sjfb]
    assert {step.without_graph for step in jfb} == set(range(7))


def test_the_rate_falls_with_samples_or_hours_whichever_is_further() -> None:
    train = train_with("max_hours=2.0", "optimizer.learning_rate=1.0", "optimizer.learning_rate_decay=linear")
    assert learning_rate(train, 500, 3600) == pytest.approx(0.5)
    assert learning_rate(train, 100, 3600) == pytest.approx(0.5)
    assert learning_rate(train, 500, 60) == pytest.approx(0.5)
    assert learning_rate(train, 0, 9000) == 0
    assert not has_ended(train, 990, 7199)
    assert has_ended(train, 0, 7200)
    assert has_ended(train, 1000, 0)
    assert not has_ended(train_with(), 990, 1e9)


def test_counts_rise_with_hours_too() -> None:
    train = train_with("max_hours=2.0", "max_grad_iterations=4", "max_no_grad_iterations=0", "iterations_rise=1.0")
    assert {step_iterations(train, 0, each, 0).with_graph for each in range(0, 100, 10)} == {1}
    assert {step_iterations(train, 0, each, 7000).with_graph for each in range(0, 500, 10)} == {1, 2, 3, 4}
