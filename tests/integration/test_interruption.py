"""Asked to stop or killed, at any moment: the same command again ends with the run that nothing interrupted."""

import signal
from pathlib import Path

import pytest

from common.errors import INTERRUPTED
from tests.integration.conftest import Experiment
from tests.integration.ranks import run_ranks, started_ranks
from tests.integration.test_training import metrics, newest_state, wait_until


@pytest.fixture(scope="module")
def quiet_run(experiment: Experiment) -> Path:
    """Four ranks that nothing interrupts."""
    done = run_ranks(experiment, "name=quiet", ranks=4)
    assert done.statuses == [0] * 4, done.output
    return experiment.folder / "runs/quiet"


def log_of(run: Path) -> list[str]:
    path = run / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def test_a_signal_to_one_of_four_ranks_saves_them_all_at_the_same_step(experiment: Experiment, quiet_run: Path) -> None:
    run = experiment.folder / "runs/drill"
    with started_ranks(experiment, "name=drill", ranks=4) as running:
        wait_until(lambda: len(log_of(run)) >= 4)
        running.send(2, signal.SIGUSR2)
        assert running.wait() == [INTERRUPTED] * 4, running.output
        (line,) = running.errors
    saved = int(max((run / "checkpoints").iterdir()).name)
    assert line == f"interrupted: {run}: saved after {saved} samples; run again to go on"
    assert saved - 16 <= metrics(run)[-1]["samples"] <= saved  # the step in hand was finished, no more, no less
    done = run_ranks(experiment, "name=drill", ranks=4)
    assert done.statuses == [0] * 4, done.output
    assert metrics(run) == metrics(quiet_run)
    assert newest_state(run) == newest_state(quiet_run)
