"""What jobs rely on, looked at from inside a job: a function for each. They know nothing of recipes."""

import fcntl
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Limits below which something must change. A checkpoint of the XL/2 network has about 2 GB.
LEAST_WRITE_MB_S = 20
LEAST_ALL_REDUCE_MB_S = {"cuda": 500, "cpu": 20}
LEAST_SHARED_MEMORY_MB = 64
MOST_SKEW_SECONDS = 2.0
WRITTEN_MB = 128
REDUCED_MB = 64
TRY_LOCK = "import fcntl, sys; fcntl.flock(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"


@dataclass(frozen=True)
class Finding:
    """What a check found; `must`: what has to change, empty where nothing has."""

    check: str
    found: str
    must: str = ""


@dataclass(frozen=True)
class Node:
    """This process in the job that looks around. `gather`: from every rank, in order; a barrier too."""

    folder: Path  # on the disk that the nodes share
    device: "torch.device"
    gpus: int  # that the processes on this node are to have together
    precision: str  # of training
    rank: int = 0
    world_size: int = 1
    gather: Callable[[Any], list[Any]] = lambda own: [own]


def gpus(node: Node) -> Finding:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    kinds = sorted({torch.cuda.get_device_name(number) for number in range(count)})
    found = f"{count} x {', '.join(kinds)}" if count else "none"
    # Each rank may see its own alone (gpus-per-task, gpu-bind): what counts is what those of one node see together.
    own = {str(torch.cuda.get_device_properties(number).uuid) for number in range(count)}
    host = platform.node()
    together = set[str]().union(*(seen for name, seen in node.gather((host, own)) if name == host))
    if len(together) >= node.gpus:
        return Finding("GPUs", found)
    return Finding(
        "GPUs",
        found,
        f"the recipe asks for {node.gpus} on a node: see gpu_option in the site file, or ask for {len(together)}",
    )


def driver(_node: Node, version_file: Path = Path("/proc/driver/nvidia/version")) -> Finding:
    import torch

    try:
        found = re.search(r"Module\s+(\S+)", version_file.read_text())
    except OSError:
        return Finding("driver", "no NVIDIA driver")
    said = f"{found[1] if found else 'unknown'}, torch is built for CUDA {torch.version.cuda}"
    if torch.cuda.is_available():
        return Finding("driver", said)
    return Finding("driver", said, "torch cannot use the GPU: a newer driver, or a torch built for an older CUDA")


def bf16(node: Node) -> Finding:
    import torch

    if node.device.type != "cuda":
        return Finding("bf16", "no GPU: training is in fp32")
    if torch.cuda.get_device_capability(node.device) >= (8, 0):
        return Finding("bf16", "in hardware")
    wanted = node.precision in ("auto", "bf16")
    return Finding("bf16", "not in hardware", "set train.precision=fp16 or fp32" if wanted else "")


