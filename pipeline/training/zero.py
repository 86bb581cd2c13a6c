"""Whole tensors in and out of DeepSpeed's shards, the same way under every ZeRO stage.

DeepSpeed keeps the fp32 parameters as flat tensors: whole ones at stage 0, this rank's part of them above. What runs
parallel to them, element by element (Adam's moments, an exponential moving average), is here a list of flat tensors of
the same shapes. `gather` makes named whole tensors of such a list and `scatter` puts them back, by letting them take
the parameters' place for a moment: DeepSpeed's own functions know where every element of a parameter lies.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's, by torch's names


def parameter_shards(engine: Any) -> list[Tensor]:
    """This rank's flat fp32 parameters. They are the live ones: writing to them changes the next step."""
    stage = engine.zero_optimization_stage()
    if stage == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    if stage in (1, 2):
        return list(engine.optimizer.single_partition_of_fp32_groups)
    return [parameter for group in engine.optimizer.param_groups for parameter in group["params"]]


def optimizer_state(engine: Any) -> dict[Tensor, dict[str, Tensor]]:
    """Adam's state by flat parameter; DeepSpeed wraps torch's optimizer above stage 0."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer).state


def start_moments(engine: Any, steps: int) -> None:
    """Makes Adam's state as after `steps` updates, with moments of zero: torch itself makes it at the first update."""
    for shard in parameter_shards(engine):
        optimizer_state(engine)[shard] = {
            "step": torch.tensor(float(steps)),
            **{name: torch.zeros_like(shard) for name in MOMENTS},
        }


def moment_shards(engine: Any, name: str) -> list[Tensor]:
    return [optimizer_state(engine)[shard][name] for shard in parameter_shards(engine)]


def gather(engine: Any, shards: list[Tensor]) -> dict[str, Tensor]:
    """Whole fp32 tensors on the CPU by parameter name, from flat ones. All ranks must call it; rank 0 gets them."""
    from deepspeed.utils import safe_get_full_fp32_param

    whole = {}
    with _in_place_of_parameters(engine, shards), torch.no_grad():
        for name, parameter, shard in _with_shards(engine, shards):
            value = safe_get_full_fp32_param(parameter) if shard is None else shard
            if engine.global_rank == 0:
                whole[name] = value.detach().to("cpu", torch.float32).clone()
    return whole


def scatter(engine: Any, whole: dict[str, Tensor], shards: list[Tensor]) -> None:
    """Writes this rank's part of whole tensors into flat ones: the inverse of `gather`, on every rank."""
    with _in_place_of_parameters(engine, shards), torch.no_grad():
        for name, parameter, shard in _with_shards(engine, shards):
            value = whole[name].to(engine.device)
            _set_full(parameter, value) if shard is None else shard.copy_(value)


def _with_shards(engine: Any, shards: list[Tensor]) -> Iterator[tuple[str, Any, Tensor | None]]:
    """(name, parameter, shard): at stage 0, where nothing is in parts, shards are whole tensors; None above it."""
    whole = engine.zero_optimization_stage() == 0
    for number, (name, parameter) in enumerate(engine.module.named_parameters()):
        yield name, parameter, shards[number] if whole else None


@contextmanager
def _in_place_of_parameters(engine: Any, shards: list[Tensor]) -> Iterator[None]:
    """Inside, the engine's fp32 parameters hold the numbers of `shards`; what is written to them ends in `shards`."""
    parameters = [shard.detach() for shard in parameter_shards(engine)]
    themselves = all(one.data_ptr() == other.data_ptr() for one, other in zip(parameters, shards, strict=True))
    if themselves or engine.zero_optimization_stage() == 0:
        yield
        return
    kept = [parameter.clone() for parameter in parameters]
    _copy(shards, parameters)
    try:
        yield
    finally:
        _copy(parameters, shards)
        _copy(kept, parameters)


def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.detach().copy_(source.detach())


def _set_full(parameter: Any, value: Tensor) -> None:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    if hasattr(parameter, "ds_id"):  # stage 3: equal parts, the last one padded
        part = parameter.ds_tensor.numel()
        padded = torch.nn.functional.pad(
            value.flatten(), (0, part * torch.distributed.get_world_size() - value.numel())
        )
        safe_set_local_fp32_param(parameter, padded.narrow(0, part * torch.distributed.get_rank(), part))
    else:
        safe_set_full_fp32_param(parameter, value)
