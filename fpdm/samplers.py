"""Samplers: the timesteps of a run from noise to data, and the move from each to the next.

Ancestral sampling: Ho et al. (2020), Nichol and Dhariwal (2021). DDIM: Song et al. (2021). Spacing: Lin et al. (2024),
table 2; Karras et al. (2022), eq. 5.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, repeat
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from fpdm.diffusion import Diffusion, GaussianSchedule, interpolate_log_variance, split_prediction
from fpdm.fitted import Coefficients, FittedSampler
from fpdm.multistep import MultistepSampler

# A recipe's section sample lists these too, but for "fitted", whose numbers `calibration.calibrate` finds.
SamplerName = Literal["ddpm", "ddim", "multistep", "dpm++", "unipc", "flow_euler", "fitted"]
Spacing = Literal["linspace", "trailing", "leading", "log_snr"]
Variance = Literal["small", "large"]
KARRAS_RHO = 7
KARRAS_MAX = 80.0  # noise to signal; a process whose last timestep is pure noise has no finite one


@dataclass(frozen=True, kw_only=True)
class SamplerSettings:
    """A sampler's settings beside its name; `build_sampler` refuses one that the sampler does not use.

    Args:
        spacing: of the timesteps. "linspace": evenly from the first to the last, as published. "trailing": evenly from
            the last, each step as long as the last one, which ends at the data. "leading": the same from the first;
            begins short of pure noise. "log_snr": Karras's.
        spacing_power: of "trailing": timesteps are T (1 - i / steps) ** power; above 1 more of them are near the data.
        eta: noise of "ddim" and "multistep", from 0 to 1, which is as much as ddpm's.
        order: of "multistep": 1 is ddim without noise, 2 and 3 also use one and two earlier predictions.
        variance: of "ddpm" where none is learned: the "large" or the "small" of Ho et al., section 3.2, beta or the
            posterior's. With few steps the one is much too wide, the other too narrow.
        coefficients: of "fitted", which has no other settings.
    """

    spacing: Spacing = "linspace"
    spacing_power: float = 1.0
    eta: float = 0.0
    order: int = 2
    variance: Variance = "small"
    coefficients: Coefficients | None = None

    @classmethod
    def stored(cls, values: Mapping[str, Any]) -> "SamplerSettings":
        """Of JSON values, as `dataclasses.asdict` gives them. Raises KeyError, TypeError or ValueError for others."""
        stored = values.get("coefficients")
        if stored is not None:
            rows = tuple(tuple(row) for row in stored["weights"])
            stored = Coefficients(timesteps=tuple(stored["timesteps"]), kept=tuple(stored["kept"]), weights=rows)
        return cls(**{**values, "coefficients": stored})


def usual_settings(diffusion: Diffusion) -> SamplerSettings:
    """Those with which multistep suits the diffusion."""
    return SamplerSettings(spacing="trailing" if diffusion.is_flow else "linspace")


class Sampler(Protocol):
    """Steps from noise to data: `timesteps`, noisiest first, and the move from one to the next."""

    timesteps: list[float]

    def step(self, i: int, output: Tensor, x: Tensor, noise: Tensor | None) -> Tensor:
        """x (B, C, H, W) at timesteps[i] and the network's output there -> x at the next timestep."""


