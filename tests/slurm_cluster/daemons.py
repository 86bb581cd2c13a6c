"""A cluster's daemons: started in order, each waited for, and gone with the process that started them."""

import ctypes
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.slurm_cluster.configuration import Cluster, configure, require

PATIENCE_SECONDS = 60
PR_SET_PDEATHSIG = 1
MARIADB = ("mariadbd", "--no-defaults", "--user=root", "--innodb-log-file-size=8M", "--innodb-buffer-pool-size=32M")
MARIADB_TABLES = Path("/usr/share/mysql")


@contextmanager
def running(folder: Path, nodes: int, accounting: bool) -> Iterator[Cluster]:
    """A cluster that accepts jobs; all of it is gone after the block, or when this process is killed.

    Raises RuntimeError with one line where it cannot run here, or with the log of a daemon that does not come up.
    """
    require(accounting)
    cluster = configure(folder, nodes, accounting)
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

    def spawn(name: str, *command: str, namespaces: tuple[str, ...] = ()) -> None:
        inside = ("unshare", "--pid", "--fork", "--kill-child", *namespaces, "bash", "-c", '"$@" & wait', name)
        with open(folder / "log" / f"{name}.out", "wb") as log:
            process = subprocess.Popen(
                [*inside, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=cluster.environment | {"MYSQL_UNIX_PORT": f"{run}/mariadb.sock"},
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        (run / f"{name}.pid").write_text(str(process.pid))
        started.append(process)

    spawn(
        "munged",
        *("munged", "--foreground", "--force", f"--key-file={folder}/etc/munge.key", f"--socket={run}/munge.sock"),
        *(f"--pid-file={run}/munged.own", f"--log-file={folder}/log/munged.log", f"--seed-file={run}/munged.seed"),
    )
    _wait(cluster, "munged", lambda: _succeeds(cluster, "munge", "-S", f"{run}/munge.sock", "-n"))
    if cluster.accounting:
        _bootstrap(cluster)
        spawn(
            "mariadbd",
            *(*MARIADB, f"--datadir={folder}/db", f"--socket={run}/mariadb.sock", "--skip-networking"),
            *("--skip-grant-tables", "--innodb-lock-wait-timeout=900", "--innodb-flush-log-at-trx-commit=0"),
            f"--pid-file={run}/mariadbd.own",
        )
        _wait(cluster, "mariadbd", (run / "mariadb.sock").exists)
        spawn("slurmdbd", "slurmdbd", "-D")
        _wait(cluster, "slurmdbd", lambda: _listens(cluster.port + 1))
    spawn("slurmctld", "slurmctld", "-D")
    _wait(cluster, "slurmctld", lambda: _succeeds(cluster, "scontrol", "ping"))
    for name in cluster.names:
        spawn(name, "bash", f"{folder}/etc/node-init", name, namespaces=("--uts", "--mount"))
    _wait(cluster, "slurmd.node1", lambda: _idle_nodes(cluster) == cluster.nodes)


def _die_with_parent() -> None:
    """Runs in `unshare`, which then kills its process 1, and so all in the namespace. A daemon that changes its user
    would lose this signal, and one that forks would leave its children."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _bootstrap(cluster: Cluster) -> None:
    """An empty data base for slurmdbd."""
    tables = [MARIADB_TABLES / name for name in ("mysql_system_tables.sql", "mysql_system_tables_data.sql")]
    commands = "CREATE DATABASE mysql;\nUSE mysql;\n" + "".join(table.read_text() for table in tables)
    command = [*MARIADB, f"--datadir={cluster.folder}/db", "--bootstrap"]
    done = subprocess.run(command, input=commands, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"mariadbd --bootstrap failed:\n{done.stderr}")


def _wait(cluster: Cluster, name: str, ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not ready():
        if time.monotonic() > deadline:
            logs = [path.read_text(errors="replace")[-2000:] for path in (cluster.folder / "log").glob(f"{name}*")]
            raise RuntimeError("\n".join([f"{name} did not come up:", *logs]))
        time.sleep(0.1)


def _succeeds(cluster: Cluster, *command: str) -> bool:
    return subprocess.run(command, env=cluster.environment, capture_output=True).returncode == 0


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _idle_nodes(cluster: Cluster) -> int:
    asked = ["sinfo", "--noheader", "--partition=main", "--states=idle", "--format=%D"]
    return sum(map(int, subprocess.check_output(asked, env=cluster.environment, text=True).split()))
