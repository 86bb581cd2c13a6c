"""A step's learning rate and iteration counts, and the end of training, as functions of the samples seen.

With `train.max_hours` they are functions of the seconds trained as well, which every checkpoint holds.
"""

import math
from typing import NamedTuple

from common.recipe import Train
from fpdm.fixed_point import intermediate_iterate, sjfb_counts
from pipeline.training.identity import total_samples

GROWTH_EVERY = 16  # one step in so many, with its whole batch: what is measured does not depend on the ranks


class StepIterations(NamedTuple):
    """A step's iterations: without graph, then with one; `intermediate` of the latter are read out too, 0: none are.

    share: of the tokens that they see, above 0 and up to 1.
    with_growth: the fixed point's growth is measured as well, and limited.
    """

    without_graph: int
    with_graph: int
    intermediate: int
    share: float = 1.0
    with_growth: bool = False

    def tokens(self, num_tokens: int) -> int:
        """How many of a sample's tokens they see, at least one."""
        return max(1, round(self.share * num_tokens))


def has_ended(train: Train, samples_seen: int, seconds: float) -> bool:
    """Whether training ends there; `seconds`: trained before the last step began, so that this step is the last."""
    return position(train, samples_seen, seconds) >= total_samples(train)


def position(train: Train, samples_seen: int, seconds: float) -> float:
    """How far training is, in samples: those seen or, if it is more, the part of `train.max_hours` that is over."""
    if train.max_hours is None:
        return samples_seen
    return max(samples_seen, seconds / (3600 * train.max_hours) * total_samples(train))


def learning_rate(train: Train, samples_seen: int, seconds: float = 0.0) -> float:
    """The rate of the step that starts at `samples_seen`: linear warm-up, then constant or falling to zero."""
    settings = train.optimizer
    rate = settings.learning_rate
    if settings.warmup_samples:
        rate *= min(1.0, (samples_seen + train.batch_size) / settings.warmup_samples)
    progress = min(1.0, position(train, samples_seen, seconds) / total_samples(train))
    if settings.learning_rate_decay == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * progress))
    elif settings.learning_rate_decay == "linear":
        rate *= 1 - progress
    return rate


def step_iterations(train: Train, seed: int, samples_seen: int, seconds: float = 0.0) -> StepIterations:
    """The iterations of the step that starts at `samples_seen`.

    The same on every rank: a rank that iterates longer would make the others wait.
    """
    step = samples_seen // train.batch_size
    place = position(train, samples_seen, seconds)
    largest = largest_counts(train, place)
    without_graph, with_graph = sjfb_counts(seed, step, *largest)
    if train.gradient == "multi_step":
        with_graph = largest[1]
    intermediate = intermediate_iterate(seed, step, with_graph) if train.intermediate_loss else 0
    with_growth = train.contraction > 0 and step % GROWTH_EVERY == 0
    return StepIterations(without_graph, with_graph, intermediate, token_share(train, place), with_growth)


def token_share(train: Train, position: float) -> float:
    """The share of a sample's tokens that iterations see: `train.sparse_tokens`, and at the dense end all."""
    return 1.0 if position >= (1 - train.dense_end) * total_samples(train) else train.sparse_tokens


def largest_counts(train: Train, position: float) -> tuple[int, int]:
    """N and M: from 0 and 1 they rise in equal steps over `train.iterations_rise` of the training."""
    largest = train.max_no_grad_iterations, train.max_grad_iterations
    rise = train.iterations_rise * total_samples(train)
    if position >= rise:
        return largest
    part = position / rise
    return int(part * (largest[0] + 1)), 1 + int(part * largest[1])
