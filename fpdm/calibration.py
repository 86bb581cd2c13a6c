"""Measured on a few batches: residual curves, where reuse pays, and how best to split a budget into steps.

Everything here takes `draw`, which is `sample` with all but steps and iterations bound:

    draw = functools.partial(sample, model, diffusion, noise, labels, sampler="ddim", guidance_scale=4.0)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fpdm.allocation import allocate
from fpdm.denoiser import Denoised

Draw = Callable[..., Tensor]
Reuse = Literal["always", "none", "calibrated"]  # a recipe's sample.reuse lists these too
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


def allocate_measured(
    draw: Draw, kind: str, num_steps: int, *, block_budget: int, outer_depth: int, reuse: bool = False
) -> list[int]:
    """`allocate` by "adaptive" or "calibrated", on residual curves that it measures.

    Arguments and errors as `allocate`, `draw` and `reuse` as `measure_residuals`.
    """
    even = allocate("constant", num_steps, block_budget=block_budget, outer_depth=outer_depth)
    longest = min(CURVE_REACH * max(even), sum(even) - num_steps + 1)
    curves = torch.stack(measure_residuals(draw, [longest] * num_steps, reuse))  # (num_steps, longest)
    return allocate(kind, num_steps, block_budget=block_budget, outer_depth=outer_depth, residuals=curves)


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
    reuse: Reuse = "calibrated",
) -> Calibration:
    """Split a budget of block evaluations into steps and iterations, from a few samples.

    For each number of steps: measure the residual curves and allocate the iterations that minimise the summed residual.
    Sums of residuals cannot compare different numbers of steps, whose discretisation errors differ; so each candidate
    draws the samples, and the one nearest to a finer reference from the same noise is taken.

    Args:
        draw: as above, with a deterministic sampler (not "ddpm").
        block_budget: (pre + iterations + post) summed over the steps.
        outer_depth: pre + post.
        step_choices: numbers of steps to try.
        reference_steps, reference_iterations: of the reference; finer than every candidate.
        reuse: of the last step's solution: "always", "none", or "calibrated", where `choose_reuse` says so.

    Raises:
        ValueError: as `allocate` and `sample`; and without step_choices.
    """
    if not step_choices:
        raise ValueError("step_choices: empty; give at least one number of steps")
    reference = draw(num_steps=reference_steps, iterations=[reference_iterations] * reference_steps)
    errors: dict[int, float] = {}
    plans: dict[int, tuple[list[int], list[bool]]] = {}
    for num_steps in step_choices:
        counts = allocate_measured(
            draw,
            "calibrated",
            num_steps,
            block_budget=block_budget,
            outer_depth=outer_depth,
            reuse=reuse == "always",
        )
        reused = choose_reuse(draw, counts) if reuse == "calibrated" else [reuse == "always"] * num_steps
        latents = draw(num_steps=num_steps, iterations=counts, reuse=reused)
        errors[num_steps] = float((latents - reference).norm() / reference.norm())
        plans[num_steps] = counts, reused
    best = min(errors, key=lambda num_steps: errors[num_steps])
    return Calibration(num_steps=best, iterations=plans[best][0], reuse=plans[best][1], errors=errors)
