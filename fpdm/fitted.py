"""A sampler without noise as the numbers that it multiplies by, which can then be fitted to a network.

After bespoke non-stationary solvers (Shaul et al., ICML 2024), which fit such numbers for networks without iterations.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Numbers = Sequence[float] | Tensor  # (steps,)


@dataclass(frozen=True, kw_only=True)
class Coefficients:
    """Step i moves x to `kept[i]` x + the sum over j of `weights[i][j]` times what the network gave in step j.

    Any sampler that adds no noise and is linear in what the network gave can be written so, see
    `calibration.linear_form`.

    Args:
        timesteps: (steps,) noisiest first; need not be whole.
        kept: (steps,).
        weights: of step i, i + 1 of them.

    Raises:
        ValueError: for other lengths, and for what is no finite number.
    """

    timesteps: Numbers
    kept: Numbers
    weights: Sequence[Numbers]

    def __post_init__(self) -> None:
        numbers = [one for row in (self.timesteps, self.kept, *self.weights) for one in row]
        plain = (one for one in numbers if not isinstance(one, Tensor))  # tensors are being fitted
        if bad := [one for one in plain if not isinstance(one, float | int) or not math.isfinite(one)]:
            raise ValueError(f"coefficients: {bad[0]!r} is no finite number")
        lengths = [len(row) for row in self.weights]
        if not len(self.timesteps) == len(self.kept) == len(lengths) or lengths != [*range(1, len(lengths) + 1)]:
            raise ValueError(
                f"coefficients: {len(self.timesteps)} timesteps, {len(self.kept)} kept, weights of {lengths}; a step "
                "has one, one, and a weight for each step so far"
            )


class FittedSampler:
    """The sampler of given `Coefficients`."""

    def __init__(self, coefficients: Coefficients) -> None:
        self.timesteps: Any = coefficients.timesteps  # tensors while they are fitted
        self._kept, self._weights = coefficients.kept, coefficients.weights
        self._outputs: list[Tensor] = []

    def step(self, i: int, output: Tensor, x: Tensor, noise: Tensor | None) -> Tensor:
        """See `samplers.Sampler.step`: (B, C, H, W); in order, each i once; no noise is added."""
        self._outputs = [*self._outputs[:i], output[:, : x.shape[1]]]
        moved = self._kept[i] * x
        for weight, prediction in zip(self._weights[i], self._outputs, strict=True):
            moved = moved + weight * prediction
        return moved
