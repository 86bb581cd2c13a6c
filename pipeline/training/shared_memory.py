"""Sums over the ranks of one machine through memory that they share, for training on its cores.

After tens of milliseconds of computing gloo takes 2 ms for the smallest sum, because one thread has to wake the next,
and 5 ms for 4 MB, which go through the loopback twice. Here a rank looks for the others' answer instead of sleeping.
"""

import mmap
import os
import select
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from common.ranks import own_cores

CHUNK = 2**20  # bytes that a rank hands over at a time: they stay in the cores' caches
MOST_RANKS = 8  # each reads all slots, so with many of them a ring, as gloo's, is better
AWAKE_SECONDS = 0.02  # that a rank looks for an answer before it sleeps
PATIENCE_SECONDS = 7200.0  # rank 0 keeps the others waiting while it writes a checkpoint or draws images


class SharedSums:
    """One rank's place in the memory, and its connections: rank 0's to all others, another rank's to rank 0.

    Each hands over a part in its slot, all meet, and each adds up all slots. The next part goes into other slots, and
    whoever comes to fill the first ones again has met everyone since, so that nobody still reads them.
    """

    def __init__(
        self, rank: int, world_size: int, connections: list[socket.socket], memory: mmap.mmap, cores: int
    ) -> None:
        self.rank, self.connections = rank, connections
        self.slots = torch.frombuffer(memory, dtype=torch.uint8).view(2, world_size, CHUNK)
        self.turn = 0
        self.awake = AWAKE_SECONDS if world_size <= cores else 0.0  # else it would take another rank's core

    def add_up(self, tensor: Tensor) -> None:
        """A contiguous tensor over all ranks, in place: first rank 0's, so that the bits are the same everywhere.

        Raises RuntimeError where a rank has ended, TimeoutError where one is silent for two hours.
        """
        for part in tensor.view(-1).split(CHUNK // tensor.element_size()):
            slots = self.slots[self.turn, :, : part.nbytes].view(tensor.dtype)  # (ranks, numbers)
            slots[self.rank].copy_(part)
            self._meet()
            torch.add(slots[0], slots[1], out=part)
            for slot in slots[2:]:
                part += slot
            self.turn = 1 - self.turn

    def _meet(self) -> None:
        """Returns once all ranks have called it. A byte through a socket also orders what the cores see of memory."""
        with naming_lost_ranks():
            if self.rank != 0:
                self.connections[0].sendall(b".")
            for connection in self.connections:
                self._receive(connection)
            if self.rank == 0:
                for connection in self.connections:
                    connection.sendall(b".")

    def _receive(self, connection: socket.socket) -> None:
        awake_until = time.monotonic() + self.awake
        while True:
            with suppress(BlockingIOError):
                if not connection.recv(1, socket.MSG_DONTWAIT):
                    raise ConnectionResetError
                return
            if time.monotonic() < awake_until:
                os.sched_yield()
            elif not select.select([connection], [], [], PATIENCE_SECONDS)[0]:
                raise TimeoutError(f"a rank of this training was silent for {PATIENCE_SECONDS:.0f} s")


@contextmanager
def naming_lost_ranks() -> Iterator[None]:
    """As gloo names them (`common.errors.has_lost_a_rank`)."""
    try:
        yield
    except ConnectionError:
        raise RuntimeError("Connection closed by peer: another rank of this training has ended") from None


@contextmanager
def shared_sums(rank: int, world_size: int, control: Any) -> Iterator[SharedSums | None]:
    """Of all ranks, which call it together and are on one machine; None on all where one of them finds no such memory.

    control: a process group.
    """
    size = 2 * world_size * CHUNK
    with ExitStack() as stack, ExitStack() as meanwhile, socket.socket(socket.AF_UNIX) as own:
        address: list[str | None] = [None]
        if rank == 0:
            address, descriptor = _offer(own, meanwhile, size)
        dist.broadcast_object_list(address, src=0, group=control)
        ready = torch.tensor(address[0] is not None and (rank == 0 or own.connect_ex(address[0]) == 0)).int()
        dist.all_reduce(ready, dist.ReduceOp.MIN, group=control)
        if not ready:
            meanwhile.close()
            yield None
            return
        with naming_lost_ranks():
            if rank == 0:
                connections = [stack.enter_context(own.accept()[0]) for _ in range(world_size - 1)]
                for connection in connections:
                    socket.send_fds(connection, [b"."], [descriptor])
            else:
                connections = [own]
                descriptor = received(own)
                meanwhile.callback(os.close, descriptor)
        memory = mmap.mmap(descriptor, size)
        meanwhile.close()  # before training: a killed rank leaves no folder behind
        bound: list[set[int]] = [set()] * world_size
        dist.all_gather_object(bound, os.sched_getaffinity(0), group=control)  # SLURM binds each rank to its own
        yield SharedSums(rank, world_size, connections, memory, own_cores(set().union(*bound)))


def received(own: socket.socket) -> int:
    """A descriptor that rank 0 sends."""
    _, descriptors, _, _ = socket.recv_fds(own, 1, 1)
    if not descriptors:
        raise ConnectionResetError
    return descriptors[0]


def _offer(own: socket.socket, meanwhile: ExitStack, size: int) -> tuple[list[str | None], int]:
    """The address where the other ranks find this one, and the memory's descriptor, both until `meanwhile` ends.

    No address where the system gives no such memory, or no place to meet.
    """
    try:
        descriptor = os.memfd_create("fpdm")
        meanwhile.callback(os.close, descriptor)
        os.truncate(descriptor, size)
        address = str(Path(meanwhile.enter_context(TemporaryDirectory())) / "ranks")  # a folder of this user only
        own.bind(address)  # a path of at most 107 bytes
        own.listen(MOST_RANKS)
    except (AttributeError, OSError):  # AttributeError: a Python or system without memfd_create
        return [None], -1
    return [address], descriptor
