"""Whole runs on a real SLURM: submitted once, interrupted in every way there is, the same in the end."""

import json
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from common.jobs import Job
from common.loading import load_recipe
from common.stage_jobs import steps
from pipeline.training.stage import STAGE
from slurm.cluster import Resources, executor, submit
from slurm.controller import OVER
from tests.integration.conftest import ROOT, Experiment, environment
from tests.integration.ranks import run_ranks
from tests.json_files import read_json
from tests.slurm_cluster.configuration import Cluster
from tests.slurm_cluster.fixtures import squeue, state, wait_until
from tests.slurm_cluster.work import __name__ as WORK

STEPS = 60
LONG = (f"train.total_samples={16 * STEPS}", "train.zero_stage=0")  # whose ranks start three seconds faster
SHORT = ("train.total_samples=192", "train.zero_stage=1")
HOSTILE = """it's a "run"; $(touch pwned)"""


def lines(run: Path) -> list[dict[str, Any]]:
    log = run / "metrics.jsonl"
    complete = log.read_text().rpartition("\n")[0].splitlines() if log.exists() else []
    return [json.loads(line) for line in complete]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in lines(run)]


def newest_state(run: Path) -> bytes:
    return (max((run / "checkpoints").iterdir()) / "state.safetensors").read_bytes()


def restarts(job: str) -> int:
    shown = subprocess.run(["scontrol", "-o", "show", "job", job], capture_output=True, text=True, check=True).stdout
    return int(next(word for word in shown.split() if word.startswith("Restarts=")).partition("=")[2])


def call(command: list[str], **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=ROOT, **more)


@pytest.fixture(scope="module")
def uninterrupted(experiment: Experiment) -> Path:
    """Two ranks, without SLURM."""
    done = run_ranks(experiment, "name=uninterrupted", *LONG, ranks=2)
    assert done.statuses == [0, 0], done.output
    return experiment.folder / "runs/uninterrupted"


def start_slow_training(
    experiment: Experiment, name: str, minutes: int, step_seconds: float, slow_starts: int
) -> tuple[Path, str]:
    """A training on two nodes, a process each: (run folder, job)."""
    recipe = load_recipe(experiment.recipe, (f"name={name}", *LONG))
    resources = Resources(nodes=2, timeout_minutes=minutes, signal_seconds=115)
    made = executor("slurm", recipe.folder / "logs/train", name, resources)
    training = Job.of(WORK, "train_slowly", recipe, step_seconds=step_seconds, slow_starts=slow_starts)
    return recipe.folder, submit(made, [training])[0].job_id


def start_elastic_training(experiment: Experiment, name: str) -> tuple[Path, str]:
    """A training on two nodes, a process each, that goes on with one: (run folder, job)."""
    recipe = load_recipe(experiment.recipe, (f"name={name}", *LONG, "launch.nodes=2", "launch.elastic=true"))
    (step,) = steps(recipe, STAGE, "slurm")
    slow = {"module": WORK, "function": "train_slowly", "arguments": {"step_seconds": 0.3, "slow_starts": 1}}
    training = replace(step.jobs[0], arguments={**step.jobs[0].arguments, "call": slow})
    made = executor("slurm", recipe.folder / "logs/train", name, step.resources)
    return recipe.folder, submit(made, [training])[0].job_id


@pytest.mark.timeout(600)
def test_requeued_preempted_and_a_node_lost_a_training_ends_with_the_same_weights(
    experiment: Experiment, uninterrupted: Path, three_nodes: Cluster
) -> None:
    folder, job = start_slow_training(experiment, "interrupted", minutes=60, step_seconds=0.3, slow_starts=3)
    wait_until(lambda: len(losses(folder)) >= 5, "the first steps")
    subprocess.run(["scontrol", "requeue", job], check=True)
    wait_until(lambda: len(losses(folder)) >= 15, "more steps")
    assert restarts(job) == 1
    urgent = ["sbatch", "--parsable", "--partition=high", "--exclusive", "--nodes=3", "--output=/dev/null"]
    other = subprocess.run([*urgent, "--wrap=sleep 1"], capture_output=True, text=True, check=True).stdout.strip()
    wait_until(lambda: state(other) == "COMPLETED", "the more urgent job")
    wait_until(lambda: len(losses(folder)) >= 25, "more steps")
    assert restarts(job) == 2
    lost = squeue("%N", f"--jobs={job}")[0].removeprefix("node[").rstrip("]")[-1]
    os.kill(int((three_nodes.folder / f"run/node{lost}.pid").read_text()), signal.SIGKILL)
    subprocess.run(["scontrol", "update", f"nodename=node{lost}", "state=down", "reason=test"], check=True)
    wait_until(lambda: state(job) == "COMPLETED", "the end", 240)
    assert restarts(job) == 3
    assert losses(folder) == losses(uninterrupted)
    assert newest_state(folder) == newest_state(uninterrupted)


