"""Where work runs: submitit executors for SLURM, for this machine, and for this process."""

import os
import shlex
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import submitit

from slurm import controller
from slurm.site_file import Site, asks_for_gpus, load_site, sbatch_options, submission_parameters
from slurm.waiting import NEXT_LOOK_SECONDS, Batch, Tail, tails_of

CLUSTERS = ("local", "debug", "slurm", "auto")  # auto: SLURM where it answers, this machine elsewhere
WITHOUT_LIMIT = 10 * 365 * 24 * 60  # minutes; after three time limits submitit would end a local job


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one job asks for; `processes`, `cpus_per_process` and `gpus_per_process` are those of one node."""

    nodes: int = 1
    processes: int = 1
    cpus_per_process: int = 1
    gpus_per_process: int = 0
    share_of_node: float = 1.0  # of its memory
    timeout_minutes: int = 60  # on SLURM
    signal_seconds: int = 120  # before that: time to save, and to be queued again


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
    """A submitit executor whose jobs write their logs and pickles below `folder`; the site file says the rest.

    Args:
        after: SLURM only: the id of the job, or of the array, that has to succeed first.
        code: a folder whose Python packages the jobs import in place of the clone's.
        submits: False where only `submission_script` is wanted: SLURM need not be there.

    Raises ValueError where `cluster` is none of CLUSTERS, or cannot give what `resources` asks for, and for a site file
    or a folder that SLURM cannot be given.
    """
    if submits:
        cluster = resolve(cluster)
    refuse(cluster, folder, resources)
    site = load_site() if cluster == "slurm" else Site()
    with nullcontext() if submits else _on_paper():
        made = submitit.AutoExecutor(str(folder), cluster=cluster, **_constructor_arguments(cluster, site))
    made.update_parameters(
        name=name,
        nodes=resources.nodes,
        tasks_per_node=resources.processes,
        cpus_per_task=resources.cpus_per_process,
        timeout_min=resources.timeout_minutes if cluster == "slurm" else WITHOUT_LIMIT,
    )
    # A cluster without GPUs refuses even none of them.
    if cluster != "slurm" or (resources.gpus_per_process and not asks_for_gpus(site)):
        made.update_parameters(gpus_per_node=resources.gpus_per_process * resources.processes)
    if cluster == "slurm":
        made.update_parameters(**_slurm_parameters(site, resources, after, code))
    return made


def resolve(cluster: str) -> str:
    """`cluster` with `auto` decided; ValueError where it is not to be had."""
    if cluster not in CLUSTERS:
        raise ValueError(f"cluster: found {cluster!r}; allowed: {', '.join(CLUSTERS)}")
    if cluster == "auto":
        return "slurm" if controller.answers() else "local"
    if cluster == "slurm" and not controller.answers():
        raise ValueError(
            "cluster: slurm is not to be had here (no controller answers `scontrol ping`); use local, debug or auto"
        )
    return cluster


def refuse(cluster: str, folder: str | Path, resources: Resources) -> None:
    """Raises ValueError where `cluster` cannot give what `resources` asks for, for a folder that SLURM cannot be given,
    and for a faulty site file.
    """
    if cluster == "slurm":
        load_site()
        _check_folder(Path(folder))
    if cluster != "slurm" and resources.nodes > 1:
        raise ValueError(f"launch.nodes: {resources.nodes} nodes need a SLURM cluster; the {cluster} one has 1")
    if cluster == "debug" and resources.processes > 1:
        raise ValueError(
            f"launch.processes: the debug cluster is this one process; found {resources.processes}, set it to 1"
        )


def _constructor_arguments(cluster: str, site: Site) -> dict[str, Any]:
    if cluster != "slurm":
        return {}
    # A long training reaches its time limit many times.
    python = {"slurm_python": site.python} if site.python else {}
    return {"slurm_max_num_timeout": 10_000, **python}


def _on_paper() -> AbstractContextManager[Any]:
    """submitit makes no executor for SLURM where there is no `srun`, not even one that only writes scripts."""
    return patch.object(submitit.SlurmExecutor, "affinity", return_value=1)


def _slurm_parameters(site: Site, resources: Resources, after: str | None, code: Path | None) -> dict[str, Any]:
    found, additional = submission_parameters(site), sbatch_options(site)
    if site.memory_gb is not None:
        found["mem_gb"] = site.memory_gb * resources.share_of_node
    if after is not None:
        found["slurm_dependency"] = f"afterok:{after}"
        additional["kill_on_invalid_dep"] = "yes"  # it would wait for ever
    if code is not None:
        # `python -m` looks in the working directory first, which is the clone.
        path = f"{shlex.quote(str(code.resolve()))}${{PYTHONPATH:+:$PYTHONPATH}}"
        lines = (f"export PYTHONPATH={path}", "export PYTHONSAFEPATH=1")
        found["slurm_setup"] = [*found.get("slurm_setup", []), *lines]
    return found | {
        "slurm_signal_delay_s": resources.signal_seconds,
        "slurm_additional_parameters": additional,
        # A failed task ends the others in seconds. srun does not take over the job's CPUs a task since SLURM 22.05.
        "slurm_srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={resources.cpus_per_process}"],
    }


def _check_folder(folder: Path) -> None:
    """SLURM replaces `%` in the names of log files, and reads a backslash as the end of that; lines end at newlines."""
    for bad in ("%", "\\", "\n"):
        if bad in str(folder.absolute()):
            raise ValueError(
                f"{folder}: SLURM cannot write logs to a path with {bad!r}; choose another folder for runs"
            )


def submission_script(made: submitit.AutoExecutor, parts: int = 1) -> str:
    """What would be given to sbatch."""
    inner: Any = made._executor
    array = {"map_count": parts} if parts > 1 else {}
    before, inner.parameters = inner.parameters, inner.parameters | array
    try:
        return inner._make_submission_file_text(inner._submitit_command_str, "submission")
    finally:
        inner.parameters = before


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
    return _run_all(made, calls, at_once, failed)


def _run_all(
    made: submitit.AutoExecutor, calls: Sequence[Callable[[], Any]], at_once: int, failed: Callable[[Any], bool]
) -> list[Any]:
    """Shows what a single call prints, and counts where there are several."""
    batch = Batch(made.cluster, lambda some: submit(made, some, at_once), calls, at_once)
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


def submit(
    made: submitit.AutoExecutor, calls: Sequence[Callable[[], Any]], at_once: int | None = None
) -> list[submitit.Job[Any]]:
    """Submits calls, several as one array on SLURM, and waits for none. ValueError with SLURM's words if it refuses."""
    if made.cluster == "slurm" and at_once is not None:
        made.update_parameters(slurm_array_parallelism=at_once)
    with controller.outside_of_jobs(), _on_this_machine() if made.cluster == "local" else nullcontext():
        try:
            return made.submit_array(calls)
        except submitit.core.utils.FailedJobError as error:  # so submitit says what sbatch said
            words = [line for line in str(error).splitlines() if "error" in line.lower() or "sbatch:" in line]
            said = "; ".join(words) or " ".join(str(error).split())
            raise ValueError(
                f"SLURM refuses the job: {said}; slurm/site.yaml, or the file that FPDM_SITE "
                "names, says partition and account, the recipe's launch section the rest"
            ) from None


@contextmanager
def _on_this_machine() -> Iterator[None]:
    """What the tasks of a local job inherit: a free port in MASTER_PORT, as one drawn by each of them would differ; and
    an ear for SIGINT, by which submitit cancels them, and which processes in a shell's background are made to ignore.
    """
    before = os.environ.get("MASTER_PORT")
    os.environ["MASTER_PORT"] = str(free_port())
    deaf = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if deaf:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if deaf:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        del os.environ["MASTER_PORT"]
        if before is not None:
            os.environ["MASTER_PORT"] = before


def free_port() -> int:
    """A TCP port that nothing listens on, on the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
