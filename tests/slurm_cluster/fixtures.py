"""The cluster that tests share: one a session, so one in each process of `pytest -n`; ports are free ones."""

import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.slurm_cluster.configuration import PARENT, Cluster, user_name
from tests.slurm_cluster.daemons import running

WITHOUT = "FPDM_WITHOUT_SLURM"


def skip_without_slurm() -> None:
    if os.environ.get(WITHOUT):
        pytest.skip(f"{WITHOUT} is set")


@contextmanager
def cluster(nodes: int) -> Iterator[Cluster]:
    """Where a cluster cannot be had the tests fail and say why, unless FPDM_WITHOUT_SLURM leaves them out."""
    skip_without_slurm()
    with tempfile.TemporaryDirectory(prefix="slurm-", dir=PARENT, ignore_cleanup_errors=True) as folder:
        try:
            with running(Path(folder), nodes) as made:
                yield made
        except RuntimeError as error:
            pytest.fail(f"{error} (scripts/setup.sh --test; or set {WITHOUT}=1)", pytrace=False)


@pytest.fixture(scope="session")
def two_nodes() -> Iterator[Cluster]:
    with cluster(2) as made:
        yield made


@pytest.fixture
def slurm(two_nodes: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """The cluster, idle, as the one that this process and what it starts see; its jobs are gone afterwards."""
    use(two_nodes, monkeypatch)
    yield two_nodes
    subprocess.run(["scancel", f"--user={user_name()}"], check=True)
    subprocess.run(["scancel", f"--user={user_name()}", "--signal=KILL"], check=False)
    wait_until(lambda: not squeue("%i"), "the queue to be empty")


@pytest.fixture
def three_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A cluster of its own, for a test that destroys a node."""
    with cluster(3) as made:
        use(made, monkeypatch)
        yield made


def use(made: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, made.environment[name])
    monkeypatch.setattr("slurm.waiting.NEXT_QUESTION_SECONDS", 0.2)  # its controller has no other users


def squeue(what: str, *arguments: str) -> list[str]:
    """One line a job; `what` as squeue's --format."""
    command = ["squeue", "--noheader", "--array", f"--format={what}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def state(job: str) -> str:
    return (squeue("%T", "--states=all", f"--jobs={job}") or ["GONE"])[0]


def wait_until(holds: Callable[[], object], what: str, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.2)
