"""The benchmark of a GPU: all of it in tiny sizes on a CPU, and what it leaves when parts fail or the time is up."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import measured, page
from benchmarks.gpu_parts import PARTS, Row, Setting, compared

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(900)
def test_a_smoke_run_measures_every_part(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/gpu.py", "--smoke", "--minutes", "30", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert set(record["parts"]) == set(PARTS)
    for name, part in record["parts"].items():
        assert part["error"] is None, part
        assert part["rows"] or name == "compile"
        assert all(row["met"] is not False and row["value"] >= 0 for row in part["rows"])
    assert "## Golden" in (tmp_path / "gpu.md").read_text()


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def test_a_part_that_fails_or_takes_too_long_is_reported_with_what_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(_: Setting) -> Iterator[Row]:
        yield Row("first", 1.0, "s")
        raise RuntimeError("CUDA error: out of memory")

    def endless(_: Setting) -> Iterator[Row]:
        yield Row("first", 2.0, "s")
        time.sleep(60)

    monkeypatch.setattr(gpu, "PARTS", {"failing": failing, "endless": endless})
    setting = Setting("cpu", True, tmp_path)
    parts = {name: measured(name, setting, 0.5) for name in ("failing", "endless")}
    assert parts["failing"]["error"] == "RuntimeError: CUDA error: out of memory"
    assert parts["endless"]["error"].startswith("TimeUp: ")
    assert [part["rows"][0]["value"] for part in parts.values()] == [1.0, 2.0]
    made = {"device": None, "time": "2026-01-01", "packages": {"torch": "2"}, "git": None}
    text = page({"provenance": made, "smoke": False, "parts": parts})
    assert "Failed: RuntimeError: CUDA error: out of memory" in text
    assert "| first | 2 | s |" in text


def test_losses_of_another_length_or_beyond_the_bound_are_not_met() -> None:
    one = np.array([1.0, 0.5])
    assert compared("", one * 1.001, one, 0.005).met
    assert not compared("", one * 1.01, one, 0.005).met
    assert not compared("", one[:1], one, 0.005).met


@pytest.mark.parametrize(("given", "message"), [(["--parts", "none"], "invalid choice"), ([], "--smoke runs every")])
def test_what_cannot_be_measured_here_is_said_at_once(
    given: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", *given])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        gpu.main()
    assert message in capsys.readouterr().err
