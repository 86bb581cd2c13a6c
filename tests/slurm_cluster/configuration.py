"""The files that SLURM's daemons read. Every setting that is not a name or a path says why it is there."""

import os
import platform
import pwd
import secrets
import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "munged": "munge",
}
NAMESPACES = ("--pid", "--fork", "--kill-child", "--uts", "--mount")
PARENT = "/tmp"  # of a cluster's folder, whatever TMPDIR is: sockets lie in it, whose paths end at 107 bytes

SLURM_CONF = """\
ClusterName=test
SlurmctldHost={controller}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# cred_expire is also how long a requeued job waits before it starts again; 120 s by default.
AuthInfo=socket={folder}/run/munge.sock,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.own
SlurmdPidFile={folder}/run/%n.own
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
# No cgroups here: processes are found by their parents, and memory is not limited.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=50000,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
# Nodes claim more CPUs than this host has.
SlurmdParameters=config_overrides
ReturnToService=1
SlurmdTimeout=10
BatchStartTimeout=10
MessageTimeout=10
TCPTimeout=2
KillWait=3
# A step that ends while its srun gives up can hang for six MessageTimeouts: its node is not drained for that.
UnkillableStepTimeout=180
MinJobAge=3600
# submitit's folders outlive this cluster: a number used again would find the results of another job. Two clusters on
# this host must differ too: the tasks of a job meet at a port that is a function of its number.
FirstJobId={first_job}
GresTypes=gpu
{nodes}
PartitionName=DEFAULT Nodes=node[1-{count}] MaxTime=INFINITE DefMemPerCPU=100 State=UP
PartitionName=main Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=10
PartitionName=high PriorityTier=10 PreemptMode=OFF
"""
# Distinct host names behind one address: distinct addresses break srun inside jobs.
NODE = "NodeName={name} NodeHostname={name} NodeAddr=127.0.0.1 Port={port} CPUs=8 RealMemory=16000 Gres=gpu:a100:8"
# HOST COMMAND ...: runs it as on a host of its own, with a name, /proc and /etc/slurm, all names at 127.0.0.1.
AS_HOST = """\
hostname "$1" && mount --bind "$SLURM_TEST/etc/hosts" /etc/hosts && mkdir -p /etc/slurm &&
  mount --bind "$SLURM_TEST/etc" /etc/slurm && mount -t proc proc /proc && mount -t tmpfs tmpfs /dev/shm || exit 1
shift
exec "$@"
"""
CONTROLLER = "controller"  # its host


@dataclass(frozen=True)
class Cluster:
    """Where a cluster lies, and who listens on which port of the loopback interface."""

    folder: Path
    nodes: int
    port: int  # slurmctld's; the nodes have those after it

    @property
    def names(self) -> list[str]:
        return [f"node{number}" for number in range(1, self.nodes + 1)]

    @property
    def environment(self) -> dict[str, str]:
        """For SLURM's commands and daemons, and for jobs' submission: nothing of another cluster's."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))}
        path = f"{kept['PATH']}:/usr/sbin:/sbin"
        return kept | {"PATH": path, "SLURM_CONF": str(self.folder / "etc/slurm.conf"), "SLURM_TEST": str(self.folder)}


def require() -> None:
    """Raises RuntimeError with one line where a cluster cannot run here."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [package for name, package in PROGRAMS.items() if shutil.which(name, path=path) is None]
    if missing:
        raise RuntimeError(f"no SLURM here: apt-get install --no-install-recommends {' '.join(missing)}")
    tried = subprocess.run([*namespaces(), "true"], capture_output=True, text=True)
    if tried.returncode:
        raise RuntimeError(f"no hosts of its own for a SLURM cluster: {tried.stderr.strip()} (docker run --privileged)")


def namespaces() -> list[str]:
    """What a command begins with that is to run on a host of its own. Whoever is not root is root in there."""
    return ["unshare", *NAMESPACES, *(["--user", "--map-root-user"] if os.geteuid() else [])]


def as_oneself() -> list[str]:
    """What a command begins with in there that is to run as the user outside: SLURM and munge tell who asks."""
    user, group = os.geteuid(), os.getegid()
    return ["unshare", "--user", f"--map-user={user}", f"--map-group={group}"] if user else []


def user_name() -> str:
    return pwd.getpwuid(os.geteuid()).pw_name


def configure(folder: Path, nodes: int) -> Cluster:
    """Writes a new cluster's files below `folder`, which must be new or empty."""
    folder = folder.resolve()
    cluster = Cluster(folder, nodes, _free_ports(nodes + 1))
    for name in ("etc", "run", "state", "log", "dev", *(f"spool/{name}" for name in cluster.names)):
        (folder / name).mkdir(parents=True)
    for number in range(8):  # SLURM wants character devices
        (folder / "dev" / f"nvidia{number}").symlink_to("/dev/null")
    lines = [NODE.format(name=name, port=cluster.port + 1 + number) for number, name in enumerate(cluster.names)]
    texts = {
        "hosts": "".join(f"127.0.0.1 {name}\n" for name in ("localhost", platform.node(), CONTROLLER, *cluster.names)),
        "gres.conf": f"AutoDetect=off\nNodeName=node[1-{nodes}] Name=gpu Type=a100 File={folder}/dev/nvidia[0-7]\n",
        "slurm.conf": SLURM_CONF.format(
            controller=CONTROLLER,
            user=user_name(),
            folder=folder,
            port=cluster.port,
            first_job=1 + secrets.randbelow(60_000_000),
            nodes="\n".join(lines),
            count=nodes,
        ),
        "as-host": AS_HOST,
    }
    for name, text in texts.items():
        (folder / "etc" / name).write_text(text)
    (folder / "etc/munge.key").touch(mode=0o600)
    (folder / "etc/munge.key").write_bytes(secrets.token_bytes(1024))
    return cluster


def _free_ports(count: int) -> int:
    """The first of `count` adjacent TCP ports that nothing listens on."""
    while True:
        first = 20000 + secrets.randbelow(12000)
        if not any(_listening(first + number) for number in range(count)):
            return first


def _listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
