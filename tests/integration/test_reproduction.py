"""The paper's tables are remade by one command, which goes on where it was killed."""

import re
import signal
import sys
from pathlib import Path

import numpy as np
import psutil

from tests.forks import run_python
from tests.integration.conftest import environment, started
from tests.photographs import idx_bytes, write_folder

SPLITS = {"images": "train", "held_out": "t10k"}
FASHION = {
    "images-idx3-ubyte": idx_bytes(np.random.default_rng(0).integers(0, 256, (40, 28, 28), np.uint8)),
    "labels-idx1-ubyte": idx_bytes(np.arange(40, dtype=np.uint8) % 10),
}


def test_a_smoke_of_table_1_survives_a_kill_and_writes_its_page(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    command = [sys.executable, "pipeline/reproduce.py", "--scale", "small", "--smoke", "--only", "T1"]
    command += ["--cluster", "debug", "--runs", str(runs)]
    with started(command) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "dit-0: sweep ..." in line:  # the context kills it there
                break
    assert not (runs / "results.md").exists()
    command += ["--at-once", "2"]
    done = run_python(*command[1:], environment=environment())
    assert done.returncode == 0, done.stderr
    assert not {"dit-0: train ...", "dit-0: encode ..."} & set(done.stdout.splitlines())  # what was finished
    page = (runs / "results.md").read_text(encoding="utf-8")
    assert "A smoke test" in page
    assert re.search(r"^\| 140, ddim \| [\d.]+ \| [\d.]+ \|$", page, re.MULTILINE)
    assert "FPDM is better than DiT at small budgets (140 and 280 blocks); at 140, ddim: **not decided by one" in page
    assert "FD (EfficientNet-Lite0), 4 images" in page
    assert len(re.findall(r"^\| (?:dit|fpdm) \| [\d,]+ \| 16 \|", page, re.MULTILINE)) == 2


def test_runs_that_train_together_end_when_the_command_is_ended(tmp_path: Path) -> None:
    command = [sys.executable, "pipeline/reproduce.py", "--scale", "small", "--smoke", "--only", "T5", "--at-once", "2"]
    with started([*command, "--cluster", "debug", "--runs", str(tmp_path / "runs")]) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if ": train ..." in line:
                break
        theirs = psutil.Process(process.pid).children(recursive=True)
        assert len(theirs) >= 2
        process.terminate()
        assert "fpdm-0: train ..." not in process.stdout.read()  # the third run: it does not begin
        assert process.wait(60) == 128 + signal.SIGTERM
        _, alive = psutil.wait_procs(theirs, 10)
        assert not alive


def test_a_smoke_of_fashion_mnist_trains_its_autoencoder_and_says_how_to_get_what_is_missing(tmp_path: Path) -> None:
    command = [
        "pipeline/reproduce.py",
        "--scale",
        "small",
        "--smoke",
        "--cluster",
        "debug",
        "--runs",
        f"{tmp_path}/runs",
    ]
    images = [f"data.{field}={tmp_path}/{split}-images-idx3-ubyte" for field, split in SPLITS.items()]
    missing = run_python(*command, "--only", "T2", *images, environment=environment())
    assert (missing.returncode, len(missing.stderr.splitlines())) == (2, 1), missing.stderr
    assert "train-images-idx3-ubyte is not there" in missing.stderr
    assert "apt-get install dataset-fashion-mnist" in missing.stderr
    write_folder(tmp_path, {f"{split}-{name}": data for split in SPLITS.values() for name, data in FASHION.items()})
    done = run_python(*command, "--only", "T2", *images, environment=environment())
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": autoencoder ...") == done.stdout.count(": encode ...") == 1
    page = (tmp_path / "runs/results.md").read_text(encoding="utf-8")
    assert re.search(r"^\| 140, ddim \| [\d.]+ \| [\d.]+ \|$", page, re.MULTILINE)
    assert "| published: CelebA-HQ | 65.2 | 11.1 |" in page
