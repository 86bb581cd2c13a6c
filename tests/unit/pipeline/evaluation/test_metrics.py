"""The Fréchet distance is the textbook's, and torch-fidelity's."""

import mpmath
import numpy as np
import pytest
from numpy.typing import NDArray
from torch_fidelity.metric_fid import fid_statistics_to_metric

from common.errors import UserError
from pipeline.evaluation.metrics import Statistics, density_coverage, frechet_distance, statistics
from pipeline.evaluation.statistics import measure, reason_unavailable, summarise


def features(seed: int, count: int, width: int) -> NDArray[np.float32]:
    """Correlated, about a mean far from zero, as pooled activations are."""
    generator = np.random.default_rng(seed)
    mixing = generator.normal(size=(width, width)) * np.geomspace(1, 1e-3, width)
    return (50 + seed + generator.normal(size=(count, width)) @ mixing).astype(np.float32)


def batched(values: NDArray[np.float32], size: int) -> list[NDArray[np.float32]]:
    return [values[start : start + size] for start in range(0, len(values), size)]


@pytest.mark.parametrize("size", [1, 7, 300])
def test_statistics_in_one_pass_are_those_of_the_whole(size: int) -> None:
    values = features(0, 300, 16)
    found = statistics(batched(values, size))
    whole = values.astype(np.float64)
    assert found.count == 300
    np.testing.assert_allclose(found.mean, whole.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(found.covariance, np.cov(whole, rowvar=False), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize(("count", "width"), [(500, 32), (2000, 256)])
def test_the_distance_is_torch_fidelitys(count: int, width: int) -> None:
    first, second = (statistics([features(seed, count, width)]) for seed in (1, 2))
    theirs = fid_statistics_to_metric(
        {"mu": first.mean, "sigma": first.covariance}, {"mu": second.mean, "sigma": second.covariance}, verbose=False
    )
    assert frechet_distance(first, second) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)


def test_the_distance_is_the_textbooks_where_covariances_commute() -> None:
    # For diagonal covariances the trace term is the squared difference of the standard deviations.
    deviations = np.array([[3.0, 1.0, 0.0, 2.0], [1.0, 1.0, 5.0, 0.0]])
    means = np.array([[0.0, 1.0, 2.0, 3.0], [0.5, 1.0, 0.0, 3.0]])
    first, second = (Statistics(mean, np.diag(std**2), 10) for mean, std in zip(means, deviations, strict=True))
    expected = ((means[0] - means[1]) ** 2).sum() + ((deviations[0] - deviations[1]) ** 2).sum()
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("count", [100, 8])
def test_the_distance_is_exact_for_covariances_of_any_rank(count: int) -> None:
    first, second = (statistics([features(seed, count, 16)]) for seed in (1, 2))
    with mpmath.workdps(50):
        one, two = (mpmath.matrix(found.covariance.tolist()) for found in (first, second))
        values, vectors = mpmath.eigsy(one)
        root = vectors * mpmath.diag([mpmath.sqrt(max(value, 0)) for value in values]) * vectors.T
        cross = mpmath.eigsy(root * two * root, eigvals_only=True)
        trace = float(sum(mpmath.sqrt(max(value, 0)) for value in cross))
    difference = first.mean - second.mean
    expected = difference @ difference + np.trace(first.covariance) + np.trace(second.covariance) - 2 * trace
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-12)


def test_fewer_images_than_dimensions_cost_no_precision() -> None:
    # The same images shifted by one vector: the distance is that vector's square, and the covariances cancel.
    values = features(3, 40, 200)
    shift = np.linspace(-1, 1, 200)
    first, second = statistics([values]), statistics([values + shift])
    assert frechet_distance(first, second) == pytest.approx((shift**2).sum(), rel=1e-6)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-6 * np.trace(first.covariance))


def test_features_that_are_not_finite_are_counted_and_refused() -> None:
    values = features(0, 10, 4)
    values[3, 1], values[7, 0], values[7, 2] = np.nan, np.inf, -np.inf
    with pytest.raises(UserError, match="features of 2 of 10 images are not finite"):
        statistics(batched(values, 4))


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_images_are_refused(count: int) -> None:
    with pytest.raises(UserError, match=f"features of {count} images"):
        statistics(batched(features(0, count, 4), 4))


def test_sets_of_different_extractors_are_refused() -> None:
    with pytest.raises(UserError, match="features of 4 and 8 dimensions"):
        frechet_distance(statistics([features(0, 9, 4)]), statistics([features(0, 9, 8)]))


def test_density_and_coverage_are_a_metric_of_any_samples_and_a_reference_of_six_images() -> None:
    rows = np.random.default_rng(3).normal(size=(20, 4)).astype(np.float32)
    own, reference, small = (summarise([{"pooled": part}], len(part)) for part in (rows[:3], rows, rows[:5]))
    assert reason_unavailable("density_coverage", own, reference) is None
    assert reason_unavailable("density_coverage", own, small) == "a reference of 5 images is too small"
    density, coverage = density_coverage(rows[:3], rows)
    assert measure("density_coverage", own, reference) == {"density": density, "coverage": coverage}
