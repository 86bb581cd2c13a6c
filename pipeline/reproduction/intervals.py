"""Means over seeds, and Student's intervals of them."""

import math
from collections.abc import Sequence
from statistics import fmean, stdev

# The 97.5 % point of Student's t by degrees of freedom, 1 to 9: of at most ten seeds.
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
MOST_SEEDS = len(T975) + 1


def interval(values: Sequence[float]) -> float | None:
    """Half the width of the mean's 95 % interval; None of one value, which has none."""
    return T975[len(values) - 2] * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def shown(values: Sequence[float]) -> str:
    """The mean, with its interval where there is one; how many diverged (inf) where some did."""
    if diverged := sum(map(math.isinf, values)):
        return "diverged" if diverged == len(values) else f"{diverged} of {len(values)} diverged"
    width = interval(values)
    return f"{fmean(values):.1f}" if width is None else f"{fmean(values):.1f} ± {width:.1f}"


def judged(better: Sequence[float], worse: Sequence[float]) -> str:
    """In words, whether the first distances are smaller, seed by seed. inf: samples diverged."""
    seeds = len(better)
    lost, others = (sum(map(math.isinf, values)) for values in (better, worse))
    if lost or others:
        found = f"of {seeds} seeds {lost} diverged, {others} of the other"
        decided = seeds > 1 and {lost, others} == {0, seeds}
        return f"{'holds' if others else 'does not hold'} ({found})" if decided else f"not decided ({found})"
    differences = [b - a for a, b in zip(better, worse, strict=True)]
    mean, width = fmean(differences), interval(differences)
    if width is None:
        return f"not decided by one seed (by {mean:.1f} there)"
    if abs(mean) <= width:
        return f"not decided by {len(differences)} seeds (by {mean:.1f} ± {width:.1f})"
    return f"{'holds' if mean > 0 else 'does not hold: it is the other way round'} (by {mean:.1f} ± {width:.1f})"
