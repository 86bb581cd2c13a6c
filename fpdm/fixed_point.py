"""The implicit layer: solvers for x = f(x), and Stochastic Jacobian-Free Backpropagation.

Bai and Melas-Kyriazi, "Fixed Point Diffusion Models" (CVPR 2024), sections 3.1-3.2 and Algorithm 1. Which gradient is
taken is a matter of the counts (n without, m with graph): S-JFB draws both, (n, 1) is one-step JFB (Fung et al., 2022),
a constant (n, m) is multi-step JFB.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fpdm import rng

Solver = Literal["picard", "anderson"]  # a recipe's sample.solver lists these too
Iterations = int | tuple[int, int]
# (iterate (b, T, D), rows (b,) of the batch that it holds or None for all) -> next iterate (b, T, D)
Step = Callable[[Tensor, Tensor | None], Tensor]

GROWTH_ITERATIONS = 20  # without a graph, before growth is measured
GROWTH_CHANGE = 1e-2  # relative to the iterate
ANDERSON_WINDOW = 5
ANDERSON_REGULARISATION = 1e-6


class Solution(NamedTuple):
    """Where the iteration ended: value (B, T, D); residuals (B, count), NaN where a sample had finished, or None; the
    iterate (B, T, D) after `intermediate` iterations, or None.
    """

    value: Tensor
    residuals: Tensor | None
    intermediate: Tensor | None = None


def sjfb_counts(seed: int, step: int, max_no_grad: int, max_grad: int) -> tuple[int, int]:
    """The counts of a training step, n ~ U{0..max_no_grad} without and m ~ U{1..max_grad} with graph (Algorithm 1).

    A function of (seed, step) alone: every rank draws the same pair, so none waits for another's longer iteration.

    Raises:
        ValueError: if max_no_grad < 0 or max_grad < 1 (without a graph there is no gradient).
    """
    if max_no_grad < 0:
        raise ValueError(f"max_no_grad: {max_no_grad} is negative; choose 0 or more")
    if max_grad < 1:
        raise ValueError(f"max_grad: {max_grad} leaves no iteration to differentiate; choose 1 or more")
    both = rng.integers(seed, "sjfb", torch.tensor([step]), (max_no_grad + 1) * max_grad)
    return int(both) // max_grad, 1 + int(both) % max_grad


def intermediate_iterate(seed: int, step: int, with_graph: int) -> int:
    """The iterate j ~ U{1..with_graph - 1} that a training step reads out beside its last, by (seed, step); 0: none."""
    return 1 + int(rng.integers(seed, "intermediate", torch.tensor([step]), with_graph - 1)) if with_graph > 1 else 0


def solve_implicit(
    step: Step,
    start: Tensor,
    iterations: Iterations,
    *,
    solver: Solver = "picard",
    relaxation: float | Tensor | None = None,
    tolerance: float | None = None,
    with_residuals: bool = False,
    intermediate: int = 0,
) -> Solution:
    """Iterate from `start`, first n times without a graph, then m times with one; an int k means (0, k).

    `step` and `start` may depend on parameters and inputs; in training the start is a constant (Algorithm 1).

    Args:
        step: the map, see `Step`.
        start: (B, T, D).
        iterations: k or (n, m).
        solver: "picard", the plain iteration of the paper, or "anderson" (Walker and Ni, 2011).
        relaxation: of picard: x moves to x + relaxation (f(x) - x), a number; None is 1, the iteration as it is.
        tolerance: a sample whose relative residual falls to this is finished and leaves the batch; for an int only.
        with_residuals: return ||f(x) - x|| / ||f(x)|| of every iteration and sample.
        intermediate: also return the iterate after this many of the m iterations, with its graph; 0: none.

    Raises:
        ValueError: for a negative count, an unknown solver, a relaxation of Anderson, a tolerance with a pair of
            counts, or an `intermediate` outside 1..m - 1, or together with Anderson or a tolerance.
    """
    n, m = (0, iterations) if isinstance(iterations, int) else iterations
    if min(n, m) < 0:
        raise ValueError(f"iterations: {iterations} holds a negative count; choose 0 or more")
    if solver not in ("picard", "anderson"):
        raise ValueError(f"solver: {solver!r} is unknown; choose 'picard' or 'anderson'")
    if relaxation is not None and solver != "picard":
        raise ValueError(f"relaxation: is of solver picard, not {solver}; leave it out")
    if tolerance is not None and not isinstance(iterations, int):
        raise ValueError(
            f"tolerance: {tolerance} stops samples early, but iterations {iterations} fixes the counts; pass an int"
        )
    if intermediate and not (0 < intermediate < m and solver == "picard" and tolerance is None):
        raise ValueError(f"intermediate: {intermediate} is not in 1..{m - 1} of fixed counts of picard")
    iterate = partial(_iterate, step, solver=solver, relaxation=relaxation, with_residuals=with_residuals)
    with torch.no_grad():
        value, first = iterate(start, n)
    early, between = iterate(value if n else start, intermediate)
    value, second = iterate(early, m - intermediate, tolerance=tolerance)
    residuals = torch.cat([first, between, second], dim=1) if with_residuals else None
    return Solution(value, residuals, early if intermediate else None)


def _iterate(
    step: Step,
    start: Tensor,
    count: int,
    *,
    solver: Solver,
    relaxation: float | Tensor | None,
    with_residuals: bool,
    tolerance: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The last iterate (B, T, D) and the residuals (B, count), NaN where they were not needed."""
    value, rows = start, None
    mixer = _AndersonMixer() if solver == "anderson" else None
    residuals = start.new_full((len(start), count), torch.nan, dtype=torch.float32)
    for k in range(count):
        x = value if rows is None else value[rows]
        image = step(x, rows)
        if mixer is not None:
            update = mixer.mix(x, image)
        else:
            update = image if relaxation is None else torch.lerp(x, image, relaxation)
        value = update if rows is None else value.index_copy(0, rows, update)
        if tolerance is None and not with_residuals:
            continue
        residual = relative_residual(x, image)
        residuals[slice(None) if rows is None else rows, k] = residual
        if tolerance is None:
            continue
        running = ~(residual <= tolerance)  # a NaN keeps running, and is reported, instead of counting as finished
        if running.all():
            continue
        rows = running.nonzero()[:, 0] if rows is None else rows[running]
        if mixer is not None:
            mixer.keep(running)
        if not len(rows):
            break
    return value, residuals


