"""Measured on a few samples: residual curves, and the way of sampling at a budget that comes nearest to the limit.

The limit is what the same network draws from the same noise with many steps and iterations. Everything here takes
`draw`, which is `sample` with all but the fields of a `Way` bound:

    draw = functools.partial(sample, model, diffusion, noise, labels, guidance_scale=4.0)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import torch
from torch import Tensor

from fpdm.allocation import allocate, count_blocks
from fpdm.denoiser import Denoised
from fpdm.diffusion import Diffusion
from fpdm.samplers import SamplerName, SamplerSettings, Spacing, adds_noise, build_sampler

Draw = Callable[..., Tensor]
Point = tuple[float, int, tuple[Spacing, float], float | None]  # of each of `Choices` one value
CURVE_REACH = 4  # curves are measured up to this many times the mean number of iterations
LIMIT_STEPS = 128  # of the limit, and at least LIMIT_REACH times those of the way that has most
LIMIT_REACH = 2
LIMIT_ITERATIONS = 8  # in each of them, from the last one's solution
TOGETHER = ((0,), (1, 2), (3,))  # positions in a `Point` that are varied at once: a spacing suits an order
STANDARD_ERRORS = 2.0  # a gain below this many of them is noise,
LEAST_GAIN = 0.01  # and one below this share of the error is not worth another way


@dataclass(frozen=True, kw_only=True)
class Way:
    """How an image's blocks are spent: arguments of `sample`, `sample(..., **vars(way))`."""

    sampler: SamplerName
    sampler_settings: SamplerSettings
    num_steps: int
    iterations: tuple[int, ...] | None  # one number a step; None of a DiT
    reuse: bool
    start_extrapolation: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What `calibrate` combines, each with each.

    Args:
        iterations: means of a step; the number of steps follows from the budget. Below 1 some steps have none.
        orders: of the multistep sampler; 1 is DDIM.
        spacings: with their power.
        starts: start_extrapolation of reused solutions; None is no reuse.
    """

    iterations: tuple[float, ...] = (0.5, 1, 1.5, 2, 3, 4, 6, 8)
    orders: tuple[int, ...] = (1, 2, 3)
    spacings: tuple[tuple[Spacing, float], ...] = (
        ("linspace", 1.0),
        ("trailing", 1.0),
        ("trailing", 1.3),
        ("trailing", 1.6),
        ("trailing", 2.0),
    )
    starts: tuple[float | None, ...] = (None, 0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The way that `calibrate` chose, and errors relative to the limit, on the samples that judge: of that way, of the
    one that was to beat, and how many were tried.
    """

    way: Way
    error: float
    error_before: float
    tried: int


def measure_residuals(draw: Draw, way: Way) -> list[Tensor]:
    """Relative residuals of every iteration along a sampling run, mean over the batch: (iterations[i],) of step i.

    Raises:
        ValueError: as `sample`; and for a DiT, which has no iterations.
    """
    curves: list[Tensor] = []

    def on_step(i: int, denoised: Denoised) -> None:
        if denoised.residuals is None:
            raise ValueError("draw: its model is a DiT, which has no fixed point iteration to measure")
        curves.append(denoised.residuals.mean(0))

    draw(**vars(way), with_residuals=True, on_step=on_step)
    return curves