def spaced_timesteps(
    num_timesteps: int,
    num_steps: int,
    spacing: Spacing = "linspace",
    power: float = 1.0,
    noise_to_signal: Tensor | None = None,
) -> list[int]:
    """`num_steps` of range(num_timesteps), distinct and ascending; see `SamplerSettings`.

    Args:
        noise_to_signal: (num_timesteps,) sigma / signal, of "log_snr".

    Raises:
        ValueError: unless 1 <= num_steps <= num_timesteps.
    """
    last = num_timesteps - 1
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(f"num_steps: {num_steps} is outside 1..{num_timesteps}, the timesteps of training")
    if num_steps == 1:
        return [last]
    if spacing == "linspace":
        return [round(place) for place in accumulate(repeat(last / (num_steps - 1), num_steps - 1), initial=0.0)]
    if spacing == "leading":
        return [i * num_timesteps // num_steps for i in range(num_steps)]
    if spacing == "trailing":
        ascending = ((i / num_steps) ** power for i in range(1, num_steps + 1))
        return _distinct([round(num_timesteps * place) - 1 for place in ascending], num_timesteps)
    assert noise_to_signal is not None
    ratios = noise_to_signal.clamp_max(KARRAS_MAX)
    lowest, highest = (float(ratios[t]) ** (1 / KARRAS_RHO) for t in (0, last))
    roots = torch.linspace(lowest, highest, num_steps, dtype=torch.float64)
    inner = torch.searchsorted(ratios.contiguous(), (roots**KARRAS_RHO)[1:-1].contiguous())  # the next noisier ones
    return _distinct([0, *inner.tolist(), last], num_timesteps)


def _distinct(ascending: list[int], num_timesteps: int) -> list[int]:
    """The same, each moved as little as needed to be distinct and within range(num_timesteps)."""
    kept: list[int] = []
    for place, t in enumerate(ascending):
        least, most = kept[-1] + 1 if kept else 0, num_timesteps - len(ascending) + place
        kept.append(min(max(t, least), most))
    return kept


class GaussianSampler:
    """DDPM and DDIM on a subset of the timesteps, whose process is the original one seen at those timesteps only."""

    def __init__(self, diffusion: Diffusion, kept: list[int], settings: SamplerSettings, *, implicit: bool) -> None:
        schedule = GaussianSchedule(diffusion.gaussian.alphas_cumprod[kept])
        self.timesteps: list[float] = list(reversed(kept))
        self._prediction = diffusion.prediction
        self._step = self._ddim if implicit else self._ddpm
        self._eta, self._variance = settings.eta, settings.variance
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
            return mean + noise * math.exp(0.5 * (self._low[k] if self._variance == "small" else self._high[k]))
        return mean + noise * (0.5 * interpolate_log_variance(variance, self._low[k], self._high[k])).exp()

    def _ddim(
        self, k: int, x: Tensor, clean: Tensor, epsilon: Tensor, variance: Tensor | None, noise: Tensor | None
    ) -> Tensor:
        abar, previous = self._abar[k], self._previous[k]
        sigma = self._eta * ((1 - previous) / (1 - abar) * (1 - abar / previous)) ** 0.5
        mean = previous**0.5 * clean + max(0.0, 1 - previous - sigma**2) ** 0.5 * epsilon
        return mean if k == 0 or noise is None else mean + sigma * noise


class DiffusersSampler:
    """One of diffusers' schedulers, set to this process."""

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
        prediction_type={"v": "v_prediction", "epsilon": "epsilon", "clean": "sample"}[diffusion.prediction],
        rescale_betas_zero_snr=diffusion.zero_terminal_snr,
    )


def build_sampler(
    diffusion: Diffusion, name: SamplerName, num_steps: int, settings: SamplerSettings | None = None
) -> Sampler:
    """A sampler by name: "ddpm", "ddim", "multistep", diffusers' "dpm++" and "unipc", its "flow_euler" for flow
    matching, which "multistep" suits too, and "fitted", by its coefficients.

    Raises:
        ValueError: for an unknown name, one that does not fit the prediction, an impossible number of steps, or a
            setting that this sampler has not.
    """
    settings = settings or SamplerSettings()
    _check_sampler(diffusion, name, num_steps, settings)
    if name == "fitted":
        assert settings.coefficients is not None
        return FittedSampler(settings.coefficients)
    if name in ("dpm++", "unipc", "flow_euler"):
        return DiffusersSampler(diffusion, num_steps, name)
    if diffusion.is_flow:
        places = [(1 - i / num_steps) ** settings.spacing_power for i in range(num_steps)]
        timesteps = [diffusion.num_timesteps * place for place in places]
        return MultistepSampler(diffusion, timesteps, settings.order, settings.eta)
    abar = diffusion.gaussian.alphas_cumprod
    ratios = ((1 - abar) / abar).sqrt()
    kept = spaced_timesteps(diffusion.num_timesteps, num_steps, settings.spacing, settings.spacing_power, ratios)
    if name == "multistep":
        return MultistepSampler(diffusion, [float(t) for t in reversed(kept)], settings.order, settings.eta)
    return GaussianSampler(diffusion, kept, settings, implicit=name == "ddim")


