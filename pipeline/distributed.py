"""Who am I among the processes: the same answer under python, torchrun, the deepspeed launcher, srun and submitit."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar
from zlib import crc32

from common.errors import UserError
from slurm.cluster import free_port

if TYPE_CHECKING:
    import torch

FIRST_PORT, PORTS = 10_000, 10_000  # below those that Linux gives away by itself


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the number of processes, from the environment alone."""
    export_environment()
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def export_environment() -> None:
    """Sets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT where the launcher did not."""
    if "RANK" in os.environ:  # torchrun, the deepspeed launcher
        return
    where: dict[str, str] = {}
    if os.environ.get("SUBMITIT_EXECUTOR", "slurm") != "slurm":
        ranks = _from_submitit()
    elif "SLURM_STEP_NUM_TASKS" in os.environ:  # srun, by submitit or by hand; a batch script alone is no rank
        ranks, where = _from_srun(), _rendezvous()
    else:
        ranks = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    os.environ.update({key: str(value) for key, value in ranks.items()})
    for key, value in ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())} | where).items():
        os.environ.setdefault(key, value)


def _from_submitit() -> dict[str, int]:
    """On this machine; `slurm.cluster` exports the port."""
    import submitit

    job = submitit.JobEnvironment()
    return {
        "RANK": job.global_rank,
        "WORLD_SIZE": job.num_tasks,
        "LOCAL_RANK": job.local_rank,
        "LOCAL_WORLD_SIZE": job.num_tasks,
    }


def _from_srun() -> dict[str, int]:
    world_size = int(os.environ["SLURM_STEP_NUM_TASKS"])
    return {
        "RANK": int(os.environ["SLURM_PROCID"]),
        "WORLD_SIZE": world_size,
        "LOCAL_RANK": int(os.environ["SLURM_LOCALID"]),
        "LOCAL_WORLD_SIZE": world_size // int(os.environ["SLURM_STEP_NUM_NODES"]),
    }


def _rendezvous() -> dict[str, str]:
    """Where the tasks of a step meet. They must agree without talking: on a function of the step's number.

    A job that is queued again gets another port: the one before may be taken. One node stays on the loopback interface.
    """
    from submitit.slurm.slurm import SlurmJobEnvironment

    class Step(SlurmJobEnvironment):
        _env: ClassVar[dict[str, str]] = SlurmJobEnvironment._env | {"nodes": "SLURM_STEP_NODELIST"}

    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    number = crc32(" ".join(os.environ.get(name, "0") for name in names).encode())
    found = {"MASTER_PORT": str(FIRST_PORT + number % PORTS)}
    if int(os.environ["SLURM_STEP_NUM_NODES"]) > 1:
        found["MASTER_ADDR"] = Step().hostnames[0]
    return found


def gpu_number(local_rank: int, local_world_size: int, visible: int) -> int:
    """Which of the `visible` GPUs is this process's: the one of its rank on the node, or the only one it was given.

    SLURM shows every task all GPUs of its job on the node, or with --gpus-per-task or --gpu-bind only its own. Raises
    UserError where several are seen that are too few.
    """
    if visible == 1:
        return 0
    if local_world_size > visible:
        raise UserError(
            f"launch.processes: {local_world_size} processes on a node of {visible} GPUs; each needs one of its own: "
            f"set it to {visible}"
        )
    return local_rank


@contextmanager
def process_group() -> Iterator[tuple[int, int]]:
    """Joins the processes through DeepSpeed (NCCL on GPUs, gloo on CPUs) and yields (rank, world size)."""
    import deepspeed
    import torch

    export_environment()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        # DeepSpeed takes LOCAL_RANK for the GPU's number.
        local_rank, local_world_size = int(os.environ["LOCAL_RANK"]), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        os.environ["LOCAL_RANK"] = str(gpu_number(local_rank, local_world_size, torch.cuda.device_count()))
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
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


def own_device() -> "torch.device":
    """This process's GPU, or the CPU. Said at every use: which GPU is the current one, each thread has to itself."""
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def float32_throughout() -> None:
    """For this process: cuDNN would round the factors of float32 convolutions to TF32's 10 bits, as torch's default.

    Pictures and features are compared with ones that were computed in float32. It is no setting of a call: a thread
    that extracts features beside one that decodes pictures would change the other's.
    """
    import torch

    torch.backends.cudnn.allow_tf32 = False