def allocate_adaptively(draw: Draw, way: Way) -> Way:
    """The same way, its iterations spread anew by `allocate`'s "adaptive", on residual curves that it measures.

    Arguments and errors as `measure_residuals`.
    """
    total, steps = sum(way.iterations or ()), way.num_steps
    longest = min(CURVE_REACH * -(-total // steps), total - steps + 1)
    curves = torch.stack(measure_residuals(draw, replace(way, iterations=(longest,) * steps)))  # (steps, longest)
    return replace(way, iterations=tuple(allocate("adaptive", steps, block_budget=total, residuals=curves)))


def calibrate(
    draw: Draw,
    judge: Draw,
    diffusion: Diffusion,
    way: Way,
    *,
    outer_depth: int,
    choices: Choices | None = None,
    limit: Way | None = None,
) -> Calibration:
    """Among ways of as many blocks, the one whose latents lie nearest to the limit; `way` itself where none is nearer.

    Steps with iterations, order with spacing, and start: each is varied with the best of the others, until none of
    them changes. What is found is compared with `way` on other samples, and taken only if there too it is nearer to
    the limit, by more than chance would make it.

    Args:
        draw: as above, of the samples that choose.
        judge: the same of other samples.
        diffusion: that of both.
        way: the way to beat; it says what is spent.
        outer_depth: pre + post.
        choices: what is tried. Of it is left out what does not fit the budget or the diffusion.
        limit: how the limit is drawn; by default `limit_way`.

    Raises:
        ValueError: as `sample`; for a way whose sampler adds noise, which has no limit; and if nothing fits.
    """
    if way.iterations is None:
        raise ValueError("way: of a DiT, which has no iterations to trade for steps")
    if adds_noise(way.sampler, way.sampler_settings):
        raise ValueError(f"way: {way.sampler} adds noise in its steps, and so has no limit; use one without, and eta 0")
    ways = fitting_ways(diffusion, choices or Choices(), count_blocks(way.iterations, outer_depth), outer_depth)
    if not ways:
        raise ValueError("choices: none fits the budget and the diffusion")
    most = max(each.num_steps for each in (way, *ways.values()))
    limit = limit or limit_way(diffusion, most)
    chosen_by, judged_by = (each(**vars(limit)) for each in (draw, judge))  # (B, C, H, W)

    @cache
    def error(way: Way) -> float:  # several points may be one way
        return float(_distances(draw, way, chosen_by).mean())

    found = ways[_descend(list(ways), lambda point: error(ways[point]))]
    before, after = (_distances(judge, each, judged_by) for each in (way, found))
    gains = before - after  # (B,)
    noise = STANDARD_ERRORS * gains.std() / len(gains) ** 0.5
    nearer = bool(gains.mean() > noise and gains.mean() > LEAST_GAIN * before.mean())
    nearer |= bool(after.isfinite().all() and not before.isfinite().all())
    return Calibration(
        way=found if nearer else way,
        error=float((after if nearer else before).mean()),
        error_before=float(before.mean()),
        tried=error.cache_info().currsize,
    )


def fitting_ways(diffusion: Diffusion, choices: Choices, block_budget: int, outer_depth: int) -> dict[Point, Way]:
    """The ways among `choices` that spend the budget exactly and suit the diffusion, by their values in `choices`."""
    ways = {}
    for point in product(choices.iterations, choices.orders, choices.spacings, choices.starts):
        mean, order, (spacing, power), start = point
        num_steps = max(1, round(block_budget / (outer_depth + mean)))
        settings = SamplerSettings(order=order, spacing=spacing, spacing_power=power)
        try:
            counts = allocate("constant", num_steps, block_budget=block_budget, outer_depth=outer_depth)
            build_sampler(diffusion, "multistep", num_steps, settings)
        except ValueError:
            continue
        if start is None and 0 in counts:
            continue
        ways[point] = Way(
            sampler="multistep",
            sampler_settings=settings,
            num_steps=num_steps,
            iterations=tuple(counts),
            reuse=start is not None,
            start_extrapolation=start or 0.0,
        )
    return ways


def limit_way(diffusion: Diffusion, most_steps: int = 0) -> Way:
    """So many steps and iterations that more of them hardly change the latents; for ways of up to `most_steps`.

    Near the data they are close: evenly spaced, even 200 steps are far from their limit, since the last one jumps.
    """
    num_steps = min(max(LIMIT_STEPS, LIMIT_REACH * most_steps), diffusion.num_timesteps)
    return Way(
        sampler="multistep",
        sampler_settings=SamplerSettings(spacing="trailing", spacing_power=2.0, order=3),
        num_steps=num_steps,
        iterations=(LIMIT_ITERATIONS,) * num_steps,
        reuse=True,
    )


def distances(draw: Draw, way: Way, limit: Tensor) -> Tensor:
    """Of each sample (B,): how far its latents are from the limit's (B, C, H, W), relative to their norm.

    Their mean is what `calibrate` compares: squares would make it a matter of the few samples whose paths part.
    """
    return (draw(**vars(way)) - limit).flatten(1).norm(dim=1) / limit.flatten(1).norm(dim=1)


def _distances(draw: Draw, way: Way, limit: Tensor) -> Tensor:
    """As `distances`; infinite for a way whose latents are not finite."""
    try:
        return distances(draw, way, limit)
    except ValueError:  # all else that `sample` refuses, it refused of the limit
        return limit.new_full((len(limit),), math.inf)


def _descend(points: list[Point], error: Callable[[Point], float]) -> Point:
    """From the middle of the points along some axes at a time, to where none leads to a smaller error."""
    axes = range(len(points[0]))
    values = (list(dict.fromkeys(point[axis] for point in points)) for axis in axes)
    middle = tuple(each[len(each) // 2] for each in values)
    best, before = middle if middle in points else points[0], None
    while best != before:
        before = best
        for varied in TOGETHER:
            near = (point for point in points if all(point[axis] == best[axis] for axis in axes if axis not in varied))
            best = min(near, key=error)
    return best
