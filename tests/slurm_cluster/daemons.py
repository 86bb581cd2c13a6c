"""A cluster's daemons: started in order, each waited for, and gone with the process that started them."""

import ctypes
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.slurm_cluster.configuration import CONTROLLER, Cluster, as_oneself, configure, namespaces, require

PATIENCE_SECONDS = 60
PR_SET_PDEATHSIG = 1


@contextmanager
def running(folder: Path, nodes: int) -> Iterator[Cluster]:
    """A cluster that accepts jobs; all of it is gone after the block, or when this process is killed.

    Raises RuntimeError with one line where it cannot run here, or with the log of a daemon that does not come up.
    """
    require()
    cluster = configure(folder, nodes)
    started: list[subprocess.Popen[bytes]] = []
    try:
        _start(cluster, started)
        yield cluster
    finally:
        for process in reversed(started):
            process.kill()
        for process in started:
            process.wait()


def _start(cluster: Cluster, started: list[subprocess.Popen[bytes]]) -> None:
    folder, run = cluster.folder, cluster.folder / "run"

    def spawn(name: str, *command: str) -> None:
        inside = (*namespaces(), "bash", "-c", '"$@" & wait', name)
        with open(folder / "log" / f"{name}.out", "wb") as log:
            process = subprocess.Popen(
                [*inside, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=cluster.environment,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        (run / f"{name}.pid").write_text(str(process.pid))
        started.append(process)

    spawn(
        "munged",
        *(
            *as_oneself(),
            "munged",
            "--foreground",
            "--force",
            f"--key-file={folder}/etc/munge.key",
            f"--socket={run}/munge.sock",
        ),
        *(f"--pid-file={run}/munged.own", f"--log-file={folder}/log/munged.log", f"--seed-file={run}/munged.seed"),
    )
    _wait(cluster, "munged", lambda: _succeeds(cluster, "munge", "-S", f"{run}/munge.sock", "-n"))
    spawn("slurmctld", "bash", f"{folder}/etc/as-host", CONTROLLER, *as_oneself(), "slurmctld", "-D")
    _wait(cluster, "slurmctld", lambda: _succeeds(cluster, "scontrol", "ping"))
    for name in cluster.names:
        # -b reports a reboot: the controller then requeues the jobs that a node powered off had.
        spawn(name, "bash", f"{folder}/etc/as-host", name, *as_oneself(), "slurmd", "-D", "-b", "-N", name)
    _wait(cluster, "slurmd.node1", lambda: _idle_nodes(cluster) == cluster.nodes)


def die_with_parent() -> None:
    """Runs in `unshare`, which then kills its process 1, and so all in the namespace. A daemon that changes its user
    would lose this signal, and one that forks would leave its children."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _wait(cluster: Cluster, name: str, ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not ready():
        if time.monotonic() > deadline:
            logs = [path.read_text(errors="replace")[-2000:] for path in (cluster.folder / "log").glob(f"{name}*")]
            raise RuntimeError("\n".join([f"{name} did not come up:", *logs]))
        time.sleep(0.1)


def _succeeds(cluster: Cluster, *command: str) -> bool:
    return subprocess.run(command, env=cluster.environment, capture_output=True).returncode == 0


def _idle_nodes(cluster: Cluster) -> int:
    asked = ["sinfo", "--noheader", "--partition=main", "--states=idle", "--format=%D"]
    return sum(map(int, subprocess.check_output(asked, env=cluster.environment, text=True).split()))
