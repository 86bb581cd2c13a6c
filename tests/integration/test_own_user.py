"""Whatever its user does to a run meanwhile: it ends what it started, and what is finished stays finished."""

import os
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.forks import run_python
from tests.integration.conftest import Experiment, environment, started

SHORT = ("train.total_samples=32", "train.log.tensorboard=false")


def test_train_may_be_called_again_in_the_same_process(experiment: Experiment) -> None:
    program = """
import sys
from common.loading import load_recipe
from pipeline.training.run import finished, train
for overrides in (["train.total_samples=32"], ["train.total_samples=64"], ["train.zero_stage=2", "name=twice-2"]):
    recipe = load_recipe(sys.argv[1], ["name=twice", "train.total_samples=32", *overrides])
    train(recipe)
    assert finished(recipe)
"""
    done = run_python("-c", program, str(experiment.recipe), environment=environment())
    assert done.returncode == 0, done.stderr


def test_damaged_last_weights_are_written_again_and_nothing_is_trained_again_without_a_word(
    experiment: Experiment,
) -> None:
    program = """
import shutil, sys
from common.errors import UserError
from common.loading import load_recipe
from common.run_folder import weights_folder
from pipeline.training.run import finished, train
recipe = load_recipe(sys.argv[1], ["name=mended", "train.total_samples=32"])
train(recipe)
config = weights_folder(recipe, 32) / "config.json"
whole = config.read_bytes()
config.write_bytes(bytes([whole[0] ^ 0x80]) + whole[1:])
assert not finished(recipe)
train(recipe)
assert config.read_bytes() == whole and finished(recipe)
config.write_bytes(whole.replace(b'"depth": 28', b'"depth": 29'))
shutil.rmtree(recipe.folder / "checkpoints")
try:
    train(recipe)
except UserError as error:
    print(error)
"""
    done = run_python("-c", program, str(experiment.recipe), environment=environment())
    assert done.returncode == 0, done.stderr
    config = experiment.folder / "runs/mended/weights/000000000032/0.9/config.json"
    assert f"warning: {config}: no JSON" in done.stderr
    assert f"{config}: changed after it was written; move the folder aside" in done.stdout


def test_a_training_whose_logs_are_deleted_meanwhile_is_finished(experiment: Experiment) -> None:
    logs = experiment.folder / "runs/no-logs/logs"
    command = experiment.command("pipeline/run.py", "name=no-logs", "--stages=train", *SHORT)
    with started(command) as process:
        while not (logs.parent / "recipe.yaml").exists():  # training has begun
            assert process.poll() is None
            time.sleep(0.01)
        shutil.rmtree(logs)
        said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert "train: done in" in said


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])  # SIGTERM: test_run.py
def test_a_run_that_is_ended_ends_its_job(experiment: Experiment, number: signal.Signals) -> None:
    name = f"ended-by-{number.name.lower()}"
    folder = experiment.folder / "runs" / name
    command = experiment.command("pipeline/run.py", f"name={name}", "--stages=train", "train.total_samples=1600000")
    before = signal.signal(number, signal.SIG_DFL)  # whatever started these tests may have had it ignored
    with started(command) as process:
        signal.signal(number, before)
        while not (folder / "metrics.jsonl").exists():
            assert process.poll() is None
            time.sleep(0.01)
        family = psutil.Process(process.pid).children(recursive=True)
        assert family
        os.kill(process.pid, number)
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 128 + number, said
        assert not [one for one in family if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def test_a_run_that_outlives_its_terminal_is_not_ended_by_it(experiment: Experiment) -> None:
    command = ["nohup", *experiment.command("pipeline/run.py", "name=nohup", "--stages=train", *SHORT)]
    with started(command) as process:
        while not (Path(experiment.folder) / "runs/nohup/recipe.yaml").exists():
            assert process.poll() is None
            time.sleep(0.01)
        for one in (psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)):
            with suppress(psutil.NoSuchProcess):  # one that has just done its part
                one.send_signal(signal.SIGHUP)
        said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
