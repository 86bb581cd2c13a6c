"""How far two sets of images lie apart, from their features, by torch-fidelity's definitions.

The Fréchet distance, KID, Inception Score, precision and recall, and density and coverage, which torch-fidelity lacks.
Their registry, with the layers that they are measured on and their printed names, is METRICS and NAMES of
`pipeline.features.extractors`.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from common.errors import UserError
from fpdm import rng

KID_SUBSET = 1000  # images of each of torch-fidelity's 100 subsets; all of them where there are fewer
DENSITY_NEIGHBOURHOOD = 5  # the same of density and coverage (Naeem et al. 2020)
NEIGHBOURHOOD = 3  # the nearest neighbour whose distance is a ball's radius (Kynkäänniemi et al. 2019)
ISC_SPLITS = 10
SHUFFLE_SEED = 2020  # torch-fidelity's own, so that its subsets are ours
BLOCK = 10_000  # images whose distances are held at once


@dataclass(frozen=True)
class Statistics:
    """The Gaussian fitted to one set's features, in float64."""

    mean: NDArray[np.float64]  # (D,)
    covariance: NDArray[np.float64]  # (D, D), unbiased: divided by count - 1
    count: int | None  # None where a statistics file does not say

    @property
    def is_singular(self) -> bool:
        """Whether there are too few images for a covariance of full rank; the distance is then biased upwards."""
        return self.count is not None and self.count <= self.mean.size


def fault_of(fitted: Statistics, precision: float = float(np.finfo(np.float64).eps)) -> str | None:
    """Why these are not a mean and a covariance; `precision`: of the numbers as they were stored."""
    mean, covariance, width = fitted.mean, fitted.covariance, fitted.mean.size
    if mean.shape != (width,) or covariance.shape != (width, width) or not width:
        return f"shapes {mean.shape} and {covariance.shape}"
    with np.errstate(all="ignore"):
        # Of numbers whose squares are not finite the distance is not either.
        if not (np.isfinite(mean @ mean) and np.isfinite(np.vdot(covariance, covariance))):
            return "not finite, or too large"
    if not np.allclose(covariance, covariance.T, rtol=max(1e-5, precision)):
        return "not symmetric"
    try:
        np.linalg.cholesky(covariance)
    except np.linalg.LinAlgError:  # singular, or worse
        values = np.linalg.eigvalsh(covariance)
        if values[0] < -min(1e-2, 100 * width * precision) * max(values[-1], 0):
            return f"not positive semi-definite (an eigenvalue of {values[0]:.3g}, the largest is {values[-1]:.3g})"
    return None


class Accumulator:
    """Sums of features, in float64 and in one pass: no set is held in memory."""

    def __init__(self) -> None:
        self.count = self.non_finite = 0
        self.shift = self.total = self.products = np.zeros(0)

    def add(self, batch: NDArray[np.floating]) -> None:
        """Features (B, D)."""
        features = batch.astype(np.float64)
        self.non_finite += int((~np.isfinite(features)).any(axis=1).sum())
        if not self.count:
            # Sums about a point inside the cloud: the covariance is then no small difference of large numbers.
            self.shift = features.mean(axis=0)
            self.total, self.products = np.zeros_like(self.shift), np.zeros((self.shift.size, self.shift.size))
        features -= self.shift
        self.total += features.sum(axis=0)
        self.products += features.T @ features
        self.count += len(features)

    def statistics(self) -> Statistics:
        """Raises UserError for features that are not finite, with their count, and for fewer than two images."""
        count = self.count
        if count < 2:
            raise UserError(f"features of {count} images: a covariance needs two images at least; give a larger set")
        if self.non_finite:
            raise UserError(f"features of {self.non_finite} of {count} images are not finite; look at the images first")
        covariance = (self.products - np.outer(self.total, self.total) / count) / (count - 1)
        return Statistics(self.shift + self.total / count, covariance, count)


def statistics(batches: Iterable[NDArray[np.floating]]) -> Statistics:
    """Mean and covariance of feature batches `(B, D)`; errors as `Accumulator.statistics`."""
    accumulator = Accumulator()
    for batch in batches:
        accumulator.add(batch)
    return accumulator.statistics()


def frechet_distance(first: Statistics, second: Statistics) -> float:
    """|m1 - m2|² + tr(C1) + tr(C2) - 2 tr((C1 C2)^½), as in Heusel et al. 2017, equation 6.

    With C1 = F1 F1ᵀ and C2 = F2 F2ᵀ the trace of the root is the sum of the singular values of F1ᵀ F2. Working
    with the factors avoids the square root of a product: the relative error is about 1e-16 instead of about 1e-8 from
    the eigenvalues of C1 C2. Raises UserError if the two were made by different extractors.
    """
    if first.mean.shape != second.mean.shape:
        raise UserError(
            f"features of {first.mean.size} and {second.mean.size} dimensions; compare sets of the same extractor"
        )
    cross = np.linalg.svd(factor(first).T @ factor(second), compute_uv=False)
    difference = first.mean - second.mean
    traces = np.trace(first.covariance) + np.trace(second.covariance)
    return float(difference @ difference + traces - 2 * cross.sum())


