"""Training that ends by operations or by the clock is finished then, and goes on where a kill left it."""

import json
import time
from pathlib import Path

import pytest

from common.loading import load_recipe
from pipeline.training.operations import mean_flops
from tests.integration.conftest import Experiment
from tests.integration.ranks import run_ranks, started_ranks

HOURS = 3 / 3600
SETTINGS = (f"train.max_hours={HOURS}", "train.total_samples=10000000", "train.log.tensorboard=false")
LINEAR = "train.optimizer.learning_rate_decay=linear"


def log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_operations_end_training_and_the_next_call_finds_it_finished(experiment: Experiment) -> None:
    pflops = 64.0 * mean_flops(load_recipe(experiment.recipe)) / 1e15
    run = experiment.folder / "runs/paid"
    done = run_ranks(experiment, "name=paid", f"train.max_pflops={pflops}")
    assert done.statuses == [0], done.output
    assert [line["samples"] for line in log(run)] == [16, 32, 48, 64]
    again = run_ranks(experiment, "name=paid", f"train.max_pflops={pflops}")
    assert (again.statuses, [line["samples"] for line in log(run)][-1]) == ([0], 64)
    assert "finished" in again.output
    more = run_ranks(experiment, "name=paid", f"train.max_pflops={pflops / 2}")
    assert more.statuses == [2]
    assert "with total_samples, allows 32" in more.errors[0]


@pytest.mark.parametrize("ranks", [1, 2])
def test_hours_end_training_after_a_kill_at_their_sum_and_the_rate_falls_with_them(
    experiment: Experiment, ranks: int
) -> None:
    given = (f"name=timed-{ranks}", *SETTINGS, LINEAR)
    run = experiment.folder / f"runs/timed-{ranks}"
    with started_ranks(experiment, *given, ranks=ranks) as running:
        until = time.monotonic() + 120
        while not list(run.glob("checkpoints/0*/complete.json")) and time.monotonic() < until:
            time.sleep(0.02)
        running.kill()
    first = min(run.glob("checkpoints/0*/complete.json"))
    assert json.loads(first.read_text())["progress"]["seconds"] < 3
    done = run_ranks(experiment, *given, ranks=ranks)
    assert done.statuses == [0] * ranks, done.output
    rates = [line["learning_rate"] for line in log(run)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == 0
    last = max(run.glob("checkpoints/0*/complete.json"))
    assert 3 <= json.loads(last.read_text())["progress"]["seconds"] < 10
    assert (run / "weights" / last.parent.name).is_dir()
    again = run_ranks(experiment, *given, ranks=ranks)
    assert again.statuses == [0] * ranks
    assert "finished" in again.output
    assert max(run.glob("checkpoints/0*/complete.json")) == last
    if ranks == 1:
        changed = run_ranks(experiment, *given, f"train.max_hours={2 * HOURS}")
        assert "train.max_hours" in changed.errors[0]
