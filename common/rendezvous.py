"""Startup barrier: waits until all WORLD_SIZE ranks have actually connected.

If stale variables of an interactive shell claim eight ranks, a lone process would do 1/8 of the work and exit, or hang
in a collective that ignores signals.
"""

import contextlib
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from types import FrameType
from typing import NoReturn

from common.command import outlived
from common.errors import Interrupted, UserError
from common.ranks import may_be_left_over, rank_and_world_size, stated_by

REPORT_SECONDS = 10.0  # before the first report of missing ranks; each further one takes three times as long
ALONE_SECONDS = 180.0  # time limit while no other rank has come
LEFT_OVER_SECONDS = 20.0  # the same, where the variables that name the others may be left over
LIMIT_SECONDS = 600.0  # time limit for the last of several ranks: a node may be slow
LATER_SECONDS = 10.0  # other ranks wait longer than rank 0, which sends them the list of missing ranks
LOOK_SECONDS = 0.2
GO, NO = b"fpdm: go", b"fpdm: "


def rendezvous() -> None:
    """Returns when all ranks have called it. With one rank, or under torchrun, which starts all or none, at once.

    Rank 0 listens at MASTER_ADDR and MASTER_PORT, where training connects afterwards. Raises UserError naming the
    missing ranks, and Interrupted if this process is asked to stop.
    """
    variables, alone_seconds = stated_by(), LEFT_OVER_SECONDS if may_be_left_over() else ALONE_SECONDS
    rank, world_size = rank_and_world_size()
    if world_size == 1 or "TORCHELASTIC_RUN_ID" in os.environ:
        return
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError):
        raise UserError(
            f"MASTER_ADDR, MASTER_PORT: no host and port, but RANK={rank} and WORLD_SIZE={world_size}; "
            "set them to the address of rank 0, or unset RANK and WORLD_SIZE to run one process"
        ) from None
    patience = _Patience(rank, world_size, f"{host}:{port}", variables, alone_seconds)
    with _interruptible(patience):
        if rank == 0:
            _gather(host, port, patience)
        else:
            _join(host, port, patience)


class _Patience:
    """The ranks that have come, the time limits, and the messages about missing ranks."""

    def __init__(self, rank: int, world_size: int, where: str, variables: Sequence[str], alone_seconds: float) -> None:
        self.rank, self.world_size, self.where = rank, world_size, where
        self.variables, self.alone_seconds = variables, alone_seconds
        self.here = {rank}
        self.began = time.monotonic()
        self.report_at = REPORT_SECONDS

    def check(self) -> None:
        """Reports missing ranks from time to time. Raises UserError after the time limit."""
        waited = time.monotonic() - self.began
        limit = self.alone_seconds if len(self.here) == 1 else LIMIT_SECONDS
        if waited > limit + (LATER_SECONDS if self.rank else 0):
            raise UserError(f"{self.missing()} after {waited:.0f} s; {self.advice()}")
        if waited > self.report_at:
            self.report_at *= 3
            sys.stderr.write(f"waiting: {self.missing()}; {self.advice()}\n")
            sys.stderr.flush()

    def missing(self) -> str:
        if self.rank != 0:
            return f"rank {self.rank} of {self.world_size}: rank 0 at {self.where}, or another rank, is missing"
        absent = [rank for rank in range(self.world_size) if rank not in self.here]
        named = ", ".join(map(str, absent[:8])) + (", ..." if len(absent) > 8 else "")
        return f"{len(self.here)} of {self.world_size} ranks have come to {self.where}; missing: rank {named}"

    def advice(self) -> str:
        stated = " ".join(f"{name}={os.environ.get(name, '')}" for name in self.variables)
        clear = f"unset {' '.join(self.variables)}, or " if self.variables else ""
        return (
            f"{stated or 'the launcher'} announced them: if this is the only process, as in an interactive shell (srun "
            f"--pty) or with its variables left over, {clear}put RANK=0 WORLD_SIZE=1 before the command"
        )


def _gather(host: str, port: int, patience: _Patience) -> None:
    """Rank 0: waits until all others are connected at the same time, and sends them GO."""
    waiting: dict[socket.socket, int] = {}
    with contextlib.ExitStack() as opened:
        server = opened.enter_context(_server(host, port))
        try:
            while len(patience.here) < patience.world_size:
                patience.check()
                for ready in select.select([server, *waiting], [], [], LOOK_SECONDS)[0]:
                    if ready is server:
                        waiting[opened.enter_context(server.accept()[0])] = -1
                    else:
                        waiting[ready] = _rank_of(ready, patience.world_size)
                        if waiting[ready] < 0:  # it has left, or is not one of our ranks
                            del waiting[ready]
                patience.here = {0, *(rank for rank in waiting.values() if rank > 0)}
        except UserError as error:
            _tell(waiting, NO + str(error).encode())
            raise
        _tell(waiting, GO)


def _tell(ranks: Iterable[socket.socket], word: bytes) -> None:
    """Sends `word` and waits until each rank has read it: training listens at the same port afterwards."""
    for other in ranks:
        with contextlib.suppress(OSError):
            other.sendall(word)
            other.shutdown(socket.SHUT_WR)
    for other in ranks:
        with contextlib.suppress(OSError):
            other.settimeout(5)
            other.recv(1)


def _server(host: str, port: int) -> socket.socket:
    # Some launchers give rank 0 the address `localhost`, and ranks on other nodes its host name.
    one_node = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    here = host == "127.0.0.1" or (host == "localhost" and one_node)
    try:
        if not here and socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
        return socket.create_server(("127.0.0.1" if here else "", port), backlog=1024)
    except OSError as error:
        raise UserError(
            f"MASTER_PORT: rank 0 cannot listen at {port} ({error.strerror}); another run may use it: set another"
        ) from None


def _rank_of(other: socket.socket, world_size: int) -> int:
    """The rank that a connection announces; -1 if it is invalid or closed."""
    try:
        word = other.recv(64).decode().split()
        rank, ranks = int(word[0]), int(word[1])
    except (OSError, ValueError, IndexError):
        return -1
    return rank if ranks == world_size and 0 < rank < ranks else -1


def _join(host: str, port: int, patience: _Patience) -> None:
    """Another rank's part. Rank 0 may start later, or restart, so keep reconnecting."""
    while True:
        patience.check()
        word = b""
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1.0) as server:
            server.sendall(f"{patience.rank} {patience.world_size}\n".encode())
            patience.here.add(0)
            while not select.select([server], [], [], LOOK_SECONDS)[0]:
                patience.check()
            word = server.makefile("rb").read(4096)
        if word == GO:
            return
        if word.startswith(NO):
            raise UserError(word.removeprefix(NO).decode(errors="replace"))
        time.sleep(LOOK_SECONDS)


@contextlib.contextmanager
def _interruptible(patience: _Patience) -> Iterator[None]:
    """Makes Ctrl-C, SIGTERM and a closed terminal raise Interrupted, unless they have other handlers."""

    def stop(number: int, _frame: FrameType | None) -> NoReturn:
        name = signal.Signals(number).name
        raise Interrupted(f"{name} while {patience.missing()}; nothing was done")

    unheard = (signal.SIG_DFL, signal.SIG_IGN, signal.default_int_handler)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    ours = [number for number, handler in before.items() if handler in unheard and not outlived(number)]
    for number in ours:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, before[number])
