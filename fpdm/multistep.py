"""A multistep sampler of first to third order, defined at pure noise and at the data.

After DPM-Solver++ (Lu et al., 2022), whose variable, the logarithm of signal to noise, is infinite at pure noise and at
the data. Here it is the angle between them, in which both are steps like all others.
"""

import math

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
    """

    def __init__(self, diffusion: Diffusion, timesteps: list[float], order: int) -> None:
        self.timesteps, self._prediction, self._order = timesteps, diffusion.prediction, order
        pairs = [*(_signal_and_sigma(diffusion, t) for t in timesteps), (1.0, 0.0)]  # the last step ends at the data
        self._signal, self._sigma = [signal for signal, _ in pairs], [sigma for _, sigma in pairs]
        self._angle = [math.atan2(sigma, signal) for signal, sigma in pairs]
        self._clean: list[Tensor] = []  # the last predictions, newest first
        self._start: Tensor | None = None

    def step(self, i: int, output: Tensor, x: Tensor, noise: Tensor | None) -> Tensor:
        """See `samplers.Sampler.step`: (B, C, H, W); in order, each i once; no noise is added."""
        prediction = output[:, : x.shape[1]]
        signal, sigma = self._signal[i], self._sigma[i]
        if self._prediction == "flow":
            clean = x - sigma * prediction
        else:
            clean, _ = split_prediction(self._prediction, prediction, x, signal, sigma)
        if i == 0:
            self._clean, self._start = [], x
        self._clean = [clean, *self._clean][: self._order]
        if i == 1 and self._order == 3:
            assert self._start is not None
            x = self._move(0, self._start, [0, 1], self._clean[::-1])
        return self._move(i, x, [i - j for j in range(len(self._clean))], self._clean)

    def _move(self, i: int, x: Tensor, knots: list[int], clean: list[Tensor]) -> Tensor:
        """x at step i moved to the next by the polynomial through `clean` at the steps `knots`."""
        moved = x * (self._sigma[i + 1] / self._sigma[i])
        for weight, values in zip(self._weights(i, knots), clean, strict=True):
            moved = moved + weight * values
        return moved

    def _weights(self, i: int, knots: list[int]) -> list[float]:
        """sigma' times the integral over u of each knot's Lagrange polynomial L(phi), from step i to the next.

        By parts: [u L] minus the integral of u L' over phi, with u = cot(phi): that integrates to log sin(phi), and
        phi cot(phi) is smooth enough for Gauss-Legendre's rule.
        """
        begin, end, sigma = self._angle[i], self._angle[i + 1], self._sigma[i + 1]
        weights = []
        for knot in knots:
            others = [self._angle[other] for other in knots if other != knot]
            polynomial = Polynomial.fromroots(others) if others else Polynomial([1.0])
            polynomial = polynomial / float(polynomial(self._angle[knot]))
            bounds = self._signal[i + 1], self._signal[i] * sigma / self._sigma[i]
            weight = float(polynomial(end)) * bounds[0] - float(polynomial(begin)) * bounds[1]
            if others and sigma:  # at the data, with sigma' = 0, the integral's share vanishes
                constant, *linear = (float(value) for value in polynomial.deriv().coef)
                integral = constant * (math.log(math.sin(end)) - math.log(math.sin(begin)))
                if linear:
                    angles = begin + (end - begin) * (NODES + 1) / 2
                    integral += linear[0] * (end - begin) / 2 * float((SHARES * angles / np.tan(angles)).sum())
                weight -= sigma * integral
            weights.append(weight)
        return weights


def _signal_and_sigma(diffusion: Diffusion, t: float) -> tuple[float, float]:
    """The factors of the latents and of the noise in x_t; of a discrete process at whole timesteps only."""
    if diffusion.is_flow:
        return 1 - t / diffusion.num_timesteps, t / diffusion.num_timesteps
    abar = float(diffusion.gaussian.alphas_cumprod[int(t)])
    return abar**0.5, (1 - abar) ** 0.5