def _check_sampler(diffusion: Diffusion, name: SamplerName, num_steps: int, settings: SamplerSettings) -> None:
    if name not in get_args(SamplerName):
        raise ValueError(f"sampler: {name!r} is unknown; choose one of {', '.join(get_args(SamplerName))}")
    _check_coefficients(name, num_steps, settings)
    if name not in ("multistep", "fitted") and (name == "flow_euler") != diffusion.is_flow:
        raise ValueError(
            f"sampler: {name!r} does not fit prediction {diffusion.prediction!r}; "
            + ("choose 'flow_euler' or 'multistep'" if diffusion.is_flow else "'flow_euler' is of prediction 'flow'")
        )
    if not 1 <= num_steps <= diffusion.num_timesteps:
        raise ValueError(f"num_steps: {num_steps} is outside 1..{diffusion.num_timesteps}, the timesteps of training")
    if not 0 <= settings.eta <= 1:
        raise ValueError(f"eta: {settings.eta} is outside 0..1")
    if settings.spacing not in get_args(Spacing):
        raise ValueError(f"spacing: {settings.spacing!r} is unknown; choose one of {', '.join(get_args(Spacing))}")
    if settings.order not in (1, 2, 3):
        raise ValueError(f"order: {settings.order} is not 1, 2 or 3")
    if settings.order != SamplerSettings.order and name != "multistep":
        raise ValueError(f"order: {settings.order} is of sampler multistep, not {name}; leave it out")
    if settings.variance not in get_args(Variance):
        raise ValueError(f"variance: {settings.variance!r} is unknown; choose one of {', '.join(get_args(Variance))}")
    if settings.variance != SamplerSettings.variance and (name != "ddpm" or diffusion.learned_variance):
        raise ValueError("variance: is of sampler ddpm where none is learned; leave it out")
    if settings.spacing_power <= 0:
        raise ValueError(f"spacing_power: {settings.spacing_power} must be positive")
    if settings.spacing_power != 1 and settings.spacing != "trailing":
        raise ValueError(
            f"spacing_power: only of spacing 'trailing', and here it is {settings.spacing!r}; leave it at 1"
        )
    if diffusion.is_flow and name == "multistep" and settings.spacing != "trailing":
        raise ValueError(f"spacing: {settings.spacing!r} does not fit flow; set it to 'trailing'")
    if name in ("dpm++", "unipc", "flow_euler", "fitted") and settings.spacing != "linspace":
        raise ValueError(f"spacing: {name!r} has one of its own; leave it out, or use the sampler multistep")
    if settings.eta and name not in ("ddim", "multistep"):
        raise ValueError(f"eta: {settings.eta:g} is of samplers ddim and multistep, not {name}; leave it at 0")


def _check_coefficients(name: SamplerName, num_steps: int, settings: SamplerSettings) -> None:
    if (name == "fitted") != (settings.coefficients is not None):
        raise ValueError(
            "sampler: 'fitted' needs the coefficients that calibrate finds; name another, such as 'multistep'"
            if name == "fitted"
            else f"coefficients: are of sampler fitted, not {name}; leave them out"
        )
    if settings.coefficients is not None and len(settings.coefficients.timesteps) != num_steps:
        raise ValueError(
            f"num_steps: {num_steps}, and the sampler was fitted for {len(settings.coefficients.timesteps)}; take "
            "those, or another sampler, such as 'multistep'"
        )


def adds_noise(name: SamplerName, settings: SamplerSettings | None = None) -> bool:
    """Whether the sampler draws noise in its steps."""
    return name == "ddpm" or bool(settings and settings.eta)
