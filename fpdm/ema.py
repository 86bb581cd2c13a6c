"""Exponential moving averages of weights as functions of samples seen, and averages of any width after training.

Karras et al., "Analyzing and improving the training dynamics of diffusion models" (CVPR 2024), section 3 and its
appendix on post-hoc EMA. A power-function average after t samples weighs the weights that training had after s samples
by p(s) = (e + 1) s**e / t**(e + 1): it reaches back a constant share of the training. Its width is the standard
deviation of p divided by t; the exponent e follows from it.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

MAX_WIDTH = 0.28  # at 0.2887 the exponent is 0, a plain mean over all of training

Average = tuple[float, float]  # samples seen, width


def constant_decay(decay: float, reference_batch: int, before: int, after: int) -> float:
    """What a step from `before` to `after` samples leaves of the average: `decay` for every `reference_batch` of them.

    Counted in samples, the average does not depend on the batch size.
    """
    return decay ** ((after - before) / reference_batch)


def power_decay(width: float, before: int, after: int) -> float:
    """As `constant_decay`, of the power-function average of this width: (1 - 1/t)**(e + 1), t in steps."""
    return (before / after) ** (power_exponent(width) + 1)


def power_exponent(width: float) -> float:
    """The exponent e of a width w: w**2 = (e + 1) / ((e + 2)**2 (e + 3)), whose largest real root is e.

    Raises ValueError for a width outside (0, MAX_WIDTH).
    """
    if not 0 < width < MAX_WIDTH:
        raise ValueError(f"width: {width} is outside (0, {MAX_WIDTH}); 0.05 to 0.2 are usual")
    inverse = width**-2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    return float(roots[np.isreal(roots)].real.max())


def reconstruction_weights(stored: Sequence[Average], wanted: Average) -> NDArray[np.float64]:
    """Factors (N,) of N stored power-function averages whose sum is the nearest to the wanted one.

    Least squares between the profiles p, which has a closed form: A x = b with the inner products of the profiles.
    Scaled to sum to one, since every profile integrates to one.

    Raises:
        ValueError: without a stored average, or for one of a width out of range.
    """
    if not stored:
        raise ValueError("stored: no average to reconstruct from; at least one is needed")
    samples = np.array([average[0] for average in stored], np.float64)
    exponents = np.array([power_exponent(average[1]) for average in stored])
    gram = _inner_products(samples[:, None], exponents[:, None], samples[None], exponents[None])  # (N, N)
    target = _inner_products(samples, exponents, np.array(wanted[0]), np.array(power_exponent(wanted[1])))
    # The profiles are nearly dependent: a pseudo-inverse leaves out what rounding alone would decide.
    scale = 1 / np.sqrt(gram.diagonal())
    weights = scale * np.linalg.lstsq(scale[:, None] * gram * scale, scale * target, rcond=1e-12)[0]
    return weights / weights.sum()


def _inner_products(
    samples: NDArray[np.float64],
    exponents: NDArray[np.float64],
    other_samples: NDArray[np.float64],
    other_exponents: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Integral of the product of two profiles, elementwise: of (a, e) and (b, f) with a <= b it is

    (e + 1) (f + 1) / (e + f + 1) (a / b)**f / b, written with ratios because a**(e + f + 1) overflows.
    """
    swap = samples > other_samples
    early, late = np.where(swap, other_samples, samples), np.where(swap, samples, other_samples)
    of_late = np.where(swap, exponents, other_exponents)
    factor = (exponents + 1) * (other_exponents + 1) / (exponents + other_exponents + 1)
    return factor * (early / late) ** of_late / late
