"""Rank, world size, device and cores of this process under python, torchrun, deepspeed, srun and submitit."""

import ctypes
import math
import os
import sys
from collections.abc import Sized
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar
from zlib import crc32

from common.errors import UserError
from slurm.cluster import FIRST_PORT, PORTS

if TYPE_CHECKING:
    import torch

LOCAL = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}  # without a launcher
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
CGROUPS = Path("/sys/fs/cgroup")  # in a container: its own


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the number of processes, from the environment alone."""
    export_environment()
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def export_environment() -> None:
    """Sets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT if the launcher did not.

    Raises UserError if RANK and WORLD_SIZE are set but invalid.
    """
    ranks: dict[str, int]
    where: dict[str, str]
    if "RANK" in os.environ:  # torchrun, the deepspeed launcher
        if _stated_world_size() > 1:
            os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1"))  # DeepSpeed's word for it
            return
        ranks, where = {}, {}
    elif os.environ.get("SUBMITIT_EXECUTOR", "slurm") != "slurm":
        ranks, where = _from_submitit(), {}
    elif "SLURM_STEP_NUM_TASKS" in os.environ and not _in_a_shell():  # srun; a batch script is no rank
        ranks, where = _from_srun(), _rendezvous()
    else:
        ranks, where = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}, {}
    os.environ.update({key: str(value) for key, value in ranks.items()})
    # Port 0, of one rank, is whichever is free when it listens: a port that is looked for before may be taken by then.
    for key, value in ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"} | where).items():
        os.environ.setdefault(key, value)


def stated_by() -> tuple[str, ...]:
    """The variables that name this process's rank and the number of ranks, before `export_environment` sets some."""
    if "RANK" in os.environ:
        return ("RANK", "WORLD_SIZE")
    return ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS") if "SLURM_STEP_NUM_TASKS" in os.environ else ()


def may_be_left_over() -> bool:
    """Whether SLURM's variables name a rank, and this process is neither a task that SLURM started nor its child.

    So it is in a notebook, in a cron job, or behind `ssh`, with the variables of an interactive shell.
    """
    own = (str(os.getpid()), str(os.getppid()))
    is_task = os.environ.get("SLURM_TASK_PID") in own or "SUBMITIT_EXECUTOR" in os.environ
    return "SLURM_STEP_NUM_TASKS" in stated_by() and not is_task


def _stated_world_size() -> int:
    stated = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")]
    try:
        rank, world_size = map(int, stated)
    except ValueError:
        rank, world_size = -1, 0
    if not 0 <= rank < world_size:
        raise UserError(
            f"RANK, WORLD_SIZE: found {stated[0]!r} and {stated[1]!r}; 0 <= RANK < WORLD_SIZE is allowed: unset both "
            "to run one process"
        )
    return world_size


def _in_a_shell() -> bool:
    """Whether this is one process in an interactive shell (`srun --pty`), whose variables name all tasks.

    Such a process has a terminal and does not lead its session. Tasks that srun starts have no terminal, except the
    first task of `srun --pty`, which leads its session.
    """
    if not has_terminal() or os.getsid(0) == os.getpid():
        return False
    tasks = os.environ["SLURM_STEP_NUM_TASKS"]
    if tasks != "1":
        print(f"note: one process, in an interactive shell of a step of {tasks} tasks", file=sys.stderr, flush=True)
    return True


def has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


def _from_submitit() -> dict[str, int]:
    """Ranks of a local submitit job; `slurm.cluster` exports the port."""
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
    """Address and port where the tasks of a step meet, as a function of the step's number, so that all agree.

    A requeued job gets another port, since the previous one may be taken. A single node uses the loopback interface.
    """
    from submitit.slurm.slurm import SlurmJobEnvironment

    class Step(SlurmJobEnvironment):
        _env: ClassVar[dict[str, str]] = SlurmJobEnvironment._env | {"nodes": "SLURM_STEP_NODELIST"}

    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    number = crc32(" ".join(os.environ.get(name, "0") for name in names).encode())
    meeting_point = {"MASTER_PORT": str(FIRST_PORT + number % PORTS)}
    if int(os.environ["SLURM_STEP_NUM_NODES"]) > 1:
        meeting_point["MASTER_ADDR"] = Step().hostnames[0]
    return meeting_point


def gpu_number(local_rank: int, local_world_size: int, visible: int) -> int:
    """This process's GPU among the `visible` ones: the one with its local rank, or the only one.

    SLURM shows every task all GPUs of its job on the node, or with --gpus-per-task or --gpu-bind only its own. Raises
    UserError if several are visible but fewer than processes.
    """
    if visible == 1:
        return 0
    if local_world_size > visible:
        raise UserError(
            f"launch.processes: {local_world_size} processes on a node of {visible} GPUs; each needs one of its own: "
            f"set it to {visible}"
        )
    return local_rank


def own_cores(bound: Sized | None = None) -> int:
    """Cores for processes that are bound to these, by default as this one is; fewer under a container's quota."""
    return min([len(os.sched_getaffinity(0) if bound is None else bound), *_quotas()])


def _quotas() -> list[int]:
    """CPU quotas of cgroups v2 and v1 in cores, rounded up; empty without a quota."""
    quotas = []
    for names in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        try:
            quota, period = " ".join((CGROUPS / name).read_text() for name in names).split()
        except (OSError, ValueError):
            continue
        if quota not in ("max", "-1"):
            quotas.append(max(1, math.ceil(int(quota) / int(period))))
    return quotas


def share_of_cores() -> int:
    """Cores per process when this machine's cores are split evenly."""
    cores = own_cores()
    if os.environ.get("SLURM_STEP_NUM_TASKS") == os.environ.get("WORLD_SIZE"):  # each may be bound to cores of its own
        cores = max(cores, own_cores(range(int(os.environ.get("SLURM_CPUS_ON_NODE", "0")))))
    share = cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(share, len(os.sched_getaffinity(0))))


def share_cores(*, alone: bool = False) -> None:
    """Limits torch to this process's share of the cores: more threads than cores stall one another.

    alone: the other processes have ended, so all cores are this one's.
    """
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(own_cores() if alone else share_of_cores())


def keep_freed_memory() -> None:
    """For this process to use again: each step of training allocates the tensors of the step before.

    glibc would give it back to the system and ask for it page by page: 6,000 pages a step of the demo's training, a
    tenth of its time. Not for stages that read images in threads: what those freed would stay too.
    """
    with suppress(AttributeError):  # another C library than glibc
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)  # the largest that glibc takes
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def own_device() -> "torch.device":
    """This process's GPU, which becomes this thread's current one, or the CPU.

    Pass it explicitly all the same: each thread has its own current GPU.
    """
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank, local_world_size = (int(os.environ.get(key, default)) for key, default in LOCAL.items())
    device = torch.device("cuda", gpu_number(local_rank, local_world_size, torch.cuda.device_count()))
    torch.cuda.set_device(device)
    return device


def float32_throughout() -> None:
    """Turns TF32 off in cuDNN for this process: by default, float32 convolutions would have a mantissa of 10 bits.

    Images and features are compared with ones computed in float32. It is set once, for the process, because other
    threads may decode images or extract features at the same time.
    """
    import torch

    torch.backends.cudnn.allow_tf32 = False
