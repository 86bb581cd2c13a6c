"""States of SLURM jobs, from `squeue` and `scontrol`; `sacct` is not needed."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import submitit

# States of a job that has ended, and of one that has not. PREEMPTED and NODE_FAIL are neither: a job shows them for a
# moment before it is requeued.
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")
ALIVE = ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESIZING",
         "SIGNALING", "SPECIAL_EXIT", "STAGE_OUT", "STOPPED", "SUSPENDED")  # fmt: skip


def answers() -> bool:
    """Whether a SLURM controller answers; installed commands alone are no cluster."""
    if shutil.which("sbatch") is None or shutil.which("scontrol") is None:
        return False
    try:
        asked = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return False
    return asked.returncode == 0 and " is UP" in asked.stdout


@contextmanager
def outside_of_jobs() -> Iterator[None]:
    """Hides the surrounding job's variables: a submitted job would inherit its memory, nodes and ranks."""
    # The first names the cluster, and the other says how much submitit tells: both are not of the job.
    kept = {name: os.environ[name] for name in ("SLURM_CONF", "SUBMITIT_LOG_LEVEL") if name in os.environ}
    with submitit.helpers.clean_env():
        os.environ.update(kept)
        yield


def states(job_ids: Iterable[str]) -> dict[str, str]:
    """State by job id (`12`, or `12_3` in an array); jobs that ended some minutes ago are missing.

    Raises OSError or subprocess.SubprocessError if the controller does not answer.
    """
    wanted = sorted({job_id.partition("_")[0] for job_id in job_ids})
    if not wanted:
        return {}
    asked = _squeue("%i|%T", ",".join(wanted))
    if asked.returncode and "Invalid job id" not in asked.stderr:
        asked.check_returncode()
    return dict(line.strip().split("|", 1) for line in asked.stdout.splitlines())


def longest_array() -> int | None:
    """How many jobs an array may have; None if the controller does not say. OSError where SLURM is not installed."""
    asked = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, timeout=60)
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", asked.stdout, re.MULTILINE)
    return int(found[1]) if found else None


def state(job_id: str) -> str | None:
    """The state of a job or array task; None if unknown."""
    try:
        return _squeue("%T", job_id).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def requeue(job_id: str) -> None:
    """Ends a job, and puts it into the queue again. Raises OSError or subprocess.SubprocessError where that fails."""
    subprocess.run(["scontrol", "requeue", job_id], capture_output=True, check=True, timeout=60)


def _squeue(what: str, jobs: str) -> subprocess.CompletedProcess[str]:
    command = ["squeue", "--noheader", "--array", "--states=all", f"--format={what}", f"--jobs={jobs}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)
