"""Exponential moving averages (EMA) of the weights, in fp32 under every ZeRO stage."""

from typing import Any

import torch
from torch import Tensor

from common.recipe.training import EMA, POWER
from fpdm.ema import constant_decay, power_decay
from pipeline.training.zero import parameter_shards


def ema_decay(name: str, reference_batch: int, before: int, after: int) -> float:
    """The decay of the average called `name` (`EMA.names`) over a step from `before` to `after` samples seen."""
    if name.startswith(POWER):
        return power_decay(float(name.removeprefix(POWER)), before, after)
    return constant_decay(float(name), reference_batch, before, after)


class EMAWeights:
    """The run's EMAs of this rank's parameter shards, by name. Ranks need not communicate: each averages its own."""

    def __init__(self, settings: EMA, engine: Any) -> None:
        self.settings, self.engine = settings, engine
        current = parameter_shards(engine)
        self.shards: dict[str, list[Tensor]] = {
            name: [shard.detach().clone() for shard in current] for name in settings.names
        }

    @torch.no_grad()
    def update(self, before: int, after: int) -> None:
        """Call it after a step that took the samples seen from `before` to `after`."""
        current = [shard.detach() for shard in parameter_shards(self.engine)]
        reference_batch = self.settings.reference_batch
        for name, shards in self.shards.items():
            torch._foreach_lerp_(shards, current, 1 - ema_decay(name, reference_batch, before, after))
