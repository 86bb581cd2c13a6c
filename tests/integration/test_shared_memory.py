"""Sums over the ranks of one machine: exact, the same on all, and no rank waits for one that has ended."""

import errno
import os
import socket
import tempfile
import time
from functools import reduce
from operator import add
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from common.ranks import own_cores
from pipeline.training.distributed import Ranks
from pipeline.training.engine import average_gradients
from pipeline.training.shared_memory import CHUNK, naming_lost_ranks, received, shared_sums
from tests.integration.ranks import started

NUMBERS = CHUNK // 4  # of float32, in a part
SIZES = (0, 1, 12, NUMBERS - 1, NUMBERS, 2 * NUMBERS + 3)


def summands(rank: int) -> list[Tensor]:
    """Whose sum depends on the order, in rounding."""
    draw = torch.Generator().manual_seed(rank)
    numbers = [torch.randn(size, generator=draw) for size in SIZES]
    return [*numbers, numbers[2].double(), torch.tensor([rank, rank == 1])]


def add_up_all(folder: str) -> None:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})  # as SLURM binds tasks
    dist.init_process_group("gloo")
    with shared_sums(rank, world_size, None) as shared:
        assert shared is not None
        assert (shared.awake > 0) == (world_size <= own_cores(set(cores)))  # no rank takes another's core
        for repetition in range(3):  # slots are used again
            tensors = summands(rank)
            for tensor in tensors:
                if rank == repetition:
                    time.sleep(0.05)  # longer than a rank looks for its answer
                shared.add_up(tensor)
            torch.save(tensors, f"{folder}/{rank}-{repetition}.pt")


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_rank_gets_the_sum_in_the_order_of_the_ranks(world_size: int, tmp_path: Path) -> None:
    with started(tmp_path, add_up_all, str(tmp_path), ranks=world_size) as running:
        assert running.wait() == [0] * world_size, running.output
    expected = [reduce(add, tensors) for tensors in zip(*map(summands, range(world_size)), strict=True)]
    found = [torch.load(path, weights_only=True) for path in sorted(tmp_path.glob("*.pt"))]
    assert len(found) == 3 * world_size
    for tensors in found:
        assert all(torch.equal(one, other) for one, other in zip(tensors, expected, strict=True))


def average(folder: str) -> None:
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    parameters = [torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(5))]
    parameters[0].grad = torch.full((2, 3), float(rank))
    if rank == 1:
        parameters[1].grad = torch.arange(5.0)
    with shared_sums(rank, 2, None) as shared:
        assert shared is not None
        average_gradients(parameters, Ranks(rank, 2, None, shared))
    torch.save([parameter.grad for parameter in parameters], f"{folder}/{rank}.pt")


def test_gradients_are_averaged_and_a_missing_one_counts_as_zeros(tmp_path: Path) -> None:
    with started(tmp_path, average, str(tmp_path), ranks=2) as running:
        assert running.wait() == [0, 0], running.output
    for path in tmp_path.glob("*.pt"):
        first, second = torch.load(path, weights_only=True)
        assert torch.equal(first, torch.full((2, 3), 0.5))
        assert torch.equal(second, torch.arange(5.0) / 2)


def wait_for_the_dead() -> None:
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    with shared_sums(rank, 3, None) as shared:
        assert shared is not None
        shared.add_up(torch.zeros(1))
        if rank == int(os.environ["DIES"]):
            os.kill(os.getpid(), 9)
        shared.add_up(torch.zeros(1))


@pytest.mark.parametrize("dies", [0, 2])
def test_no_rank_waits_for_one_that_was_killed(dies: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIES", str(dies))
    with started(tmp_path, wait_for_the_dead, ranks=3) as running:
        statuses = running.wait(60)
    assert statuses.pop(dies) == -9
    assert statuses == [1, 1], running.output
    assert running.output.count("\nRuntimeError: Connection closed by peer: another rank") == 2


def test_a_rank_lost_before_it_sends_the_memory_is_named_as_one() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    with ours, pytest.raises(RuntimeError, match="another rank of this training has ended"), naming_lost_ranks():
        received(ours)


def find_none(way: str, folder: str) -> None:
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    with pytest.MonkeyPatch.context() as patched:
        if way == "a long path":
            patched.setattr(tempfile, "tempdir", folder)
        if way == "another system":
            patched.delattr(os, "memfd_create")
        if way == "out of sight" and rank == 1:  # as where each task of a cluster has a /tmp of its own
            patched.setattr(socket.socket, "connect_ex", lambda *_: errno.ENOENT)
        with shared_sums(rank, 2, None) as shared:
            assert shared is None
    total = torch.ones(1)
    Ranks(rank, 2, None, None).add_up(total)
    assert total == 2


@pytest.mark.parametrize("way", ["a long path", "another system", "out of sight"])
def test_ranks_without_such_memory_agree_on_it_and_use_gloo(way: str, tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 30)  # a socket's path has at most 107 bytes
    folder.mkdir()
    with started(tmp_path, find_none, way, str(folder), ranks=2) as running:
        assert running.wait(60) == [0, 0], running.output
