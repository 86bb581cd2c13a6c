"""Who am I among the processes: the same answer under python, torchrun, the deepspeed launcher, srun and submitit."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from common.errors import UserError
from slurm.cluster import free_port


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the number of processes, from the environment alone."""
    export_environment()
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def export_environment() -> None:
    """Sets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT where the launcher did not."""
    if "RANK" in os.environ:  # torchrun, the deepspeed launcher
        return
    if "SUBMITIT_EXECUTOR" in os.environ:
        found = _from_submitit()
    elif "SLURM_STEP_NUM_TASKS" in os.environ:  # srun; a batch script alone is no rank
        found = _from_srun()
    else:
        found = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    os.environ.update({key: str(value) for key, value in found.items()})
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(free_port()))


def _from_submitit() -> dict[str, int | str]:
    from submitit.helpers import TorchDistributedEnvironment

    job = TorchDistributedEnvironment()  # its port is a function of the job id, or MASTER_PORT
    found: dict[str, int | str] = {
        "RANK": job.rank,
        "WORLD_SIZE": job.world_size,
        "LOCAL_RANK": job.local_rank,
        "LOCAL_WORLD_SIZE": job.local_world_size,
        "MASTER_PORT": job.master_port,
    }
    if job.local_world_size < job.world_size:  # one node stays on the loopback interface
        found["MASTER_ADDR"] = job.master_addr
    return found


def _from_srun() -> dict[str, int | str]:
    from submitit.slurm.slurm import SlurmJobEnvironment

    world_size, nodes = int(os.environ["SLURM_STEP_NUM_TASKS"]), int(os.environ["SLURM_STEP_NUM_NODES"])
    found: dict[str, int | str] = {
        "RANK": os.environ["SLURM_PROCID"],
        "WORLD_SIZE": world_size,
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": world_size // nodes,
        # All tasks of a step must agree without talking: the step's number picks the port.
        "MASTER_PORT": 20000 + (int(os.environ["SLURM_JOB_ID"]) * 7 + int(os.environ["SLURM_STEP_ID"])) % 40000,
    }
    if nodes > 1:
        found["MASTER_ADDR"] = SlurmJobEnvironment().hostnames[0]
    return found


@contextmanager
def process_group() -> Iterator[tuple[int, int]]:
    """Joins the processes through DeepSpeed (NCCL on GPUs, gloo on CPUs) and yields (rank, world size)."""
    import deepspeed
    import torch

    export_environment()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)  # called by DeepSpeed
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(_own_gpu())
    else:
        share_cores()
        # Otherwise DeepSpeed compiles a shared-memory helper of its own first, for minutes; gloo does without it.
        deepspeed.ops.__compatible_ops__.clear()
    deepspeed.init_distributed("nccl" if on_gpu else "gloo", timeout=timedelta(minutes=10), verbose=False)
    try:
        yield int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    finally:
        torch.distributed.destroy_process_group()


def _own_gpu() -> int:
    """This process's GPU among those that it sees: all of the node, or its own alone where SLURM binds them to tasks.

    Raises UserError where there are more processes than GPUs.
    """
    import torch

    seen, local = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
    if seen == 1:
        os.environ["LOCAL_RANK"] = "0"  # DeepSpeed takes its device from there
        return 0
    if local >= seen:
        raise UserError(
            f"launch.processes: {os.environ.get('LOCAL_WORLD_SIZE', local + 1)} on a node with {seen} GPUs; start one "
            "process a GPU"
        )
    return local


def any_rank(asked: bool, error: UserError | None, group: Any) -> bool:
    """Whether any rank was `asked`; if any has an error, the first such rank's is raised on every rank.

    No rank is left waiting for another that gave up. `group`: that of `control_group`.
    """
    import torch
    import torch.distributed as dist

    found = torch.tensor([int(asked), int(error is not None)])
    dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
    anyone, failed = found.tolist()
    if failed:
        errors: list[UserError | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(errors, error, group=group)
        raise next(one for one in errors if one is not None)
    return bool(anyone)


@contextmanager
def told_by_all(group: Any) -> Iterator[None]:
    """All ranks raise the UserError that the first of them raises inside, and none goes on before all are through."""
    error = None
    try:
        yield
    except UserError as fault:
        error = fault
    any_rank(False, error, group)


def control_group() -> Any:
    """Where ranks agree on what to do next, in the host's memory: over NCCL each such question would wait for the GPU.

    One may keep the others waiting: with shards to fetch, a checkpoint to write, pictures to draw.
    """
    import torch

    return torch.distributed.new_group(backend="gloo", timeout=timedelta(hours=2))


def share_cores() -> None:
    """Gives each process of this machine its share of the cores: more threads than cores stall one another."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
