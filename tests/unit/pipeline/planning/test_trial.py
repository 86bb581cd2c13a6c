"""A trial training ends with its measurement, or with the command that asked for it; so do its ranks, which the
launcher puts into groups of their own.
"""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipeline.planning import machine

ROOT = Path(__file__).parents[4]

RANK = """
import os, sys, time
from pathlib import Path
Path(sys.argv[2]).with_name(os.environ.get("RANK", "0")).write_text(str(os.getpid()))
time.sleep(600)
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_a_trial_leaves_no_process_behind(processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline/train.py").write_text(RANK)
    ranks = [tmp_path / str(rank) for rank in range(processes)]
    with machine._trained(tmp_path / "recipe.yaml", processes, tmp_path / "output") as launcher:
        while not all(path.exists() and path.read_text() for path in ranks):
            assert launcher.poll() is None, (tmp_path / "output").read_text()
            time.sleep(0.05)
    assert not any(psutil.pid_exists(int(path.read_text())) for path in ranks)


PLANNER = """
import sys
from pathlib import Path
from common.loading import load_recipe
from pipeline.planning import machine
recipe = load_recipe("recipes/demo.yaml")
machine.ROOT = Path(sys.argv[1])
machine.try_training(recipe, 600.0)
"""


def test_a_terminated_command_leaves_no_trial_behind(tmp_path: Path) -> None:
    (tmp_path / "pipeline").mkdir()
    pids = tmp_path / "pids"
    pids.mkdir()
    train = RANK.replace("Path(sys.argv[2]).with_name(", f"Path({str(pids)!r}).joinpath(")
    (tmp_path / "pipeline/train.py").write_text(train)
    command = [sys.executable, "-c", PLANNER, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as planner:
        ranks = [pids / str(rank) for rank in range(2)]
        while not all(path.exists() and path.read_text() for path in ranks):
            assert planner.poll() is None, planner.stderr and planner.stderr.read()
            time.sleep(0.05)
        planner.terminate()
        assert planner.wait(60) == 128 + signal.SIGTERM
    assert not any(psutil.pid_exists(int(path.read_text())) for path in ranks)
