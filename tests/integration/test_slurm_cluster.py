"""The cluster that tests run on leaves nothing behind, however the process that holds it ends."""

import shutil
import signal
import sys
from collections.abc import Iterator

import psutil
import pytest

from tests.integration.conftest import started
from tests.slurm_cluster.fixtures import skip_without_slurm

DAEMONS = ("munged", "slurmctld", "slurmd", "unshare")


def daemons(folder: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        try:
            if process.name() in DAEMONS and process.environ().get("SLURM_TEST") == folder:
                yield process
        except psutil.Error:  # it has ended since, or is another's
            continue


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_cluster_ends_with_the_process_that_holds_it(number: signal.Signals) -> None:
    skip_without_slurm()
    command = [sys.executable, "-m", "tests.slurm_cluster", "--nodes", "1"]
    with started([*command, "bash", "-c", "echo $SLURM_TEST; exec sleep 600"]) as process:
        assert process.stdout is not None
        folder = process.stdout.readline().strip()
        running = list(daemons(folder))
        assert {one.name() for one in running} == set(DAEMONS), folder
        running += psutil.Process(process.pid).children()  # the command
        process.send_signal(number)
        _, alive = psutil.wait_procs(running, timeout=20)
        assert not alive
    shutil.rmtree(folder, ignore_errors=True)  # what a killed process cannot tidy up
