"""`slurm/status.py` where there is no SLURM at all: what the run folder alone tells."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def show(run: Path, *arguments: str, path: str | Path = "/nowhere") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "slurm/status.py"), str(run), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={"PATH": str(path)}, timeout=60)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    logs = tmp_path / "logs/train"
    logs.mkdir(parents=True)
    jobs = [
        {"step": "encode", "job": "12", "parts": 2, "logs": str(tmp_path / "logs/encode")},
        {"step": "train", "job": "13", "parts": 1, "logs": str(logs)},
    ]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    (logs / "13_0_result.pkl").write_bytes(b"")
    (logs / "13_0_log.err").write_text("first\n\ntrain:  1%\rtrain: 50%\rtrain: 99%\n")
    (tmp_path / "recipe.yaml").write_text("train: {total_samples: 12800}\n")
    line = {"step": 50, "samples": 3200, "loss": 0.25, "samples_per_second": 2.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + '\n{"step": 50, "loss": null}\n{"step": 51, "sam')
    return tmp_path


def test_it_shows_every_job_the_last_whole_step_and_the_time_left(run: Path) -> None:
    shown = show(run).stdout.splitlines()
    assert shown[1].split()[:3] == ["encode", "12", "unknown"]
    assert shown[2].split()[:3] == ["train", "13", "ended"]
    assert shown[4].startswith(
        "training: step 50, 3,200 of 12,800 samples, loss 0.2500, 2.0 samples/s, done in 1 h 20 min at this rate"
    )


def test_of_the_newest_log_it_shows_the_end(run: Path) -> None:
    assert show(run, "--lines", "2").stdout.splitlines()[-2:] == ["  train: 50%", "  train: 99%"]


def test_a_run_without_jobs_is_told_in_one_line(tmp_path: Path) -> None:
    done = show(tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path}/jobs.json: no such file; a run folder whose stages were submitted with")


def test_a_damaged_listing_is_told_in_one_line(run: Path) -> None:
    for text in ("[{", '[{"step": "train"}]', "7"):
        (run / "jobs.json").write_text(text)
        done = show(run)
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"error: {run}/jobs.json: damaged (")


def test_where_the_controller_has_forgotten_sacct_is_asked(run: Path) -> None:
    told = {  # by SLURM 22.05
        "12": "12_0|COMPLETED|00:00:02|node1\n12_[1-3%1]|PENDING|00:00:00|None assigned",
        "13": "13|CANCELLED by 0|00:00:04|node1",
    }
    (run / "bin").mkdir()
    sacct = "#!/bin/sh\n" + "".join(f"case $* in *--jobs={job}) echo '{text}';; esac\n" for job, text in told.items())
    for name, text in {"sacct": sacct, "scontrol": "#!/bin/sh\nexit 1\n"}.items():
        (run / "bin" / name).write_text(text)
        (run / "bin" / name).chmod(0o755)
    rows = [line.split() for line in show(run, path=run / "bin").stdout.splitlines()[1:4]]
    assert rows == [
        ["encode", "12_0", "COMPLETED", "-", "00:00:02", "node1"],
        ["encode", "12_[1-3%1]", "PENDING", "-", "-"],
        ["train", "13", "CANCELLED", "-", "00:00:04", "node1"],
    ]
