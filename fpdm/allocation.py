"""How many fixed point iterations each timestep gets, under a budget that is spent exactly.

Bai and Melas-Kyriazi (2024), section 3.3. The paper contradicts itself on which end of the process an "increasing"
allocation favours, so the ramps here are named by the end that gets more. All lists are noisiest first.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

# A recipe's field sample.allocation lists these too, and "calibrated" (`calibration.calibrate`).
AllocationKind = Literal["constant", "more_at_noise", "more_at_data", "list", "adaptive"]
MEASURED = ("adaptive", "calibrated")  # allocations that are measured on the weights
RAMP = 0.5  # a ramp runs from 1 + RAMP to 1 - RAMP times the mean


def allocate(
    kind: str,
    num_steps: int,
    iterations: int | float | Sequence[int] | None = None,
    *,
    block_budget: int | None = None,
    outer_depth: int = 0,
    residuals: Tensor | None = None,
) -> list[int]:
    """Iterations for each of `num_steps` timesteps, noisiest first, that spend the budget exactly.

    Each step has at least 1. Only "constant" with a mean below 1 and "list" give some steps none, which then read out
    what the steps before found (`sample` with reuse), and never the first.

    Args:
        kind: "constant", as even as whole numbers allow; "more_at_noise" and "more_at_data", linear ramps; "list", the
            list in `iterations`; "adaptive", every step until its residual falls to one threshold, the least that the
            budget allows.
        num_steps: number of timesteps.
        iterations: the mean per step (times num_steps it must be an integer), or the list for "list".
        block_budget: instead of a mean, the number of block evaluations: (pre + iterations + post) summed over the
            steps. With "list" it is only checked.
        outer_depth: pre + post layers, which the block budget includes.
        residuals: (num_steps, K) for "adaptive": relative residual at each step of iteration 1..K.

    Raises:
        ValueError: naming the argument that is missing, unknown or impossible, with the numbers.
    """
    if kind not in get_args(AllocationKind):
        raise ValueError(f"kind: {kind!r} is unknown; choose one of {', '.join(get_args(AllocationKind))}")
    if num_steps < 1:
        raise ValueError(f"num_steps: {num_steps} must be at least 1")
    if kind == "list":
        return _checked_list(num_steps, iterations, block_budget, outer_depth)
    least = 1 if kind == "constant" else num_steps
    total = _total(num_steps, iterations, block_budget, outer_depth, least)
    if kind == "constant":
        return _constant(num_steps, total)
    if kind in ("more_at_noise", "more_at_data"):
        ramp = _ramp(num_steps, total)
        return ramp if kind == "more_at_noise" else ramp[::-1]
    return _adaptive(_checked_residuals(residuals, num_steps, total), total)


def count_blocks(iterations: Sequence[int], outer_depth: int) -> int:
    """Block evaluations of an allocation: (pre + iterations + post) summed over the steps, the paper's unit."""
    return sum(iterations) + outer_depth * len(iterations)


def _total(
    num_steps: int,
    iterations: int | float | Sequence[int] | None,
    block_budget: int | None,
    outer_depth: int,
    least: int,
) -> int:
    """Total iterations of the allocation, at least `least`."""
    if (iterations is None) == (block_budget is None):
        raise ValueError("iterations, block_budget: give exactly one of the two")
    if block_budget is not None:
        total = block_budget - outer_depth * num_steps
        if total < least:
            raise ValueError(
                f"block_budget: {block_budget} is too small for {num_steps} steps of {outer_depth} outer layers and at "
                f"least {least} iterations; {least + num_steps * outer_depth} is the least"
            )
        return total
    if not isinstance(iterations, int | float):
        raise ValueError(f"iterations: {iterations!r}: only allocation 'list' takes a list; name one number")
    total = round(iterations * num_steps)
    if abs(iterations * num_steps - total) > 1e-6:
        raise ValueError(
            f"iterations: a mean of {iterations} over {num_steps} steps is {iterations * num_steps:g}, not a whole "
            f"number; {total / num_steps:g} is the nearest"
        )
    if total < least:
        raise ValueError(f"iterations: a mean of {iterations} is below the floor of {least} in {num_steps} steps")
    return total


