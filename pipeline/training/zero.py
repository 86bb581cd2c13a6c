"""Gathers complete tensors from DeepSpeed's shards and scatters them back, the same way under every ZeRO stage.

DeepSpeed keeps the fp32 parameters as flat tensors: complete ones at stage 0, this rank's shards of them above.
Adam's moments and an EMA are lists of flat tensors of the same shapes. `gather` and `scatter` convert between such a
list and complete tensors by parameter name. To do so they copy the list over the parameters for a moment: DeepSpeed's
own functions know where every element of a parameter lies.
"""

from collections.abc import Iterator, Sequence
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
    """The optimizer's state by flat parameter."""
    return _wrapped(engine).state


def _wrapped(engine: Any) -> Any:
    """The optimizer itself, which DeepSpeed wraps unless it is one of fp32 at stage 0."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def start_moments(engine: Any, steps: int) -> None:
    """Sets the optimizer's state to `steps` updates and moments of zero; torch would create it at the first update."""
    muon_names = getattr(_wrapped(engine), "matrix_names", ())
    for shard, names in zip(parameter_shards(engine), _names_by_shard(engine), strict=True):
        moments = MOMENTS[:1] if names[0] in muon_names else MOMENTS
        optimizer_state(engine)[shard] = {
            "step": torch.tensor(float(steps)),
            **{name: torch.zeros_like(shard) for name in moments},
        }


def moment_shards(engine: Any, moment: str) -> list[Tensor | None]:
    """Of `parameter_shards`; None where the optimizer has no such moment: Muon has no second."""
    return [optimizer_state(engine)[shard].get(moment) for shard in parameter_shards(engine)]


def gather(engine: Any, shards: Sequence[Tensor | None]) -> dict[str, Tensor]:
    """Complete fp32 tensors on the CPU, by parameter name, from `shards`. A collective; only rank 0 gets them.

    Where a shard is None its parameters are left out.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    complete, tensors = engine.zero_optimization_stage() == 0, {}
    with _in_place_of_parameters(engine, shards), torch.no_grad():
        for name, parameter, shard in _with_shards(engine, shards):
            value = shard if complete else safe_get_full_fp32_param(parameter)
            if engine.global_rank == 0:
                tensors[name] = value.detach().to("cpu", torch.float32).clone()
    return tensors


def scatter(engine: Any, tensors: dict[str, Tensor], shards: Sequence[Tensor | None]) -> None:
    """Writes this rank's part of complete tensors, which every rank has, into `shards`: the inverse of `gather`."""
    complete = engine.zero_optimization_stage() == 0
    with _in_place_of_parameters(engine, shards), torch.no_grad():
        for name, parameter, shard in _with_shards(engine, shards):
            value = tensors[name].to(engine.device)
            shard.copy_(value) if complete else _set_full(parameter, value)


def _with_shards(engine: Any, shards: Sequence[Tensor | None]) -> Iterator[tuple[str, Any, Tensor]]:
    """(name, parameter, the shard that holds it), without the parameters whose shard is None."""
    by_name = {name: shard for names, shard in zip(_names_by_shard(engine), shards, strict=True) for name in names}
    for name, parameter in engine.module.named_parameters():
        shard = by_name[name]
        if shard is not None:
            yield name, parameter, shard


def _names_by_shard(engine: Any) -> list[list[str]]:
    """The names of the parameters that each of `parameter_shards` holds."""
    named, stage = list(engine.module.named_parameters()), engine.zero_optimization_stage()
    if stage == 0:
        ordered = [name for group in engine.optimizer.param_groups for name in group.get("param_names", ())]
        return [[name] for name in ordered or dict(named)]
    names = {id(parameter): name for name, parameter in named}
    groups = engine.optimizer.fp16_groups if stage == 3 else engine.optimizer.bit16_groups
    return [[names[id(parameter)] for parameter in group] for group in groups]


@contextmanager
def _in_place_of_parameters(engine: Any, shards: Sequence[Tensor | None]) -> Iterator[None]:
    """Inside, the engine's fp32 parameters hold the values of `shards`; at the end these get the parameters' values."""
    pairs = zip(parameter_shards(engine), shards, strict=True)
    held = [(parameter.detach(), shard.detach()) for parameter, shard in pairs if shard is not None]
    same = all(parameter.data_ptr() == shard.data_ptr() for parameter, shard in held)
    if same or engine.zero_optimization_stage() == 0:
        yield
        return
    originals = [parameter.clone() for parameter, _ in held]
    for parameter, shard in held:
        parameter.copy_(shard)
    try:
        yield
    finally:
        for (parameter, shard), original in zip(held, originals, strict=True):
            shard.copy_(parameter)
            parameter.copy_(original)


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
