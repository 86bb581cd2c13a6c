"""What jobs ask for. How they reach SLURM is in `slurm/cluster.py`, settings of a cluster in its site file."""

from dataclasses import fields, replace

from pydantic import StrictBool
from pydantic.dataclasses import dataclass

from common.gpus import Model
from common.recipe.fields import STRICT, Count, CountOrZero, Positive, Word

ONE_PROCESS = ("compose", "autoencoder", "merge", "report", "sweep")  # per job
LIGHT = ("compose", "merge", "report")  # no GPU, unless the recipe says so of this stage
ONE_JOB = ("compose", "autoencoder", "merge", "train", "report")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StageLaunch:
    """What the jobs of one stage ask for, in place of the same field of `launch`. Without any, `compose`, `merge` and
    `report` ask for one core, no GPU and at most an hour, and the others for what `launch` says. `merge` is the job
    after an array, which collects what its jobs have made."""

    partition: Word | None = None
    """SLURM's partition. null: the site file's."""
    nodes: Count | None = None
    """Nodes of its job; of `train`, and of stages that `jobs` does not divide."""
    processes: Count | None = None
    """Processes on a node of such a job."""
    cpus_per_process: Count | None = None
    """CPU cores of one process."""
    gpus_per_process: CountOrZero | None = None
    """GPUs of one process."""
    gpu_type: Word | None = None
    """Their type, such as `a100`. null: the site file's."""
    memory_gb: Positive | None = None
    """Memory of a job on each of its nodes, in GB. null: a share of the site file's, by cores."""
    timeout_minutes: Count | None = None
    """Time limit of a job, in minutes."""
    jobs: Count | None = None
    """Jobs, of one process each, into which the stage is divided."""
    at_once: Count | None = None
    """How many of them run at the same time. null: all."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Stages:
    """What the jobs of single stages ask for."""

    compose: StageLaunch | None = None
    autoencoder: StageLaunch | None = None
    encode: StageLaunch | None = None
    merge: StageLaunch | None = None
    train: StageLaunch | None = None
    sample: StageLaunch | None = None
    evaluate: StageLaunch | None = None
    report: StageLaunch | None = None
    sweep: StageLaunch | None = None


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
    gpu: Model | None = None
    """Model for which `--dry-run` computes hours and memory, as if each process had one. null: it measures this machine
    for a few seconds, where that has what the recipe asks for."""
    timeout_minutes: Count = 240
    """Time limit of a job, in minutes."""
    signal_seconds: Count = 120
    """Seconds before the time limit at which training saves; every job that is not finished is queued again."""
    elastic: StrictBool = False
    """On SLURM, training goes on with the nodes that are left when one dies, and with all when its job is requeued."""
    jobs: Count = 1
    """Jobs, of one process each, into which encoding, sampling, evaluation and sweeps are divided by `--cluster`;
    pipeline/run.py divides them on SLURM only. 1: a single job, of sampling with the processes above."""
    stages: Stages = Stages()


def own_launch(launch: Launch, stage: str) -> StageLaunch:
    """What the recipe says of one stage alone; of all stages alike where it says nothing."""
    return getattr(launch.stages, stage, None) or StageLaunch()


def launch_of(launch: Launch, stage: str) -> Launch:
    """The section with a stage's own values in place of those of all stages."""
    own = own_launch(launch, stage)
    common = {field.name for field in fields(launch)}
    return replace(launch, **{name: value for name, value in vars(own).items() if name in common and value is not None})


def check_launch(launch: Launch) -> None:
    """Raises ValueError for a value of a stage that its jobs would not use."""
    for field in fields(launch.stages):
        stage, own, resolved = field.name, own_launch(launch, field.name), launch_of(launch, field.name)
        unused: dict[str, str] = {}
        if stage in ONE_PROCESS:
            unused |= dict.fromkeys(("nodes", "processes"), "its jobs have one process each")
        elif stage != "train" and resolved.jobs > 1:
            several = f"its {resolved.jobs} jobs have one process each (launch.stages.{stage}.jobs=1: a single job)"
            unused |= dict.fromkeys(("nodes", "processes"), several)
        if stage in ONE_JOB:
            unused |= dict.fromkeys(("jobs", "at_once"), "it is one job")
        elif resolved.jobs == 1:
            unused["at_once"] = "it is one job"
        if not (own.gpus_per_process if stage in LIGHT else resolved.gpus_per_process):
            unused["gpu_type"] = "it has no GPU (gpus_per_process)"
        for name, reason in unused.items():
            if getattr(own, name) is not None:
                raise ValueError(f"launch.stages.{stage}.{name}: {getattr(own, name)}, but {reason}; remove it")
