"""How far two sets of pictures lie apart: Gaussians fitted to their features, and the Fréchet distance between them."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError


@dataclass(frozen=True)
class Statistics:
    """The Gaussian fitted to one set's features, in float64."""

    mean: NDArray[np.float64]  # (D,)
    covariance: NDArray[np.float64]  # (D, D), unbiased: divided by count - 1
    count: int


def statistics(batches: Iterable[NDArray[np.floating]]) -> Statistics:
    """Mean and covariance of feature batches `(B, D)`, one pass, accumulated in float64: no set is held in memory.

    Raises UserError for features that are not finite, with their count, and for fewer than two pictures.
    """
    count, non_finite = 0, 0
    shift = total = products = np.zeros(0)
    for batch in batches:
        features = batch.astype(np.float64)
        non_finite += int((~np.isfinite(features)).any(axis=1).sum())
        if not count:
            # Sums about a point inside the cloud: the covariance is then no small difference of large numbers.
            shift = features.mean(axis=0)
            total, products = np.zeros_like(shift), np.zeros((shift.size, shift.size))
        features -= shift
        total += features.sum(axis=0)
        products += features.T @ features
        count += len(features)
    if count < 2:
        raise UserError(f"features of {count} pictures: a covariance needs two pictures at least; give a larger set")
    if non_finite:
        raise UserError(f"features of {non_finite} of {count} pictures are not finite; look at the pictures first")
    covariance = (products - np.outer(total, total) / count) / (count - 1)
    return Statistics(shift + total / count, covariance, count)


def frechet_distance(first: Statistics, second: Statistics) -> float:
    """|m1 - m2|² + tr(C1) + tr(C2) - 2 tr((C1 C2)^½), as in Heusel et al. 2017, equation 6.

    The trace of the root is the sum of the singular values of C1^½ C2^½, both roots symmetric, by `eigh`. This way
    nothing is squared and rooted again: the error is 1e-16 of the largest value, where the eigenvalues of C1 C2 have
    the root of that. Raises UserError where the two were made by different extractors.
    """
    if first.mean.shape != second.mean.shape:
        raise UserError(
            f"features of {first.mean.size} and {second.mean.size} dimensions; compare sets of the same extractor"
        )
    cross = np.linalg.svd(_root(first.covariance) @ _root(second.covariance), compute_uv=False)
    difference = first.mean - second.mean
    traces = np.trace(first.covariance) + np.trace(second.covariance)
    return float(difference @ difference + traces - 2 * cross.sum())


def _root(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    """The symmetric square root. Eigenvalues that are rounding error count as zero: with fewer pictures than dimensions
    there are hundreds, and the root makes 1e-8 of each 1e-16.
    """
    values, vectors = np.linalg.eigh(covariance)
    threshold = values.max(initial=0) * values.size * np.finfo(np.float64).eps
    return (vectors * np.sqrt(np.where(values > threshold, values, 0))) @ vectors.T
