"""The chain: every stage a submitit job, finished stages skipped, faults told in one line, nothing left behind."""

import json
import re
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.integration.conftest import Experiment, started

RUN = "pipeline/run.py"
STAGES = ("encode", "train", "sample", "evaluate", "report")


@pytest.fixture(scope="module")
def said(experiment: Experiment) -> str:
    """The output of a whole run."""
    done = experiment.run(RUN, "name=chain", "--cluster", "local", "launch.processes=2", "train.zero_stage=0")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def finished_run(experiment: Experiment, said: str) -> Path:
    return experiment.folder / "runs/chain"


def test_a_stage_is_a_line_and_libraries_say_nothing(said: str) -> None:
    stages, _, closing = said.partition("\n\n")
    titles = [f"[{number}/5] {stage}" for number, stage in enumerate(STAGES, 1)]
    lines = [line for line in stages.splitlines() if ": done in" in line or ": finished before" in line]
    assert [line.split(":")[0] for line in lines] == titles
    assert all(line.startswith(tuple(titles)) for line in stages.splitlines())  # after a minute, a stage says more
    assert re.fullmatch(r"\[2/5\] train: done in \d+ s, .*/runs/chain/weights", lines[1])
    assert re.match(r"report: .*\nimages: .*\nnumbers: .*\n +FD \(EfficientNet-Lite0\) = [\d.]+: 12 samples", closing)


def test_a_run_ends_with_report_images_and_numbers(finished_run: Path) -> None:
    for name in ("report.html", "samples.png", "metrics.json", "recipe.yaml", "provenance.jsonl", "metrics.jsonl"):
        assert (finished_run / name).stat().st_size > 0, name
    stages = set(json.loads((finished_run / "stages.json").read_text())["seconds"])
    distances = json.loads((finished_run / "metrics.json").read_text())["distances"]
    assert set(distances) == {"trained", "untrained", "held_out", "reconstruction"}
    assert stages == {"train", "sample", "evaluate", "report"}  # the fixture had encoded before


def test_two_submitit_tasks_trained_as_one_job(finished_run: Path) -> None:
    assert json.loads((finished_run / "deepspeed.json").read_text())["train_micro_batch_size_per_gpu"] == 8


def test_the_same_command_again_skips_every_finished_stage(experiment: Experiment, finished_run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")}
    done = experiment.run(RUN, "name=chain", "launch.processes=2", "train.zero_stage=0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished before, skipped") == 5
    assert {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")} == before


def test_the_debug_cluster_runs_everything_in_this_process_also_without_an_autoencoder(experiment: Experiment) -> None:
    pixels = ("vae.path=null", "vae.latent_channels=3", "vae.downsampling=1", f"data.shards={experiment.folder}/pixels")
    short = ("train.total_samples=32", "model.kind=dit", "model.depth=2", "model.patch_size=4")
    done = experiment.run(RUN, "name=debug", "--cluster", "debug", *short, *pixels)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (experiment.folder / "runs/debug/report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("data.images=nowhere", "data.shards=other"), "error: data.images: nowhere"),
        (("train.batch_size=15", "launch.processes=2"), "error: train.batch_size: 15 is not divisible by the 2 ranks"),
        (("--cluster", "moon"), "error: cluster: found 'moon'; allowed: local, debug, slurm, auto"),
        (("--cluster", "slurm"), "error: cluster: slurm is unavailable"),
        (
            ("--cluster", "debug", "launch.processes=2"),
            "error: launch.processes: 2, but the debug cluster runs one process",
        ),
    ],
)
def test_a_mistake_found_in_a_job_is_one_line_and_status_2(
    experiment: Experiment, arguments: tuple[str, ...], expected: str
) -> None:
    done = experiment.run(RUN, "name=mistake", *arguments)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(expected)
    assert "Traceback" not in done.stderr


def test_damage_that_one_rank_finds_is_told_and_ends_the_others(
    encoded_images: Experiment, experiment: Experiment, tmp_path: Path
) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(encoded_images.folder / "shards", shards)
    tar = min(shards.glob("*.tar"))
    content = bytearray(tar.read_bytes())
    content[700] ^= 1  # in the first sample's moments; one rank meets it in the first epoch
    tar.write_bytes(content)
    done = experiment.run(RUN, "name=damaged", f"data.shards={shards}", "data.flips=true", "launch.processes=2")
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: {tar}: sample 0 (member 0000000000) does not match")
    assert "Traceback" not in done.stderr


def test_ending_a_run_ends_its_jobs(experiment: Experiment) -> None:
    with started(experiment.command(RUN, "name=ended", "train.total_samples=1000000")) as process:
        log = experiment.folder / "runs/ended/metrics.jsonl"
        deadline = time.monotonic() + 120
        while not log.exists() or not log.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 128 + signal.SIGTERM
        _, alive = psutil.wait_procs(family, timeout=30)
        assert not alive
