"""Gathers complete tensors from DeepSpeed's shards and scatters them back, the same way under every ZeRO stage.

DeepSpeed keeps the fp32 parameters as flat tensors: complete ones at stage 0, this rank's shards of them above.
Adam's moments and an EMA are lists of flat tensors of the same shapes. `gather` and `scatter` convert between such a
list and complete tensors by parameter name. To do so they copy the list over the parameters for a moment: DeepSpeed's
own functions know where every element of a parameter lies.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's, by torch's names


def parameter_shards(engine: Any) -> list[Tensor]:
    """This rank's flat fp32 parameters themselves: writing to them changes the next step."""
    stage = engine.zero_optimization_stage()
    if stage == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    if stage in (1, 2):
        return list(engine.optimizer.single_partition_of_fp32_groups)
    return [parameter for group in engine.optimizer.param_groups for parameter in group["params"]]


def optimizer_state(engine: Any) -> dict[Tensor, dict[str, Tensor]]:
    """Adam's state by flat parameter. Above stage 0 DeepSpeed wraps torch's optimizer."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer).state


def start_moments(engine: Any, steps: int) -> None:
    """Sets Adam's state to `steps` updates and moments of zero; torch itself would create it at the first update."""
    for shard in parameter_shards(engine):
        optimizer_state(engine)[shard] = {
            "step": torch.tensor(float(steps)),
            **{name: torch.zeros_like(shard) for name in MOMENTS},
        }


def moment_shards(engine: Any, name: str) -> list[Tensor]:
    return [optimizer_state(engine)[shard][name] for shard in parameter_shards(engine)]


def gather(engine: Any, shards: list[Tensor]) -> dict[str, Tensor]:
    """Complete fp32 tensors on the CPU, by parameter name, from `shards`. A collective; only rank 0 gets them."""
    from deepspeed.utils import safe_get_full_fp32_param

    tensors = {}
    with _in_place_of_parameters(engine, shards), torch.no_grad():
        for name, parameter, shard in _with_shards(engine, shards):
            value = safe_get_full_fp32_param(parameter) if shard is None else shard
            if engine.global_rank == 0:
                tensors[name] = value.detach().to("cpu", torch.float32).clone()
    return tensors


def scatter(engine: Any, tensors: dict[str, Tensor], shards: list[Tensor]) -> None:
    """Writes this rank's part of complete tensors, which every rank has, into `shards`: the inverse of `gather`."""
    with _in_place_of_parameters(engine, shards), torch.no_grad():
        for name, parameter, shard in _with_shards(engine, shards):
            value = tensors[name].to(engine.device)
            _set_full(parameter, value) if shard is None else shard.copy_(value)


def _with_shards(engine: Any, shards: list[Tensor]) -> Iterator[tuple[str, Any, Tensor | None]]:
    """(name, parameter, shard); shard is None above stage 0, where shards and parameters do not correspond."""
    complete = engine.zero_optimization_stage() == 0
    for number, (name, parameter) in enumerate(engine.module.named_parameters()):
        yield name, parameter, shards[number] if complete else None


@contextmanager
def _in_place_of_parameters(engine: Any, shards: list[Tensor]) -> Iterator[None]:
    """Inside, the engine's fp32 parameters hold the values of `shards`; at the end these get the parameters' values."""
    parameters = [shard.detach() for shard in parameter_shards(engine)]
    same = all(mine.data_ptr() == shard.data_ptr() for mine, shard in zip(parameters, shards, strict=True))
    if same or engine.zero_optimization_stage() == 0:
        yield
        return
    originals = [parameter.clone() for parameter in parameters]
    _copy(shards, parameters)
    try:
        yield
    finally:
        _copy(parameters, shards)
        _copy(originals, parameters)


def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.detach().copy_(source.detach())


def _set_full(parameter: Any, value: Tensor) -> None:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    if hasattr(parameter, "ds_id"):  # stage 3: equal parts, the last padded
        part = parameter.ds_tensor.numel()
        padded = torch.nn.functional.pad(
            value.flatten(), (0, part * torch.distributed.get_world_size() - value.numel())
        )
        safe_set_local_fp32_param(parameter, padded.narrow(0, part * torch.distributed.get_rank(), part))
    else:
        safe_set_full_fp32_param(parameter, value)
