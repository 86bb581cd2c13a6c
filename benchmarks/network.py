"""The network's time and memory against the published recurrence, DiT, and the bare matrix products.

    python benchmarks/network.py [--sizes S B XL] [--compile]

For each size, in one run, its contenders taking turns:
  ours       this FPDM, one layer before and one after the implicit one
  published  (a) a plain transcription of the published recurrence with the same parameters: nothing is computed once,
             and the iterations "without gradient" build their graph all the same
  dit        (b) DiT of the same width, 28 layers deep
  products   (c) only the matrix products of ours, preallocated: the limit
A training step is forward and backward, without the optimiser, with the given n and m. Time is the median over the rounds
of each contender; ratios are medians of the rounds' ratios. Memory is the peak of the tensors allocated during the step,
gradients included.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from fpdm import SIZES, Denoiser, DenoiserConfig, build_denoiser
from fpdm.blocks import Block, unpatchify

DIT_DEPTH = 28
AIMS = {"sampling": 0.92, "sampling, compiled": 0.90, "training": 0.90, "memory n=12 m=1": 0.30}


class Published:
    """The published recurrence, transcribed, on the parameters of one of our networks."""

    def __init__(self, model: Denoiser) -> None:
        self.model = model

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, n: int, m: int) -> Tensor:
        model = self.model
        label = model.y_embedder(y)
        c = model.t_embedder(t, x.dtype) + label
        z = model.x_embedder(x) + model.pos_embed
        for block in model.blocks_pre:
            z = plain_block(block, z, label)
        injection = model.block_pre_projection(z)
        with nullcontext():
            for _ in range(n):
                z = self.iterate(z, injection, c)
        z = z.detach() if n else z
        for _ in range(m):
            z = self.iterate(z, injection, c)
        for block in model.blocks_post:
            z = plain_block(block, z, label)
        return unpatchify(model.final_layer(z, label), model.config.patch_size)

    def iterate(self, z: Tensor, injection: Tensor, c: Tensor) -> Tensor:
        fc1, fc2 = self.model.block_fixed_point_projection_fc1, self.model.block_fixed_point_projection_fc2
        hidden = F.linear(torch.cat([z, injection], dim=-1), fc1.weight, fc1.bias)
        return plain_block(self.model.block_fixed_point, fc2(F.gelu(hidden, approximate="tanh")), c)


def plain_block(block: Block, x: Tensor, c: Tensor) -> Tensor:
    parts = block.adaLN_modulation(c).chunk(6, dim=1)
    shift1, scale1, gate1, shift2, scale2, gate2 = (part.unsqueeze(1) for part in parts)
    x = x + gate1 * block.attn(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale1) + shift1)
    return x + gate2 * block.mlp(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale2) + shift2)


class Products:
    """The matrix products of `calls`, counted from the shapes, with operands and results allocated before."""

    def __init__(self, config: DenoiserConfig, batch: int, device: str) -> None:
        tokens, width, heads = config.num_tokens, config.hidden_size, config.num_heads
        rows, hidden = batch * tokens, int(config.mlp_ratio * config.hidden_size)
        attention = [(batch * heads, tokens, width // heads, tokens), (batch * heads, tokens, tokens, width // heads)]
        layers = [(width, 3 * width), (width, width), (width, hidden), (hidden, width)]
        block = attention + [(1, rows, k, n) for k, n in layers]
        self.block = [self._operands(shape, device) for shape in block]
        self.projection = [self._operands((1, rows, *shape), device) for shape in ((width, 2 * width), (2 * width, width))]
        self.once = [self._operands((1, rows, *shape), device) for shape in ((width, width), (width, 2 * width))]

    @staticmethod
    def _operands(shape: tuple[int, int, int, int], device: str) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Of the product itself, and of its two gradients: a (b, m, k) @ b (b, k, n), dc @ b.T, a.T @ dc."""
        batch, m, k, n = shape
        a, b, c = (torch.randn(batch, *size, device=device) for size in ((m, k), (n, k), (m, n)))
        return [(a, b.mT, c), (c, b, torch.empty_like(a)), (c.mT, a, torch.empty_like(b))]

    def __call__(self, outer_depth: int, n: int, m: int, backward: bool) -> None:
        """Products of a call with n iterations without and m with gradient; m of 0 and no backward is sampling."""
        self._run(self.block, outer_depth, backward)
        self._run(self.once, 1, backward)
        for iterations, differentiated in ((n, False), (m, backward)):
            self._run(self.block + self.projection, iterations, differentiated)

    @staticmethod
    def _run(products: list[list[tuple[Tensor, Tensor, Tensor]]], times: int, backward: bool) -> None:
        for _ in range(times):
            for forward, *gradients in products:
                for a, b, out in [forward, *gradients] if backward else [forward]:
                    torch.bmm(a, b, out=out)


def timed(call: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def take_turns(calls: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of every call in every round, after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            seconds = timed(call, device)
            if number:
                times[name].append(seconds)
    return times


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """Most bytes of tensors allocated at once by a call, beyond what was there before."""
    call()  # so that what is kept once and for all is there
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    changes = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    level = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak
