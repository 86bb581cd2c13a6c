"""After a signal or kill -9 at any moment, the same command again ends with the same run as without."""

import json
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from common.errors import INTERRUPTED
from tests.integration.conftest import Experiment
from tests.integration.faults import killed_at_byte, killed_at_sync, planted, recording
from tests.integration.ranks import run_ranks, started_ranks
from tests.integration.test_training import losses, metrics, newest_state, wait_until

INTERVAL = 48  # samples from checkpoint to checkpoint in the tiny recipe
STATE = 1_250_000  # bytes of its state.safetensors, nearly; the averages before it have 300,000


@pytest.fixture(scope="module")
def quiet_run(experiment: Experiment) -> Path:
    """An uninterrupted run of two ranks."""
    done = run_ranks(experiment, "name=quiet", ranks=2)
    assert done.statuses == [0, 0], done.output
    return experiment.folder / "runs/quiet"


def log_of(run: Path) -> list[str]:
    path = run / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def assert_same_run(run: Path, expected: Path) -> None:
    """Log lines without times, parameters, moments and EMAs, to the bit."""
    assert metrics(run) == metrics(expected)
    assert newest_state(run) == newest_state(expected)
    for weights in expected.glob("weights/*/*/*.safetensors"):
        assert (run / weights.relative_to(expected)).read_bytes() == weights.read_bytes()


def test_a_signal_to_one_of_four_ranks_saves_them_all_at_the_same_step(experiment: Experiment) -> None:
    quiet = run_ranks(experiment, "name=quiet4", ranks=4)
    assert quiet.statuses == [0] * 4, quiet.output
    run = experiment.folder / "runs/drill"
    with started_ranks(experiment, "name=drill", ranks=4) as running:
        wait_until(lambda: len(log_of(run)) >= 4)
        running.send(2, signal.SIGUSR2)
        assert running.wait() == [INTERRUPTED] * 4, running.output
        (line,) = running.errors
    saved = int(max((run / "checkpoints").iterdir()).name)
    assert line == f"interrupted: {run}: saved after {saved} samples; run again to go on"
    assert metrics(run)[-1]["samples"] == saved  # no step is lost: each has a log line
    assert (
        not (run / "weights" / f"{saved:012d}").exists() or saved % INTERVAL == 0
    )  # no weights beside the scheduled ones
    done = run_ranks(experiment, "name=drill", ranks=4)
    assert done.statuses == [0] * 4, done.output
    assert_same_run(run, run.parent / "quiet4")


def test_a_signal_between_two_log_lines_changes_no_line(experiment: Experiment) -> None:
    every = ("train.log.every_samples=80", "train.checkpoint.every_samples=160")
    quiet = run_ranks(experiment, "name=sparse", *every)
    assert quiet.statuses == [0], quiet.output
    run = experiment.folder / "runs/sparse-drill"
    with started_ranks(experiment, "name=sparse-drill", *every) as running:
        wait_until(lambda: bool(log_of(run)))
        running.send(0, signal.SIGTERM)
        assert running.wait() == [INTERRUPTED], running.output
    assert len(log_of(run)) == 1
    done = run_ranks(experiment, "name=sparse-drill", *every)
    assert done.statuses == [0], done.output
    assert_same_run(run, run.parent / "sparse")


def test_a_signal_before_the_first_step_saves_nothing(experiment: Experiment) -> None:
    with started_ranks(experiment, "name=early", before=ask_at_once) as running:
        assert running.wait() == [INTERRUPTED], running.output
    assert not list((experiment.folder / "runs/early").glob("checkpoints/*"))


