"""Training: the same losses whatever shares the work, and the same run whatever interrupts it."""

import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import ROOT, Experiment, environment, kill_all, started, torchrun

TRAIN = "pipeline/train.py"
SAME_TO = 1e-5  # fp32, another order of summation


def metrics(run: Path) -> list[dict[str, Any]]:
    """The log without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "samples_per_second"} for line in lines]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics(run)]


def newest_state(run: Path) -> bytes:
    return (max((run / "checkpoints").iterdir()) / "state.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole_run(experiment: Experiment) -> Path:
    """Uninterrupted, two ranks."""
    done = experiment.run(TRAIN, "name=whole", ranks=2)
    assert done.returncode == 0, done.stderr
    return experiment.folder / "runs/whole"


def train_together(experiment: Experiment, ranks: int, **overrides: str) -> dict[str, list[float]]:
    """Losses of several runs trained in one launch, by name."""
    runs = [f"{name}={given}" for name, given in overrides.items()]
    command = [*torchrun(ranks), "tests/integration/train_stages.py", str(experiment.recipe), *runs]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=ROOT, timeout=280)
    assert done.returncode == 0, done.stderr
    return {name: losses(experiment.folder / "runs" / name) for name in overrides}


@pytest.mark.timeout(600)  # ten runs in two launches
def test_two_ranks_have_the_losses_of_one_under_every_zero_stage(experiment: Experiment) -> None:
    one = train_together(
        experiment, 1, one="train.zero_stage=0", accumulated="train.zero_stage=1,train.micro_batch_size=4"
    )
    two = train_together(
        experiment,
        2,
        **{f"stage_{stage}": f"train.zero_stage={stage}" for stage in range(4)},
        two_accumulated="train.zero_stage=2,train.micro_batch_size=2",
        **{f"bf16_{stage}": f"train.zero_stage={stage},train.precision=bf16" for stage in (1, 2, 3)},
    )
    expected = one["one"]
    assert len(expected) == 10
    for name, found in (one | two).items():
        # bf16 rounds to three digits; it has to train, and from the same numbers.
        assert found == pytest.approx(expected, rel=0.03 if "bf16" in name else SAME_TO), name


def test_a_killed_run_continues_bit_for_bit(experiment: Experiment, whole_run: Path) -> None:
    run = experiment.folder / "runs/killed"
    command = experiment.command(TRAIN, "name=killed")
    with started([*torchrun(2), *command[1:]]) as process:
        # Past the second checkpoint and into the steps that will have to be done again.
        wait_until(
            lambda: (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) >= 7
        )
        kill_all(process)
    assert len(metrics(run)) < 10
    done = experiment.run(TRAIN, "name=killed", ranks=2)
    assert done.returncode == 0, done.stderr
    assert "resuming" in done.stdout
    assert metrics(run) == metrics(whole_run)
    assert newest_state(run) == newest_state(whole_run)


def test_a_run_resumes_with_other_ranks_and_another_zero_stage(experiment: Experiment, whole_run: Path) -> None:
    run = interrupted_copy(whole_run, "moved", checkpoints=1)
    done = experiment.run(TRAIN, "name=moved", "train.zero_stage=3")
    assert done.returncode == 0, done.stderr
    assert losses(run) == pytest.approx(losses(whole_run), rel=SAME_TO)


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_taken(
    experiment: Experiment, whole_run: Path
) -> None:
    run = interrupted_copy(whole_run, "damaged", checkpoints=2)
    state = max((run / "checkpoints").iterdir()) / "state.safetensors"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    cut = interrupted_copy(whole_run, "cut-marker", checkpoints=2)
    marker = max((cut / "checkpoints").iterdir()) / "complete.json"
    marker.write_text(marker.read_text()[:100])
    for name, damaged in (("damaged", state), ("cut-marker", marker)):
        done = experiment.run(TRAIN, f"name={name}", ranks=2)
        assert done.returncode == 0, done.stderr
        assert f"{damaged}: damaged" in done.stderr
        assert metrics(run.parent / name) == metrics(whole_run)


def test_another_recipe_does_not_continue_a_run(experiment: Experiment, whole_run: Path) -> None:
    interrupted_copy(whole_run, "changed", checkpoints=1)
    done = experiment.run(TRAIN, "name=changed", "train.learning_rate=0.5", "model.pre_depth=2")
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "model.pre_depth (was 1, is 2), train.learning_rate (was 0.001, is 0.5)" in line


def test_a_finished_run_returns_at_once(experiment: Experiment, whole_run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole_run.rglob("*")}
    done = experiment.run(TRAIN, "name=whole")
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in whole_run.rglob("*")} == before


def test_a_finished_run_of_another_recipe_is_not_taken_for_this_one(experiment: Experiment, whole_run: Path) -> None:
    for override, expected in (("seed=9", "seed (was 0, is 9)"), ("train.total_samples=32", "train.total_samples: 32")):
        done = experiment.run(TRAIN, "name=whole", override)
        assert done.returncode == 2
        assert expected in done.stderr.splitlines()[-1]


def test_a_second_training_in_the_same_folder_is_refused(experiment: Experiment) -> None:
    command = experiment.command(TRAIN, "name=locked", "train.total_samples=1000000")
    with started(command) as process:
        wait_until((experiment.folder / "runs/locked/metrics.jsonl").exists)
        done = experiment.run(TRAIN, "name=locked", "train.total_samples=1000000")
        assert done.returncode == 2
        assert f"runs/locked: process {process.pid} on " in done.stderr.splitlines()[-1]


def test_a_loss_that_is_not_finite_ends_training_before_anything_is_saved(experiment: Experiment) -> None:
    done = experiment.run(TRAIN, "name=exploded", "train.learning_rate=1e30", "train.gradient_clipping=0")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: train.learning_rate: ")
    assert not list((experiment.folder / "runs/exploded/checkpoints").glob("[0-9]*"))


def test_a_batch_that_the_ranks_do_not_divide_is_refused(experiment: Experiment) -> None:
    done = experiment.run(TRAIN, "name=odd", "train.batch_size=15", ranks=2)
    assert done.returncode != 0
    assert "error: train.batch_size: 15 is not divisible by the 2 ranks; use 14" in done.stderr
    assert not (experiment.folder / "runs/odd").exists()


def test_a_flipped_bit_in_a_shard_stops_training_before_the_sample_is_used(
    experiment: Experiment, tmp_path: Path
) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(experiment.folder / "shards", shards)
    tar = sorted(shards.glob("*.tar"))[1]
    content = bytearray(tar.read_bytes())
    content[700] ^= 1  # in the first sample's moments: past a tar header and an npy header
    tar.write_bytes(content)
    done = experiment.run(TRAIN, "name=flipped", f"data.shards={shards}")
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert f"{tar}: sample 20 (member 0000000020) does not match its checksum" in line


def test_shards_of_another_shape_or_number_of_classes_are_refused(experiment: Experiment) -> None:
    for override, expected in (
        ("data.resolution=64", "data.shards"),
        ("model.num_classes=3", "model.num_classes: found 3"),
        ("data.shards=nowhere", "data.shards: nowhere has no index.json"),
    ):
        done = experiment.run(TRAIN, "name=other", override)
        assert done.returncode == 2
        assert expected in done.stderr.splitlines()[-1]


def interrupted_copy(run: Path, name: str, checkpoints: int) -> Path:
    """A copy of a finished run as it was when its first `checkpoints` checkpoints were all it had."""
    copy = run.parent / name
    shutil.copytree(run, copy)
    for checkpoint in sorted((copy / "checkpoints").iterdir())[checkpoints:]:
        shutil.rmtree(checkpoint)
        shutil.rmtree(copy / "weights" / checkpoint.name)
    return copy


def wait_until(condition: Any, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
