"""The sampling loop: a sampler's steps, iterations per step, reuse of solutions, classifier-free guidance.

Reuse: Bai and Melas-Kyriazi (2024), section 3.3. Guidance: Ho and Salimans (2022); on an interval: Kynkäänniemi et al.
(2024). Ancestral sampling: Ho et al. (2020), Nichol and Dhariwal (2021); DDIM: Song et al. (2021).
"""

from collections.abc import Callable, Sequence
from itertools import accumulate, repeat
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from fpdm import rng
from fpdm.config import DenoiserConfig
from fpdm.denoiser import Denoised, Denoiser
from fpdm.diffusion import Diffusion, GaussianSchedule, interpolate_log_variance, split_prediction
from fpdm.fixed_point import Solver

# A recipe's field sample.sampler lists these too.
SamplerName = Literal["ddpm", "ddim", "dpm++", "unipc", "flow_euler"]


class Sampler(Protocol):
    """Steps from noise to data: `timesteps`, noisiest first, and the move from one to the next."""

    timesteps: list[float]

    def step(self, i: int, output: Tensor, x: Tensor, noise: Tensor | None) -> Tensor:
        """x (B, C, H, W) at timesteps[i] and the network's output there -> x at the next timestep."""


def spaced_timesteps(num_timesteps: int, num_steps: int) -> list[int]:
    """`num_steps` of range(num_timesteps), evenly from 0 to the last, ascending, as published; one alone is the last.

    Raises:
        ValueError: unless 1 <= num_steps <= num_timesteps.
    """
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(f"num_steps: {num_steps} is outside 1..{num_timesteps}, the timesteps of training")
    if num_steps == 1:
        return [num_timesteps - 1]
    stride = (num_timesteps - 1) / (num_steps - 1)
    return [round(position) for position in accumulate(repeat(stride, num_steps - 1), initial=0.0)]


class GaussianSampler:
    """DDPM and DDIM on a subset of the timesteps, whose process is the original one seen at those timesteps only."""

    def __init__(self, diffusion: Diffusion, num_steps: int, *, implicit: bool, eta: float) -> None:
        kept = spaced_timesteps(diffusion.num_timesteps, num_steps)
        schedule = GaussianSchedule(diffusion.gaussian.alphas_cumprod[kept])
        self.timesteps: list[float] = list(reversed(kept))
        self._prediction = diffusion.prediction
        self._step = self._ddim if implicit else self._ddpm
        self._eta = eta
        self._abar = schedule.alphas_cumprod.tolist()
        self._previous = schedule.alphas_cumprod_previous.tolist()
        self._clean, self._noised = (part.tolist() for part in schedule.posterior_coefficients)
        self._low, self._high = (part.tolist() for part in schedule.log_variance_range)

    def step(self, i: int, output: Tensor, x: Tensor, noise: Tensor | None) -> Tensor:
        """See `Sampler.step`: (B, C, H, W); a noise of None means the mean."""
        k = len(self.timesteps) - 1 - i
        prediction, *variance = output.split(x.shape[1], dim=1)
        signal, sigma = self._abar[k] ** 0.5, (1 - self._abar[k]) ** 0.5
        clean, epsilon = split_prediction(self._prediction, prediction, x, signal, sigma)
        return self._step(k, x, clean, epsilon, variance[0] if variance else None, noise)

    def _ddpm(
        self, k: int, x: Tensor, clean: Tensor, epsilon: Tensor, variance: Tensor | None, noise: Tensor | None
    ) -> Tensor:
        mean = self._clean[k] * clean + self._noised[k] * x
        if k == 0 or noise is None:
            return mean
        if variance is None:
            return mean + noise * self._betas_std(k)
        return mean + noise * (0.5 * interpolate_log_variance(variance, self._low[k], self._high[k])).exp()

    def _betas_std(self, k: int) -> float:
        """Without a learned variance the step's is beta, "fixed large" (Ho et al., section 3.2)."""
        return (1 - self._abar[k] / self._previous[k]) ** 0.5

    def _ddim(
        self, k: int, x: Tensor, clean: Tensor, epsilon: Tensor, variance: Tensor | None, noise: Tensor | None
    ) -> Tensor:
        abar, previous = self._abar[k], self._previous[k]
        sigma = self._eta * ((1 - previous) / (1 - abar) * (1 - abar / previous)) ** 0.5
        mean = previous**0.5 * clean + max(0.0, 1 - previous - sigma**2) ** 0.5 * epsilon
        return mean if k == 0 or noise is None else mean + sigma * noise


