"""The numbers of a set against a reference, each with an interval, and distances that are fast to take again."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.image_sets import evenly_spaced
from pipeline.evaluation.metrics import (
    NEIGHBOURHOOD,
    Statistics,
    density_coverage,
    factor,
    frechet_distance,
    inception_score,
    precision_recall,
    statistics,
)
from pipeline.evaluation.statistics import Summary, measure, reason_unavailable, summarise
from pipeline.features.extractors import METRICS, ExtractorWeights
from pipeline.judging.inputs import Judged
from pipeline.judging.scan import Measuring, Scan

GROUPS = 10  # of the jackknife
NORMAL_95 = 1.96
LIMITS = {**dict.fromkeys(("precision", "recall", "coverage"), (0.0, 1.0)), "density": (0.0, np.inf)}
MOST = 50_000  # rows of a reference whose distances to all samples are taken
AT_MOST = 2000  # rows that an interval of KID, precision, recall, density and coverage is taken from


@dataclass(frozen=True)
class Number:
    """A number with the 95 % interval of drawing other samples; the reference is taken as given."""

    key: str
    name: str
    value: float
    low: float
    high: float


class Distance:
    """The Fréchet distance from one reference, whose covariance is factored once."""

    def __init__(self, reference: Statistics) -> None:
        self.reference, self._factor = reference, factor(reference)

    def __call__(self, rows: NDArray[np.floating]) -> float:
        """Of features (N, D), as `frechet_distance` of their statistics."""
        count, width = rows.shape
        if count > width:
            own = factor(statistics([rows]))
            mean = rows.mean(axis=0, dtype=np.float64)
        else:  # the centred rows are a factor already
            mean = rows.mean(axis=0, dtype=np.float64)
            own = (rows.astype(np.float64) - mean).T / np.sqrt(count - 1)
        shift = mean - self.reference.mean
        cross = np.linalg.svd(self._factor.T @ own, compute_uv=False).sum()
        return float(shift @ shift + np.trace(self.reference.covariance) + np.square(own).sum() - 2 * cross)


@dataclass(frozen=True)
class Reference:
    """What distances are measured from: the features of its images, or statistics alone."""

    images: Judged
    scan: Scan | None
    statistics: dict[str, Statistics]

    @classmethod
    def of(cls, images: Judged, found: Scan | None) -> "Reference":
        """Statistics of its file take precedence over those of its images."""
        fitted = {} if found is None else summarise([found.features], found.count, ()).statistics
        return cls(images, found, fitted | (images.statistics or {}))

    @property
    def rows(self) -> NDArray[np.float32] | None:
        return self.scan.pooled if self.scan else None


def all_numbers(found: Scan, reference: Reference, measuring: Measuring) -> tuple[list[Number], list[str]]:
    """Every metric that the extractor and the reference allow, and why the others are not there."""
    own = summarise([found.features], found.count)
    rows = None if reference.rows is None else evenly(reference.rows, MOST)
    kept = {} if rows is None else {"pooled": rows}
    against = Summary(reference.statistics, kept)
    numbers, missing = [], []
    for metric, layer in METRICS.items():
        reason = None if layer in measuring.layers else f"{measuring.weights.extractor} has no such layer"
        reason = reason or reason_unavailable(metric, own, against)
        if reason:
            missing.append(f"{measuring.weights.name_of(metric)}: {reason}")
            continue
        measured = measure(metric, own, against)
        spread = _spread(metric, found.features[layer], reference)
        names = [name for name in measured if not name.endswith("_spread")]
        numbers += [
            _number(name, measured[name], each, measuring.weights) for name, each in zip(names, spread, strict=True)
        ]
    return numbers, missing


def _number(key: str, value: float, spread: float, weights: ExtractorWeights) -> Number:
    least, most = LIMITS.get(key, (-np.inf, np.inf))
    low, high = max(least, value - NORMAL_95 * spread), min(most, value + NORMAL_95 * spread)
    return Number(key, weights.name_of(key), value, low, high)


def _spread(metric: str, rows: NDArray[np.float32], reference: Reference) -> list[float]:
    """Standard errors of the numbers of a metric, by the jackknife over groups of samples."""
    if metric in ("frechet", "spatial"):
        distance = Distance(reference.statistics["pooled" if metric == "frechet" else "spatial"])
        return jackknife(lambda kept: (distance(kept),), rows)
    if metric == "inception_score":
        return jackknife(lambda kept: inception_score(kept)[:1], rows, fewest=2 * GROUPS)
    assert reference.rows is not None
    part, against = evenly(rows, AT_MOST), evenly(reference.rows, AT_MOST)
    scale = np.sqrt(len(part) / len(rows))  # standard errors fall as 1 / sqrt(N)
    statistic: dict[str, Callable[[NDArray[np.float32]], tuple[float, ...]]] = {
        "kid": lambda kept: (squared_mmd(kept, against),),
        "precision_recall": lambda kept: precision_recall(kept, against),
        "density_coverage": lambda kept: density_coverage(kept, against),
    }
    return [scale * each for each in jackknife(statistic[metric], part, fewest=2 * NEIGHBOURHOOD)]


def jackknife(
    statistic: Callable[[NDArray[np.float32]], tuple[float, ...]], rows: NDArray[np.float32], fewest: int = 4
) -> list[float]:
    """Standard errors of a statistic of rows (N, D), from leaving out one of GROUPS groups at a time (Efron 1982).

    Unlike a bootstrap it draws no row twice, which neighbours and covariances would feel. Zero for fewer than `fewest`
    rows.
    """
    groups = min(GROUPS, len(rows) // 2)
    if len(rows) < fewest or groups < 2:
        return [0.0] * len(statistic(rows))
    group = np.arange(len(rows)) % groups
    left_out = np.array([statistic(rows[group != number]) for number in range(groups)])  # (G, numbers)
    spread = np.square(left_out - left_out.mean(axis=0)).sum(axis=0)
    return np.sqrt((groups - 1) / groups * spread).tolist()


def squared_mmd(rows: NDArray[np.floating], others: NDArray[np.floating]) -> float:
    """KID's estimate from all rows at once: the unbiased squared MMD with kernel (x . y / D + 1)^3, in float64."""
    x, y = rows.astype(np.float64), others.astype(np.float64)

    def kernel(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
        return (first @ second.T / first.shape[1] + 1) ** 3

    def within(each: NDArray[np.float64]) -> float:
        values = kernel(each, each)
        return float((values.sum() - np.trace(values)) / (len(each) * (len(each) - 1)))

    return within(x) + within(y) - 2 * float(kernel(x, y).mean())


def evenly(rows: NDArray[np.float32], most: int) -> NDArray[np.float32]:
    """At most `most` rows, evenly spaced."""
    return rows[evenly_spaced(len(rows), most)]


def distance_number(rows: NDArray[np.float32], reference: Statistics, weights: ExtractorWeights) -> Number:
    """The Fréchet distance of features (N, D)."""
    distance = Distance(reference)
    value = frechet_distance(statistics([rows]), reference)
    return _number("frechet", value, jackknife(lambda kept: (distance(kept),), rows)[0], weights)
