"""Measurements of a step: losses over all ranks, seconds by part, floating-point operations."""

import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import add
from typing import Any

import torch
from torch import Tensor

from common import gpus
from fpdm.config import DenoiserConfig
from fpdm.fixed_point import GROWTH_ITERATIONS
from fpdm.flops import forward_flops
from pipeline.training.schedule import StepIterations

QUARTILES = 4
# What a step sums over the ranks, see `StepResult`: slices of one tensor.
LOSSES = slice(0, 1 + 2 * QUARTILES)  # `loss_sums`
INTERMEDIATE = slice(LOSSES.stop, LOSSES.stop + 2)  # losses of intermediate iterates: their sum and number
GROWTH = slice(INTERMEDIATE.stop, INTERMEDIATE.stop + 2)  # the same of growths
RESIDUAL = GROWTH.stop  # the mean residual of the last iteration
SUMS = RESIDUAL + 1  # numbers


def loss_sums(losses: Tensor, timesteps: Tensor, num_timesteps: int) -> Tensor:
    """(B,) losses and timesteps -> (9,) float64: sum of losses, then sums and counts by quartile of the timestep.

    The first quartile is the one with the least noise. Sums of parts of a batch add up to those of the batch.
    """
    quartile = (timesteps * QUARTILES // num_timesteps).long()  # (B,)
    members = (quartile[None] == torch.arange(QUARTILES, device=losses.device)[:, None]).double()  # (4, B)
    losses = losses.detach().double()
    return torch.cat([losses.sum()[None], torch.where(members > 0, losses, 0).sum(1), members.sum(1)])


@dataclass(frozen=True)
class Interval:
    """Sums over the steps since the last log line and over all ranks; a checkpoint holds them."""

    steps: int = 0  # that updated the weights
    skipped: int = 0
    loss: float = 0.0  # sum of the steps' mean losses
    quartile_losses: Sequence[float] = (0.0,) * QUARTILES
    quartile_counts: Sequence[float] = (0.0,) * QUARTILES
    intermediate_loss: float = 0.0  # sum over samples, and their number
    intermediate_count: float = 0.0
    growth: float = 0.0  # the same of the growth of the fixed point
    growth_count: float = 0.0

    def plus(self, sums: Sequence[float], batch_size: int) -> "Interval":
        """With one more step; `sums` over all ranks: those of `StepResult`."""
        losses, counts = sums[1 : 1 + QUARTILES], sums[1 + QUARTILES : LOSSES.stop]
        (early, early_count), (growth, growth_count) = sums[INTERMEDIATE], sums[GROWTH]
        return Interval(
            steps=self.steps + 1,
            skipped=self.skipped,
            loss=self.loss + sums[0] / batch_size,
            quartile_losses=tuple(map(add, self.quartile_losses, losses)),
            quartile_counts=tuple(map(add, self.quartile_counts, counts)),
            intermediate_loss=self.intermediate_loss + early,
            intermediate_count=self.intermediate_count + early_count,
            growth=self.growth + growth,
            growth_count=self.growth_count + growth_count,
        )

    def means(self) -> dict[str, float | None]:
        """None where there was no sample to take a mean of."""
        quartiles = {
            f"loss_q{number}": total / count if count else None
            for number, (total, count) in enumerate(zip(self.quartile_losses, self.quartile_counts, strict=True), 1)
        }
        early = self.intermediate_loss / self.intermediate_count if self.intermediate_count else None
        loss = self.loss / self.steps if self.steps else None
        growth = self.growth / self.growth_count if self.growth_count else None
        return {"loss": loss, **quartiles, "intermediate_loss": early, "growth": growth, "skipped_steps": self.skipped}


class Stopwatch:
    """Seconds spent in the parts of a step. A GPU's own clock measures them, and only `read` waits for it."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.clock: Callable[[], float] = time.perf_counter  # of the CPU
        self.spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = self._now()
        yield
        self.spans.append((part, start, self._now()))

    def read(self) -> dict[str, float]:
        """Seconds by part since the last reading."""
        if self.on_gpu:
            torch.cuda.synchronize()
        totals: dict[str, float] = {}
        for part, start, end in self.spans:
            seconds = start.elapsed_time(end) / 1e3 if self.on_gpu else end - start
            totals[part] = totals.get(part, 0.0) + seconds
        self.spans.clear()
        return totals

    def _now(self) -> Any:
        if not self.on_gpu:
            return self.clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Throughput:
    """Speed since the last log line or since this process started, whichever is later."""

    def __init__(
        self, peak_tflops: float | None, config: DenoiserConfig, device: torch.device, world_size: int
    ) -> None:
        self.peak_tflops = known_peak() if peak_tflops is None else peak_tflops
        self.config, self.world_size = config, world_size
        self.watch = Stopwatch(device)
        self.start()

    def count(self, samples: int, iterations: StepIterations) -> None:
        self.steps += 1
        self.samples += samples
        self.flops += samples * step_flops(self.config, iterations)

    def read(self) -> dict[str, float | None]:
        """Samples per second over all ranks; seconds per step, by part; TFLOP/s and utilisation of one device."""
        seconds, steps = max(time.perf_counter() - self.started, 1e-9), max(self.steps, 1)
        tflops = self.flops / seconds / self.world_size / 1e12
        speed = {
            "samples_per_second": round(self.samples / seconds, 2),
            "step_seconds": round(seconds / steps, 6),
            **{f"{part}_seconds": round(spent / steps, 6) for part, spent in self.watch.read().items()},
            "memory_gib": round(peak_memory() / 2**30, 3),
            "tflops": float(f"{tflops:.4g}"),
            "flop_utilisation": round(tflops / self.peak_tflops, 4) if self.peak_tflops else None,
        }
        self.start()
        return speed

    def start(self) -> None:
        """Begins a new interval."""
        self.steps, self.samples, self.flops, self.started = 0, 0, 0.0, time.perf_counter()


def peak_memory() -> int:
    """In bytes, of the GPU's allocator or of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def known_peak() -> float | None:
    """TFLOP/s of this machine's GPU; None without a GPU or for one that `common.gpus` lacks."""
    gpu = gpus.named(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return gpu.tflops if gpu else None


def step_flops(config: DenoiserConfig, iterations: StepIterations) -> float:
    """Floating-point operations of one sample's training step: a backward pass counts as two forward passes.

    Recomputation by activation checkpointing is not counted: it is no progress.
    """
    outer, iteration, read_out = forward_flops(config, iterations.tokens(config.num_tokens))
    without_graph, with_graph, intermediate = iterations[:3]
    if iterations.with_growth:
        without_graph, with_graph = without_graph + GROWTH_ITERATIONS, with_graph + 2
    return 3 * outer + (without_graph + 3 * with_graph) * iteration + 3 * bool(intermediate) * read_out
