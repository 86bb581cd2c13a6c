"""Measured on a few samples: residual curves, and numbers of a sampler that bring its latents near to their limit.

The limit is what the same network draws from the same noise with many steps and iterations. Everything here takes
`draw`, which is `sample` with all but the fields of a `Way` bound, or `bind`, which makes one of sample numbers (B,):

    def bind(index):
        return functools.partial(sample, model, diffusion, noise_of(index), labels_of(index), guidance_scale=4.0)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fpdm import rng
from fpdm.allocation import allocate, count_blocks
from fpdm.denoiser import Denoised
from fpdm.diffusion import Diffusion
from fpdm.fitted import Coefficients, Numbers
from fpdm.samplers import Sampler, SamplerName, SamplerSettings, adds_noise, build_sampler, usual_settings
from fpdm.sampling import UnsoundError

Draw = Callable[..., Tensor]
Bind = Callable[[Tensor], Draw]
CURVE_REACH = 4  # curves are measured up to this many times the mean number of iterations
LIMIT_STEPS = 128  # of the limit, and at least LIMIT_REACH times those of the way that has most
LIMIT_REACH = 2
LIMIT_ITERATIONS = 4  # in each of them, from the last one's solution
MOVED_ON = 0.5  # by this times its last change: in the limit, and where a fit begins
FIT_ITERATIONS = (1, 2, 3)  # means of a step that are tried beside those of the way to beat
SCREENING = 5  # they are fitted for this part of the updates
FIT_SAMPLES = 128  # that are fitted to; as many judge
FIT_UPDATES = 150
FIT_BATCH = 16
FIT_RATE = 1e-2  # Adam's, of all numbers alike: kept and weights, starts, relaxations, and timesteps as shares of T
FIT_CLIP = 1.0  # of the gradient's norm: a few samples' paths part, and their gradients are huge
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
    start_extrapolation: float | Numbers = 0.0
    relaxation: Numbers | None = None


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The way that `calibrate` chose, and the mean of `distances` to the limit on the samples that judge: of that way,
    and of the one that was to beat.
    """

    way: Way
    error: float
    error_before: float


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
    bind: Bind,
    diffusion: Diffusion,
    way: Way,
    *,
    outer_depth: int,
    samples: int = FIT_SAMPLES,
    updates: int = FIT_UPDATES,
    batch_size: int = 32,
    limit: Way | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Calibration:
    """A sampler fitted to the network, of as many blocks as `way`; `way` itself where that is no nearer to the limit.

    The blocks are spread evenly over steps of about as many iterations as `way` has, and of `FIT_ITERATIONS`. Each is
    fitted (see `fit`) for a part of the updates, and the nearest one for all. Other samples then compare it with `way`:
    it is taken only if there too it is nearer to the limit, by more than chance would make it.

    Args:
        bind: as above.
        diffusion: that of the network.
        way: the way to beat; it says what is spent.
        outer_depth: pre + post.
        samples: those numbered from 0 on choose, as many after them judge.
        updates: of the fit.
        batch_size: samples that are drawn at once; the fit's own batches have `FIT_BATCH`.
        limit: how the limit is drawn; by default `limit_way`.
        report: takes a line now and then, since it takes minutes.

    Raises:
        ValueError: as `sample`; and for a way whose sampler adds noise, which has no limit.
    """
    if way.iterations is None:
        raise ValueError("way: of a DiT, which has no iterations to trade for steps")
    if adds_noise(way.sampler, way.sampler_settings):
        raise ValueError(f"way: {way.sampler} adds noise in its steps, and so has no limit; use one without, and eta 0")
    budget = count_blocks(way.iterations, outer_depth)
    means = dict.fromkeys((sum(way.iterations) / way.num_steps, *FIT_ITERATIONS))
    ways = {start.num_steps: start for mean in means if (start := fit_start(diffusion, budget, mean, outer_depth))}
    limit = limit or limit_way(diffusion, max(way.num_steps, *ways))

    def drawn(way: Way, first: int) -> Tensor:  # (samples, C, H, W)
        index = torch.arange(first, first + samples)
        return torch.cat([bind(part)(**vars(way)) for part in index.split(batch_size)])

    chosen_by, judged_by = (drawn(limit, first) for first in (0, samples))
    report(
        f"limit drawn: {2 * samples} samples of {limit.num_steps} steps of {(limit.iterations or (0,))[0]} iterations"
    )

    def error(way: Way, first: int, limit: Tensor) -> Tensor:
        """(samples,), all infinite where some latents are not finite."""
        try:
            return distances(drawn(way, first), limit)
        except UnsoundError:
            return limit.new_full((samples,), math.inf)

    errors = {}
    for steps, start in ways.items():
        screened = fit(bind, diffusion, start, chosen_by, -(-updates // SCREENING))
        errors[steps] = float(error(screened, 0, chosen_by).mean())
        report(f"{steps} steps of {list(start.iterations or ())} iterations: error {errors[steps]:.3f}, fitted briefly")
    best = min(errors, key=lambda steps: errors[steps])
    found = fit(bind, diffusion, ways[best], chosen_by, updates)
    before, after = (error(each, samples, judged_by) for each in (way, found))
    gains = before - after
    noise = STANDARD_ERRORS * gains.std() / len(gains) ** 0.5
    nearer = bool(gains.mean() > noise and gains.mean() > LEAST_GAIN * before.mean())
    nearer |= bool(after.isfinite().all() and not before.isfinite().all())
    return Calibration(
        way=found if nearer else way,
        error=float((after if nearer else before).mean()),
        error_before=float(before.mean()),
    )


def fit_start(diffusion: Diffusion, block_budget: int, iterations: float, outer_depth: int) -> Way | None:
    """Where a fit begins: multistep of second order, of about so many iterations a step, exactly at the budget.

    None where the budget does not pay for one step's, or pays for more steps than there are timesteps.
    """
    steps = max(1, round(block_budget / (outer_depth + iterations)))
    try:
        counts = allocate("constant", steps, block_budget=block_budget, outer_depth=outer_depth)
        coefficients = linear_form(build_sampler(diffusion, "multistep", steps, usual_settings(diffusion)))
    except ValueError:
        return None
    return Way(
        sampler="fitted",
        sampler_settings=SamplerSettings(coefficients=coefficients),
        num_steps=steps,
        iterations=tuple(counts),
        reuse=True,
        start_extrapolation=(MOVED_ON,) * steps,
        relaxation=(1.0,) * steps,
    )


def linear_form(sampler: Sampler) -> Coefficients:
    """A sampler's numbers, found by letting it act on the unit vectors of its start and of each step's output.

    Args:
        sampler: one without noise that computes in the dtype of what it is given.
    """
    steps = len(sampler.timesteps)
    units = torch.eye(1 + steps, dtype=torch.float64)[:, None, :, None, None]  # each (1, 1 + steps, 1, 1)
    x, before, kept, weights = units[0], units[0].flatten(), [], []
    for i in range(steps):
        x = sampler.step(i, units[1 + i], x, None)
        after = x.flatten()  # of the start, then of each output
        kept.append(float(after[0] / before[0]))
        weights.append(tuple((after - kept[i] * before)[1 : 2 + i].tolist()))
        before = after
    return Coefficients(timesteps=tuple(map(float, sampler.timesteps)), kept=tuple(kept), weights=tuple(weights))


def fit(bind: Bind, diffusion: Diffusion, way: Way, limit: Tensor, updates: int) -> Way:
    """A way of sampler "fitted" whose numbers are fitted to bring the latents near to their limit.

    They are the sampler's coefficients and timesteps, and what each step's start is moved on by and its iteration
    relaxed by; gradients pass through all steps. Batches are a function of the update's number.

    Args:
        bind: as above.
        diffusion: that of the network.
        way: where the fit begins, see `fit_start`.
        limit: (samples, C, H, W) latents of the samples from 0 on.
        updates: of Adam, its rate falling to 0 by a cosine.

    Raises:
        ValueError: as `sample`, of the way where the fit begins.
    """
    numbers = _Numbers(way, diffusion, limit.device)
    optimizer = torch.optim.Adam(numbers.all, lr=FIT_RATE, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, updates))
    for update in range(updates):
        places = torch.arange(FIT_BATCH) + update * FIT_BATCH
        rows = rng.integers(0, "calibrate/batch", places, len(limit))
        try:
            latents = bind(rows)(**vars(numbers.way()), with_graph=True)
        except UnsoundError:
            break  # the numbers went where samples are not finite; whoever compares will not take them
        loss = distances(latents, limit[rows.to(limit.device)]).mean()
        gradients = torch.autograd.grad(loss, numbers.all, allow_unused=True)  # two steps have no start to move on
        for values, gradient in zip(numbers.all, gradients, strict=True):
            values.grad = gradient  # of these alone: the network's weights have none
        norm = torch.nn.utils.clip_grad_norm_(numbers.all, FIT_CLIP)
        if norm.isfinite():  # else some sample's path is too steep for float32
            optimizer.step()
            numbers.clamp()
        schedule.step()
    return numbers.way(fixed=True)


class _Numbers:
    """The numbers of a way, as tensors that are fitted."""

    def __init__(self, way: Way, diffusion: Diffusion, device: torch.device) -> None:
        coefficients = way.sampler_settings.coefficients
        assert coefficients is not None
        assert way.relaxation is not None
        self._way, self._scale = way, diffusion.num_timesteps
        self._last = diffusion.num_timesteps - (not diffusion.is_flow)

        def variable(values: float | Numbers) -> Tensor:
            return torch.as_tensor(values, dtype=torch.float32, device=device).clone().requires_grad_()

        self._times = variable([t / self._scale for t in coefficients.timesteps])
        self._kept, self._weights = variable(coefficients.kept), [variable(row) for row in coefficients.weights]
        self._starts, self._relaxation = variable(way.start_extrapolation), variable(way.relaxation)
        self.all = [self._times, self._kept, *self._weights, self._starts, self._relaxation]

    @torch.no_grad()
    def clamp(self) -> None:
        """Holds the timesteps within those of training."""
        self._times.clamp_(0, self._last / self._scale)

    def way(self, *, fixed: bool = False) -> Way:
        """With the numbers as they are now; `fixed`: as plain ones."""

        def number(values: Tensor) -> Numbers:
            return tuple(values.tolist()) if fixed else values

        coefficients = Coefficients(
            timesteps=number(self._times * self._scale),
            kept=number(self._kept),
            weights=tuple(number(row) for row in self._weights),
        )
        return replace(
            self._way,
            sampler_settings=SamplerSettings(coefficients=coefficients),
            start_extrapolation=number(self._starts),
            relaxation=number(self._relaxation),
        )


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
        start_extrapolation=MOVED_ON,
    )


def distances(latents: Tensor, limit: Tensor) -> Tensor:
    """Of each sample (B,): how far its latents are from the limit's, both (B, C, H, W), relative to their norm.

    Their mean is what is fitted and compared: squares would make it a matter of the few samples whose paths part.
    """
    return (latents - limit).flatten(1).norm(dim=1) / limit.flatten(1).norm(dim=1)