@pytest.mark.timeout(600)
def test_an_elastic_training_goes_on_without_a_lost_node_and_with_another_when_it_is_requeued(
    experiment: Experiment, uninterrupted: Path, three_nodes: Cluster
) -> None:
    folder, job = start_elastic_training(experiment, "elastic")
    log = folder / f"logs/train/{job}_0_log.err"
    wait_until(lambda: len(losses(folder)) >= 5, "the first steps")
    os.kill(int((three_nodes.folder / "run/node2.pid").read_text()), signal.SIGKILL)
    before = losses(folder)
    wait_until(lambda: "the work goes on from the last checkpoint" in log.read_text(), "the other node to notice")
    wait_until(lambda: len(losses(folder)) > len(before) + 1, "a step on it")
    assert restarts(job) == 0
    subprocess.run(["scontrol", "update", "nodename=node2", "state=down", "reason=test"], check=True)
    assert state(job) == "RUNNING"
    subprocess.run(["scontrol", "requeue", job], check=True)
    wait_until(lambda: state(job) == "COMPLETED", "the end")
    assert restarts(job) == 1
    assert squeue("%N", "--states=all", f"--jobs={job}") == ["node[1,3]"]
    assert [line["samples"] for line in lines(folder)] == [line["samples"] for line in lines(uninterrupted)]
    assert losses(folder) == pytest.approx(losses(uninterrupted), rel=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_elastic_training_whose_first_node_dies_is_queued_again_and_ends_the_same(
    experiment: Experiment, uninterrupted: Path, three_nodes: Cluster
) -> None:
    folder, job = start_elastic_training(experiment, "first-lost")
    wait_until(lambda: len(losses(folder)) >= 5, "the first steps")
    assert squeue("%N", f"--jobs={job}") == ["node[1-2]"]
    os.kill(int((three_nodes.folder / "run/node1.pid").read_text()), signal.SIGKILL)
    subprocess.run(["scontrol", "update", "nodename=node1", "state=down", "reason=test"], check=True)
    wait_until(lambda: state(job) == "COMPLETED", "the end", 240)
    assert restarts(job) == 1
    assert squeue("%N", "--states=all", f"--jobs={job}") == ["node[2-3]"]
    assert [line["samples"] for line in lines(folder)] == [line["samples"] for line in lines(uninterrupted)]
    assert losses(folder) == pytest.approx(losses(uninterrupted), rel=1e-4)


@pytest.mark.timeout(600)
def test_a_training_that_reaches_its_time_limit_saves_and_goes_on_to_the_same_weights(
    experiment: Experiment, uninterrupted: Path, slurm: Cluster
) -> None:
    folder, job = start_slow_training(experiment, "limited", minutes=60, step_seconds=1.0, slow_starts=1)
    wait_until(lambda: len(losses(folder)) >= 3, "the first steps")  # whenever that is on a busy machine
    began = datetime.fromisoformat(squeue("%S", f"--jobs={job}")[0])
    minutes = int((datetime.now() - began).total_seconds() // 60) + 2  # SLURM's are local times too
    subprocess.run(["scontrol", "update", f"jobid={job}", f"timelimit={minutes}"], check=True)
    # The signal is due 115 s before the limit, which is one to two minutes away: at SLURM's next look, every 30 s.
    wait_until(lambda: restarts(job) >= 1, "the limit")
    subprocess.run(["scontrol", "update", f"jobid={job}", "timelimit=60"], check=True)
    wait_until(lambda: state(job) == "COMPLETED", "the end")
    assert "saved after" in (folder / f"logs/train/{job}_0_log.err").read_text()
    assert losses(folder) == losses(uninterrupted)
    assert newest_state(folder) == newest_state(uninterrupted)


@pytest.mark.timeout(600)
def test_two_nodes_of_two_tasks_have_the_losses_of_one_process(
    experiment: Experiment, slurm: Cluster, tmp_path: Path
) -> None:
    done = experiment.run(
        "pipeline/run.py",
        *("name=four", *SHORT, "--cluster", "slurm", "--stages", "train", "launch.nodes=2", "launch.processes=2"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    four = experiment.folder / "runs/four"
    assert read_json(four / "deepspeed.json")["train_micro_batch_size_per_gpu"] == 4
    done = experiment.run("pipeline/train.py", "name=one", *SHORT)
    assert done.returncode == 0, done.stderr
    assert losses(four) == pytest.approx(losses(experiment.folder / "runs/one"), rel=1e-4)
    # srun alone is a launcher too.
    step = shlex.join(["srun", *experiment.command("pipeline/train.py", "name=srun", *SHORT)])
    script = ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", f"--output={tmp_path}/log", "--wrap", step]
    job = call(script).stdout.strip()
    wait_until(lambda: state(job) in OVER, "the step to end")
    assert state(job) == "COMPLETED", (tmp_path / "log").read_text()
    assert losses(experiment.folder / "runs/srun") == pytest.approx(losses(four), rel=1e-4)


@pytest.mark.timeout(600)
def test_a_whole_run_is_submitted_once_and_ends_with_a_report(slurm: Cluster, tmp_path: Path) -> None:
    runs = tmp_path / HOSTILE
    run = runs / "small"
    script = [
        str(ROOT / "slurm/train_demo.sh"),
        f"runs='{str(runs).replace(chr(39), chr(39) * 2)}'",
        *SMALL_DEMO(tmp_path),
    ]
    launcher = subprocess.run(
        ["sbatch", "--parsable", f"--output={tmp_path}/launcher", *script],
        capture_output=True, text=True, check=True, env=environment(), cwd=ROOT,
    ).stdout.strip()  # fmt: skip
    wait_until(lambda: state(launcher) == "COMPLETED", f"the launcher, {tmp_path}/launcher")
    first = {entry["step"]: entry["job"] for entry in read_json(run / "jobs.json")["jobs"]}
    assert list(first) == [
        "compose",
        "encode",
        "encode-merge",
        "train",
        "sample",
        "evaluate",
        "evaluate-merge",
        "report",
    ]
    again = call(["bash", *script])
    assert again.returncode == 0, again.stderr
    assert {entry["step"]: entry["job"] for entry in read_json(run / "jobs.json")["jobs"]} == first
    shown = call([sys.executable, "slurm/status.py", str(run)]).stdout
    assert all(f"{step} " in shown for step in first)
    wait_until(lambda: not squeue("%i"), "the chain", 400)
    assert {state(job) for job in first.values()} == {"COMPLETED"}
    for name in ("report.html", "samples.png", "metrics.json"):
        assert (run / name).stat().st_size > 0
    shown = call([sys.executable, "slurm/status.py", str(run)]).stdout
    assert "training: step 2, 128 of 128 samples" in shown
    assert "nothing to submit" in call(["bash", *script]).stdout
    assert not [path for path in (*tmp_path.rglob("pwned"), ROOT / "pwned") if path.exists()]


def SMALL_DEMO(folder: Path) -> list[str]:
    """Overrides that make the demo a matter of a minute."""
    return [
        *("name=small", f"data.images={folder}/pictures/train", f"data.held_out={folder}/pictures/held_out"),
        *(f"data.shards={folder}/shards", "data.shard_samples=16", "demo.per_class=16", "demo.held_out_per_class=4"),
        *(
            "train.total_samples=128",
            "train.batch_size=64",
            "train.zero_stage=0",
            "sample.num_samples=16",
            "sample.chunk_samples=4",
        ),
        *("sample.num_steps=2", "sample.iterations=2", "launch.jobs=2", "launch.nodes=2", "launch.processes=1"),
    ]


@pytest.mark.timeout(600)
def test_the_cancelled_part_of_an_array_alone_is_done_again(
    experiment: Experiment, slurm: Cluster, tmp_path: Path
) -> None:
    shards = tmp_path / "shards"
    encode = (
        *("pipeline/run.py", "name=parts", f"data.shards={shards}", "data.shard_samples=10", "launch.jobs=2"),
        *("--detach", "--stages", "encode"),
    )
    assert experiment.run(*encode).returncode == 0
    array, merge = (entry["job"] for entry in read_json(experiment.folder / "runs/parts/jobs.json")["jobs"])
    subprocess.run(["scancel", f"{array}_1"], check=True)
    wait_until(lambda: state(merge) == "CANCELLED", "the merge to be cancelled")
    there = {path.name: path.stat().st_mtime_ns for path in shards.glob("*.tar")}
    assert len(there) == 3  # of the shards 0 to 4, part 1 has the second and the fourth
    assert experiment.run(*encode).returncode == 0
    wait_until(lambda: not squeue("%i"), "the second array")
    now = {path.name: path.stat().st_mtime_ns for path in shards.glob("*.tar")}
    assert len(now) == 5
    assert {name: now[name] for name in there} == there
    assert (shards / "index.json").exists()


def test_jobs_of_another_recipe_keep_the_folder(experiment: Experiment, slurm: Cluster) -> None:
    detach = ("--detach", "--stages", "train", "name=held", "train.total_samples=1000000")
    done = experiment.run("pipeline/run.py", *detach)
    assert done.returncode == 0, done.stderr
    done = experiment.run("pipeline/run.py", *detach, "seed=3")
    assert done.returncode == 2
    assert "jobs of another recipe are on their way" in done.stderr


def shown(job: str) -> dict[str, str]:
    """SLURM's description of a job."""
    words = subprocess.run(["scontrol", "-o", "show", "job", job], capture_output=True, text=True, check=True).stdout
    return dict(word.split("=", 1) for word in words.split() if "=" in word)


def test_nothing_is_queued_where_a_check_fails_and_each_stage_asks_for_its_own_unless_it_is_forced(
    experiment: Experiment, slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site.yaml"
    site.write_text("gpu_option: gres\ngpu_type: a100\nmemory_gb: 16\nsbatch: {hold: true, wckey: false}\n")
    monkeypatch.setenv("FPDM_SITE", str(site))
    asked = [
        *("name=asked", "--detach", "data.held_out=/nowhere", "launch.gpus_per_process=1", "launch.processes=2"),
        *("launch.cpus_per_process=2", "launch.timeout_minutes=90", "launch.stages.train.partition=high"),
        *("launch.stages.train.nodes=2", "launch.stages.sample={jobs: 3, at_once: 2, memory_gb: 3}"),
    ]
    done = experiment.run("pipeline/run.py", *asked, "train.precision=fp32", "sample.num_samples=1")
    assert done.returncode == 2
    first, *faults = done.stderr.splitlines()
    assert "--force starts them all the same" in first
    assert [fault.split(":")[1] for fault in faults] == [" sample.num_samples", " data.held_out"]
    assert squeue("%i") == []
    done = experiment.run("pipeline/run.py", *asked, "--force")
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("warning: data.held_out: /nowhere")
    queued = {
        entry["step"]: shown(entry["job"]) for entry in read_json(experiment.folder / "runs/asked/jobs.json")["jobs"]
    }
    names = ("Partition", "TimeLimit", "NumNodes", "NumTasks", "NumCPUs", "MinMemoryNode", "TresPerNode")
    assert {step: tuple(job.get(name) for name in names) for step, job in queued.items()} == {
        "train": ("high", "01:30:00", "2-2", "4", "8", "16G", "gres:gpu:a100:2"),
        "sample": ("main", "01:30:00", "1-1", "1", "2", "3G", "gres:gpu:a100:1"),
        "evaluate": ("main", "01:30:00", "1-1", "1", "4", "16G", "gres:gpu:a100:1"),
        "report": ("main", "01:00:00", "1-1", "1", "1", "4G", None),
    }
    assert queued["sample"]["ArrayTaskThrottle"] == "2"
    assert not any("WCKey" in job and job["WCKey"].strip("*") for job in queued.values())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_preflight_looks_around_on_the_nodes_of_a_training_after_it_was_requeued(
    experiment: Experiment, slurm: Cluster
) -> None:
    done = experiment.run(
        "slurm/preflight.py", "--cluster", "slurm", "name=preflight", "launch.nodes=2", "launch.gpus_per_process=1"
    )
    assert done.returncode == 2  # the devices that the cluster counts are none
    assert "GPUs: none; the recipe asks for 1 on a node" in done.stderr
    for found in (
        "MB/s between 2 ranks",
        "seen by every rank",
        "allowed, done 1 times",
        "partition: main",
        "gpu_type: a100",
    ):
        assert found in done.stdout, done.stdout


def test_a_dry_run_prints_the_scripts_and_submits_nothing(experiment: Experiment) -> None:
    """On a machine without SLURM too."""
    done = experiment.run("pipeline/run.py", "--detach", "--dry-run", "name=dry", "launch.nodes=2", "launch.jobs=2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("#SBATCH --nodes=2") == 1  # training; sampling is in parts of one process
    assert "#SBATCH --array=0-1%2" in done.stdout
    assert not (experiment.folder / "runs/dry").exists()


def test_a_launching_script_outside_a_clone_says_so(slurm: Cluster, tmp_path: Path) -> None:
    asked = [
        "sbatch",
        "--parsable",
        f"--output={tmp_path}/out",
        f"--chdir={tmp_path}",
        str(ROOT / "slurm/train_demo.sh"),
    ]
    done = subprocess.run(asked, capture_output=True, text=True, check=True, cwd=tmp_path, env=environment())
    number = done.stdout.strip()
    wait_until(lambda: state(number) == "FAILED", "the launcher to give up")
    assert (tmp_path / "out").read_text().startswith(f"error: {tmp_path} is no clone of this project")
