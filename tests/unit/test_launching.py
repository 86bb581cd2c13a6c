"""A process finds out who it is under every launcher, and a job is asked for what its recipe says."""

from pathlib import Path

import pytest

from common.loading import parse_recipe
from pipeline.distributed import export_environment
from pipeline.stages import STAGES
from slurm.cluster import Resources, executor

LAUNCHERS = {
    "python": ({}, ("0", "1", "0", "1")),
    "torchrun": (
        {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
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
            "SLURM_JOB_NODELIST": "host-a",
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
    import os

    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    for name in (*names, "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that what the call sets is undone
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    export_environment()
    assert tuple(os.environ[name] for name in names) == expected


def test_a_parallel_stage_asks_for_all_processes_and_another_for_their_cores() -> None:
    recipe = parse_recipe("name: a\nlaunch: {nodes: 2, processes: 8, cpus_per_process: 6, gpus_per_process: 1}")
    asked = {stage.name: stage.resources(recipe) for stage in STAGES}
    assert asked["train"] == Resources(
        nodes=2, processes=8, cpus_per_process=6, gpus_per_process=1, timeout_minutes=240
    )
    assert asked["encode"] == Resources(cpus_per_process=48, gpus_per_process=1, timeout_minutes=240)


@pytest.mark.parametrize(
    ("cluster", "resources", "expected"),
    [
        ("moon", Resources(), "cluster: found 'moon'; allowed: local, debug, slurm, auto"),
        ("local", Resources(nodes=2), r"launch\.nodes: 2 nodes need a SLURM cluster"),
        ("debug", Resources(processes=2), r"launch\.processes: the debug cluster is this one process; found 2"),
    ],
)
def test_what_a_cluster_cannot_give_is_refused(
    cluster: str, resources: Resources, expected: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=expected):
        executor(cluster, tmp_path, "name", resources)
