"""Forward processes, what the network predicts of them, and the losses.

Linear schedule and ancestral posterior: Ho et al. (2020). Cosine, learned-range variance and the hybrid loss: Nichol
and Dhariwal (2021). Zero terminal SNR and v under it: Lin et al. (2024), Salimans and Ho (2022). Flow matching with
straight paths: Lipman et al. (2023), Liu et al. (2023). Min-SNR: Hang et al. (2023). The clean latents as prediction
under the loss of v: Li and He, "Back to basics: let denoising generative models denoise" (2025).
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

MIN_SNR_GAMMA = 5.0
LEAST_SIGMA = 0.1  # of the loss weight "velocity": nearer to the data every error would weigh more than all others
LOG_FLOOR = 1e-12


@dataclass(frozen=True, eq=False)
class GaussianSchedule:
    """The numbers of a discrete Gaussian process, one a timestep, float64: all derived from alphas_cumprod (T,)."""

    alphas_cumprod: Tensor

    @property
    def alphas_cumprod_previous(self) -> Tensor:
        """(T,) of the timestep before; 1 before the first."""
        return torch.cat([self.alphas_cumprod.new_ones(1), self.alphas_cumprod[:-1]])

    @property
    def betas(self) -> Tensor:
        """(T,) variance added in a step."""
        return 1 - self.alphas_cumprod / self.alphas_cumprod_previous

    @property
    def posterior_coefficients(self) -> tuple[Tensor, Tensor]:
        """Of x0 and of x_t in the mean of q(x_{t-1} | x_t, x0), (T,) each; eq. 7 of Ho et al."""
        previous, variance = self.alphas_cumprod_previous, 1 - self.alphas_cumprod
        clean = self.betas * previous.sqrt() / variance
        return clean, (1 - previous) * (1 - self.betas).sqrt() / variance

    @property
    def log_variance_range(self) -> tuple[Tensor, Tensor]:
        """(T,) logs of a step's least (posterior) and greatest (beta) variance; the first zero takes the second's."""
        posterior = self.betas * (1 - self.alphas_cumprod_previous) / (1 - self.alphas_cumprod)
        return torch.cat([posterior[1:2], posterior[1:]]).log(), self.betas.log()


@dataclass(frozen=True, kw_only=True)
class Diffusion:
    """A forward process, its prediction target and its loss; a ValueError names the field that does not fit.

    Args:
        prediction: "epsilon" (the noise), "v" (sqrt(abar) noise - sqrt(1 - abar) x0), "clean" (x0), or "flow" (noise -
            x0). The demo's network learned "clean" faster (docs/speedrun.md), as Li and He find.
        loss_weight: of the squared error of the prediction; "none" is plain. "p2" is what the released FPDM code does
            with v, abar sqrt(1 - abar): it is exactly zero at t = T - 1 under zero terminal SNR, so that the first step
            of sampling is never trained. "min_snr" is zero there too, for v. "velocity" weighs errors of the clean
            latents as if they were those of v that they imply, 1 / (1 - abar), 100 at most.
    """

    schedule: Literal["linear", "cosine", "flow"] = "linear"
    num_timesteps: int = 1000
    zero_terminal_snr: bool = False
    prediction: Literal["epsilon", "v", "clean", "flow"] = "epsilon"
    learned_variance: bool = True
    loss_weight: Literal["none", "p2", "min_snr", "velocity"] = "none"

    def __post_init__(self) -> None:
        for field, allowed in (
            ("schedule", ("linear", "cosine", "flow")),
            ("prediction", ("epsilon", "v", "clean", "flow")),
            ("loss_weight", ("none", "p2", "min_snr", "velocity")),
        ):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field}: {getattr(self, field)!r} is unknown; choose one of {', '.join(allowed)}")
        if self.num_timesteps < 2:
            raise ValueError(f"num_timesteps: {self.num_timesteps} is too few; choose 2 or more")
        if (self.schedule == "flow") != (self.prediction == "flow"):
            raise ValueError(
                f"prediction: {self.prediction!r} does not fit schedule {self.schedule!r}; set both to 'flow' or none"
            )
        if self.is_flow and self.learned_variance:
            raise ValueError("learned_variance: flow matching has no variance to learn; set it to False")
        if self.is_flow and self.loss_weight != "none":
            raise ValueError(f"loss_weight: {self.loss_weight!r} is not defined for flow matching; choose 'none'")
        if self.zero_terminal_snr and self.prediction not in ("v", "clean"):
            raise ValueError(
                f"zero_terminal_snr: with no signal left, prediction {self.prediction!r} says nothing of x0; choose "
                "'v' or 'clean'"
            )
        if self.loss_weight == "velocity" and self.prediction != "clean":
            raise ValueError(
                f"loss_weight: 'velocity' weighs clean predictions, not {self.prediction!r}; choose 'none' or 'min_snr'"
            )
        if self.loss_weight == "p2" and self.prediction != "v":
            raise ValueError(
                f"loss_weight: 'p2' weighs v predictions, not {self.prediction!r}; choose 'none' or 'min_snr'"
            )

    @property
    def is_flow(self) -> bool:
        """Whether this is flow matching, which has no discrete schedule."""
        return self.prediction == "flow"

    @property
    def gaussian(self) -> GaussianSchedule:
        """The discrete process, tables (T,) in float64 on the CPU; a ValueError for flow matching, which has none."""
        if self.is_flow:
            raise ValueError("schedule: flow matching has no discrete Gaussian process")
        return _gaussian(self)

    def timesteps(self, u: Tensor) -> Tensor:
        """Timesteps to train at from uniforms u (B,) in [0, 1): integers 0..T-1; for flow continuous, in [0, T)."""
        return u * self.num_timesteps if self.is_flow else (u * self.num_timesteps).long()

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t of clean latents and noise (B, C, H, W) at timesteps t (B,)."""
        signal, sigma = self._signal_and_sigma(t)
        return signal * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network is to predict, (B, C, H, W)."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "flow":
            return noise - x0
        if self.prediction == "clean":
            return x0
        signal, sigma = self._signal_and_sigma(t)
        return signal * noise - sigma * x0

    def clean(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The clean latents (B, C, H, W) that an output (B, C or 2C, H, W) implies at x_t, x (B, C, H, W), t (B,)."""
        prediction = output[:, : x.shape[1]]
        signal, sigma = self._signal_and_sigma(t if self.is_flow else t.long())
        if self.is_flow:
            return x - sigma * prediction
        return split_prediction(self.prediction, prediction, x, signal, sigma)[0]

    def loss(self, output: Tensor, x0: Tensor, noise: Tensor, t: Tensor) -> dict[str, Tensor]:
        """Per-sample losses, in float32 whatever the output's dtype.

        Args:
            output: (B, C, H, W), or (B, 2C, H, W) with learned variance, the network's at `add_noise(x0, noise, t)`.
            x0, noise: (B, C, H, W).
            t: (B,) from `timesteps`.

        Returns:
            "mse" (B,): squared error of the prediction, mean over (C, H, W), times the loss weight. With learned
            variance also "vb" (B,): the variational term in bits a dimension, which trains the variance alone (Nichol
            and Dhariwal, eq. 16). "loss" (B,): their sum.

        Raises:
            ValueError: if the output has not the channels that learned_variance implies.
        """
        channels = x0.shape[1] * (2 if self.learned_variance else 1)
        if output.shape[1] != channels:
            raise ValueError(
                f"output: {output.shape[1]} channels, but learned_variance {self.learned_variance} on "
                f"{x0.shape[1]}-channel latents needs {channels}"
            )
        prediction, *variance = output.float().split(x0.shape[1], dim=1)
        error = (prediction - self.target(x0, noise, t)).square().flatten(1).mean(1)
        mse = error if self.loss_weight == "none" else error * self._table("loss_weight", t)
        if not variance:
            return {"loss": mse, "mse": mse}
        vb = self._variational_bound(prediction.detach(), variance[0], x0, self.add_noise(x0, noise, t), t)
        return {"loss": mse + vb, "mse": mse, "vb": vb}

    def _variational_bound(self, prediction: Tensor, variance: Tensor, x0: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """KL of the model's step from the posterior's, bits a dimension; at t = 0 the decoder's -log2 p(x0 | x1)."""

        def at(name: str) -> Tensor:
            return self._table(name, t)[:, None, None, None]

        signal, sigma = self._signal_and_sigma(t)
        clean, _ = split_prediction(self.prediction, prediction, x, signal, sigma)
        low, high = at("log_variance_low"), at("log_variance_high")
        log_variance = interpolate_log_variance(variance, low, high)
        mean = at("posterior_clean") * clean + at("posterior_noised") * x
        true_mean = at("posterior_clean") * x0 + at("posterior_noised") * x
        ratio = low - log_variance
        kl = 0.5 * (ratio.exp() - 1 - ratio + (true_mean - mean).square() * (-log_variance).exp())
        terms = torch.where(t[:, None, None, None] == 0, _decoder_nll(x0, mean, log_variance), kl)
        return terms.flatten(1).mean(1) / math.log(2)

    def _signal_and_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Factors (B, 1, 1, 1) float32 of x0 and of the noise in x_t."""
        if self.is_flow:
            sigma = (t.float() / self.num_timesteps)[:, None, None, None]
            return 1 - sigma, sigma
        return self._table("signal", t)[:, None, None, None], self._table("sigma", t)[:, None, None, None]

    def _table(self, name: str, t: Tensor) -> Tensor:
        return _tables(self, t.device)[name][t]


@lru_cache(maxsize=16)
def _gaussian(diffusion: Diffusion) -> GaussianSchedule:
    """Kept: samplers ask for it at each of their timesteps."""
    steps = diffusion.num_timesteps
    if diffusion.schedule == "linear":
        # 1e-4 to 0.02 are those of 1000 steps; as many more or fewer end as near to pure noise (ADM and DiT).
        betas = torch.linspace(1e-4, 0.02, steps, dtype=torch.float64, device="cpu") * (1000 / steps)
        alphas_cumprod = (1 - betas.clamp_max(0.999)).cumprod(0)
    else:
        angles = (torch.arange(steps + 1, dtype=torch.float64, device="cpu") / steps + 0.008) / 1.008 * (math.pi / 2)
        squares = angles.cos() ** 2
        alphas_cumprod = (squares[1:] / squares[:-1]).clamp_min(1e-3).cumprod(0)
    if diffusion.zero_terminal_snr:
        # Lin et al., algorithm 1: shift sqrt(abar) to end at 0, scale it to begin as before.
        roots = alphas_cumprod.sqrt()
        alphas_cumprod = ((roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))) ** 2
    return GaussianSchedule(alphas_cumprod)


@lru_cache(maxsize=16)
def _tables(diffusion: Diffusion, device: torch.device) -> dict[str, Tensor]:
    """The training tables as float32 on a device; kept, because copying them in each step would wait for the device."""
    gaussian = diffusion.gaussian
    abar = gaussian.alphas_cumprod
    posterior_clean, posterior_noised = gaussian.posterior_coefficients
    low, high = gaussian.log_variance_range
    tables = {
        "signal": abar.sqrt(),
        "sigma": (1 - abar).sqrt(),
        "posterior_clean": posterior_clean,
        "posterior_noised": posterior_noised,
        "log_variance_low": low,
        "log_variance_high": high,
        "loss_weight": _loss_weight(diffusion, abar),
    }
    return {name: table.float().to(device) for name, table in tables.items()}


def _loss_weight(diffusion: Diffusion, abar: Tensor) -> Tensor:
    if diffusion.loss_weight == "none":
        return torch.ones_like(abar)
    if diffusion.loss_weight == "p2":
        return abar * (1 - abar).sqrt()
    if diffusion.loss_weight == "velocity":
        return 1 / (1 - abar).clamp_min(LEAST_SIGMA**2)
    snr = abar / (1 - abar)
    unweighted = {"v": snr + 1, "epsilon": snr, "clean": torch.ones_like(snr)}  # over the squared error of x0
    return snr.clamp_max(MIN_SNR_GAMMA) / unweighted[diffusion.prediction]


def split_prediction(
    kind: str, prediction: Tensor, x: Tensor, signal: Tensor | float, sigma: Tensor | float
) -> tuple[Tensor, Tensor]:
    """(clean latents, noise) implied by a prediction of `kind` at x = signal x0 + sigma noise, in the shape of x.

    kind: "epsilon", "v" or "clean". The factors are numbers or broadcast.
    """
    if kind == "clean":
        return prediction, (x - signal * prediction) / sigma
    if kind == "epsilon":
        return (x - sigma * prediction) / signal, prediction
    return signal * x - sigma * prediction, sigma * x + signal * prediction


def interpolate_log_variance(variance: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """Log variance from the network's number v, -1 for `low` and 1 for `high` (Nichol and Dhariwal, eq. 15)."""
    fraction = (variance + 1) / 2
    return fraction * high + (1 - fraction) * low


def _decoder_nll(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """-log of a discretised normal's mass in the bin of width 2/255 around x, in nats, elementwise (Ho et al., eq. 13).

    Latents are no 8-bit images; the term is kept because the published networks were trained with it.
    """
    inverse = (-0.5 * log_variance).exp()
    upper = _normal_cdf(inverse * (x - mean + 1 / 255))
    lower = _normal_cdf(inverse * (x - mean - 1 / 255))
    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return -mass.clamp_min(LOG_FLOOR).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation that the published loss uses (Page, 1977)."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
