"""Averages are functions of samples seen, and any width comes back from stored ones."""

import numpy as np
import pytest

from fpdm.ema import MAX_WIDTH, constant_decay, power_decay, power_exponent, reconstruction_weights


def tracked(weights: np.ndarray, width: float) -> np.ndarray:
    """(T, D) weights after samples 1..T -> (T, D) their power-function averages, step by step."""
    averages, average = [], np.zeros_like(weights[0])
    for step, value in enumerate(weights):
        decay = power_decay(width, step, step + 1)
        average = decay * average + (1 - decay) * value
        averages.append(average)
    return np.stack(averages)


@pytest.mark.parametrize("width", [0.01, 0.05, 0.1, 0.25])
def test_the_width_is_the_profiles_standard_deviation(width: float) -> None:
    steps = 20_000
    profile, remaining = np.empty(steps), 1.0
    for step in reversed(range(steps)):  # what each step's weights have left of them in the last average
        decay = power_decay(width, step, step + 1)
        profile[step] = remaining * (1 - decay)
        remaining *= decay
    times = np.arange(1, steps + 1) / steps
    mean = profile @ times
    assert profile.sum() == pytest.approx(1)
    assert np.sqrt(profile @ (times - mean) ** 2) == pytest.approx(width, rel=2e-3)


def test_the_exponents_of_the_papers_widths() -> None:
    assert power_exponent(0.05) == pytest.approx(16.97, abs=0.01)
    assert power_exponent(0.10) == pytest.approx(6.94, abs=0.01)


@pytest.mark.parametrize("width", [0.0, -0.1, MAX_WIDTH, 1.0])
def test_a_width_that_no_average_has_is_refused(width: float) -> None:
    with pytest.raises(ValueError, match="width: "):
        power_exponent(width)


def test_decays_are_functions_of_samples_whatever_the_batch() -> None:
    def over(batch: int, decay: str) -> float:
        product = 1.0
        for before in range(1024, 4096, batch):
            constant = decay == "constant"
            after = before + batch
            product *= constant_decay(0.999, 512, before, after) if constant else power_decay(0.1, before, after)
        return product

    for decay in ("constant", "power"):
        assert over(64, decay) == pytest.approx(over(1024, decay), rel=1e-12)


@pytest.mark.parametrize(("width", "end"), [(0.05, 4000), (0.075, 4000), (0.15, 4000), (0.1, 3000)])
def test_any_width_comes_back_from_stored_snapshots(width: float, end: int) -> None:
    noise = np.random.default_rng(0).normal(size=(4000, 8)).cumsum(axis=0)  # weights wander as in training
    stored = [(samples, one) for one in (0.05, 0.1) for samples in range(250, 4001, 250)]
    averages = {one: tracked(noise, one) for one in (0.05, 0.1, width)}
    factors = reconstruction_weights(stored, (end, width))
    found = sum(factor * averages[one][samples - 1] for factor, (samples, one) in zip(factors, stored, strict=True))
    wanted = averages[width][end - 1]
    distance = np.linalg.norm(found - wanted) / np.linalg.norm(wanted - averages[0.05][end - 1 - 250])
    assert distance < 0.02


def test_a_stored_average_is_its_own_reconstruction() -> None:
    stored = [(1000.0, 0.05), (2000.0, 0.05), (1000.0, 0.1), (2000.0, 0.1)]
    assert reconstruction_weights(stored, (2000.0, 0.1)) == pytest.approx([0, 0, 0, 1], abs=1e-6)


def test_samples_in_the_hundreds_of_millions_do_not_overflow() -> None:
    stored = [(204_800_000.0 * part / 40, width) for part in range(1, 41) for width in (0.01, 0.1)]
    assert np.isfinite(reconstruction_weights(stored, (204_800_000.0, 0.02))).all()
