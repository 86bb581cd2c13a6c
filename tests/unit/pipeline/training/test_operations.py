"""What training computes is counted beforehand, and `train.max_pflops` ends it."""

from statistics import fmean

import pytest

from common.loading import parse_recipe
from common.recipe import Recipe, denoiser_config
from pipeline.training.operations import describe_cost, mean_flops, training_flops, with_end
from pipeline.training.schedule import step_iterations
from pipeline.training.throughput import step_flops

SMALL = ("model.size=null", "model.hidden_size=32", "model.num_heads=2", "train.batch_size=10")


def recipe_with(*overrides: str) -> Recipe:
    return parse_recipe("name: a\nmodel: {num_classes: 10}", (*SMALL, *overrides))


@pytest.mark.parametrize(
    "settings",
    [
        ("train.gradient=sjfb",),
        ("train.gradient=multi_step", "train.max_grad_iterations=4"),
        ("train.iterations_rise=0.5", "train.intermediate_loss=0.5"),
        ("train.contraction=1", "train.precision=fp32"),
        ("train.iterations_rise=0.9", "train.sparse_tokens=0.25", "train.dense_end=0.2"),
        ("model.kind=dit", "model.depth=3"),
    ],
)
def test_the_mean_operations_are_those_of_the_steps_that_are_drawn(settings: tuple[str, ...]) -> None:
    recipe = recipe_with("train.total_samples=15000", *settings)
    config, train = denoiser_config(recipe), recipe.train
    drawn = fmean(step_flops(config, step_iterations(train, 0, step * 10)) for step in range(1500))
    assert mean_flops(recipe) == pytest.approx(drawn, rel=0.03)


def test_equal_operations_end_dit_and_fpdm_after_different_samples() -> None:
    pflops = "train.max_pflops=0.5"
    ends = {kind: with_end(recipe_with(f"model.kind={kind}", "model.depth=28", pflops)) for kind in ("dit", "fpdm")}
    for recipe in ends.values():
        assert training_flops(recipe) / 1e15 == pytest.approx(0.5, rel=0.01)
        assert recipe.train.total_samples % 10 == 0
        assert with_end(recipe) == recipe
    assert ends["fpdm"].train.total_samples > 2 * ends["dit"].train.total_samples


def test_training_ends_with_the_first_of_samples_and_operations() -> None:
    assert with_end(recipe_with("train.total_samples=100", "train.max_pflops=5")).train.total_samples == 100
    assert with_end(recipe_with("train.total_samples=100", "train.max_pflops=1e-9")).train.total_samples == 10


def test_the_papers_dit_costs_the_768_hours_that_the_paper_states() -> None:
    recipe = parse_recipe("name: a\nmodel: {kind: dit, num_classes: 1000}")
    assert describe_cost(recipe) == "145,762 PFLOP, 771.23 V100-hours at 42% of the peak"
