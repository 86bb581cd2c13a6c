"""Checks of each step: losses and gradients that are not finite, and loss spikes."""

import math
import statistics
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch

from common.errors import UserError
from common.recipe import Recipe, Train
from pipeline.training.distributed import Ranks
from pipeline.training.state import TrainState
from pipeline.training.step import StepResult

FEWEST = 20  # losses that a loss spike needs to be compared with

Event = dict[str, Any]


def check_finite(
    train: Train,
    state: TrainState,
    result: StepResult,
    ranks: Ranks,
    *,
    scaled: bool,
    sample_ids: Callable[[], list[int]],
) -> tuple[TrainState, Event | None]:
    """The state after a step, and an event for `events.jsonl` if the step was out of the ordinary; on every rank.

    Args:
        state: before the step.
        result: `sums` over all ranks.
        scaled: whether the gradient is scaled (fp16): then one that overflows is no event.
        sample_ids: returns the data set's samples of `result.losses`.
    """
    loss = float(result.sums[0]) / train.batch_size
    if math.isfinite(loss) and math.isfinite(result.norm):
        deviations = loss_spike(state.recent_losses, loss, train.spike_deviations)
        event = None if deviations is None else _spike_event(train.batch_size, state.samples_seen, loss, deviations)
        return state.updated(result.sums.tolist(), train.batch_size, spike=event is not None), event
    if math.isfinite(loss) and scaled:
        return state.passed_over(train.batch_size, scaling=True), None
    own = [each for each, loss in zip(sample_ids(), result.losses.tolist(), strict=True) if not math.isfinite(loss)]
    by_rank: list[list[int]] = [[] for _ in range(ranks.world_size)]
    torch.distributed.all_gather_object(by_rank, own, group=ranks.control)
    event = _not_finite_event(train.batch_size, state.samples_seen, loss, result.norm, [*chain.from_iterable(by_rank)])
    return state.passed_over(train.batch_size, scaling=False), event


def not_finite_error(recipe: Recipe, event: Event, skipped: int) -> UserError:
    """Ends training after `skipped` consecutive steps that were not finite; `event` is the last one's."""
    what = "gradient" if event["loss"] is not None else "loss"
    ids = event["sample_ids"]
    if through_samples(event, recipe.train.batch_size):
        named = ", ".join(map(str, ids[:8])) + (", ..." if len(ids) > 8 else "")
        cause = f"samples {named} of {recipe.data.shards}; look at them"
    else:
        cause = f"no single sample; lower train.optimizer.learning_rate from {recipe.train.optimizer.learning_rate}"
    before = f" after {skipped - 1} skipped steps in a row" if skipped > 1 else ""
    return UserError(
        f"{recipe.folder}: step {event['step']}: the {what} is not finite{before}, through {cause}; this step updated "
        "nothing and nothing was saved since (train.max_skipped_steps skips such steps)"
    )


def through_samples(event: Event, batch_size: int) -> bool:
    """Whether some samples of a step were not finite, and not the network."""
    return 0 < len(event["sample_ids"]) <= batch_size / 2


def loss_spike(recent_losses: Sequence[float], loss: float, allowed: float | None) -> float | None:
    """How many standard deviations `loss` lies above the mean of `recent_losses`, if more than `allowed`; else None.

    `allowed`: None allows any number.
    """
    if allowed is None or len(recent_losses) < FEWEST:
        return None
    mean, spread = statistics.fmean(recent_losses), statistics.stdev(recent_losses)
    deviations = (loss - mean) / max(spread, 1e-12 * abs(mean), 1e-30)
    return deviations if deviations > allowed else None


def _not_finite_event(batch_size: int, samples_seen: int, loss: float, norm: float, sample_ids: list[int]) -> Event:
    """Of a step that started at `samples_seen`; `sample_ids`: the samples, over all ranks, with a bad loss."""
    return {
        "samples": samples_seen + batch_size,
        "step": samples_seen // batch_size + 1,
        "event": "not finite",
        "loss": loss if math.isfinite(loss) else None,
        "gradient_norm": norm if math.isfinite(norm) else None,
        "sample_ids": sample_ids,
    }


def _spike_event(batch_size: int, samples_seen: int, loss: float, deviations: float) -> Event:
    """Of a step that started at `samples_seen`; `stream`: its first position in the stream and the next step's."""
    return {
        "samples": samples_seen + batch_size,
        "step": samples_seen // batch_size + 1,
        "event": "loss spike",
        "loss": loss,
        "deviations": round(deviations, 2),
        "stream": [samples_seen, samples_seen + batch_size],
    }