def ask_at_once() -> None:
    """The process sends itself a stop signal while it opens the run folder."""
    import os

    from pipeline.training import trainer

    open_run_folder = trainer.open_run_folder

    def asked(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return open_run_folder(*arguments)

    trainer.open_run_folder = asked


def kill_often(experiment: Experiment, name: str, *overrides: str, kills: int, seed: int) -> Path:
    """A run killed again and again: all ranks at a random moment, or rank 0 before a sync or inside a write."""
    draw, run = random.Random(seed), experiment.folder / "runs" / name
    for number in range(kills):
        kind = ("in a write", "anywhere", "at a sync")[number % 3]
        inside = {
            "anywhere": None,
            "at a sync": planted(killed_at_sync, draw.randint(8, 28)),
            "in a write": planted(killed_at_byte, 1, draw.randint(1, STATE)),
        }[kind]
        with started_ranks(experiment, f"name={name}", *overrides, ranks=2, before=inside) as running:
            lines = len(log_of(run))
            if inside is None:
                wait_until(lambda: len(log_of(run)) != lines or not running.processes[0].is_alive())  # noqa: B023
                time.sleep(draw.uniform(0, 1.0))
            else:
                running.processes[0].join(120)  # until `started_ranks` kills the other rank
            if number == 0:  # later the run may have ended
                assert running.processes[0].exitcode == -signal.SIGXFSZ
        assert_little_lost(run, in_background="train.checkpoint.background=true" in overrides)
    done = run_ranks(experiment, f"name={name}", *overrides, ranks=2)
    assert done.statuses == [0, 0], done.output
    return run


def assert_little_lost(run: Path, in_background: bool) -> None:
    """At most a checkpoint interval is lost; with saves in the background at most two."""
    steps = [json.loads(line)["samples"] for line in log_of(run) if line.endswith("}")]
    saved = [int(path.parent.name) for path in run.glob("checkpoints/[0-9]*/complete.json")]
    lost = max(steps, default=0) - max(saved, default=0)
    assert lost <= INTERVAL * (2 if in_background else 1)


def test_kill_9_at_random_moments_and_inside_saves_changes_no_bit(experiment: Experiment, quiet_run: Path) -> None:
    assert_same_run(kill_often(experiment, "killed", kills=6, seed=0), quiet_run)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_kill_9_at_thirty_random_moments_changes_no_bit(experiment: Experiment, quiet_run: Path) -> None:
    for seed in range(1, 6):  # a tiny run has ended before six kills
        background = f"train.checkpoint.background={'false' if seed % 2 else 'true'}"
        run = kill_often(experiment, f"killed-{seed}", background, kills=6, seed=seed)
        assert_same_run(run, quiet_run)
        shutil.rmtree(run)


def test_world_size_1_2_4_3_1_in_mid_epoch_sees_the_same_samples_once(experiment: Experiment, tmp_path: Path) -> None:
    settings = ("train.batch_size=12", "train.checkpoint.every_samples=24", "train.log.every_samples=12")
    expected = run_ranks(
        experiment, "name=steady", *settings, "train.total_samples=240", before=planted(recording, tmp_path / "steady")
    )
    assert expected.statuses == [0], expected.output
    for number, ranks in enumerate((1, 2, 4, 3, 1), 1):  # 48 samples each of epochs of 50
        done = run_ranks(
            experiment,
            *("name=elastic", *settings, f"train.total_samples={48 * number}"),
            ranks=ranks,
            before=planted(recording, tmp_path / "elastic"),
        )
        assert done.statuses == [0] * ranks, done.output
    steady, elastic = (recorded(tmp_path, name) for name in ("steady", "elastic"))
    assert elastic == steady  # ids, latents, noise, timesteps and labels, each position once
    assert [position for position, _, _ in steady] == list(range(240))
    for epoch in range(4):
        assert sorted(identity for _, identity, _ in steady[epoch * 50 : epoch * 50 + 50]) == list(range(50))
    runs = experiment.folder / "runs"
    counts = [
        [(line["no_grad_iterations"], line["grad_iterations"]) for line in metrics(runs / name)]
        for name in ("steady", "elastic")
    ]
    assert counts[0] == counts[1]
    assert losses(runs / "elastic") == pytest.approx(losses(runs / "steady"), rel=1e-5)


def recorded(folder: Path, name: str) -> list[list[int]]:
    """[position, id, checksum] of every sample read, by position, over all ranks."""
    return sorted(json.loads(line) for path in folder.glob(f"{name}.*") for line in path.read_text().splitlines())


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_twenty_minutes_of_kills_signals_and_world_sizes_end_with_the_same_weights(experiment: Experiment) -> None:
    """Runs one after another, each interrupted at random; in fp32, where world sizes differ by rounding only."""
    settings = (
        "train.batch_size=12",
        "train.total_samples=480",
        "train.checkpoint.every_samples=24",
        "train.log.every_samples=12",
    )
    expected = run_ranks(experiment, "name=soak-quiet", *settings)
    assert expected.statuses == [0], expected.output
    draw, until, number = random.Random(0), time.monotonic() + 20 * 60, 0
    while time.monotonic() < until:
        name = f"soak-{number}"
        cut_at_random(experiment, name, settings, draw)
        runs = experiment.folder / "runs"
        assert losses(runs / name) == pytest.approx(losses(runs / "soak-quiet"), rel=1e-4)
        assert_close_weights(runs / name, runs / "soak-quiet")
        shutil.rmtree(runs / name)
        number += 1


def cut_at_random(experiment: Experiment, name: str, settings: tuple[str, ...], draw: random.Random) -> None:
    """Trains to the end through random kills, signals and changes of the world size."""
    run = experiment.folder / "runs" / name
    while True:
        ranks = draw.choice((1, 2, 3, 4))
        with started_ranks(experiment, f"name={name}", *settings, ranks=ranks) as running:
            lines = len(log_of(run))
            wait_until(lambda: len(log_of(run)) != lines or not running.processes[0].is_alive())  # noqa: B023
            time.sleep(draw.uniform(0, 3))
            if draw.random() < 0.5:
                alive = [rank for rank, process in enumerate(running.processes) if process.is_alive()]
                if alive:
                    running.send(draw.choice(alive), draw.choice((signal.SIGTERM, signal.SIGUSR2)))
                statuses = running.wait()
                assert set(statuses) in ({0}, {INTERRUPTED}), running.output
                if set(statuses) == {0}:
                    return


def assert_close_weights(run: Path, expected: Path) -> None:
    from safetensors.torch import load_file

    newest = max(expected.glob("weights/*/*/*.safetensors"))
    weights, wanted = load_file(run / newest.relative_to(expected)), load_file(newest)
    for name in wanted:
        assert (weights[name] - wanted[name]).norm() <= 1e-4 * wanted[name].norm() + 1e-6, name
