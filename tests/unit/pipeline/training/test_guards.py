"""Steps that are not finite, loss spikes, and how each changes the state."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from common.loading import parse_recipe
from pipeline.training.distributed import Ranks
from pipeline.training.guards import FEWEST, check_finite, loss_spike, not_finite_error
from pipeline.training.state import WINDOW, TrainState
from pipeline.training.step import StepResult

BATCH = 4
RECIPE = parse_recipe("name: a", (f"train.batch_size={BATCH}",))


def judged(state: TrainState, losses: list[float], norm: float, *, scaled: bool = False) -> tuple[TrainState, Any]:
    """`check_finite` of one rank's step with these losses, of samples 10 to 13."""
    sums = torch.tensor([sum(losses), *losses, *[1.0] * 4, *[0.0] * 5], dtype=torch.float64)
    result, ranks = StepResult(sums, norm, torch.tensor(losses)), Ranks(0, 1, None)
    return check_finite(
        RECIPE.train, state, result, ranks, scaled=scaled, sample_ids=lambda: list(range(10, 10 + BATCH))
    )


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_gather_object(into: list[Any], own: Any, group: Any) -> None:
        into[:] = [own]

    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)


def test_a_finite_step_is_counted_and_a_spike_is_not_compared_with() -> None:
    state, event = judged(TrainState(skipped=1), [1.0, 2.0, 3.0, 2.0], 1.0)
    assert event is None
    assert (state.samples_seen, state.updates, state.skipped, state.recent_losses) == (BATCH, 1, 0, (2.0,))
    usual = tuple(1.0 + 0.01 * (step % 5) for step in range(WINDOW))
    state, event = judged(TrainState(40, recent_losses=usual), [50.0] * BATCH, 1.0)
    assert (event["event"], event["step"], event["stream"]) == ("loss spike", 11, [40, 44])
    assert (state.updates, state.recent_losses) == (1, usual)
    state, event = judged(state, [1.02] * BATCH, 1.0)
    assert state.recent_losses == (*usual[1:], pytest.approx(1.02))


@pytest.mark.usefixtures("one_rank")
def test_a_step_that_is_not_finite_is_counted_as_skipped_and_named_with_its_samples() -> None:
    state, event = judged(TrainState(40, updates=7), [1.0, math.nan, 1.0, 1.0], math.nan)
    assert (state.samples_seen, state.updates, state.skipped, state.interval.skipped) == (44, 7, 1, 1)
    assert (event["step"], event["loss"], event["sample_ids"]) == (11, None, [11])
    assert "step 11: the loss is not finite, through samples 11 of" in str(not_finite_error(RECIPE, event, 1))
    state, event = judged(state, [1.0] * BATCH, math.inf)
    assert (state.skipped, event["loss"], event["gradient_norm"], event["sample_ids"]) == (2, 1.0, None, [])
    error = str(not_finite_error(RECIPE, event, state.skipped))
    assert "step 12: the gradient is not finite after 1 skipped steps in a row, through no single sample" in error


def test_a_gradient_that_overflows_under_the_loss_scaler_is_no_event() -> None:
    state, event = judged(TrainState(skipped=1), [1.0] * BATCH, math.inf, scaled=True)
    assert event is None
    assert (state.samples_seen, state.updates, state.skipped, state.interval.skipped) == (BATCH, 0, 1, 1)


def test_a_state_comes_back_from_json() -> None:
    state, _ = judged(TrainState(40, updates=7), [1.0, 2.0, 3.0, 2.0], 1.0)
    state = replace(state, scaler={"cur_scale": 1024.0})
    assert TrainState.from_json(state.samples_seen, json.loads(json.dumps(state.to_json()))) == state


def test_a_loss_spike_lies_far_above_the_recent_losses() -> None:
    recent = [1.0 + 0.01 * (step % 5) for step in range(FEWEST)]
    assert loss_spike(recent[1:], 100.0, 8.0) is None  # too few to compare with
    assert loss_spike(recent, 1.05, 8.0) is None
    assert loss_spike(recent, 0.2, 8.0) is None  # far below
    assert (loss_spike(recent, 1.5, 8.0) or 0) > 8
    assert loss_spike(recent, 1e9, None) is None