def _checked_list(
    num_steps: int, iterations: int | float | Sequence[int] | None, block_budget: int | None, outer_depth: int
) -> list[int]:
    if iterations is None or isinstance(iterations, int | float):
        raise ValueError(f"iterations: {iterations!r} is not a list; kind 'list' needs one")
    if len(iterations) != num_steps:
        raise ValueError(
            f"iterations: {len(iterations)} values for {num_steps} steps; pass one per step, noisiest first"
        )
    counts = [int(count) for count in iterations]
    if counts != list(iterations) or min(counts) < 0 or counts[0] < 1:
        raise ValueError(f"iterations: {list(iterations)} must be whole numbers of at least 0, and 1 in the first step")
    if block_budget is not None and count_blocks(counts, outer_depth) != block_budget:
        raise ValueError(f"block_budget: {block_budget}, but the list takes {count_blocks(counts, outer_depth)}")
    return counts


def _constant(num_steps: int, total: int) -> list[int]:
    """As even as possible, with the larger counts spread evenly; the first step has one of the ones among zeros."""
    counts = [end - start for start, end in pairwise(i * total // num_steps for i in range(num_steps + 1))]
    return counts if counts[0] else counts[::-1]


def _ramp(num_steps: int, total: int) -> list[int]:
    """Falling linearly, rounded by largest remainders, which keeps it monotone."""
    mean = total / num_steps
    positions = [1 - 2 * i / max(1, num_steps - 1) for i in range(num_steps)]  # 1 at the noisiest step, -1 at the last
    above_floor = [max(0.0, mean * (1 + RAMP * position) - 1) for position in positions]
    spare = total - num_steps
    scale = spare / sum(above_floor) if spare else 0.0
    quotas = [scale * weight for weight in above_floor]
    counts = [1 + int(quota) for quota in quotas]
    by_remainder = sorted(range(num_steps), key=lambda i: int(quotas[i]) - quotas[i])  # stable: noisier first
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _checked_residuals(residuals: Tensor | None, num_steps: int, total: int) -> Tensor:
    if residuals is None:
        raise ValueError("residuals: kind 'adaptive' needs curves (num_steps, K); measure them with measure_residuals")
    if residuals.ndim != 2 or len(residuals) != num_steps:
        raise ValueError(f"residuals: shape {tuple(residuals.shape)} is not ({num_steps} steps, K)")
    if not residuals.isfinite().all():
        raise ValueError("residuals: the curves hold a non-finite number; the iteration diverged")
    if total > residuals.numel():
        raise ValueError(
            f"residuals: the budget of {total} iterations exceeds {num_steps} steps x {residuals.shape[1]} measured; "
            f"measure at least {-(-total // num_steps)}"
        )
    return residuals.double().cpu()


def _adaptive(curves: Tensor, total: int) -> list[int]:
    """Up to the first residual within one threshold (paper v1, supplement C); what is left goes to the worst steps."""
    steps, longest = curves.shape

    def counts_at(threshold: float) -> Tensor:
        reached = curves <= threshold
        return torch.where(reached.any(1), 1 + reached.int().argmax(1), longest)

    thresholds = curves.flatten().unique()
    low, high = 0, len(thresholds) - 1  # at the greatest threshold every step takes one iteration, which is affordable
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if counts_at(float(thresholds[middle])).sum() <= total else (middle + 1, high)
    counts = counts_at(float(thresholds[low]))
    for _ in range(total - int(counts.sum())):
        reached = curves[torch.arange(steps), counts - 1].masked_fill(counts == longest, -torch.inf)
        counts[reached.argmax()] += 1
    return counts.tolist()
