"""Which recipes continue a run."""

from common.loading import parse_recipe
from pipeline.training.identity import changes
from pipeline.training.run import _is_same_run


def test_a_field_that_is_younger_than_the_run_had_its_default() -> None:
    before = {"seed": 0, "model.kind": "fpdm", "train.batch_size": 16}
    now = before | {"model.injection": "concat", "train.latents": "drawn"}
    assert changes(before, now) == ""
    assert changes(before, now | {"model.injection": "decay"}) == "model.injection (was 'concat', is 'decay')"
    assert changes(before, now | {"seed": 1}) == "seed (was 0, is 1)"


def test_a_field_that_only_the_run_has_counts() -> None:
    assert parse_recipe("name: a").train.optimizer.learning_rate_decay == "constant"
    before = {"train.total_samples": 100}
    assert changes(before, {}) == "train.total_samples (was 100, is None)"


def test_a_finished_run_stays_finished_when_a_field_is_new() -> None:
    run = {"seed": 0, "train.precision": "fp32"}
    assert _is_same_run(run, run | {"train.gradient": "sjfb"}, "fp32")
    assert not _is_same_run(run, run | {"train.gradient": "multi_step"}, "fp32")
    assert not _is_same_run(None, run, "fp32")