class DiffusersSampler:
    """One of diffusers' schedulers, told of our process."""

    def __init__(self, diffusion: Diffusion, num_steps: int, name: SamplerName) -> None:
        self._scheduler = _diffusers_scheduler(diffusion, name)
        if name == "flow_euler":
            self._scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / num_steps, num_steps).tolist())
        else:
            self._scheduler.set_timesteps(num_steps)
        self.timesteps: list[float] = self._scheduler.timesteps.tolist()
        if len(set(self.timesteps)) < num_steps:  # a step of length zero, which these schedulers divide by
            raise ValueError(f"num_steps: {num_steps} of {name!r} repeat a timestep; choose {num_steps - 1} at most")

    def step(self, i: int, output: Tensor, x: Tensor, noise: Tensor | None) -> Tensor:
        """See `Sampler.step`: (B, C, H, W); in order, each i once; no noise is added."""
        prediction = output[:, : x.shape[1]]
        return self._scheduler.step(prediction, self._scheduler.timesteps[i], x).prev_sample


def _diffusers_scheduler(diffusion: Diffusion, name: SamplerName) -> Any:
    import diffusers  # seconds to import

    if name == "flow_euler":
        return diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=diffusion.num_timesteps)
    kind = diffusers.DPMSolverMultistepScheduler if name == "dpm++" else diffusers.UniPCMultistepScheduler
    return kind(
        num_train_timesteps=diffusion.num_timesteps,
        trained_betas=diffusion.gaussian.betas.tolist(),
        prediction_type="v_prediction" if diffusion.prediction == "v" else "epsilon",
        rescale_betas_zero_snr=diffusion.zero_terminal_snr,
    )


def build_sampler(diffusion: Diffusion, name: SamplerName, num_steps: int, eta: float = 0.0) -> Sampler:
    """A sampler by name: "ddpm", "ddim" (with eta), diffusers' "dpm++" and "unipc", and for flow matching "flow_euler".

    Raises:
        ValueError: for an unknown name, one that does not fit the prediction, or an impossible number of steps.
    """
    if name not in get_args(SamplerName):
        raise ValueError(f"sampler: {name!r} is unknown; choose one of {', '.join(get_args(SamplerName))}")
    if (name == "flow_euler") != diffusion.is_flow:
        raise ValueError(
            f"sampler: {name!r} does not fit prediction {diffusion.prediction!r}; flow goes with flow_euler"
        )
    if not 1 <= num_steps <= diffusion.num_timesteps:
        raise ValueError(f"num_steps: {num_steps} is outside 1..{diffusion.num_timesteps}, the timesteps of training")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta: {eta} is outside 0..1")
    if name in ("ddpm", "ddim"):
        return GaussianSampler(diffusion, num_steps, implicit=name == "ddim", eta=eta)
    return DiffusersSampler(diffusion, num_steps, name)


def guide(conditional: Tensor, unconditional: Tensor, scale: float, channels: int) -> Tensor:
    """u + scale (c - u) on the first `channels` of the outputs (B, C or 2C, H, W), the conditional on the others."""
    guided = torch.lerp(unconditional[:, :channels], conditional[:, :channels], scale)
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


