"""A training that is likely to disappoint is announced before it, or in its first steps."""

from dataclasses import replace

import pytest

from common.recipe import Recipe, Train
from pipeline.training.log import TIMED_STEPS, ProgressBar
from pipeline.training.warnings import long_silence, warnings

RECIPE = Recipe(name="a", train=Train(total_samples=32_000, batch_size=32))


def test_above_a_thousand_epochs_is_a_warning() -> None:
    assert list(warnings(RECIPE, 32)) == []
    (line,) = warnings(RECIPE, 31)
    assert line.startswith("warning: train.total_samples: each of the 31 images is seen 1,032 times")
    assert list(warnings(replace(RECIPE, train=replace(RECIPE.train, total_samples=31_000)), 31)) == []


def test_a_log_line_that_is_more_than_a_minute_away_is_a_warning() -> None:
    assert long_silence(600, rate=10) is None
    line = long_silence(6000, rate=10)
    assert line is not None
    assert "6,000 samples are 10.0 minutes" in line
    assert "300 makes one every half minute" in line


@pytest.mark.parametrize(("every", "rank", "warned"), [(10**9, 0, True), (10**9, 1, False), (1, 0, False)])
def test_it_is_said_once_after_the_first_steps(every: int, rank: int, warned: bool, capsys) -> None:
    bar = ProgressBar(10**9, 0, rank, every_samples=every)
    for _ in range(TIMED_STEPS + 4):
        bar.advance(1)
    bar.close()
    assert capsys.readouterr().err.count("warning: train.log.every_samples") == warned
