"""A trial training ends with its measurement, with all ranks, which the launcher puts into groups of their own."""

import time
from pathlib import Path

import psutil
import pytest

from pipeline.planning import machine

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
