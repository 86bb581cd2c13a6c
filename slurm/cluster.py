"""Where work runs: submitit executors for SLURM, for this machine, and for this process."""

import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import submitit

CLUSTERS = ("local", "debug", "slurm", "auto")  # auto: SLURM where it is installed, this machine elsewhere


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one job asks for; `processes`, `cpus_per_process` and `gpus_per_process` are those of one node."""

    nodes: int = 1
    processes: int = 1
    cpus_per_process: int = 1
    gpus_per_process: int = 0
    timeout_minutes: int = 60


def executor(cluster: str, folder: str | Path, name: str, resources: Resources) -> submitit.AutoExecutor:
    """A submitit executor whose jobs write their logs and pickles below `folder`.

    Raises ValueError where `cluster` is none of CLUSTERS, or cannot give what `resources` asks for.
    """
    if cluster not in CLUSTERS:
        raise ValueError(f"cluster: found {cluster!r}; allowed: {', '.join(CLUSTERS)}")
    try:
        made = submitit.AutoExecutor(str(folder), cluster=None if cluster == "auto" else cluster)
    except RuntimeError as error:  # slurm is asked for and not there
        raise ValueError(
            f"cluster: {cluster} is not to be had here ({error}); allowed: {', '.join(CLUSTERS)}"
        ) from None
    if made.cluster != "slurm" and resources.nodes > 1:
        raise ValueError(f"launch.nodes: {resources.nodes} nodes need a SLURM cluster; the {made.cluster} one has 1")
    if made.cluster == "debug" and resources.processes > 1:
        raise ValueError(
            f"launch.processes: the debug cluster is this one process; found {resources.processes}, set it to 1"
        )
    made.update_parameters(
        name=name,
        nodes=resources.nodes,
        tasks_per_node=resources.processes,
        cpus_per_task=resources.cpus_per_process,
        gpus_per_node=resources.gpus_per_process * resources.processes,
        timeout_min=resources.timeout_minutes,
        slurm_signal_delay_s=120,  # before the limit: time to queue the job again
    )
    return made


def run(
    made: submitit.AutoExecutor, function: Callable[..., Any], *arguments: Any, failed: Callable[[Any], bool]
) -> list[Any]:
    """Submits one job, shows what its first task prints until it ends, and returns every task's result.

    A task that raises, or whose result `failed` says is a failure, brings the others down. Raises the first task's
    exception where no result tells of a failure: a task that others were waiting for explains more than their waiting.
    An interruption here cancels the job.
    """
    with _master_port() if made.cluster == "local" else nullcontext():
        job = made.submit(function, *arguments)
    tasks = [job.task(rank) for rank in range(job.num_tasks)] if job.num_tasks > 1 else [job]
    try:
        if made.cluster != "debug":  # that one runs here, and prints by itself
            _follow(job, tasks, failed)
    except BaseException:
        job.cancel(check=False)
        raise
    errors = [task.exception() for task in tasks]
    results = [task.result() for task, error in zip(tasks, errors, strict=True) if error is None]
    told = [result for result in results if failed(result)]
    for error in errors:
        if error is not None and not told:
            raise error
    return told or results


def _follow(job: submitit.Job[Any], tasks: list[submitit.Job[Any]], failed: Callable[[Any], bool]) -> None:
    """Copies the first task's output to this terminal until all tasks have ended, or one of them has failed."""

    def has_failed(task: submitit.Job[Any]) -> bool:
        return task.done() and (task.exception() is not None or failed(task.result()))

    tails = (_Tail(tasks[0].paths.stdout, sys.stdout.buffer), _Tail(tasks[0].paths.stderr, sys.stderr.buffer))
    ended = False
    while not ended:
        ended = job.done() or any(has_failed(task) for task in tasks)
        for tail in tails:
            tail.copy()
        time.sleep(0.2)
    if not job.done():
        job.cancel(check=False)  # the others wait for the failed one in a collective


class _Tail:
    """Copies what is appended to a file, which may not exist yet."""

    def __init__(self, path: Path, sink: BinaryIO) -> None:
        self.path, self.sink, self.copied = path, sink, 0

    def copy(self) -> None:
        if not self.path.exists():
            return
        with open(self.path, "rb") as source:
            source.seek(self.copied)
            new = source.read()
        if new:
            self.copied += len(new)
            self.sink.write(new)
            self.sink.flush()


@contextmanager
def _master_port() -> Iterator[None]:
    """A free port in MASTER_PORT, which the tasks of a local job inherit; one drawn by each of them would differ."""
    before = os.environ.get("MASTER_PORT")
    os.environ["MASTER_PORT"] = str(free_port())
    try:
        yield
    finally:
        del os.environ["MASTER_PORT"]
        if before is not None:
            os.environ["MASTER_PORT"] = before


def free_port() -> int:
    """A TCP port that nothing listens on, on the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
