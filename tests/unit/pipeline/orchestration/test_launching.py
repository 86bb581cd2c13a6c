"""A process finds out who it is under every launcher, and a job is asked for what its recipe says."""

import os
import pty
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from common import ranks
from common.errors import UserError
from common.loading import parse_recipe
from common.ranks import export_environment, gpu_number, own_cores, share_of_cores
from common.stage_jobs import steps
from pipeline.stages import STAGES
from pipeline.training.stage import STAGE as TRAIN
from slurm import cluster
from slurm.cluster import Resources, executor, submission_script

LAUNCHERS = {
    "python": ({}, ("0", "1", "0", "1")),
    "torchrun": (
        {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
        ("3", "4", "1", "2"),
    ),
    "deepspeed": (
        {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"},
        ("3", "4", "1", "2"),
    ),
    "srun": (
        {
            "SLURM_PROCID": "5",
            "SLURM_LOCALID": "1",
            "SLURM_STEP_NUM_TASKS": "8",
            "SLURM_STEP_NUM_NODES": "2",
            "SLURM_STEP_ID": "0",
            "SLURM_JOB_ID": "17",
            "SLURM_STEP_NODELIST": "host-[b,d]",
            "SLURM_JOB_NODELIST": "host-[a-d]",
        },
        ("5", "8", "1", "4"),
    ),
    "a batch script, which is no rank": ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, ("0", "1", "0", "1")),
    "submitit on this machine": (
        {
            "SUBMITIT_EXECUTOR": "local",
            "SUBMITIT_LOCAL_JOB_ID": "9",
            "SUBMITIT_LOCAL_NTASKS": "2",
            "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
            "SUBMITIT_LOCAL_GLOBALID": "1",
            "SUBMITIT_LOCAL_LOCALID": "1",
        },
        ("1", "2", "1", "2"),
    ),
}


@pytest.mark.parametrize(("given", "expected"), LAUNCHERS.values(), ids=LAUNCHERS.keys())
def test_every_launcher_tells_rank_and_world_size(
    given: dict[str, str], expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    assert tuple(exported(given, monkeypatch)[name] for name in names) == expected


def exported(given: dict[str, str], monkeypatch: pytest.MonkeyPatch, terminal: bool = False) -> dict[str, str]:
    """The environment after `export_environment`, of a process that is launched with `given`."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    with monkeypatch.context() as patch:
        patch.setattr(ranks, "has_terminal", lambda: terminal)
        patch.setattr(
            os, "environ", {name: value for name, value in os.environ.items() if name not in launcher} | given
        )
        export_environment()
        return dict(os.environ)


def test_the_tasks_of_a_step_meet_on_its_first_node_at_a_port_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    given = LAUNCHERS["srun"][0]
    first = exported(given, monkeypatch)
    assert first["MASTER_ADDR"] == "host-b"
    others = [{"SLURM_PROCID": "0"}, {"SLURM_JOB_ID": "18"}, {"SLURM_STEP_ID": "1"}, {"SLURM_RESTART_COUNT": "1"}]
    ports = [exported(given | change, monkeypatch)["MASTER_PORT"] for change in others]
    assert ports[0] == first["MASTER_PORT"]  # of another rank
    assert len(set(ports)) == len(ports)
    assert all(10_000 <= int(port) < 20_000 for port in ports)
    assert exported(given | {"MASTER_PORT": "4000"}, monkeypatch)["MASTER_PORT"] == "4000"
    assert exported(given | {"SLURM_STEP_NUM_NODES": "1"}, monkeypatch)["MASTER_ADDR"] == "127.0.0.1"


def test_an_interactive_shell_of_a_step_is_one_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`srun --ntasks=8 --pty bash` gives its shell the variables of the first of eight tasks, and a terminal."""
    given = LAUNCHERS["srun"][0] | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    found = exported(given, monkeypatch, terminal=True)
    assert [found[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")] == ["0", "1", "0", "1"]
    assert found["MASTER_ADDR"] == "127.0.0.1"
    assert capsys.readouterr().err == "note: one process, in an interactive shell of a step of 8 tasks\n"
    torchrun = LAUNCHERS["torchrun"][0]
    assert exported(given | torchrun, monkeypatch, terminal=True)["WORLD_SIZE"] == "4"  # in such a shell


def test_a_terminal_is_told_from_none() -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os._exit(0 if ranks.has_terminal() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(terminal)
    code = "import sys; from common.ranks import has_terminal; sys.exit(has_terminal())"
    assert subprocess.run([sys.executable, "-c", code], start_new_session=True, timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("rank", "world_size"), [("0", None), ("0", ""), ("x", "2"), ("2", "2"), ("-1", "4"), ("0", "0")]
)
def test_variables_that_are_no_rank_are_refused(
    rank: str, world_size: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"RANK": rank} | ({} if world_size is None else {"WORLD_SIZE": world_size})
    if world_size is None:
        monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UserError, match=f"^RANK, WORLD_SIZE: found '{rank}' and '{world_size or ''}'"):
        exported(given, monkeypatch)


def test_one_rank_needs_no_other_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is put before a command in a shell whose variables name more."""
    found = exported(LAUNCHERS["srun"][0] | {"RANK": "0", "WORLD_SIZE": "1"}, monkeypatch)
    assert (found["WORLD_SIZE"], found["MASTER_ADDR"]) == ("1", "127.0.0.1")
    assert found["MASTER_PORT"] == "0"  # whichever is free when it listens: runs that start together do not collide


def test_a_port_of_several_ranks_is_free_and_below_those_of_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "PORTS", 2)
    taken, other = cluster.FIRST_PORT, cluster.FIRST_PORT + 1
    with socket.socket() as run:
        run.bind(("127.0.0.1", taken))
        assert {cluster.free_port() for _ in range(20)} == {other}
        with socket.socket() as another:
            another.bind(("127.0.0.1", other))
            with pytest.raises(OSError, match=f"no port from {taken} to {other} is free"):
                cluster.free_port()


def test_a_process_takes_the_gpu_of_its_local_rank_or_the_only_one_it_was_given() -> None:
    assert [gpu_number(rank, 4, 4) for rank in range(4)] == [0, 1, 2, 3]
    assert [gpu_number(rank, 4, 1) for rank in range(4)] == [0, 0, 0, 0]
    with pytest.raises(UserError, match=r"launch\.processes: 8 processes on a node of 4 GPUs.*set it to 4"):
        gpu_number(0, 8, 4)


def test_a_parallel_stage_asks_for_all_processes_and_another_for_their_cores() -> None:
    recipe = parse_recipe("name: a\nlaunch: {nodes: 2, processes: 8, cpus_per_process: 6, gpus_per_process: 1}")
    asked = {stage.name: steps(recipe, stage, "local")[0].resources for stage in STAGES}
    assert asked["train"] == Resources(
        nodes=2, processes=8, cpus_per_process=6, gpus_per_process=1, timeout_minutes=240
    )
    assert asked["encode"] == Resources(cpus_per_process=48, gpus_per_process=1, timeout_minutes=240)


def test_parts_of_a_stage_ask_for_one_process_each_and_its_share_of_a_nodes_memory() -> None:
    text = "name: a\nlaunch: {nodes: 2, processes: 8, cpus_per_process: 6, gpus_per_process: 1, jobs: 3}"
    made = [step for stage in STAGES for step in steps(parse_recipe(text), stage, "slurm")]
    alone = Resources(cpus_per_process=6, gpus_per_process=1, share_of_node=1 / 8, timeout_minutes=240)
    asked = {step.name: (len(step.jobs), step.resources) for step in made}
    assert asked["encode"] == asked["sample"] == (3, alone)
    assert asked["evaluate-merge"] == (1, replace(alone, cpus_per_process=48, share_of_node=1.0))
    assert asked["train"][1].processes == 8
    here = [step.name for stage in STAGES for step in steps(parse_recipe(text), stage, "local")]
    assert here == [stage.name for stage in STAGES]


def test_small_work_asks_for_one_core_no_gpu_and_an_hour() -> None:
    launch = "processes: 8, cpus_per_process: 6, gpus_per_process: 1, jobs: 3, timeout_minutes: 1440"
    recipe = parse_recipe(f"name: a\ndemo: {{}}\nlaunch: {{{launch}, signal_seconds: 7200}}")
    asked = {step.name: step.resources for stage in STAGES for step in steps(recipe, stage, "slurm")}
    light = Resources(without_gpus=True, share_of_node=1 / 48, timeout_minutes=60, signal_seconds=1800)
    assert asked["compose"] == asked["encode-merge"] == asked["report"] == light
    ffcv = replace(recipe, data=replace(recipe.data, format="ffcv"))
    assert steps(ffcv, STAGES[1], "slurm")[-1].resources.cpus_per_process == 48  # of the merge, which converts


def test_a_stage_asks_for_its_own_resources_and_the_others_for_those_of_all() -> None:
    own = {
        "train": "nodes: 2, processes: 4, gpu_type: h100, partition: big",
        "sample": "jobs: 64, at_once: 8, timeout_minutes: 30, memory_gb: 40, cpus_per_process: 3",
        "evaluate": "jobs: 1, processes: 2",
        "report": "partition: cpu, timeout_minutes: 5",
        "merge": "cpus_per_process: 2",
    }
    stages = ", ".join(f"{name}: {{{values}}}" for name, values in own.items())
    recipe = parse_recipe(f"name: a\nlaunch: {{processes: 8, gpus_per_process: 1, jobs: 3, stages: {{{stages}}}}}")
    made = {step.name: step for stage in STAGES for step in steps(recipe, stage, "slurm")}
    asked = {name: step.resources for name, step in made.items()}
    train, sample, report = asked["train"], asked["sample"], asked["report"]
    assert (train.nodes, train.processes, train.gpu_type, train.partition) == (2, 4, "h100", "big")
    assert (len(made["sample"].jobs), made["sample"].at_once) == (64, 8)
    assert (sample.timeout_minutes, sample.memory_gb) == (30, 40)
    assert parse_recipe(made["sample"].jobs[0].recipe).launch.cpus_per_process == 3  # what its work divides
    assert (asked["evaluate"].processes, asked["evaluate"].cpus_per_process) == (2, 1)
    assert (report.partition, report.timeout_minutes, report.signal_seconds) == ("cpu", 5, 120)
    assert asked["encode-merge"].cpus_per_process == 2
    assert (len(made["encode"].jobs), made["encode"].at_once, asked["encode"].partition) == (3, 3, None)


def test_an_elastic_training_has_one_task_a_node_which_outlives_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FPDM_SITE", str(tmp_path / "site.yaml"))
    (tmp_path / "site.yaml").write_text("partition: gpu\n")
    launch = "nodes: 2, processes: 8, gpus_per_process: 1, cpus_per_process: 6"
    recipes = [parse_recipe(f"name: a\nlaunch: {{{launch}, elastic: {elastic}}}") for elastic in ("true", "false")]
    scripts = []
    for recipe in recipes:
        (step,) = steps(recipe, TRAIN, "slurm")
        scripts.append(submission_script(executor("slurm", tmp_path, "name", step.resources, submits=False)))
    elastic, plain = scripts
    for option in ("#SBATCH --ntasks-per-node=1\n", "#SBATCH --cpus-per-task=48\n", "#SBATCH --no-kill\n"):
        assert option in elastic
        assert option not in plain
    assert "--kill-on-bad-exit=1 --no-kill --cpus-per-task=48" in elastic
    assert "#SBATCH --gpus-per-node=8\n" in elastic
    assert "#SBATCH --gpus-per-node=8\n" in plain
    assert steps(recipes[0], TRAIN, "local") == steps(recipes[0], TRAIN, "debug")  # as any other there
    (tmp_path / "site.yaml").write_text("sbatch: {gpus-per-task: 1}\n")
    with pytest.raises(ValueError, match=r"launch\.elastic: the site file asks for gpus-per-task"):
        executor("slurm", tmp_path, "name", steps(recipes[0], TRAIN, "slurm")[0].resources, submits=False)


@pytest.mark.parametrize(
    ("cluster", "resources", "expected"),
    [
        ("moon", Resources(), "cluster: found 'moon'; allowed: local, debug, slurm, auto"),
        ("local", Resources(nodes=2), r"launch\.nodes: 2 nodes need a SLURM cluster"),
        ("debug", Resources(processes=2), r"launch\.processes: 2, but the debug cluster runs one process"),
    ],
)
def test_what_a_cluster_cannot_give_is_refused(
    cluster: str, resources: Resources, expected: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=expected):
        executor(cluster, tmp_path, "name", resources)


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 64),
        ({"cpu.max": "max 100000\n"}, 64),
        ({"cpu.max": "250000 100000\n"}, 3),
        ({"cpu.max": "20000 100000\n"}, 1),
        ({"cpu.max": "9900000 100000\n"}, 64),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 64),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
    ],
)
def test_a_containers_quota_limits_the_cores_that_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], cores: int
) -> None:
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(ranks, "CGROUPS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert own_cores() == cores


@pytest.mark.parametrize(
    ("bound", "processes", "tasks", "allocated", "cores"),
    [
        (64, 1, None, None, 64),
        (64, 8, None, None, 8),
        (2, 8, None, None, 1),
        (64, 8, 8, 64, 8),  # tasks of SLURM that may run on all of the job's cores
        (8, 8, 8, 64, 8),  # each on its own
        (3, 2, 2, 5, 2),  # as many threads on each
        (2, 2, 2, 5, 2),
        (8, 8, 1, 8, 1),  # torchrun in one task
        (32, 2, 1, 64, 16),
    ],
)
def test_processes_share_the_cores_that_slurm_has_not_split_for_them(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    bound: int,
    processes: int,
    tasks: int | None,
    allocated: int | None,
    cores: int,
) -> None:
    monkeypatch.setattr(ranks, "CGROUPS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(bound)))
    stated = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    for name, value in ({"SLURM_STEP_NUM_TASKS": tasks, "SLURM_CPUS_ON_NODE": allocated} | stated).items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, str(value))
    assert share_of_cores() == cores
