"""A multistep sampler of first to third order, with and without noise, defined at pure noise and at the data.

After DPM-Solver++ (Lu et al., 2022) and, with noise, SA-Solver (Xue et al., 2023), whose variable, the logarithm of
signal to noise, is infinite at pure noise and at the data. Here it is the angle between them, in which both are steps
like all others.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.polynomial import Polynomial
from torch import Tensor

from fpdm.diffusion import Diffusion, split_prediction

NODES, SHARES = np.polynomial.legendre.leggauss(16)  # of Gauss-Legendre's rule on -1..1


class MultistepSampler:
    """Adams-Bashforth on the clean latents D that the network predicts; each is evaluated once, and used again.

    In y = x / sigma and u = signal / sigma the process is dy / du = D exactly: a step is the integral of D over u. D is
    extrapolated as a polynomial of phi = atan2(sigma, signal), which runs from pi / 2 at pure noise to 0 at the data.
    The first step has one prediction only; with order 3 the second one corrects it, or it would cost an order.

    With eta, the reverse process of as much noise: y decays by u^-eta^2, D counts (1 + eta^2) times, and what sigma
    lacks is new noise. First order with eta of 1 is ancestral sampling with the posterior's variance.
    """

    def __init__(self, diffusion: Diffusion, timesteps: list[float], order: int, eta: float = 0.0) -> None:
        self.timesteps, self._prediction, self._order, self._eta = timesteps, diffusion.prediction, order, eta
        pairs = [*(_signal_and_sigma(diffusion, t) for t in timesteps), (1.0, 0.0)]  # the last step ends at the data
        self._signal, self._sigma = [signal for signal, _ in pairs], [sigma for _, sigma in pairs]
        self._angle = [math.atan2(sigma, signal) for signal, sigma in pairs]
        self._clean: list[Tensor] = []  # the last predictions, newest first
        self._first: tuple[Tensor, Tensor | None, Tensor] | None = None  # the start, its step's noise, where it led

    def step(self, i: int, output: Tensor, x: Tensor, noise: Tensor | None) -> Tensor:
        """See `samplers.Sampler.step`: (B, C, H, W); in order, each i once; noise is of an eta above 0."""
        prediction = output[:, : x.shape[1]]
        signal, sigma = self._signal[i], self._sigma[i]
        if self._prediction == "flow":
            clean = x - sigma * prediction
        else:
            clean, _ = split_prediction(self._prediction, prediction, x, signal, sigma)
        self._clean = [clean, *(self._clean if i else [])][: self._order]
        if i == 1 and self._order == 3:
            assert self._first is not None
            start, its_noise, led_to = self._first
            replaced = x - led_to  # 0 where the caller has not changed the latents in between
            x = self._move(0, start, its_noise, [0, 1], self._clean[::-1]) + replaced
        moved = self._move(i, x, noise, [i - j for j in range(len(self._clean))], self._clean)
        if i == 0:
            self._first = (x, noise, moved)
        return moved

    def _move(self, i: int, x: Tensor, noise: Tensor | None, knots: Sequence[int], clean: Sequence[Tensor]) -> Tensor:
        """x at step i moved to the next by the polynomial through `clean` at the steps `knots`."""
        sigma, kept = self._sigma[i + 1], self._kept(i)
        moved = x * (sigma / self._sigma[i] * kept)
        if noise is not None and self._eta:
            moved = moved + sigma * max(0.0, 1 - kept**2) ** 0.5 * noise
        for weight, values in zip(self._weights(i, knots), clean, strict=True):
            moved = moved + weight * values
        return moved

    def _kept(self, i: int) -> float:
        """(u / u')^eta^2, what a step keeps of the noise that is in x: 1 without eta."""
        ratio = self._signal[i] * self._sigma[i + 1] / (self._sigma[i] * self._signal[i + 1])
        return float(ratio ** (self._eta**2))

    def _weights(self, i: int, knots: Sequence[int]) -> list[float]:
        """sigma' (1 + eta^2) u'^-eta^2 times the integral of u^eta^2 L(phi) over u, of each knot's Lagrange polynomial.

        By parts: [u^(1 + eta^2) L] minus the integral of u^(1 + eta^2) L' over phi, with u = cot(phi): in log(phi) that
        is smooth enough for Gauss-Legendre's rule.
        """
        begin, end, signal, sigma = self._angle[i], self._angle[i + 1], self._signal[i + 1], self._sigma[i + 1]
        weights = []
        for knot in knots:
            others = [self._angle[other] for other in knots if other != knot]
            polynomial = Polynomial.fromroots(others) if others else Polynomial([1.0])
            polynomial = polynomial / float(polynomial(self._angle[knot]))
            at_begin = self._signal[i] * sigma / self._sigma[i] * self._kept(i)
            weight = float(polynomial(end)) * signal - float(polynomial(begin)) * at_begin
            if others and sigma:  # at the data, with sigma' = 0, the integral's share vanishes
                angles = end * (begin / end) ** ((NODES + 1) / 2)
                slopes = polynomial.deriv()(angles) / np.tan(angles) ** (1 + self._eta**2)
                integral = math.log(begin / end) / 2 * float((SHARES * angles * slopes).sum())
                weight += sigma * (sigma / signal) ** (self._eta**2) * integral
            weights.append(weight)
        return weights


def _signal_and_sigma(diffusion: Diffusion, t: float) -> tuple[float, float]:
    """The factors of the latents and of the noise in x_t; of a discrete process at whole timesteps only."""
    if diffusion.is_flow:
        return 1 - t / diffusion.num_timesteps, t / diffusion.num_timesteps
    abar = float(diffusion.gaussian.alphas_cumprod[int(t)])
    return abar**0.5, (1 - abar) ** 0.5
