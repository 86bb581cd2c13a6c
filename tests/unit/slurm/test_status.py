"""`slurm/status.py` where there is no SLURM at all: what the run folder alone tells."""

import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from common.command import exit_status_of
from common.loading import parse_recipe
from common.log_lines import append_line
from common.run_recipe import write_recipe
from common.sealed import write_sealed
from pipeline.orchestration.slurm_chain import Submitted
from slurm.status import status
from tests.seals import edits, flips, resealed

ROOT = Path(__file__).parents[3]


def show(run: Path, *arguments: str, path: str | Path = "/nowhere") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "slurm/status.py"), str(run), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env={"PATH": str(path), "PYTHONPATH": str(ROOT)}, timeout=60
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    logs = tmp_path / "logs/train"
    logs.mkdir(parents=True)
    jobs = [
        Submitted("encode", "12", 2, None, str(tmp_path / "logs/encode"), "", 0.0),
        Submitted("train", "13", 1, "12", str(logs), "", 0.0),
    ]
    write_sealed(tmp_path / "jobs.json", {"jobs": [asdict(job) for job in jobs]})
    (logs / "13_0_result.pkl").write_bytes(b"")
    (logs / "13_0_log.err").write_text("first\n\ntrain:  1%\rtrain: 50%\rtrain: 99%\n")
    write_recipe(parse_recipe(f"name: {tmp_path.name}", (f"runs={tmp_path.parent}", "train.total_samples=12800")))
    line = {"step": 50, "samples": 3200, "loss": 0.25, "samples_per_second": 2.0}
    append_line(tmp_path / "metrics.jsonl", line)
    append_line(tmp_path / "metrics.jsonl", {**line, "step": 51, "loss": None})
    with open(tmp_path / "metrics.jsonl", "a") as log:
        log.write('{"step": 52, "sam')
    return tmp_path


def test_it_shows_every_job_the_last_step_and_the_time_left(run: Path) -> None:
    shown = show(run).stdout.splitlines()
    assert shown[1].split()[:3] == ["encode", "12", "unknown"]
    assert shown[2].split()[:3] == ["train", "13", "ended"]
    assert shown[4].startswith(
        "training: step 50, 3,200 of 12,800 samples, loss 0.2500, 2.0 samples/s, done in 1 h 20 min at this rate"
    )


def test_of_the_newest_log_it_shows_the_end(run: Path) -> None:
    assert show(run, "--lines", "2").stdout.splitlines()[-2:] == ["  train: 50%", "  train: 99%"]


def test_a_run_without_jobs_is_one_line(tmp_path: Path) -> None:
    done = show(tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path}/jobs.json: no such file; a run folder whose stages were submitted with")


def told(run: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What status prints, or its one line of error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "/nowhere")
        done = exit_status_of(lambda: print("\n".join(status(run, 3))))
    shown = capsys.readouterr()
    if done:
        assert shown.err.count("\n") == 1
        assert shown.err.startswith("error: ")
    return shown.out + shown.err


def test_a_damaged_listing_is_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("[{", '[{"step": "train"}]', "7", "[" * 100_000):
        (run / "jobs.json").write_text(text)
        assert told(run, capsys).startswith(f"error: {run}/jobs.json: ")


def test_a_flipped_bit_in_its_files_is_named_and_changes_no_number(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random = np.random.default_rng(0)
    expected = told(run, capsys)
    for name, count in (("jobs.json", 100), ("metrics.jsonl", 100), ("recipe.yaml", 25)):
        for _ in flips(run / name, random, count):
            shown = told(run, capsys)
            same = re.sub(r"logged .* ago", "", shown) == re.sub(r"logged .* ago", "", expected)
            assert same or f"{run}/{name}: " in shown


def test_whatever_a_listing_holds_under_a_new_seal_ends_in_no_traceback(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listing = json.loads((run / "jobs.json").read_text())
    del listing["content_key"]
    for edited in edits(listing, np.random.default_rng(0), 150):
        resealed(run / "jobs.json", lambda _, edited=edited: edited)
        shown = told(run, capsys)
        assert "training: step 50" in shown or f"{run}/jobs.json: " in shown


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