@torch.no_grad()
def sample(
    model: Denoiser,
    diffusion: Diffusion,
    noise: Tensor,
    labels: Tensor,
    *,
    num_steps: int,
    iterations: Sequence[int] | None = None,
    sampler: SamplerName = "ddim",
    eta: float = 0.0,
    step_noise: Callable[[int], Tensor] | None = None,
    reuse: bool | Sequence[bool] = False,
    guidance_scale: float = 1.0,
    guidance_channels: int | None = None,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    solver: Solver = "picard",
    tolerance: float | None = None,
    with_residuals: bool = False,
    on_step: Callable[[int, Denoised], None] | None = None,
) -> Tensor:
    """Draw latents. Sample i is a function of its own noise, label and step noise, whatever batch it is in.

    Args:
        noise: (B, C, H, W) starting latents, standard normal; also fixes the device.
        labels: (B,) class labels or (B, condition_dim) vectors.
        num_steps: number of timesteps.
        iterations: FPDM: one count a step, noisiest first (`allocation.allocate`). DiT: None.
        sampler, eta: see `build_sampler`.
        step_noise: i -> (B, C, H, W) standard normal noise of step i; needed by "ddpm", and by "ddim" with eta > 0.
            The last step adds none.
        reuse: start each step's iteration at the solution of the step before: always, never, or step by step.
        guidance_scale: 1 is no guidance, and costs no second half of the batch.
        guidance_channels: channels that are guided: None for all C; 3 is what DiT and FPDM published.
        guidance_interval: guide only where t / num_timesteps lies within, 1 being pure noise.
        solver, tolerance, with_residuals: see `fixed_point.solve_implicit`.
        on_step: called with each step's number and the network's output (with guidance: conditional half first).

    Returns:
        (B, C, H, W) float32 latents.

    Raises:
        ValueError: for arguments that do not fit, and for samples that came out non-finite or constant.
    """
    channels = model.config.in_channels if guidance_channels is None else guidance_channels
    _check(model.config, diffusion, labels)
    check_guidance(model.config.in_channels, channels, guidance_interval)
    steps = build_sampler(diffusion, sampler, num_steps, eta)
    guided = guided_steps(steps.timesteps, diffusion.num_timesteps, guidance_scale, guidance_interval)
    counts = _one_a_step("iterations", iterations, num_steps, model.config.kind == "fpdm")
    reused = [reuse] * num_steps if isinstance(reuse, bool) else _one_a_step("reuse", reuse, num_steps, True)
    if step_noise is None and (sampler == "ddpm" or (sampler == "ddim" and eta > 0)):
        raise ValueError(
            f"step_noise: sampler {sampler!r} adds noise in every step; pass a function of the step number"
        )
    x, solution = noise.float(), None
    for i, t in enumerate(steps.timesteps):
        y = torch.cat([labels, model.config.null_condition(labels)]) if guided[i] else labels
        inputs = torch.cat([x, x]) if guided[i] else x
        denoised = model(
            inputs,
            torch.full((len(inputs),), t, device=x.device),
            y,
            iterations=counts[i],
            start=_fit_start(solution, inputs) if reused[i] else None,
            solver=solver,
            tolerance=tolerance,
            with_residuals=with_residuals,
        )
        solution = denoised.solution
        if on_step is not None:
            on_step(i, denoised)
        output = denoised.output.float()
        if guided[i]:
            conditional, unconditional = output.chunk(2)
            output = guide(conditional, unconditional, guidance_scale, channels)
        last = i == num_steps - 1
        x = steps.step(i, output, x, None if last or step_noise is None else step_noise(i))
    require_sound(x)
    return x


def check_guidance(in_channels: int, channels: int, interval: tuple[float, float]) -> None:
    """Raise a ValueError for an impossible number of guided channels or guidance interval."""
    if not 1 <= channels <= in_channels:
        raise ValueError(f"guidance_channels: {channels} is outside 1..{in_channels}")
    if interval[0] > interval[1]:
        raise ValueError("guidance_interval: its lower bound is above its upper one; give (low, high)")


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


def _one_a_step(name: str, values: Sequence[Any] | None, num_steps: int, needed: bool) -> Sequence[Any]:
    if not needed:
        return [None] * num_steps
    if values is None or len(values) != num_steps:
        given = "None" if values is None else f"{len(values)} values"
        raise ValueError(f"{name}: {given} for {num_steps} steps; pass one value per step, noisiest first")
    return values


def _fit_start(solution: Tensor | None, inputs: Tensor) -> Tensor | None:
    """The previous solution for a batch that guidance has just doubled (null half second) or halved.

    A new null half starts at the conditional solution: the two differ in the label only.
    """
    if solution is None or len(solution) == len(inputs):
        return solution
    return solution[: len(inputs)] if len(solution) > len(inputs) else torch.cat([solution, solution])


def require_sound(samples: Tensor) -> None:
    """Raise a ValueError naming the samples (B, ...) that are non-finite or constant."""
    flat = samples.flatten(1)
    for problem, bad in (("non-finite", ~flat.isfinite().all(1)), ("constant", flat.amax(1) == flat.amin(1))):
        if bad.any():
            rows = bad.nonzero()[:, 0].tolist()
            shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
            raise ValueError(
                f"samples: {len(rows)} of {len(samples)} are {problem} (rows {shown}); metrics of them mean nothing"
            )
