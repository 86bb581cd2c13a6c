"""Training processes without their launcher, forked (`tests/forks.py`): tests can kill a run as often as they like."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from slurm.cluster import free_port
from tests.forks import ROOT, context
from tests.integration.conftest import Experiment, environment


@dataclass
class Ranks:
    """The processes of one training command, and what they wrote."""

    processes: list[ForkServerProcess]
    logs: list[Path]
    statuses: list[int] = field(default_factory=list)

    @property
    def output(self) -> str:
        return "".join(log.read_text() for log in self.logs if log.exists())

    @property
    def errors(self) -> list[str]:
        """The distinct last words of the ranks: what begins with "error:" or "interrupted:"."""
        lines = self.output.splitlines()
        return sorted({line for line in lines if line.startswith(("error:", "interrupted:"))})

    def send(self, rank: int, signal: int) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, signal)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def wait(self, seconds: float = 120) -> list[int | None]:
        """Exit statuses, by rank; None for one that is still at work after `seconds`."""
        for process in self.processes:
            process.join(seconds)
        return [process.exitcode for process in self.processes]


@contextlib.contextmanager
def started(folder: Path, function: Callable[..., None], *arguments: Any, ranks: int) -> Iterator[Ranks]:
    """`function(*arguments)` on so many ranks, which log into `folder`; whatever is left at the end is killed."""
    os.environ["OMP_NUM_THREADS"] = "1"  # the server's, and so that of all it forks
    port = free_port()
    logs = [folder / f"log-{port}-{rank}" for rank in range(ranks)]
    shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = []
    for rank in range(ranks):
        given = {"RANK": rank, "LOCAL_RANK": rank, **shared}
        variables = environment() | {name: str(value) for name, value in given.items()}
        processes.append(context.Process(target=_rank, args=(variables, logs[rank], function, arguments)))
    running = Ranks(processes, logs)
    try:
        for process in processes:
            process.start()
        yield running
    finally:
        running.kill()


def finish(running: Ranks, seconds: float = 240) -> Ranks:
    """Waits for their end; the statuses are in the result."""
    for process in running.processes:
        process.join(seconds)
    running.statuses = [-1 if process.exitcode is None else process.exitcode for process in running.processes]
    return running


@contextlib.contextmanager
def started_ranks(
    experiment: Experiment, *overrides: str, ranks: int = 1, before: Callable[[], None] | None = None
) -> Iterator[Ranks]:
    """`pipeline/train.py` on so many ranks. `before` is called in each of them first: that is how a fault gets in."""
    arguments = ["--config", str(experiment.recipe), *overrides]
    with started(experiment.folder, _train, arguments, before, ranks=ranks) as running:
        yield running


def run_ranks(
    experiment: Experiment, *overrides: str, ranks: int = 1, before: Callable[[], None] | None = None
) -> Ranks:
    """As `started_ranks`, waiting for their end."""
    with started_ranks(experiment, *overrides, ranks=ranks, before=before) as running:
        return finish(running)


def _rank(variables: dict[str, str], log: Path, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(ROOT)
    with open(log, "a") as sink:
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
    function(*arguments)


def _train(arguments: list[str], before: Callable[[], None] | None) -> None:
    """One rank, as `python pipeline/train.py` is one."""
    from common.command import run_stage_command
    from pipeline import train

    if before is not None:
        before()
    sys.exit(run_stage_command(train.__doc__ or "", train.STAGE, arguments))
