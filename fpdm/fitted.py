"""A sampler without noise as the numbers that it multiplies by, which can then be fitted to a network.

After bespoke non-stationary solvers (Shaul et al., ICML 2024), which fit such numbers for networks without iterations.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Numbers = Sequence[float] | Tensor  # (steps,)


@dataclass(frozen=True, kw_only=True)
class Coefficients:
    """Step i moves x to kept[i] x + the sum over j of weights[i][j] times what the network gave in step j.

    Any sampler that adds no noise and is linear in what the network gave can be written so: `linear_form`.

    Args:
        timesteps: (steps,) noisiest first; need not be whole.
        kept: (steps,).
        weights: of step i, i + 1 of them.
    """

    timesteps: Numbers
    kept: Numbers
    weights: Sequence[Numbers]

    def __post_init__(self) -> None:
        lengths = [len(row) for row in self.weights]
        if not len(self.timesteps) == len(self.kept) == len(lengths) or lengths != [*range(1, len(lengths) + 1)]:
            raise ValueError(
                f"coefficients: {len(self.timesteps)} timesteps, {len(self.kept)} kept, weights of {lengths}; a step "
                "has one, one, and a weight for each step so far"
            )


class FittedSampler:
    """The sampler of given `Coefficients`."""

    def __init__(self, coefficients: Coefficients) -> None:
        self.timesteps: Any = coefficients.timesteps
        self._kept, self._weights = coefficients.kept, coefficients.weights
        self._outputs: list[Tensor] = []

    def step(self, i: int, output: Tensor, x: Tensor, noise: Tensor | None) -> Tensor:
        """See `samplers.Sampler.step`: (B, C, H, W); in order, each i once; no noise is added."""
        self._outputs = [*self._outputs[:i], output[:, : x.shape[1]]]
        moved = self._kept[i] * x
        for weight, prediction in zip(self._weights[i], self._outputs, strict=True):
            moved = moved + weight * prediction
        return moved


def linear_form(sampler: Any) -> Coefficients:
    """A sampler's numbers, found by letting it act on the unit vectors of its start and of each step's output.

    Args:
        sampler: a `samplers.Sampler` without noise that computes in the dtype of what it is given.
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
