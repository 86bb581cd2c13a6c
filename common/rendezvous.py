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
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import NoReturn

from common.command import outlived
from common.errors import Interrupted, UserError
from common.ranks import rank_and_world_size

TOLD_SECONDS = 10.0  # of waiting, before it is told who is missing; and then now and again
ALONE_SECONDS = 180.0  # while nobody has come: is there anybody?
LIMIT_SECONDS = 600.0  # for the last of several: a node may be slow
LATER_SECONDS = 10.0  # other ranks wait longer than rank 0, which knows who is missing and tells them
LOOK_SECONDS = 0.2
GO, NO = b"fpdm: go", b"fpdm: "


def rendezvous() -> None:
    """Returns when every rank that the launcher names has called it; at once where there is one.

    Rank 0 listens at MASTER_ADDR and MASTER_PORT, where training meets afterwards. Raises UserError naming the ranks
    that do not come, and Interrupted where this process is asked to stop meanwhile. Ranks of torchrun are there: it
    starts none otherwise, and itself listens at that port.
    """
    rank, world_size = rank_and_world_size()
    if world_size == 1 or "TORCHELASTIC_RUN_ID" in os.environ:
        return
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError):
        raise UserError(
            f"MASTER_ADDR, MASTER_PORT: no host and number, though RANK={rank} and WORLD_SIZE={world_size}; "
            "set them to where rank 0 is, or unset RANK and WORLD_SIZE to work alone"
        ) from None
    patience = _Patience(rank, world_size, f"{host}:{port}")
    with _interruptible(patience):
        if rank == 0:
            _gather(host, port, patience)
        else:
            _join(host, port, patience)


class _Patience:
    """Who has come, how long to wait for the others, and what to say of it."""

    def __init__(self, rank: int, world_size: int, where: str) -> None:
        self.rank, self.world_size, self.where = rank, world_size, where
        self.here = {rank}
        self.began = time.monotonic()
        self.tell_at = TOLD_SECONDS

    def check(self) -> None:
        """Tells now and again who is missing. Raises UserError where it has been long enough."""
        waited = time.monotonic() - self.began
        limit = ALONE_SECONDS if len(self.here) == 1 else LIMIT_SECONDS
        if waited > limit + (LATER_SECONDS if self.rank else 0):
            raise UserError(f"{self.missing()} after {waited:.0f} s; {self.advice()}")
        if waited > self.tell_at:
            self.tell_at *= 3
            sys.stderr.write(f"waiting: {self.missing()}; {self.advice()}\n")
            sys.stderr.flush()

    def missing(self) -> str:
        if self.rank != 0:
            return (
                f"rank {self.rank} of {self.world_size}: rank 0 has not come, or not all ranks to it, at {self.where}"
            )
        absent = [rank for rank in range(self.world_size) if rank not in self.here]
        named = ", ".join(map(str, absent[:8])) + (", ..." if len(absent) > 8 else "")
        return f"{len(self.here)} of {self.world_size} ranks have come to {self.where}, not rank {named}"

    @staticmethod
    def advice() -> str:
        return (
            "if this process is alone, as in an interactive shell (srun --pty) or with variables left over in one, put "
            "RANK=0 WORLD_SIZE=1 before the command"
        )


def _gather(host: str, port: int, patience: _Patience) -> None:
    """Rank 0's part: all others are connected at the same time, and are told so."""
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
                        if waiting[ready] < 0:  # it has left, or is none of ours
                            del waiting[ready]
                patience.here = {0, *(rank for rank in waiting.values() if rank > 0)}
        except UserError as error:
            _tell(waiting, NO + str(error).encode())
            raise
        _tell(waiting, GO)


def _tell(ranks: Iterable[socket.socket], word: bytes) -> None:
    """Waits until each has heard it: training listens at the same port afterwards."""
    for other in ranks:
        with contextlib.suppress(OSError):
            other.sendall(word)
            other.shutdown(socket.SHUT_WR)
    for other in ranks:
        with contextlib.suppress(OSError):
            other.settimeout(5)
            other.recv(1)


def _server(host: str, port: int) -> socket.socket:
    # Some launchers tell rank 0 `localhost`, and ranks on other nodes its name.
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
    """What a rank says when it comes; -1 where it is none, or gone."""
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
    """Inside, Ctrl-C, SIGTERM and a closed terminal raise Interrupted, where nobody else has a handler for them."""

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
