"""Waiting for submitit jobs: their output, their end, and the failure that came first."""

import re
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import submitit

from slurm import controller

NEXT_LOOK_SECONDS = 0.2  # between looks at files on disk
NEXT_QUESTION_SECONDS = 2.0  # between requests to SLURM's controller, which all users share
UNSURE_SECONDS = 10.0  # how long an ambiguous state has to last, and how late a result may appear on a network disk
CANCEL_SECONDS = 10.0
SHOWN_LINES = 30  # of the log of a task without a result

Failed = Callable[[Any], bool]
Show = Callable[[str], None]  # takes a line of a job's output


class Batch:
    """Runs calls as jobs, submitted in order, at most `at_once` at a time.

    On SLURM all of them are one job array, which keeps to `at_once` itself.
    """

    def __init__(
        self,
        cluster: str,
        submit: Callable[[Sequence[Callable[[], Any]]], list[submitit.Job[Any]]],
        calls: Sequence[Callable[[], Any]],
        at_once: int,
    ) -> None:
        self.watch = Watch(cluster)
        self.submit = submit
        self.at_once = len(calls) if cluster == "slurm" else at_once
        self.waiting = deque(enumerate(calls))
        self.running: dict[int, submitit.Job[Any]] = {}

    def advance(self, failed: Failed) -> dict[int, list[Any]]:
        """Submits as many calls as `at_once` allows; returns the outcomes of calls that ended since, by number."""
        free = min(self.at_once - len(self.running), len(self.waiting))
        if free > 0:
            numbers, calls = zip(*(self.waiting.popleft() for _ in range(free)), strict=True)
            self.running |= dict(zip(numbers, self.submit(calls), strict=True))
        ended = self.watch.ended(self.running, failed)
        return {number: outcomes(self.running.pop(number), self.watch.states.get(number), failed) for number in ended}

    def cancel(self) -> None:
        """Cancels all jobs and waits for the local ones, which submitit kills after a second."""
        self.waiting.clear()
        for job in self.running.values():
            job.cancel(check=False)
        for job in self.running.values():
            if isinstance(job, submitit.LocalJob) and job._process is not None:
                with suppress(subprocess.TimeoutExpired):
                    job._process.wait(CANCEL_SECONDS)


class Watch:
    """Finds out which jobs of one cluster have ended.

    It asks SLURM's controller instead of `sacct` as submitit does: not every cluster has `sacct`, and it reports a
    requeued job as ended.
    """

    def __init__(self, cluster: str) -> None:
        self.cluster = cluster
        self.states: dict[int, str] = {}  # as SLURM last reported them
        self.asked = float("-inf")
        self.unsure: dict[int, float] = {}  # since when a job is in an ambiguous state

    def ended(self, jobs: dict[int, submitit.Job[Any]], failed: Failed) -> list[int]:
        """Numbers of the jobs that have ended, or that have a failed task, for which the others would wait."""
        if self.cluster == "debug":
            return list(jobs)
        if self.cluster != "slurm":
            return [
                number for number, job in jobs.items() if job.done() or (job.num_tasks > 1 and has_failed(job, failed))
            ]
        now = time.monotonic()
        if now - self.asked < NEXT_QUESTION_SECONDS:
            return []
        self.asked = now
        try:
            states = controller.states(job.job_id for job in jobs.values())
        except (OSError, subprocess.SubprocessError):  # the controller restarts; jobs keep running
            return []
        self.states = {number: states.get(job.job_id, "no longer known") for number, job in jobs.items()}
        return [number for number, state in self.states.items() if self._is_over(number, state, now)]

    def _is_over(self, number: int, state: str, now: float) -> bool:
        if state in controller.OVER:
            return True
        if state in controller.ALIVE:
            self.unsure.pop(number, None)
            return False
        return now - self.unsure.setdefault(number, now) >= UNSURE_SECONDS


def tasks_of(job: submitit.Job[Any]) -> list[submitit.Job[Any]]:
    return [job.task(rank) for rank in range(job.num_tasks)] if job.num_tasks > 1 else [job]


def has_failed(job: submitit.Job[Any], failed: Failed) -> bool:
    """Whether one of a job's tasks has left an exception, or a result that `failed` accepts."""
    left = [_left(task) for task in tasks_of(job) if task.paths.result_pickle.exists()]
    return any(kind == "error" or failed(result) for kind, result in left)


