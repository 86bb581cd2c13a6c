"""What training computes, counted before it begins, and the end that `train.max_pflops` sets.

Counts are means over the iterations that a run draws; the run's own differ by the chance of its draws.
"""

import math
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from statistics import fmean

from common.gpus import GPUS
from common.recipe import Recipe, Train, denoiser_config
from fpdm.config import DenoiserConfig
from pipeline.training.identity import total_samples
from pipeline.training.schedule import GROWTH_EVERY, StepIterations, largest_counts, token_share
from pipeline.training.throughput import step_flops

UTILISATION = 0.42  # of a V100's peak: what the paper's 400,000 steps of DiT-XL/2 in 4 days on 8 of them come to


def with_end(recipe: Recipe) -> Recipe:
    """Resolves `train.max_pflops`: `total_samples` becomes what it pays for, if that is less."""
    if recipe.train.max_pflops is None:
        return recipe
    affordable = max(1, math.floor(recipe.train.max_pflops * 1e15 / mean_flops(recipe)))
    steps = math.ceil(affordable / recipe.train.batch_size)  # rounded up to full steps, as samples are
    samples = min(total_samples(recipe.train), steps * recipe.train.batch_size)
    return replace(recipe, train=replace(recipe.train, total_samples=samples))


def training_flops(recipe: Recipe) -> float:
    """Floating-point operations of the whole training, or of as much as `max_pflops` allows."""
    return total_samples(with_end(recipe).train) * mean_flops(recipe)


def describe_cost(recipe: Recipe) -> str:
    """One line: operations, and hours of one V100."""
    flops = training_flops(recipe)
    hours = flops / (GPUS["v100"].tflops * 1e12 * UTILISATION) / 3600
    return f"{flops / 1e15:,.6g} PFLOP, {hours:,.2f} V100-hours at {UTILISATION:.0%} of the peak"


@lru_cache
def mean_flops(recipe: Recipe) -> float:
    """Operations of one sample's training, in the mean over all steps."""
    train, config = recipe.train, denoiser_config(recipe)
    stages = (train.max_no_grad_iterations + 1) * train.max_grad_iterations
    rises = (train.iterations_rise * stage / stages for stage in range(1, stages + 1))
    ends = sorted({0.0, *rises, 1 - train.dense_end, 1.0})  # counts and tokens do not change between two of them
    return sum((end - start) * _mean_step(train, config, (start + end) / 2) for start, end in pairwise(ends))


def _mean_step(train: Train, config: DenoiserConfig, part: float) -> float:
    """In the mean over what a step can draw, all equally likely, when this part of the training is over."""
    position = part * total_samples(train)
    (no_grad, grad), share = largest_counts(train, position), token_share(train, position)
    counts = [grad] if train.gradient == "multi_step" else range(1, grad + 1)
    draws = ((n, m, int(train.intermediate_loss > 0 and m > 1)) for n in range(no_grad + 1) for m in counts)
    with_growth = 1 / GROWTH_EVERY if train.contraction else 0.0  # of the steps
    return fmean(
        (1 - with_growth) * step_flops(config, StepIterations(*draw, share))
        + with_growth * step_flops(config, StepIterations(*draw, share, with_growth=True))
        for draw in draws
    )
