"""Measured on a few batches: residual curves, where reuse pays, and how best to split a budget into steps.

Everything here takes `draw`, which is `sample` with all but steps and iterations bound:

    draw = functools.partial(sample, model, diffusion, noise, labels, sampler="ddim", guidance_scale=4.0)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fpdm.allocation import allocate
from fpdm.denoiser import Denoised

Draw = Callable[..., Tensor]
CURVE_REACH = 4  # curves are measured up to this many times the mean number of iterations


def measure_residuals(draw: Draw, iterations: Sequence[int], reuse: bool | Sequence[bool] = False) -> list[Tensor]:
    """Relative residuals of every iteration along a sampling run, mean over the batch.

    Args:
        draw: `sample`, bound to an FPDM and to a few batches' noise and labels.
        iterations: counts, one a step, noisiest first.
        reuse: as in `sample`.

    Returns:
        One (iterations[i],) float32 tensor a step.

    Raises:
        ValueError: as `sample`; and for a DiT, which has no iterations.
    """
    curves: list[Tensor] = []

    def on_step(i: int, denoised: Denoised) -> None:
        if denoised.residuals is None:
            raise ValueError("draw: its model is a DiT, which has no fixed point iteration to measure")
        curves.append(denoised.residuals.mean(0))

    draw(num_steps=len(iterations), iterations=iterations, reuse=reuse, with_residuals=True, on_step=on_step)
    return curves


def choose_reuse(draw: Draw, iterations: Sequence[int]) -> list[bool]:
    """For every step, whether starting at the last step's solution gave a smaller last residual than starting anew.

    Reuse helps below about four iterations and hurts at five to eight (paper, Fig. 6a), so it is worth measuring.
    Arguments and errors as `measure_residuals`.
    """
    cold, warm = (measure_residuals(draw, iterations, reuse) for reuse in (False, True))
    return [bool(reused[-1] < fresh[-1]) for fresh, reused in zip(cold, warm, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The best way found to spend a budget: arguments of `sample`, and the relative error of every number of steps."""

    num_steps: int
    iterations: list[int]
    reuse: list[bool]
    errors: dict[int, float]


def calibrate(
    draw: Draw,
    *,
    block_budget: int,
    outer_depth: int,
    step_choices: Sequence[int],
    reference_steps: int,
    reference_iterations: int,
) -> Calibration:
    """Split a budget of block evaluations into steps and iterations, from a few samples.

    For each number of steps: measure the residual curves, allocate the iterations that minimise the summed residual,
    choose where to reuse. Sums of residuals cannot compare different numbers of steps, whose discretisation errors
    differ; so each candidate draws the samples, and the one nearest to a finer reference from the same noise is taken.

    Args:
        draw: as above, with a deterministic sampler (not "ddpm").
        block_budget: (pre + iterations + post) summed over the steps.
        outer_depth: pre + post.
        step_choices: numbers of steps to try.
        reference_steps, reference_iterations: of the reference; finer than every candidate.

    Raises:
        ValueError: as `allocate` and `sample`; and without step_choices.
    """
    if not step_choices:
        raise ValueError("step_choices: empty; give at least one number of steps")
    reference = draw(num_steps=reference_steps, iterations=[reference_iterations] * reference_steps)
    errors: dict[int, float] = {}
    plans: dict[int, tuple[list[int], list[bool]]] = {}
    for num_steps in step_choices:
        counts = _least_residual(draw, num_steps, block_budget, outer_depth)
        reuse = choose_reuse(draw, counts)
        latents = draw(num_steps=num_steps, iterations=counts, reuse=reuse)
        errors[num_steps] = float((latents - reference).norm() / reference.norm())
        plans[num_steps] = counts, reuse
    best = min(errors, key=lambda num_steps: errors[num_steps])
    return Calibration(num_steps=best, iterations=plans[best][0], reuse=plans[best][1], errors=errors)


def _least_residual(draw: Draw, num_steps: int, block_budget: int, outer_depth: int) -> list[int]:
    even = allocate("constant", num_steps, block_budget=block_budget, outer_depth=outer_depth)
    longest = min(CURVE_REACH * max(even), sum(even) - num_steps + 1)
    curves = torch.stack(measure_residuals(draw, [longest] * num_steps))  # (num_steps, longest)
    return allocate("calibrated", num_steps, block_budget=block_budget, outer_depth=outer_depth, residuals=curves)
