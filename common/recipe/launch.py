"""What jobs ask for. How they reach SLURM is in `slurm/cluster.py`, settings of a cluster in its site file."""

from pydantic.dataclasses import dataclass

from common.recipe.fields import STRICT, Count, CountOrZero


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Launch:
    """What one job of a stage asks for, on any cluster. Where it runs is `pipeline/run.py --cluster`."""

    nodes: Count = 1
    """Nodes of a training job, and of a sampling job that `jobs` does not divide."""
    processes: Count = 1
    """Processes on a node of such a job: one a GPU."""
    cpus_per_process: Count = 1
    """CPU cores of one process."""
    gpus_per_process: CountOrZero = 0
    """GPUs of one process. 0: it runs on CPUs."""
    timeout_minutes: Count = 240
    """Time limit of a job, in minutes."""
    signal_seconds: Count = 120
    """Seconds before the time limit at which training saves; every job that is not finished is queued again."""
    jobs: Count = 1
    """Jobs, of one process each, into which encoding, sampling, evaluation and sweeps are divided by `--cluster`;
    pipeline/run.py divides them on SLURM only. 1: a single job, of sampling with the processes above."""