def outcomes(job: submitit.Job[Any], state: str | None, failed: Failed) -> list[Any]:
    """The results of an ended job's tasks, or only the failed ones if there are any.

    Raises the exception of the task that failed first if there is no failed result: the others only waited for it. Ends
    the remaining tasks.
    """
    if isinstance(job, submitit.DebugJob):
        error = job.exception()  # runs it
        if error is not None:
            raise error
        return [job.result()]
    tasks = tasks_of(job)
    if len(tasks) > 1 and has_failed(job, failed):
        _end(job)
        tasks = [task for task in tasks if task.paths.result_pickle.exists()]
    results, errors = [], []
    for task in tasks:
        kind, result = _left(task) if _waited_for(task, state) else ("missing", _without_result(task, state))
        if kind == "success":
            results.append(result)
        else:
            errors.append((_written(task.paths.result_pickle), result))
    failures = [result for result in results if failed(result)]
    if results and state == "COMPLETED":  # tasks without a result were on nodes that died, which it outlived
        errors = [error for error in errors if error[0] != float("inf")]
    if errors and not failures:
        raise submitit.core.utils.FailedJobError(min(errors)[1])
    return failures or results


def _end(job: submitit.Job[Any]) -> None:
    """Ends the remaining tasks of a failed job, which wait for the failed one in a collective."""
    patience = time.monotonic() + 2.0  # other tasks may be about to report the same failure
    while not all(task.paths.result_pickle.exists() for task in tasks_of(job)):
        if time.monotonic() > patience:
            job.cancel(check=False)
            break
        time.sleep(NEXT_LOOK_SECONDS)
    if isinstance(job, submitit.LocalJob):  # so that its last output comes before our message about it
        job.wait()


def _left(task: submitit.Job[Any]) -> tuple[str, Any]:
    """("success", result) or ("error", traceback), as submitit wrote it."""
    return submitit.core.utils.pickle_load(task.paths.result_pickle)


def _waited_for(task: submitit.Job[Any], state: str | None) -> bool:
    """Whether an ended task left a result; waits for one that is late on a network disk."""
    patience = time.monotonic() + (UNSURE_SECONDS if state == "COMPLETED" else 1.0)
    while not task.paths.result_pickle.exists() and time.monotonic() < patience:
        time.sleep(NEXT_LOOK_SECONDS)
    return task.paths.result_pickle.exists()


def _without_result(task: submitit.Job[Any], state: str | None) -> str:
    log = task.paths.stderr
    lines = log.read_text(errors="replace").splitlines()[-SHOWN_LINES:] if log.exists() else []
    ended = f"ended ({state})" if state else "ended"
    return "\n".join([f"job {task.job_id} {ended} without a result; the last lines of {log}:", *lines])


def _written(path: Path) -> float:
    """Modification time of a file; infinity if it is missing, since a task without a result explains least."""
    return path.stat().st_mtime if path.exists() else float("inf")


class Lines:
    """Passes on whole lines of an output; each state of a progress bar is a line."""

    def __init__(self, show: Show) -> None:
        self.show, self.rest = show, b""

    def __call__(self, new: bytes) -> None:
        *whole, self.rest = re.split(rb"[\r\n]", self.rest + new)
        for line in whole:
            if line.strip():
                self.show(line.decode(errors="replace").rstrip())


class Tail:
    """Passes on what is appended to a file, which may not exist yet."""

    def __init__(self, path: Path, write: Callable[[bytes], None]) -> None:
        self.path, self.write, self.copied = path, write, 0

    def copy(self) -> None:
        if not self.path.exists():
            return
        with open(self.path, "rb") as source:
            source.seek(self.copied)
            new = source.read()
        if new:
            self.copied += len(new)
            self.write(new)


def tails_of(job: submitit.Job[Any], show: Show | None = None) -> tuple[Tail, ...]:
    """Tails that pass the output of a job's first task to `show`, or to this terminal as it is; a debug job prints
    here itself."""
    if isinstance(job, submitit.DebugJob):
        return ()
    first = tasks_of(job)[0].paths
    sinks = (sys.stdout.buffer, sys.stderr.buffer)
    writes = [Lines(show) if show else partial(_copy, sink) for sink in sinks]
    return Tail(first.stdout, writes[0]), Tail(first.stderr, writes[1])


def _copy(sink: BinaryIO, new: bytes) -> None:
    sink.write(new)
    sink.flush()