def factor(fitted: Statistics) -> NDArray[np.floating]:
    """F (D, rank) with F Fᵀ = C: Cholesky's, or from the eigenvectors where C is not safely of full rank.

    With fewer images than dimensions hundreds of eigenvalues are rounding noise (1e-16); the square root would
    inflate them to 1e-8, so they are dropped.
    """
    covariance = fitted.covariance
    threshold = covariance.shape[0] * np.finfo(np.float64).eps
    if not fitted.is_singular:
        try:
            lower = np.linalg.cholesky(covariance)
        except np.linalg.LinAlgError:
            pass
        else:
            pivots = np.diag(lower) ** 2
            if pivots.min() > threshold * pivots.max():
                return lower
    values, vectors = np.linalg.eigh(covariance)
    kept = values > threshold * values.max(initial=0)
    return vectors[:, kept] * np.sqrt(values[kept])


def bootstrap_error(features: NDArray[np.floating], reference: Statistics, replicates: int, seed: int) -> float:
    """Standard error of the Fréchet distance of features (N, D) from a reference: the standard deviation over sets of N
    images drawn from them with replacement. How well N images tell the distance, not its bias at N.
    """
    count = len(features)
    distances = []
    for replicate in range(replicates):
        chosen = rng.integers(seed, f"evaluate/bootstrap/{replicate}", torch.arange(count), count).numpy()
        distances.append(frechet_distance(statistics(np.array_split(features[chosen], -(-count // BLOCK))), reference))
    return float(np.std(distances, ddof=1))


def kernel_distance(features: NDArray[np.floating], reference: NDArray[np.floating]) -> tuple[float, float]:
    """KID (Binkowski et al. 2018): mean and standard deviation over torch-fidelity's random subsets, in float64."""
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    scores = kid_features_to_metric(
        torch.from_numpy(features).double(),
        torch.from_numpy(reference).double(),
        kid_subset_size=min(KID_SUBSET, len(features), len(reference)),
        rng_seed=SHUFFLE_SEED,
        verbose=False,
    )
    return scores[KEY_METRIC_KID_MEAN], scores[KEY_METRIC_KID_STD]


def inception_score(logits: NDArray[np.floating]) -> tuple[float, float]:
    """Mean and standard deviation over ten parts of a shuffled set (Salimans et al. 2016), in float64."""
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    if len(logits) < ISC_SPLITS:
        raise UserError(f"evaluate.metrics: the Inception Score takes {ISC_SPLITS} images or more; {len(logits)} given")
    scores = isc_features_to_metric(torch.from_numpy(logits), splits=ISC_SPLITS, rng_seed=SHUFFLE_SEED)
    return scores[KEY_METRIC_ISC_MEAN], scores[KEY_METRIC_ISC_STD]


def precision_recall(features: NDArray[np.floating], reference: NDArray[np.floating]) -> tuple[float, float]:
    """Share of samples inside the reference's manifold, and of the reference inside the samples' (balls to the third
    neighbour, Kynkäänniemi et al. 2019).
    """
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    if min(len(features), len(reference)) <= NEIGHBOURHOOD:
        raise UserError(f"evaluate.metrics: precision and recall need more than {NEIGHBOURHOOD} images of each set")
    scores = prc_features_to_metric(
        torch.from_numpy(features),
        torch.from_numpy(reference),
        prc_neighborhood=NEIGHBOURHOOD,
        prc_batch_size=BLOCK,
        save_cpu_ram=True,  # distances of one block at a time
        verbose=False,
    )
    return scores[KEY_METRIC_PRECISION], scores[KEY_METRIC_RECALL]


def density_coverage(features: NDArray[np.floating], reference: NDArray[np.floating]) -> tuple[float, float]:
    """Density: of how many of the reference's balls a sample lies inside, over five, on average. Coverage: the share of
    balls with a sample inside. Balls reach to the fifth neighbour (Naeem et al. 2020); in float64.
    """
    if len(reference) <= DENSITY_NEIGHBOURHOOD:
        raise UserError(
            f"evaluate.metrics: density and coverage need more than {DENSITY_NEIGHBOURHOOD} images of the reference"
        )
    samples, real = torch.from_numpy(features).double(), torch.from_numpy(reference).double()
    rows = max(1, BLOCK**2 // (4 * max(len(samples), len(real))))
    inside = covered = 0
    for block in real.split(rows):
        radii = torch.cdist(block, real).kthvalue(DENSITY_NEIGHBOURHOOD + 1, dim=1).values  # the first is itself
        held = torch.cdist(block, samples) < radii[:, None]  # (B, N)
        inside += int(held.sum())
        covered += int(held.any(dim=1).sum())
    return inside / (DENSITY_NEIGHBOURHOOD * len(samples)), covered / len(real)