def all_reduce(node: Node) -> Finding:
    """The sum, and MB/s as they go over the slowest link: 2 (n - 1) / n of a tensor's bytes (NCCL's bus bandwidth)."""
    import torch
    import torch.distributed as dist

    if node.world_size == 1:
        return Finding("all-reduce", "one process")
    values = torch.ones(REDUCED_MB * 2**20 // 4, device=node.device)
    dist.all_reduce(values)
    right = bool((values == node.world_size).all())
    started = time.monotonic()
    for _ in range(3):
        dist.all_reduce(values)
    if node.device.type == "cuda":
        torch.cuda.synchronize(node.device)
    share = 2 * (node.world_size - 1) / node.world_size
    speed = share * 3 * REDUCED_MB / (time.monotonic() - started)
    found = f"{speed:,.0f} MB/s between {node.world_size} ranks"
    if not right:
        return Finding("all-reduce", "a wrong sum", "training would be wrong: try NCCL_P2P_DISABLE=1, tell the admins")
    if speed < LEAST_ALL_REDUCE_MB_S[node.device.type]:
        return Finding("all-reduce", found, "name the fast network: NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME in setup")
    return Finding("all-reduce", found)


def locks(node: Node) -> Finding:
    """Whether other processes see a lock of rank 0: a child of each rank, on every node."""
    path, fault = node.folder / ".preflight-lock", ""
    with ExitStack() as opened:
        try:
            file = opened.enter_context(open(path, "a"))
            if node.rank == 0:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            fault = error.strerror or str(error)
        node.gather(None)
        other = [sys.executable, "-c", TRY_LOCK, str(path)]
        unseen = not fault and subprocess.run(other, stderr=subprocess.DEVNULL).returncode == 0
        answers = node.gather("not seen by other processes" if unseen else fault)
    if node.rank == 0:
        path.unlink(missing_ok=True)
    if faults := [answer for answer in answers if answer]:
        must = "two trainings could share a run folder: put runs on a disk with flock (Lustre: mounted with -o flock)"
        return Finding("file locks", faults[0], must)
    return Finding("file locks", "seen by every rank")


def renames(node: Node) -> Finding:
    """Whether every rank sees at once what rank 0 put in the place of a file."""
    path, seen = node.folder / ".preflight-rename", ""
    for text in ("old", "new"):
        with suppress(OSError):
            if node.rank == 0:
                beside = path.with_suffix(".unfinished")
                beside.write_text(text)
                os.replace(beside, path)
        node.gather(None)
        seen = "nothing"
        with suppress(OSError):
            seen = path.read_text()
        all_seen = node.gather(seen)
    if node.rank == 0:
        path.unlink(missing_ok=True)
    late = [rank for rank, text in enumerate(all_seen) if text != "new"]
    if not late:
        return Finding("renames", "seen at once by every rank")
    return Finding(
        "renames", f"not seen by ranks {late[:8]}", f"mount {node.folder} with less caching, or choose another disk"
    )


def write_speed(node: Node) -> Finding:
    """Of all ranks together."""
    path, own, fault = node.folder / f".preflight-{node.rank}", 0.0, ""
    try:
        started = time.monotonic()
        with open(path, "wb") as file:
            for _ in range(WRITTEN_MB):
                file.write(os.urandom(2**20))
            file.flush()
            os.fsync(file.fileno())
        own = WRITTEN_MB / (time.monotonic() - started)
    except OSError as error:
        fault = error.strerror or str(error)
    finally:
        path.unlink(missing_ok=True)
    speed = sum(node.gather(own))
    if fault:
        return Finding("disk", f"{node.folder}: {fault}", "choose another folder for runs")
    free = shutil.disk_usage(node.folder).free / 1e9
    slow = speed < LEAST_WRITE_MB_S
    must = f"a checkpoint would take minutes: a faster disk than {node.folder} for runs" if slow else ""
    return Finding("disk", f"writes {speed:,.0f} MB/s, {free:,.0f} GB free", must)


def shared_memory(_node: Node, folder: str = "/dev/shm") -> Finding:
    try:
        size = os.statvfs(folder).f_frsize * os.statvfs(folder).f_blocks / 2**20
    except OSError as error:
        return Finding("shared memory", f"{folder}: {error.strerror}", "mount a tmpfs there (docker: --shm-size)")
    few = size < LEAST_SHARED_MEMORY_MB
    must = f"decoding processes need {LEAST_SHARED_MEMORY_MB} MB (docker: --shm-size)" if few else ""
    return Finding("shared memory", f"{size:,.0f} MB", must)


def clocks(node: Node) -> Finding:
    """Of the nodes, and of the disk, whose times are compared with theirs."""
    path, disk = node.folder / f".preflight-clock-{node.rank}", 0.0
    with suppress(OSError):
        path.touch()
        disk = abs(path.stat().st_mtime - time.time())
        path.unlink()
    node.gather(None)
    times = node.gather(time.time())
    skew = max(max(times) - min(times), *node.gather(disk), 0.0)
    must = "set the clocks (NTP): ask the admins" if skew > MOST_SKEW_SECONDS else ""
    return Finding("clocks", f"{skew:.1f} s apart", must)


def signals(_node: Node, status: Path = Path("/proc/self/status")) -> Finding:
    """Whether the signals arrive by which a job is told to save."""
    masks = dict(re.findall(r"^(Sig(?:Blk|Ign)):\s*([0-9a-f]+)", status.read_text(), re.MULTILINE))
    deaf = sum(1 << bit for bit in range(64) if any(int(mask, 16) >> bit & 1 for mask in masks.values()))
    lost = [number.name for number in (signal.SIGUSR2, signal.SIGTERM) if deaf >> (number - 1) & 1]
    if lost:
        must = "training would not save before it is ended: start jobs without what ignores them (nohup, a wrapper)"
        return Finding("signals", f"{', '.join(lost)} ignored", must)
    return Finding("signals", "SIGUSR2 and SIGTERM arrive")


def requeue(_node: Node) -> Finding:
    """Whether SLURM starts this job again."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return Finding("requeue", "no SLURM job")
    try:
        shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return Finding("requeue", "no scontrol in the job", "put SLURM's commands and munge's socket in the container")
    if "Requeue=1" not in shown.stdout:
        return Finding("requeue", "the job may not be requeued", "remove requeue: false from the site file")
    times = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    return Finding("requeue", f"allowed, done {times} times")


CHECKS = (*(gpus, driver, bf16, all_reduce, locks, renames, write_speed, shared_memory, clocks, signals, requeue),)


def site_page(sinfo: str) -> list[str]:
    """Lines for the site file, from what `sinfo --format=%R|%G|%m` says: partition, GPUs, memory in MB."""
    lines = []
    for row in sinfo.splitlines()[:1]:
        partition, generic, memory = row.split("|")
        kind = re.search(r"gpu:([A-Za-z]\w*):", generic)
        lines += [f"partition: {partition}", f"memory_gb: {int(memory.rstrip('+')) // 1024}"]
        lines += [f"gpu_type: {kind[1]}"] if kind else []
    return lines
