"""The loss curves of every ZeRO stage and precision against committed ones, and the EMAs against a plain reference.

tests/golden/losses.json holds the losses by run. After an intended change of the losses:

    WRITE_GOLDEN=1 python -m pytest tests/integration/test_golden_losses.py

Tolerances, relative: 1e-4 in fp32, whose curves agree to 1e-5 across stages on one machine, because other machines sum
in another order; 0.5 % in bf16, whose curves lie within 0.1 % of those in fp32.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from fpdm.ema import constant_decay, power_decay
from tests.integration.conftest import ROOT, Experiment
from tests.integration.ranks import finish, started
from tests.integration.test_training import SAME_TO, losses

pytestmark = pytest.mark.timeout(1200)  # twelve trainings are the fixture's, on a machine that may be busy
GOLDEN = ROOT / "tests/golden/losses.json"
BF16_TO = 0.005
RUNS = {
    **{f"zero{stage}-fp32": (f"train.zero_stage={stage}",) for stage in range(4)},
    **{f"zero{stage}-bf16": (f"train.zero_stage={stage}", "train.precision=bf16") for stage in (0, 2, 3)},
    "zero0-fp32-accumulated": ("train.zero_stage=0", "train.micro_batch_size=2"),
    "zero2-fp32-accumulated": ("train.zero_stage=2", "train.micro_batch_size=2"),
    "zero3-fp32-checkpointed": ("train.zero_stage=3", "train.activation_checkpointing=true"),
    "zero2-fp32-offloaded": ("train.zero_stage=2", "train.optimizer.offload=true"),
}
# A network of the demo's width, on the experiment's smaller latents, with a warm-up and two kinds of EMA.
SETTINGS = (
    *("model.hidden_size=128", "model.num_heads=2", "model.patch_size=4", "objective.learned_variance=false"),
    *("train.checkpoint.every_samples=16", "train.checkpoint.keep=20", "train.optimizer.warmup_samples=64"),
    "train.ema.widths=[0.1]",
)
STEPS = 6  # of 16 samples; the warm-up ends within them
# The decay of each EMA in the step that starts after so many samples.
DECAYS = {
    "ema-0.9": lambda before: constant_decay(0.9, 16, before, before + 16),
    "ema-power-0.1": lambda before: power_decay(0.1, before, before + 16),
}


def train_all(recipe_path: str, runs: dict[str, tuple[str, ...]]) -> None:
    """One rank's part of all runs in one launch. Each run stops half-way and resumes in a new engine."""
    from common.loading import load_recipe
    from common.recipe import with_world_size
    from pipeline.training.data import open_shards
    from pipeline.training.distributed import process_group
    from pipeline.training.trainer import Trainer

    with process_group() as ranks:
        for name, overrides in runs.items():
            for total in (8 * STEPS, 16 * STEPS):
                given = [f"name={name}", *SETTINGS, f"train.total_samples={total}", *overrides]
                recipe = with_world_size(load_recipe(recipe_path, given), ranks.world_size)
                Trainer(recipe, open_shards(recipe), ranks).run()
            if ranks.rank == 0:
                check_ema(recipe.folder)


def check_ema(run: Path) -> None:
    """Writes the errors of a run's last EMAs, computed from the parameters after each step, into its `ema-errors.txt`.

    Then deletes checkpoints and weights, a gigabyte per run.
    """
    from safetensors.torch import load_file

    states = [load_file(path / "state.safetensors") for path in sorted((run / "checkpoints").iterdir())]
    start = load_file(run / "weights/000000000000/0.9/diffusion_pytorch_model.safetensors")
    faults = [] if len(states) == STEPS else [f"{len(states)} checkpoints of {STEPS} steps"]
    for ema, decay in DECAYS.items():
        for parameter, value in start.items():
            if parameter == "pos_embed":  # a constant
                continue
            expected = value.clone()
            for step, state in enumerate(states):
                expected.lerp_(state[f"model.{parameter}"], 1 - decay(16 * step))
            actual = states[-1][f"{ema}.{parameter}"]
            # The last digit is the fused multiply-add's, which comes and goes with an element's place in a shard.
            if actual.dtype != torch.float32 or not torch.allclose(actual, expected, rtol=2e-7, atol=1e-10):
                faults.append(f"{ema}.{parameter} is off by {(actual - expected).abs().max():.2g}")
    (run / "ema-errors.txt").write_text("\n".join(faults))
    shutil.rmtree(run / "checkpoints")
    shutil.rmtree(run / "weights")


@pytest.fixture(scope="module")
def curves(experiment: Experiment) -> dict[str, list[float]]:
    """Losses by run, of two ranks and of one."""
    alone = {"one-rank": RUNS["zero0-fp32"]}
    for runs, ranks in ((RUNS, 2), (alone, 1)):
        with started(experiment.folder, train_all, str(experiment.recipe), runs, ranks=ranks) as running:
            assert finish(running, 550).statuses == [0] * ranks, running.output
    curves = {name: losses(experiment.folder / "runs" / name) for name in RUNS | alone}
    if os.environ.get("WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps(curves, indent=1) + "\n")
    return curves


def golden(name: str) -> list[float]:
    return json.loads(GOLDEN.read_text())[name]


@pytest.mark.parametrize("name", [*RUNS, "one-rank"])
def test_the_losses_are_the_golden_ones(curves: dict[str, list[float]], name: str) -> None:
    assert len(curves[name]) == STEPS
    assert curves[name] == pytest.approx(golden(name), rel=BF16_TO if "bf16" in name else 1e-4)


def test_stages_ranks_accumulation_checkpointing_and_offload_change_no_loss(curves: dict[str, list[float]]) -> None:
    for name, curve in curves.items():
        assert curve == pytest.approx(curves["zero0-fp32"], rel=BF16_TO if "bf16" in name else SAME_TO), name


@pytest.mark.parametrize("name", list(RUNS))
def test_emas_are_those_of_one_process_in_fp32(
    curves: dict[str, list[float]], experiment: Experiment, name: str
) -> None:
    assert (experiment.folder / "runs" / name / "ema-errors.txt").read_text() == ""


def test_the_golden_file_holds_every_run() -> None:
    assert set(json.loads(Path(GOLDEN).read_text())) == {*RUNS, "one-rank"}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_compiled_blocks_change_no_loss(curves: dict[str, list[float]], experiment: Experiment) -> None:
    """Takes minutes of compilation on two cores."""
    runs = {"compiled": ("train.zero_stage=2", "train.compile=true")}
    with started(experiment.folder, train_all, str(experiment.recipe), runs, ranks=1) as running:
        assert finish(running, 1100).statuses == [0], running.output
    assert losses(experiment.folder / "runs/compiled") == pytest.approx(curves["zero0-fp32"], rel=SAME_TO)
