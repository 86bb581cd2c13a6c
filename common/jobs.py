"""A job as submitit pickles it: names and plain values only, no objects of this project."""

import atexit
import importlib
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import submitit

from common.errors import Interrupted, UserError, has_lost_a_rank
from common.loading import dump_recipe, parse_recipe
from common.recipe import Recipe
from common.rendezvous import rendezvous
from slurm import controller
from slurm.site_file import SCRATCH_VARIABLE

# SLURM notices a dead node after SlurmdTimeout, five minutes by default, and then requeues its job.
LOST_RANK_SECONDS = 600


@dataclass(frozen=True)
class Job(submitit.helpers.Checkpointable):
    """A call of `module.function(recipe, **arguments)`; the recipe is YAML.

    `Checkpointable`: at a time limit or a preemption the same job is requeued, and continues its stage.
    """

    module: str
    function: str
    recipe: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, module: str, function: str, recipe: Recipe, **arguments: Any) -> "Job":
        return cls(module, function, dump_recipe(recipe), arguments)

    def __call__(self) -> dict[str, Any]:
        """{"seconds": ...}, or {"error": line} if it ended in a UserError."""
        os.environ.setdefault("TQDM_MININTERVAL", "1")  # a bar in a log file: a line a second is enough
        started = time.monotonic()
        _forget_result()
        try:
            return self._outcome(started)
        finally:
            _make_folder()

    def checkpoint(self, *arguments: Any, **named: Any) -> submitit.helpers.DelayedSubmission:
        """Returns the submission that submitit uses to requeue this job."""
        _make_folder()
        return super().checkpoint(*arguments, **named)

    def _outcome(self, started: float) -> dict[str, Any]:
        try:
            _use_scratch()
            self.work()
        except UserError as error:
            _fail_in_the_queue_too(f"error: {error}")
            return {"error": str(error)}
        except subprocess.CalledProcessError as error:
            if "requeue" in error.cmd:  # submitit's handler came too late: SLURM is already ending this job
                _leave_to_slurm()
            raise
        except RuntimeError as error:
            if has_lost_a_rank(error):
                _wait_for_the_cause()
            raise
        return {"seconds": round(time.monotonic() - started, 1)}

    def work(self) -> None:
        """The call itself, when all ranks have come."""
        function = getattr(importlib.import_module(self.module), self.function)
        try:
            rendezvous()
            function(parse_recipe(self.recipe), **self.arguments)
        except Interrupted as interruption:
            print(f"interrupted: {interruption}", file=sys.stderr, flush=True)
            _queue_again()
            raise


def failed(outcome: dict[str, Any]) -> bool:
    """Whether the job ended in a UserError."""
    return "error" in outcome


def _cluster() -> str | None:
    return os.environ.get("SUBMITIT_EXECUTOR")


def _use_scratch() -> None:
    """Creates the site file's scratch folder on this node and puts temporary files there.

    Setting TMPDIR is not enough: SLURM resets it to /tmp if the folder's parent is missing.
    """
    folder = os.environ.get(SCRATCH_VARIABLE)
    if folder is None:
        return
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"scratch: no folder {folder} on {platform.node()}: {error.strerror}; see the site file"
        ) from None
    os.environ["TMPDIR"] = tempfile.tempdir = folder


def _forget_result() -> None:
    """Deletes the result of an earlier attempt: a requeued job keeps its number, and so the name of that file."""
    if _cluster() in ("local", "slurm"):
        submitit.JobEnvironment().paths.result_pickle.unlink(missing_ok=True)


def _make_folder() -> None:
    """Recreates the log folder in case it was deleted, so that submitit can still write the result."""
    if _cluster() in ("local", "slurm"):
        submitit.JobEnvironment().paths.folder.mkdir(parents=True, exist_ok=True)


def _fail_in_the_queue_too(line: str) -> None:
    """Ends this process with status 2 after submitit has written its result.

    So jobs that depend on this one do not start, and the other ranks do not wait.
    """
    if _cluster() == "slurm":
        print(line, file=sys.stderr, flush=True)
        atexit.register(os._exit, 2)


def _queue_again() -> None:
    """Requeues the job, through submitit's handler on rank 0, and does not return; returns outside of such a job."""
    if _cluster() not in ("local", "slurm"):
        return
    _leave_to_slurm()
    environment = submitit.JobEnvironment()
    if environment.global_rank == 0:
        signal.raise_signal(getattr(signal, f"SIG{environment.USR_SIG}"))
    sys.exit(0)


def _leave_to_slurm() -> None:
    """Ends this process without a result if SLURM is ending its job: requeuing would revive a cancelled job."""
    if _cluster() == "slurm" and controller.state(submitit.JobEnvironment().job_id) not in ("RUNNING", None):
        sys.exit(1)


def _wait_for_the_cause() -> None:
    """Waits for SLURM to end the job after a rank was lost; returns if it does not.

    Failing at once would end a job that SLURM requeues because a node died. A rank that failed ends the job within
    seconds (`srun --kill-on-bad-exit`) and is reported as the cause.
    """
    if _cluster() != "slurm":
        return
    print("lost connection to another rank; waiting for SLURM to report why", file=sys.stderr, flush=True)
    patience = time.monotonic() + LOST_RANK_SECONDS
    while time.monotonic() < patience:
        time.sleep(2)
        _leave_to_slurm()
