"""The sampling loop: a sampler's steps, iterations per step, reuse of solutions, classifier-free guidance.

Reuse: Bai and Melas-Kyriazi (2024), section 3.3. Guidance: Ho and Salimans (2022); on an interval: Kynkäänniemi et al.
(2024); rescaled: Lin et al. (2024), section 3.4.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fpdm import rng
from fpdm.config import DenoiserConfig
from fpdm.denoiser import Denoised, Denoiser
from fpdm.diffusion import Diffusion
from fpdm.fitted import Numbers
from fpdm.fixed_point import Solver
from fpdm.samplers import Sampler, SamplerName, SamplerSettings, adds_noise, build_sampler


def guide(conditional: Tensor, unconditional: Tensor, scale: float, channels: int, rescale: float = 0.0) -> Tensor:
    """u + scale (c - u) on the first `channels` of the outputs (B, C or 2C, H, W), the conditional on the others.

    Args:
        rescale: how far to bring a sample's standard deviation over those channels back to the conditional's, 0 to 1.
    """
    guided = torch.lerp(unconditional[:, :channels], conditional[:, :channels], scale)
    if rescale:
        before, after = (each.flatten(1).std(1)[:, None, None, None] for each in (conditional[:, :channels], guided))
        guided = guided * torch.lerp(torch.ones_like(after), before / after, rescale)
    return torch.cat([guided, conditional[:, channels:]], dim=1)


def guided_steps(
    timesteps: Sequence[float], num_timesteps: int, scale: float, interval: tuple[float, float]
) -> list[bool]:
    """The steps in which guidance acts, and whose blocks it computes twice; arguments as in `sample`."""
    low, high = (bound * num_timesteps for bound in interval)
    return [scale != 1 and low <= t <= high for t in timesteps]


def sample_noise(
    seed: int, index: Tensor, shape: tuple[int, ...], step: int | None = None, stream: str = "sample"
) -> Tensor:
    """Noise (B, *shape) of the samples `index` (B,), a function of (seed, index): of a step, or the starting one."""
    return rng.normal(seed, f"{stream}/noise" if step is None else f"{stream}/step/{step}", index, shape)


def sample(
    model: Denoiser,
    diffusion: Diffusion,
    noise: Tensor,
    labels: Tensor,
    *,
    num_steps: int,
    iterations: Sequence[int] | None = None,
    sampler: SamplerName | Sampler = "ddim",
    sampler_settings: SamplerSettings | None = None,
    step_noise: Callable[[int], Tensor] | None = None,
    reuse: bool | Sequence[bool] = False,
    start_extrapolation: float | Numbers = 0.0,
    relaxation: Numbers | None = None,
    guidance_scale: float = 1.0,
    guidance_rescale: float = 0.0,
    iterate_guidance: float = 0.0,
    weak_iterate: int = 1,
    guidance_channels: int | None = None,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    solver: Solver = "picard",
    tolerance: float | None = None,
    with_residuals: bool = False,
    with_graph: bool = False,
    on_step: Callable[[int, Denoised], None] | None = None,
) -> Tensor:
    """Draw latents. Sample i is a function of its own noise, label and step noise, whatever batch it is in.

    Args:
        noise: (B, C, H, W) starting latents, standard normal; also fixes the device.
        labels: (B,) class labels or (B, condition_dim) vectors.
        num_steps: number of timesteps.
        iterations: FPDM: one count a step, noisiest first (`allocation.allocate`). DiT: None. A step of none reads its
            start out: all but the first may have that, if they reuse.
        sampler, sampler_settings: see `build_sampler`; or a sampler of `num_steps` timesteps itself, without settings.
        step_noise: i -> (B, C, H, W) standard normal noise of step i; needed by "ddpm", and with eta > 0.
            The last step adds none.
        reuse: start each step's iteration at the solution of the step before: always, never, or step by step.
        start_extrapolation: move such a start on by this times the change from the solution before it; one number, or
            one a step. It costs no block.
        relaxation: one number a step, see `fixed_point.solve_implicit`; None: 1 in all.
        guidance_scale: 1 is no guidance, and costs no second half of the batch.
        guidance_rescale: see `guide`.
        iterate_guidance: FPDM: move a prediction on by this times its difference from the one that the iterate after
            `weak_iterate` iterations gives, in steps that have more (after Internal Guidance, 2512.24176). It costs
            the post-layers once more.
        guidance_channels: channels that are guided: None for all C; 3 is what DiT and FPDM published.
        guidance_interval: guide only where t / num_timesteps lies within, 1 being pure noise.
        solver, tolerance, with_residuals: see `fixed_point.solve_implicit`.
        with_graph: for gradients of the latents by numbers of the sampler, the starts and the relaxation; the network's
            blocks are then computed twice, for the sake of memory. A start at a step's own tokens is a constant.
        on_step: called with each step's number and the network's output (with guidance: conditional half first).

    Returns:
        (B, C, H, W) float32 latents.

    Raises:
        ValueError: for arguments that do not fit, and for samples that came out non-finite or constant.
    """
    channels = model.config.in_channels if guidance_channels is None else guidance_channels
    _check(model.config, diffusion, labels)
    check_guidance(model.config.in_channels, channels, guidance_interval)
    steps = build_sampler(diffusion, sampler, num_steps, sampler_settings) if isinstance(sampler, str) else sampler
    guided = guided_steps(steps.timesteps, diffusion.num_timesteps, guidance_scale, guidance_interval)
    counts = _one_a_step("iterations", iterations, num_steps, model.config.kind == "fpdm")
    reused = _one_a_step("reuse", reuse, num_steps, True)
    _check_steps_without_iterations(counts, reused)
    if step_noise is None and isinstance(sampler, str) and adds_noise(sampler, sampler_settings):
        raise ValueError(
            f"step_noise: sampler {sampler!r} adds noise in every step; pass a function of the step number"
        )
    weak = weak_iterates(counts, weak_iterate if iterate_guidance else 0)
    moved_on = _one_a_step("start_extrapolation", start_extrapolation, num_steps, True)
    relaxations = _one_a_step("relaxation", relaxation, num_steps, relaxation is not None)
    x, solution, older = noise.float(), None, None  # the last solution, and the one before it
    with torch.set_grad_enabled(with_graph):
        for i, t in enumerate(steps.timesteps):
            y = torch.cat([labels, model.config.null_condition(labels)]) if guided[i] else labels
            inputs = torch.cat([x, x]) if guided[i] else x
            denoised = model(
                inputs,
                t.expand(len(inputs)) if isinstance(t, Tensor) else torch.full((len(inputs),), t, device=x.device),
                y,
                iterations=counts[i],
                start=_start(solution, older, moved_on[i], len(inputs)) if reused[i] else None,
                solver=solver,
                relaxation=relaxations[i],
                tolerance=tolerance,
                with_residuals=with_residuals,
                activation_checkpointing=with_graph,
                intermediate=weak[i],
            )
            solution, older = denoised.solution, solution
            if on_step is not None:
                on_step(i, denoised)
            output = denoised.output.float()
            if denoised.intermediate is not None:
                output = guide(output, denoised.intermediate.float(), 1 + iterate_guidance, model.config.in_channels)
            if guided[i]:
                conditional, unconditional = output.chunk(2)
                output = guide(conditional, unconditional, guidance_scale, channels, guidance_rescale)
            last = i == num_steps - 1
            x = steps.step(i, output, x, None if last or step_noise is None else step_noise(i))
    require_sound(x)
    return x


def weak_iterates(counts: Sequence[int | None], weak_iterate: int) -> list[int]:
    """The iterate that each step's guidance by iterates reads out beside its last; 0 where a step has no later one."""
    return [weak_iterate if count is not None and count > weak_iterate else 0 for count in counts]


