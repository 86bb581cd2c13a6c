"""Processes that train together: joining them, and agreeing on errors and on requests to stop."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from common.errors import UserError
from common.ranks import keep_freed_memory, own_device, rank_and_world_size, share_cores

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.training.shared_memory import SharedSums


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together.

    control: the group in which ranks agree on what to do next, in the host's memory: over NCCL each such question would
        wait for the GPU.
    shared: memory that all ranks share, where they train on the cores of one machine.
    """

    rank: int
    world_size: int
    control: Any
    shared: "SharedSums | None" = None

    def add_up(self, tensor: "Tensor") -> None:
        """A contiguous tensor in the host's memory over all ranks, in place."""
        import torch.distributed as dist

        if self.shared is not None:
            self.shared.add_up(tensor)
        elif self.world_size > 1:
            dist.all_reduce(tensor, group=self.control)


@contextmanager
def process_group() -> Iterator[Ranks]:
    """Joins the processes through DeepSpeed (NCCL on GPUs, gloo on CPUs).

    On CPUs it also limits this process's threads to its share of the cores, and keeps freed memory, for good.
    """
    import torch

    from pipeline.training.shared_memory import MOST_RANKS, PATIENCE_SECONDS, shared_sums

    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns on import that it found no GPU
    import deepspeed

    rank, world_size = rank_and_world_size()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)  # called by DeepSpeed
    if on_gpu:
        os.environ["LOCAL_RANK"] = str(own_device().index)  # DeepSpeed uses it as the GPU's number
    else:
        share_cores()
        keep_freed_memory()
        # As DeepSpeed's launcher says it. Else ZeRO 3 asks `numactl` in every step, and fails where PATH names a folder
        # that this user is not allowed to read.
        os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
        # Otherwise DeepSpeed first compiles a shared-memory helper of its own, for minutes; gloo does without it.
        deepspeed.ops.__compatible_ops__.clear()
    deepspeed.init_distributed("nccl" if on_gpu else "gloo", timeout=timedelta(minutes=10), verbose=False)
    try:
        # Rank 0 keeps the others waiting while it fetches shards, writes a checkpoint or draws images.
        control = torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=PATIENCE_SECONDS))
        one_machine = world_size == int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        share = not on_gpu and one_machine and 1 < world_size <= MOST_RANKS
        with shared_sums(rank, world_size, control) if share else nullcontext() as shared:
            yield Ranks(rank, world_size, control, shared)
    finally:
        deepspeed.comm.destroy_process_group()  # torch's, and DeepSpeed's own record of it


@dataclass
class Outcome:
    """What all ranks know after a block of `raise_on_all_ranks`."""

    stop_requested: bool = False  # on any rank


@contextmanager
def raise_on_all_ranks(ranks: Ranks, stop: object = False) -> Iterator[Outcome]:
    """Barrier: if any rank raises UserError in the block, all ranks raise that of the lowest failing rank.

    So no rank waits for another that has given up. `stop`: true where this rank was asked to stop, read at the end of
    the block; the outcome then says whether any rank was.
    """
    import torch
    import torch.distributed as dist

    outcome, error = Outcome(), None
    try:
        yield outcome
    except UserError as own:
        error = own
    flags = torch.tensor([int(bool(stop)), int(error is not None)])
    ranks.add_up(flags)
    outcome.stop_requested, failed = map(bool, flags.tolist())
    if failed:
        errors: list[UserError | None] = [None] * ranks.world_size
        dist.all_gather_object(errors, error, group=ranks.control)
        raise next(each for each in errors if each is not None)
