"""submitit executors for SLURM, for this machine and for this process."""

import os
import random
import shlex
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import submitit

from slurm import controller
from slurm.gpus import gpu_options
from slurm.site_file import Site, left_out, load_site, sbatch_options, srun_options, submission_parameters
from slurm.waiting import NEXT_LOOK_SECONDS, Batch, Show, Tail, tails_of

CLUSTERS = ("local", "debug", "slurm", "auto")  # auto: SLURM where it answers, this machine elsewhere
FIRST_PORT, PORTS = 10_000, 10_000  # where ranks meet: below Linux's ephemeral ports
WITHOUT_LIMIT = 10 * 365 * 24 * 60  # minutes; after three time limits submitit would end a local job


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Resources of a job; `processes`, `cpus_per_process` and `gpus_per_process` are per node."""

    nodes: int = 1
    processes: int = 1
    cpus_per_process: int = 1
    gpus_per_process: int = 0
    gpu_type: str | None = None  # None: the site file's
    without_gpus: bool = False  # GPUs that the site file asks for in every job are left out
    partition: str | None = None  # None: the site file's
    memory_gb: float | None = None  # of each node; None: a share of the site file's
    share_of_node: float = 1.0  # of the node's memory
    timeout_minutes: int = 60  # SLURM only
    signal_seconds: int = 120  # before the time limit: time to save and to be requeued
    outlives_nodes: bool = False  # the job goes on when one of its nodes, but the first, dies


def executor(
    cluster: str,
    folder: str | Path,
    name: str,
    resources: Resources,
    *,
    after: str | None = None,
    code: Path | None = None,
    submits: bool = True,
) -> submitit.AutoExecutor:
    """A submitit executor whose jobs write their logs and pickles to `folder`; the site file adds its options.

    Args:
        after: SLURM only: id of the job or array that has to succeed first.
        code: a folder with Python packages that the jobs import instead of the clone's.
        submits: False if only `submission_script` is needed: works without SLURM.

    Raises ValueError if `cluster` is unknown, unavailable or lacks the resources, and for a site file or folder that
    SLURM would refuse.
    """
    if submits:
        cluster = resolve(cluster)
    refuse(cluster, folder, resources)
    site = load_site() if cluster == "slurm" else Site()
    with nullcontext() if submits else _on_paper():
        submitter = submitit.AutoExecutor(str(folder), cluster=cluster, **_constructor_arguments(cluster, site))
    submitter.update_parameters(
        name=name,
        nodes=resources.nodes,
        tasks_per_node=resources.processes,
        cpus_per_task=resources.cpus_per_process,
        timeout_min=resources.timeout_minutes if cluster == "slurm" else WITHOUT_LIMIT,
    )
    if cluster == "slurm":
        submitter.update_parameters(**_slurm_parameters(site, resources, after, code))
        inner: Any = submitter._executor  # where None leaves an option out; AutoExecutor drops it
        inner.update_parameters(**{name: None for name in left_out(site) if name != "requeue"})
    else:
        submitter.update_parameters(gpus_per_node=resources.gpus_per_process * resources.processes)
    return submitter


def resolve(cluster: str) -> str:
    """`cluster`, with `auto` resolved. ValueError if it is unknown or unavailable."""
    if cluster not in CLUSTERS:
        raise ValueError(f"cluster: found {cluster!r}; allowed: {', '.join(CLUSTERS)}")
    if cluster == "auto":
        return "slurm" if controller.answers() else "local"
    if cluster == "slurm" and not controller.answers():
        raise ValueError(
            "cluster: slurm is unavailable (no controller answers `scontrol ping`); use local, debug or auto"
        )
    return cluster


def refuse(cluster: str, folder: str | Path, resources: Resources) -> None:
    """Raises ValueError if `cluster` lacks the resources, for a folder SLURM cannot use, and a faulty site file."""
    if cluster == "slurm":
        site = load_site()
        gpu_options(site, resources)
        if resources.outlives_nodes and site.sbatch.get("gpus-per-task"):
            raise ValueError(
                "launch.elastic: the site file asks for gpus-per-task, and an elastic job has one task a node; set "
                "gpus-per-node there in its place, or launch.elastic to false"
            )
        _check_folder(Path(folder))
        if resources.signal_seconds >= 60 * resources.timeout_minutes:
            raise ValueError(
                f"launch.signal_seconds: {resources.signal_seconds} is not below launch.timeout_minutes "
                f"({resources.timeout_minutes} minutes): a job would be requeued as soon as it starts; set it lower"
            )
    if cluster != "slurm" and resources.nodes > 1:
        raise ValueError(
            f"launch.nodes: {resources.nodes} nodes need a SLURM cluster; set it to 1 for cluster {cluster}"
        )
    if cluster == "debug" and resources.processes > 1:
        raise ValueError(
            f"launch.processes: {resources.processes}, but the debug cluster runs one process; set it to 1"
        )


def _constructor_arguments(cluster: str, site: Site) -> dict[str, Any]:
    if cluster != "slurm":
        return {}
    # A long training reaches its time limit, and is requeued, many times.
    python = {"slurm_python": site.python} if site.python else {}
    return {"slurm_max_num_timeout": 10_000, **python}


def _on_paper() -> AbstractContextManager[Any]:
    """Lets submitit make a SLURM executor without `srun`, to write submission scripts only."""
    return patch.object(submitit.SlurmExecutor, "affinity", return_value=1)


def _slurm_parameters(site: Site, resources: Resources, after: str | None, code: Path | None) -> dict[str, Any]:
    parameters = submission_parameters(site)
    additional = sbatch_options(site, gpu_options(site, resources))
    if resources.partition is not None:
        parameters["slurm_partition"] = resources.partition
    if resources.memory_gb is not None:
        parameters["mem_gb"] = resources.memory_gb
    elif site.memory_gb is not None:
        parameters["mem_gb"] = site.memory_gb * resources.share_of_node
    if after is not None:
        parameters["slurm_dependency"] = f"afterok:{after}"
        additional["kill_on_invalid_dep"] = "yes"  # else it would stay pending forever
    if code is not None:
        # `python -m` looks in the working directory first, which is the clone.
        path = f"{shlex.quote(str(code.resolve()))}${{PYTHONPATH:+:$PYTHONPATH}}"
        lines = (f"export PYTHONPATH={path}", "export PYTHONSAFEPATH=1")
        parameters["slurm_setup"] = [*parameters.get("slurm_setup", []), *lines]
    no_kill = ["--no-kill"] if resources.outlives_nodes else []
    if no_kill:
        additional["no_kill"] = True
    return parameters | {
        "slurm_signal_delay_s": resources.signal_seconds,
        "slurm_additional_parameters": additional,
        # A failed task ends the others in seconds. Since SLURM 22.05, srun does not inherit the job's --cpus-per-task.
        "slurm_srun_args": ["--kill-on-bad-exit=1", *no_kill, *srun_options(site, resources.cpus_per_process)],
    }


def _check_folder(folder: Path) -> None:
    """Raises ValueError for characters in a path that SLURM would change in log file names, or that break a line."""
    for bad in ("%", "\\", "\n"):
        if bad in str(folder.absolute()):
            raise ValueError(
                f"{folder}: SLURM cannot write logs to a path with {bad!r}; choose another folder for runs"
            )


def submission_script(submitter: submitit.AutoExecutor, parts: int = 1, at_once: int = 1) -> str:
    """The script that would be passed to sbatch."""
    inner: Any = submitter._executor
    array = {"map_count": parts, "array_parallelism": at_once} if parts > 1 else {}
    before, inner.parameters = inner.parameters, inner.parameters | array
    try:
        return inner._make_submission_file_text(inner._submitit_command_str, "submission")
    finally:
        inner.parameters = before


def run(
    submitter: submitit.AutoExecutor,
    function: Callable[..., Any],
    *arguments: Any,
    failed: Callable[[Any], bool],
    show: Show | None = None,
) -> list[Any]:
    """Submits one job, shows the output of its first task until it ends, and returns all tasks' results.

    A task that raises, or whose result `failed` accepts, ends the others, and only failed results are returned. Raises
    the exception of the task that failed first if there is no failed result. An interruption cancels the job.
    """
    return _run_all(submitter, [partial(function, *arguments) if arguments else function], 1, failed, show)


def run_array(
    submitter: submitit.AutoExecutor,
    calls: Sequence[Callable[[], Any]],
    *,
    at_once: int,
    failed: Callable[[Any], bool],
    show: Show | None = None,
) -> list[Any]:
    """Runs every call as a separate job, at most `at_once` at a time; a job array on SLURM.

    `show`: what is done with each line of a single call's output, in place of copying it to this terminal.

    Returns all results in the order of `calls`. The first failure cancels the rest; as in `run`, its results are
    returned or its exception is raised. An interruption cancels all jobs.
    """
    return _run_all(submitter, calls, at_once, failed, show)


def _run_all(
    submitter: submitit.AutoExecutor,
    calls: Sequence[Callable[[], Any]],
    at_once: int,
    failed: Callable[[Any], bool],
    show: Show | None,
) -> list[Any]:
    """Shows the output of a single call, or counts the finished ones of several."""
    batch = Batch(submitter.cluster, lambda some: submit(submitter, some, at_once), calls, at_once)
    results: dict[int, list[Any]] = {}
    tails: tuple[Tail, ...] = ()
    try:
        while len(results) < len(calls):
            ended = batch.advance(failed)
            for outcome in ended.values():
                if any(failed(result) for result in outcome):
                    batch.cancel()
                    return outcome
            results |= ended
            if len(calls) > 1 and ended:
                (show or partial(print, flush=True))(f"{len(results)} of {len(calls)} parts are done")
            for job in batch.running.values() if len(calls) == 1 else ():
                tails = tails or tails_of(job, show)
            for tail in tails:
                tail.copy()
            time.sleep(NEXT_LOOK_SECONDS)
    except BaseException:
        batch.cancel()
        raise
    return [result for number in range(len(calls)) for result in results[number]]


def submit(
    submitter: submitit.AutoExecutor, calls: Sequence[Callable[[], Any]], at_once: int | None = None
) -> list[submitit.Job[Any]]:
    """Submits calls, on SLURM several as one array, without waiting. ValueError with SLURM's words if it refuses."""
    if submitter.cluster == "slurm" and at_once is not None:
        submitter.update_parameters(slurm_array_parallelism=at_once)
    with controller.outside_of_jobs(), _on_this_machine() if submitter.cluster == "local" else nullcontext():
        try:
            return submitter.submit_array(calls)
        except submitit.core.utils.FailedJobError as error:  # submitit's error for a refusal by sbatch
            words = [line for line in str(error).splitlines() if "error" in line.lower() or "sbatch:" in line]
            reason = "; ".join(words) or " ".join(str(error).split())
            raise ValueError(
                f"SLURM refuses the job: {reason}; set partition and account in slurm/site.yaml, or in the file that "
                "FPDM_SITE names, and the rest in the recipe's launch section"
            ) from None


@contextmanager
def _on_this_machine() -> Iterator[None]:
    """Sets what the tasks of a local job inherit: one free port in MASTER_PORT, and a handler of SIGINT.

    submitit cancels tasks by SIGINT, which background processes of a shell ignore.
    """
    before = os.environ.get("MASTER_PORT")
    os.environ["MASTER_PORT"] = str(free_port())
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if ignored:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        del os.environ["MASTER_PORT"]
        if before is not None:
            os.environ["MASTER_PORT"] = before


def free_port() -> int:
    """A TCP port that is free on the loopback interface, of those that the kernel gives to no connection meanwhile."""
    first = random.SystemRandom().randrange(PORTS)  # runs that start together should not try the same
    for number in range(PORTS):
        port = FIRST_PORT + (first + number) % PORTS
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError(f"no port from {FIRST_PORT} to {FIRST_PORT + PORTS - 1} is free")
