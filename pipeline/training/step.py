"""One training step on this rank's part of the batch: forward, backward, update."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common.recipe import Train
from fpdm.diffusion import Diffusion
from pipeline.training.data import Batch
from pipeline.training.distributed import Ranks
from pipeline.training.engine import propagate_non_finite, update
from pipeline.training.schedule import StepIterations
from pipeline.training.throughput import GROWTH, INTERMEDIATE, LOSSES, RESIDUAL, SUMS, loss_sums

ALLOWED_GROWTH = 0.8  # of a small change near the fixed point, by one iteration


@dataclass(frozen=True)
class StepResult:
    """What one rank knows after a step.

    sums (SUMS,) float64 on the CPU, see `throughput`; the mean residual is this rank's share of it.
    norm: of the gradient over all ranks; not finite where nothing was updated.
    losses (B,): whose mean has this gradient, by sample of this rank's part of the batch.
    """

    sums: Tensor
    norm: float
    losses: Tensor


def train_step(
    engine: Any,
    diffusion: Diffusion,
    batches: list[Batch],
    iterations: StepIterations,
    settings: Train,
    ranks: Ranks,
    watch: Callable[[str], AbstractContextManager[None]],
    *,
    with_residuals: bool,
) -> StepResult:
    """Accumulates the gradients of this rank's micro-batches and updates the weights, unless they are not finite.

    Args:
        engine: DeepSpeed's (`build_engine`), with the step's learning rate set.
        iterations: the same on every rank.
        watch: times the parts of the step (`Stopwatch`).
        with_residuals: also computes the fixed point's residuals, for the log.
    """
    sums, norm = torch.zeros(SUMS, dtype=torch.float64, device=engine.device), math.nan
    all_losses = []
    for number, batch in enumerate(batches, 1):
        with watch("forward"):
            batch = batch.to(engine.device)
            noisy = diffusion.add_noise(batch.latents, batch.noise, batch.timesteps)
            answer = engine(
                noisy,
                batch.timesteps,
                batch.labels,
                iterations=iterations[:2],
                intermediate=iterations.intermediate,
                with_residuals=with_residuals,
                activation_checkpointing=settings.activation_checkpointing,
                with_growth=iterations.with_growth,
                seen=batch.tokens[:, : iterations.tokens(batch.tokens.shape[1])] if iterations.share < 1 else None,
            )
            losses = _losses(diffusion, answer.output, batch)  # (B,)
            sums[LOSSES] += loss_sums(losses, batch.timesteps, diffusion.num_timesteps)
            if answer.residuals is not None:  # (B, n + m)
                sums[RESIDUAL] += answer.residuals[:, -1].double().sum() / settings.batch_size
            if answer.intermediate is not None:
                early = _losses(diffusion, answer.intermediate, batch)
                sums[INTERMEDIATE] += torch.stack([early.detach().double().sum(), sums.new_tensor(len(early))])
                losses = losses + settings.intermediate_loss * early
            if answer.growth is not None:
                sums[GROWTH] += torch.stack([answer.growth.detach().double().sum(), sums.new_tensor(len(losses))])
                losses = losses + settings.contraction * (answer.growth - ALLOWED_GROWTH).relu().square()
            all_losses.append(losses.detach())
        with watch("backward"):
            engine.backward(propagate_non_finite((losses * batch.weights).mean()))
        with watch("optimizer"):
            if number < len(batches):
                engine.step()  # counts the micro-batch
            else:
                norm = update(engine, settings.optimizer.gradient_clipping, ranks)
    return StepResult(sums.cpu(), norm, torch.cat(all_losses))


def _losses(diffusion: Diffusion, output: Tensor, batch: Batch) -> Tensor:
    """(B,) of a network's output."""
    return diffusion.loss(output.float(), batch.latents, batch.noise, batch.timesteps)["loss"]
