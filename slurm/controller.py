"""What SLURM knows about jobs, asked through its own commands; nothing here needs `sacct`."""

import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import submitit

# States of a job that is over, and of one that is not. PREEMPTED and NODE_FAIL are neither: a job that is to be queued
# again shows them for a moment.
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")
ALIVE = ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESIZING",
         "SIGNALING", "SPECIAL_EXIT", "STAGE_OUT", "STOPPED", "SUSPENDED")  # fmt: skip


def answers() -> bool:
    """Whether a SLURM controller answers here. Its commands alone are no cluster."""
    if shutil.which("sbatch") is None or shutil.which("scontrol") is None:
        return False
    try:
        asked = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return False
    return asked.returncode == 0 and " is UP" in asked.stdout


@contextmanager
def outside_of_jobs() -> Iterator[None]:
    """As outside of any job: a job submitted from within one would inherit its memory, its nodes and its ranks."""
    configuration = os.environ.get("SLURM_CONF")  # where the cluster is, not which job this is
    with submitit.helpers.clean_env():
        if configuration is not None:
            os.environ["SLURM_CONF"] = configuration
        yield


def states(job_ids: Iterable[str]) -> dict[str, str]:
    """State by job id (`12`, or `12_3` in an array), of those that the controller still knows.

    Raises OSError or subprocess.SubprocessError where it does not answer; it forgets jobs some minutes after their end.
    """
    wanted = sorted({job_id.partition("_")[0] for job_id in job_ids})
    if not wanted:
        return {}
    asked = _squeue("%i|%T", ",".join(wanted))
    if asked.returncode and "Invalid job id" not in asked.stderr:
        asked.check_returncode()
    return dict(line.strip().split("|", 1) for line in asked.stdout.splitlines())


def state(job_id: str) -> str | None:
    """The state of one job, or of one of an array; None where it cannot be learned."""
    try:
        return _squeue("%T", job_id).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def _squeue(what: str, jobs: str) -> subprocess.CompletedProcess[str]:
    command = ["squeue", "--noheader", "--array", "--states=all", f"--format={what}", f"--jobs={jobs}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)
