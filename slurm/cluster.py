"""Where work runs: submitit executors for SLURM, for this machine, and for this process."""

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import submitit

from slurm import queue
from slurm.waiting import NEXT_LOOK_SECONDS, Batch, Tail, tails_of

CLUSTERS = ("local", "debug", "slurm", "auto")  # auto: SLURM where it answers, this machine elsewhere


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
    if cluster == "auto":
        cluster = "slurm" if queue.answers() else "local"
    elif cluster == "slurm" and not queue.answers():
        raise ValueError(
            "cluster: slurm is not to be had here (no controller answers `scontrol ping`); use local, debug or auto"
        )
    made = submitit.AutoExecutor(str(folder), cluster=cluster)
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

    A task that raises, or whose result `failed` says is a failure, brings the others down; failing results are returned
    alone. Raises the exception of the task that failed first where no result tells of a failure. An interruption here
    cancels the job.
    """
    return _run_all(made, [partial(function, *arguments) if arguments else function], 1, failed)


def run_array(
    made: submitit.AutoExecutor, calls: Sequence[Callable[[], Any]], *, at_once: int, failed: Callable[[Any], bool]
) -> list[Any]:
    """Runs every call as a job of its own, at most `at_once` at a time; a job array on SLURM.

    Returns all tasks' results in the order of `calls`. The first failure cancels the rest: its results are returned
    alone where `failed` tells them, its exception is raised otherwise, as `run` does. An interruption here cancels all.
    """
    if made.cluster == "slurm":
        made.update_parameters(slurm_array_parallelism=at_once)
    return _run_all(made, calls, at_once, failed)


def _run_all(
    made: submitit.AutoExecutor, calls: Sequence[Callable[[], Any]], at_once: int, failed: Callable[[Any], bool]
) -> list[Any]:
    """Shows what a single call prints, and counts where there are several."""
    batch = Batch(made.cluster, partial(_submit, made), calls, at_once)
    results: dict[int, list[Any]] = {}
    tails: tuple[Tail, ...] = ()
    try:
        while len(results) < len(calls):
            ended = batch.advance(failed)
            for found in ended.values():
                if any(failed(result) for result in found):
                    batch.cancel()
                    return found
            results |= ended
            if len(calls) > 1 and ended:
                print(f"{len(results)} of {len(calls)} parts are done", flush=True)
            for job in batch.running.values() if len(calls) == 1 else ():
                tails = tails or tails_of(job)
            for tail in tails:
                tail.copy()
            time.sleep(NEXT_LOOK_SECONDS)
    except BaseException:
        batch.cancel()
        raise
    return [result for number in range(len(calls)) for result in results[number]]


def _submit(made: submitit.AutoExecutor, calls: Sequence[Callable[[], Any]]) -> list[submitit.Job[Any]]:
    """Several calls are one array on SLURM."""
    with queue.outside_of_jobs(), _master_port() if made.cluster == "local" else nullcontext():
        return made.submit_array(calls)


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