def check_guidance(in_channels: int, channels: int, interval: tuple[float, float]) -> None:
    """Raise a ValueError for an impossible number of guided channels or guidance interval."""
    if not 1 <= channels <= in_channels:
        raise ValueError(f"guidance_channels: {channels} is outside 1..{in_channels}")
    if interval[0] > interval[1]:
        raise ValueError(
            f"guidance_interval: its first bound, {interval[0]:g}, is above its second, {interval[1]:g}; swap them"
        )


def _check(config: DenoiserConfig, diffusion: Diffusion, labels: Tensor) -> None:
    if config.learned_variance != diffusion.learned_variance:
        raise ValueError(
            f"learned_variance: {config.learned_variance} in the model, {diffusion.learned_variance} in the diffusion; "
            "set both to what the model was trained with"
        )
    if not len(labels):
        raise ValueError("labels: none; pass one per sample")
    if config.condition_dim is None and not 0 <= int(labels.min()) <= int(labels.max()) <= config.num_classes:
        raise ValueError(f"labels: {int(labels.min())}..{int(labels.max())} are outside 0..{config.num_classes}")


def _one_a_step(name: str, values: Any, num_steps: int, needed: bool) -> Any:
    if not needed:
        return [None] * num_steps
    if isinstance(values, bool | float | int):
        return [values] * num_steps
    if values is None or len(values) != num_steps:
        given = "None" if values is None else f"{len(values)} values"
        raise ValueError(f"{name}: {given} for {num_steps} steps; pass one value per step, noisiest first")
    return values


def _check_steps_without_iterations(counts: Sequence[int | None], reused: Sequence[bool]) -> None:
    for i, (count, warm) in enumerate(zip(counts, reused, strict=True)):
        if count == 0 and not (warm and i > 0):
            why = "is the first" if i == 0 else "does not start at the last step's solution"
            raise ValueError(f"iterations: step {i} of {list(counts)} has none and {why}; give it at least 1")


def _start(solution: Tensor | None, older: Tensor | None, extrapolation: float | Tensor, batch: int) -> Tensor | None:
    """Where a step starts: the last solution, moved on by a part of its last change.

    Both fit a batch of this size; where guidance has just added a null half there is no earlier one to move on from.
    """
    if solution is None:
        return None
    start = _for_batch(solution, batch)
    moves = isinstance(extrapolation, Tensor) or extrapolation != 0
    if older is None or not moves or len(older) < batch:
        return start
    return start + extrapolation * (start - _for_batch(older, batch))


def _for_batch(solution: Tensor, batch: int) -> Tensor:
    """A solution for a batch that guidance has just doubled (null half second) or halved.

    A new null half starts at the conditional solution: the two differ in the label only.
    """
    if len(solution) == batch:
        return solution
    return solution[:batch] if len(solution) > batch else torch.cat([solution, solution])


class UnsoundError(ValueError):
    """Samples came out non-finite or constant."""


def require_sound(samples: Tensor) -> None:
    """Raise an UnsoundError naming the samples (B, ...) that are non-finite or constant."""
    flat = samples.flatten(1)
    for problem, bad in (("non-finite", ~flat.isfinite().all(1)), ("constant", flat.amax(1) == flat.amin(1))):
        if bad.any():
            rows = bad.nonzero()[:, 0].tolist()
            shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
            raise UnsoundError(
                f"samples: {len(rows)} of {len(samples)} are {problem} (rows {shown}); metrics of them mean nothing"
            )