def relative_residual(x: Tensor, image: Tensor) -> Tensor:
    """||f(x) - x|| / ||f(x)|| of each sample: two (B, T, D) -> (B,) float32, without graph."""
    image, x = image.detach().flatten(1).float(), x.detach().flatten(1).float()
    return (image - x).norm(dim=1) / image.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)


def growth(step: Step, near: Tensor) -> Tensor:
    """How much an iteration enlarges a small change of the fixed point, (B,) float32, with the step's graph.

    The change has the direction of the last of `GROWTH_ITERATIONS` iterations, where what dies out slowest, or grows,
    is left (a power iteration). Below 1 the iteration comes to rest; training may ask for it, as STARS asks for a
    small spectral radius (arXiv 2605.26733, 2026).

    Args:
        step: the map, see `Step`.
        near: (B, T, D) where the iteration has come to.
    """
    with torch.no_grad():
        before = x = near
        for _ in range(GROWTH_ITERATIONS):
            before, x = x, step(x, None)
        change = (x - before).float()  # (B, T, D)
        size, length = _norm(x), _norm(change)  # (B,)
        scale = torch.where(length > 1e-12 * size, GROWTH_CHANGE * size / length, 0)  # 0: at rest, to the last bit
        moved = x + (scale[:, None, None] * change).to(x.dtype)
    return _norm(step(moved, None) - step(x, None)) / _norm(moved - x).clamp_min(torch.finfo(torch.float32).tiny)


def _norm(x: Tensor) -> Tensor:
    """(B, T, D) -> (B,) float32."""
    return x.flatten(1).float().norm(dim=1)


class _AndersonMixer:
    """Combines the last images so that the combination's residual is least (Walker and Ni, 2011, eq. 2.2)."""

    def __init__(self) -> None:
        self.images: list[Tensor] = []
        self.residuals: list[Tensor] = []

    def mix(self, x: Tensor, image: Tensor) -> Tensor:
        self.images = [*self.images, image][-ANDERSON_WINDOW:]
        self.residuals = [*self.residuals, image - x][-ANDERSON_WINDOW:]
        residuals = torch.stack(self.residuals, dim=1).flatten(2).double()  # (B, window, T * D)
        gram = residuals @ residuals.mT
        scale = gram.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None].clamp_min(torch.finfo(torch.float64).tiny)
        identity = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
        weights = torch.linalg.solve(gram / scale + ANDERSON_REGULARISATION * identity, gram.new_ones(gram.shape[:2]))
        weights = (weights / weights.sum(dim=1, keepdim=True)).to(image.dtype)
        return torch.einsum("bw,wbtd->btd", weights, torch.stack(self.images))

    def keep(self, running: Tensor) -> None:
        """Forget the samples that have finished."""
        self.images = [image[running] for image in self.images]
        self.residuals = [residual[running] for residual in self.residuals]
