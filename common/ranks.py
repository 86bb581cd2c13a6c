"""Who am I among the processes: the same answer under python, torchrun, the deepspeed launcher, srun and submitit."""

import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar
from zlib import crc32

from common.errors import UserError
from slurm.cluster import free_port

if TYPE_CHECKING:
    import torch

LOCAL = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}  # without a launcher
CGROUPS = Path("/sys/fs/cgroup")  # in a container: its own
FIRST_PORT, PORTS = 10_000, 10_000  # below those that Linux gives away by itself


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the number of processes, from the environment alone."""
    export_environment()
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def export_environment() -> None:
    """Sets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT where the launcher did not.

    Raises UserError where RANK and WORLD_SIZE are no rank and a number of ranks.
    """
    ranks: dict[str, int]
    where: dict[str, str]
    if "RANK" in os.environ:  # torchrun, the deepspeed launcher
        if _stated_world_size() > 1:
            return
        ranks, where = {}, {}
    elif os.environ.get("SUBMITIT_EXECUTOR", "slurm") != "slurm":
        ranks, where = _from_submitit(), {}
    elif "SLURM_STEP_NUM_TASKS" in os.environ and not _in_a_shell():  # srun; a batch script is no rank
        ranks, where = _from_srun(), _rendezvous()
    else:
        ranks, where = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}, {}
    os.environ.update({key: str(value) for key, value in ranks.items()})
    for key, value in ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())} | where).items():
        os.environ.setdefault(key, value)


def _stated_world_size() -> int:
    stated = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")]
    try:
        rank, world_size = map(int, stated)
    except ValueError:
        rank, world_size = -1, 0
    if not 0 <= rank < world_size:
        raise UserError(
            f"RANK, WORLD_SIZE: found {stated[0]!r} and {stated[1]!r}, a rank from 0 and how many there are; launchers "
            "set both: unset both to work alone"
        )
    return world_size


def _in_a_shell() -> bool:
    """Whether the step's variables are those of an interactive shell (`srun --pty`), which names all tasks of its step
    and is one process. It has a terminal; tasks that srun starts have none, but for the first of `srun --pty`, which
    leads a session of its own, as no command in a shell does.
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


def own_cores() -> int:
    """Cores that this process and its like may use: those it is bound to, or fewer where a container has a quota."""
    return min([len(os.sched_getaffinity(0)), *_quotas()])


def _quotas() -> list[int]:
    """What cgroups of either version grant of the processors' time, in cores, rounded up; nothing where none do."""
    found = []
    for names in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        try:
            quota, period = " ".join((CGROUPS / name).read_text() for name in names).split()
        except (OSError, ValueError):
            continue
        if quota not in ("max", "-1"):
            found.append(max(1, math.ceil(int(quota) / int(period))))
    return found


def share_of_cores() -> int:
    """Cores per process when this machine's cores are split evenly."""
    return max(1, own_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def share_cores() -> None:
    """Gives each process of this machine its share of the cores: more threads than cores stall one another."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(share_of_cores())


def own_device() -> "torch.device":
    """This process's GPU, from now on this thread's current one, or the CPU.

    Said at every use all the same: each thread has a current GPU of its own.
    """
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank, local_world_size = (int(os.environ.get(key, default)) for key, default in LOCAL.items())
    device = torch.device("cuda", gpu_number(local_rank, local_world_size, torch.cuda.device_count()))
    torch.cuda.set_device(device)
    return device


def float32_throughout() -> None:
    """For this process: cuDNN would round the factors of float32 convolutions to TF32's 10 bits, as torch's default.

    Images and features are compared with ones that were computed in float32. It is no setting of a call: a thread
    that extracts features beside one that decodes images would change the other's.
    """
    import torch

    torch.backends.cudnn.allow_tf32 = False
