"""Processes that train together: joining them, agreeing on what to do next, telling all what one found wrong."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from common.errors import UserError
from common.ranks import own_device, rank_and_world_size, share_cores


@contextmanager
def process_group() -> Iterator[tuple[int, int]]:
    """Joins the processes through DeepSpeed (NCCL on GPUs, gloo on CPUs) and yields (rank, world size)."""
    import deepspeed
    import torch

    rank, world_size = rank_and_world_size()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)  # called by DeepSpeed
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        os.environ["LOCAL_RANK"] = str(own_device().index)  # DeepSpeed takes it for the GPU's number
    else:
        share_cores()
        # Otherwise DeepSpeed compiles a shared-memory helper of its own first, for minutes; gloo does without it.
        deepspeed.ops.__compatible_ops__.clear()
    deepspeed.init_distributed("nccl" if on_gpu else "gloo", timeout=timedelta(minutes=10), verbose=False)
    try:
        yield rank, world_size
    finally:
        deepspeed.comm.destroy_process_group()  # torch's, and DeepSpeed's own record of it


def any_rank(asked: bool, error: UserError | None, group: Any) -> bool:
    """Whether any rank was `asked`; if any has an error, the first such rank's is raised on every rank.

    No rank is left waiting for another that gave up. `group`: that of `control_group`.
    """
    import torch
    import torch.distributed as dist

    found = torch.tensor([int(asked), int(error is not None)])
    dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
    anyone, failed = found.tolist()
    if failed:
        errors: list[UserError | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(errors, error, group=group)
        raise next(one for one in errors if one is not None)
    return bool(anyone)


@contextmanager
def told_by_all(group: Any) -> Iterator[None]:
    """All ranks raise the UserError that the first of them raises inside, and none goes on before all are through."""
    error = None
    try:
        yield
    except UserError as fault:
        error = fault
    any_rank(False, error, group)


def control_group() -> Any:
    """Where ranks agree on what to do next, in the host's memory: over NCCL each such question would wait for the GPU.

    One may keep the others waiting: with shards to fetch, a checkpoint to write, pictures to draw.
    """
    import torch

    return torch.distributed.new_group(backend="gloo", timeout=timedelta(hours=2))
