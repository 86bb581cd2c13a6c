"""Floating-point operations of the network, counted by torch on the meta device: no weights, no run."""

from functools import lru_cache

import torch

from fpdm.config import DenoiserConfig
from fpdm.denoiser import Denoiser


@lru_cache
def forward_flops(config: DenoiserConfig, tokens: int) -> tuple[int, int, int]:
    """Operations of one sample: everything but the iterations, one iteration, reading out one more iterate.

    tokens: how many of the sample's the iterations and the injection see.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model = Denoiser(config)
        latents = torch.empty(1, config.in_channels, config.input_size, config.input_size)
        zero = torch.zeros(1, dtype=torch.long)
        seen = torch.zeros(1, tokens, dtype=torch.long) if tokens < config.num_tokens else None
    counts = []
    for iterations, intermediate in ((1, 0), (2, 0), (2, 1)):
        with FlopCounterMode(display=False) as counter:
            model(latents, zero, zero, iterations=iterations, intermediate=intermediate, seen=seen)
        counts.append(counter.get_total_flops())
    iteration = counts[1] - counts[0]
    return counts[0] - iteration, iteration, counts[2] - counts[1]
