"""A call as submitit pickles it: names and plain values, so that a queue holds no objects of ours."""

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

from common.errors import Interrupted, UserError
from common.loading import dump_recipe, parse_recipe
from common.recipe import Recipe
from common.rendezvous import rendezvous
from slurm import controller
from slurm.site_file import SCRATCH_VARIABLE

# A dead node is noticed after SlurmdTimeout, five minutes by default; its job is then queued again.
LOST_RANK_SECONDS = 600
# gloo's words, and NCCL's.
LOST_RANK_WORDS = ("connection closed by peer", "connection reset by peer", "broken pipe", "remote process exit",
                   "exit of a remote peer")  # fmt: skip


@dataclass(frozen=True)
class Job(submitit.helpers.Checkpointable):
    """`module.function(recipe, **arguments)`; the recipe is YAML.

    `Checkpointable`: on a time limit or a preemption the same job is queued again; every stage finds what is done.
    """

    module: str
    function: str
    recipe: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, module: str, function: str, recipe: Recipe, **arguments: Any) -> "Job":
        return cls(module, function, dump_recipe(recipe), arguments)

    def __call__(self) -> dict[str, Any]:
        """{"seconds": ...}, or {"error": line} for a user's mistake: that needs no traceback."""
        os.environ.setdefault("TQDM_MININTERVAL", "1")  # a bar in a log file: a line a second is enough
        started = time.monotonic()
        _forget_result()
        try:
            return self._attempt(started)
        finally:
            _make_folder()

    def checkpoint(self, *arguments: Any, **named: Any) -> submitit.helpers.DelayedSubmission:
        """Returns the submission that submitit uses to requeue this job."""
        _make_folder()
        return super().checkpoint(*arguments, **named)

    def _attempt(self, started: float) -> dict[str, Any]:
        try:
            _use_scratch()
            self._work()
        except UserError as error:
            _fail_in_the_queue_too(f"error: {error}")
            return {"error": str(error)}
        except subprocess.CalledProcessError as error:
            if "requeue" in error.cmd:  # submitit's handler came too late: SLURM is ending this job itself
                _leave_to_slurm()
            raise
        except RuntimeError as error:
            if any(words in str(error).lower() for words in LOST_RANK_WORDS):
                _wait_for_the_cause()
            raise
        return {"seconds": round(time.monotonic() - started, 1)}

    def _work(self) -> None:
        function = getattr(importlib.import_module(self.module), self.function)
        try:
            rendezvous()
            function(parse_recipe(self.recipe), **self.arguments)
        except Interrupted as interruption:
            print(f"interrupted: {interruption}", file=sys.stderr, flush=True)
            _queue_again()
            raise


def failed(outcome: dict[str, Any]) -> bool:
    """Whether a job's result tells of a user's mistake; `slurm.cluster` asks."""
    return "error" in outcome


def _cluster() -> str | None:
    return os.environ.get("SUBMITIT_EXECUTOR")


def _use_scratch() -> None:
    """Makes the site file's scratch folder on this node, and puts temporary files there.

    Not by TMPDIR alone: SLURM sets it to /tmp where the folder's parent is not there yet.
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
    """A job that is queued again keeps its number, and so does the file of what it raised before."""
    if _cluster() in ("local", "slurm"):
        submitit.JobEnvironment().paths.result_pickle.unlink(missing_ok=True)


def _make_folder() -> None:
    """Recreates the log folder in case it was deleted, so that submitit can still write the result."""
    if _cluster() in ("local", "slurm"):
        submitit.JobEnvironment().paths.folder.mkdir(parents=True, exist_ok=True)


def _fail_in_the_queue_too(line: str) -> None:
    """Lets this process end with status 2 after submitit has written its result: jobs that depend on this one must not
    start, and the other ranks must not wait."""
    if _cluster() == "slurm":
        print(line, file=sys.stderr, flush=True)
        atexit.register(os._exit, 2)


def _queue_again() -> None:
    """Does not return in a job that can be queued again: submitit's own handler does that on rank 0."""
    if _cluster() not in ("local", "slurm"):
        return
    _leave_to_slurm()
    environment = submitit.JobEnvironment()
    if environment.global_rank == 0:
        signal.raise_signal(getattr(signal, f"SIG{environment.USR_SIG}"))
    sys.exit(0)


def _leave_to_slurm() -> None:
    """Ends this process, without a result, where SLURM is ending its job already: cancelled, or queued again.

    To queue a cancelled job again would bring it back.
    """
    if _cluster() == "slurm" and controller.state(submitit.JobEnvironment().job_id) not in ("RUNNING", None):
        sys.exit(1)


def _wait_for_the_cause() -> None:
    """Returns when SLURM has not ended this job in spite of a rank that is gone.

    To fail at once would end the job, and one whose node died is to be queued again. A rank that failed ends the job
    within seconds by itself (`srun --kill-on-bad-exit`), and is told as the cause.
    """
    if _cluster() != "slurm":
        return
    print("another rank is gone; waiting for SLURM to tell why", file=sys.stderr, flush=True)
    patience = time.monotonic() + LOST_RANK_SECONDS
    while time.monotonic() < patience:
        time.sleep(2)
        _leave_to_slurm()
