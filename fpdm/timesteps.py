"""Which timesteps training sees: a density on the fractions t / T, and the weights that would undo it.

Logit-normal: Esser et al., "Scaling rectified flow transformers" (ICML 2024), section 3.1; shift: the same, eq. 23.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

MAX_WEIGHT = 10.0
BELOW_ONE = 1 - 2.0**-24  # the greatest float32 below 1: a fraction of 1 would be a timestep that there is not


@dataclass(frozen=True, kw_only=True)
class TimestepDensity:
    """How uniform numbers become fractions t / T; 0 is data, 1 is noise.

    kind: "uniform", or "logit_normal": the logit of the fraction is normal.
    mean, deviation: of that logit. A mean above 0 favours noise.
    shift: moves every fraction x to shift x / (1 + (shift - 1) x); above 1 favours noise, as larger latents need.
    """

    kind: Literal["uniform", "logit_normal"] = "uniform"
    mean: float = 0.0
    deviation: float = 1.0
    shift: float = 1.0

    def fractions(self, u: Tensor) -> Tensor:
        """Uniform numbers (B,) in [0, 1) -> fractions (B,) float32 in [0, 1), in the same order."""
        return self._quantile_and_slope(u)[0].clamp(0, BELOW_ONE).float()

    def weights(self, u: Tensor) -> Tensor:
        """(B,) float32, 1 / density of `fractions(u)`, but MAX_WEIGHT at most.

        A loss times these has the expectation of uniform timesteps, but for the ends of the interval, which are seen so
        seldom that a single sample would outweigh its batch.
        """
        return self._quantile_and_slope(u)[1].clamp_max(MAX_WEIGHT).float()

    def _quantile_and_slope(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The fractions and their derivative by u, float64."""
        x = u.double()
        slope = torch.ones_like(x)
        if self.kind == "logit_normal":
            z = torch.special.ndtri(x.clamp(2.0**-26, 1 - 2.0**-26))
            x = (self.mean + self.deviation * z).sigmoid()
            slope = self.deviation * x * (1 - x) * math.sqrt(2 * math.pi) * (z.square() / 2).exp()
        shifted = self.shift * x / (1 + (self.shift - 1) * x)
        return shifted, slope * self.shift / (1 + (self.shift - 1) * x).square()
