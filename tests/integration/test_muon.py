"""Muon, and options of network and loss, under DeepSpeed: one update with any number of ranks and any ZeRO stage,
and an exact resume.
"""

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.integration.conftest import ROOT, Experiment
from tests.integration.ranks import finish, run_ranks, started
from tests.integration.test_training import SAME_TO, losses, metrics, newest_state

GOLDEN = ROOT / "tests/golden/muon-losses.json"
STEPS = 5
SETTINGS = (
    *("train.optimizer.name=muon", "train.optimizer.weight_decay=0.1", "train.batch_size=12"),
    *("train.timesteps.kind=logit_normal", "train.timesteps.stratified=true"),
    *("model.norm=rms", "model.qk_norm=true", "model.rope=true", "model.mlp=swiglu", "model.value_residual=true"),
    *("model.injection=decay", "train.intermediate_loss=0.5", "train.contraction=1", "train.precision=fp32"),
    *("train.checkpoint.every_samples=24", f"train.total_samples={12 * STEPS}", "train.log.every_samples=12"),
)


def train_stages(recipe_path: str, stages: list[int]) -> None:
    """One rank's part of a run of each ZeRO stage, in one launch."""
    from common.loading import load_recipe
    from common.recipe import with_world_size
    from pipeline.training.data import open_shards
    from pipeline.training.distributed import process_group
    from pipeline.training.trainer import Trainer

    with process_group() as ranks:
        assert (ranks.shared is not None) == (ranks.world_size > 1)
        for stage in stages:
            given = (f"name=muon-{ranks.world_size}-{stage}", f"train.zero_stage={stage}", *SETTINGS)
            recipe = with_world_size(load_recipe(recipe_path, list(given)), ranks.world_size)
            Trainer(recipe, open_shards(recipe), ranks).run()


@pytest.fixture(scope="module")
def runs(experiment: Experiment) -> Path:
    """A run of every ZeRO stage with 1, 2, 3 and 4 ranks: `muon-<ranks>-<stage>`."""
    for ranks, stages in ((1, [0]), (2, [1, 2, 3]), (3, [3]), (4, [2])):
        with started(experiment.folder, train_stages, str(experiment.recipe), stages, ranks=ranks) as running:
            assert finish(running, 240).statuses == [0] * ranks, running.output
    return experiment.folder / "runs"


def test_ranks_and_zero_stages_change_no_loss(runs: Path) -> None:
    expected = losses(runs / "muon-1-0")
    assert len(expected) == STEPS
    curves = {run.name: losses(run) for run in runs.glob("muon-[1-4]-[0-3]")}
    assert len(curves) == 6
    for name, curve in curves.items():
        assert curve == pytest.approx(expected, rel=SAME_TO), name
    growths = [metrics(runs / name)[0]["growth"] for name in ("muon-1-0", *curves)]
    assert growths == pytest.approx([growths[0]] * len(growths), rel=1e-3)  # a change of 1e-2, in float32
    assert 0 < growths[0] < 1


def test_the_losses_are_the_golden_ones(runs: Path) -> None:
    """Relative 1e-4, for other machines sum in another order; after an intended change: WRITE_GOLDEN=1."""
    if os.environ.get("WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps(losses(runs / "muon-1-0")) + "\n")
    assert losses(runs / "muon-1-0") == pytest.approx(json.loads(GOLDEN.read_text()), rel=1e-4)


def test_a_run_resumes_to_the_bit_and_with_other_ranks_and_stages(experiment: Experiment, runs: Path) -> None:
    """Stopped after two of five steps; the rest is done by as many ranks, or by others."""
    for name, total, ranks, stage in (("same", 24, 2, 2), ("moved", 60, 3, 3), ("same", 60, 2, 2)):
        given = (*SETTINGS, f"name=muon-{name}", f"train.total_samples={total}", f"train.zero_stage={stage}")
        done = run_ranks(experiment, *given, ranks=ranks)
        assert done.statuses == [0] * ranks, done.output
        if total == 24:
            shutil.copytree(runs / "muon-same", runs / "muon-moved")
    assert newest_state(runs / "muon-same") == newest_state(runs / "muon-2-2")
    assert losses(runs / "muon-moved") == pytest.approx(losses(runs / "muon-2-2"), rel=SAME_TO)


def test_another_optimizer_does_not_continue_the_run(experiment: Experiment, runs: Path) -> None:
    given = (*SETTINGS, "name=muon-2-2", "train.optimizer.name=adamw", "train.total_samples=72")
    done = run_ranks(experiment, *given)
    assert done.statuses == [2]
    assert "train.optimizer.name (was 'muon', is 'adamw')" in done.output
