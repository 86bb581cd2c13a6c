"""Losses add up over ranks, micro-batches and interruptions; the operations of a step are counted."""

import json

import pytest
import torch

from common.loading import parse_recipe
from common.recipe import denoiser_config
from fpdm.denoiser import build_denoiser
from pipeline.training.schedule import StepIterations
from pipeline.training.state import TrainState
from pipeline.training.throughput import Interval, loss_sums, step_flops

SMALL = ("model.size=null", "model.hidden_size=32", "model.num_heads=2", "model.num_classes=2", "train.batch_size=16")


def test_loss_sums_of_parts_add_up_to_those_of_the_batch() -> None:
    losses, timesteps = torch.rand(16, generator=torch.Generator().manual_seed(0)), torch.arange(16) * 62
    sums = loss_sums(losses, timesteps, 1000)
    parts = sum(loss_sums(losses[part : part + 4], timesteps[part : part + 4], 1000) for part in range(0, 16, 4))
    assert torch.allclose(sums, parts, rtol=1e-12)
    assert sums[0] == pytest.approx(float(losses.sum()))
    quartile = timesteps // 250
    for number in range(4):
        assert sums[1 + number] == pytest.approx(float(losses[quartile == number].sum()))
        assert sums[5 + number] == (quartile == number).sum()


def test_an_interval_saved_in_a_checkpoint_gives_the_same_means() -> None:
    sums = [
        [3.0, 1.0, 2.0, 0.0, 0.0, 2.0, 2.0, 0.0, 0.0, 6.0, 4.0, 2.0, 4.0],
        [5.0, 0.0, 0.0, 4.0, 1.0, 0.0, 0.0, 3.0, 1.0, *[0.0] * 4],  # without an intermediate iterate, or growth
    ]
    uninterrupted = Interval().plus(sums[0], 4).plus(sums[1], 4)
    saved = json.loads(json.dumps(TrainState(interval=Interval().plus(sums[0], 4)).to_json()))
    assert TrainState.from_json(4, saved).interval.plus(sums[1], 4) == uninterrupted
    assert uninterrupted.means() == {
        **{"loss": 1.0, "loss_q1": 0.5, "loss_q2": 1.0, "loss_q3": 4 / 3, "loss_q4": 1.0},
        **{"intermediate_loss": 1.5, "growth": 0.5, "skipped_steps": 0},
    }
    for name in ("intermediate_loss", "intermediate_count", "growth", "growth_count"):
        del saved["interval"][name]  # of an older run
    means = TrainState.from_json(4, saved).interval.means()
    assert means["intermediate_loss"] is means["growth"] is None
    assert Interval().means()["loss_q1"] is None


def test_the_operations_of_a_step_grow_with_its_iterations() -> None:
    config = denoiser_config(parse_recipe("name: a", SMALL))
    counts = ((0, 1, 0), (0, 2, 0), (3, 1, 0), (0, 2, 1))
    one, two, more, read_out = (step_flops(config, StepIterations(*each)) for each in counts)
    iteration = (two - one) / 3
    assert more == one + 3 * iteration
    tokens, width, hidden = 256, 32, 128
    block = 2 * tokens * width * (4 * width + 2 * hidden) + 4 * tokens**2 * width
    projections = 2 * tokens * (width * 2 * width + 2 * width * width)
    assert iteration == pytest.approx(block + projections, rel=0.01)
    assert read_out - two == pytest.approx(3 * block, rel=0.1)  # the post-layer and the last one, once more


def test_iterations_that_measure_growth_are_counted_as_the_network_does_them() -> None:
    config = denoiser_config(parse_recipe("name: a", SMALL))
    model, done = build_denoiser(config, seed=0), {False: 0, True: 0}  # iterations without and with graph

    def count(*_: object) -> None:
        done[torch.is_grad_enabled()] += 1

    model.block_fixed_point.register_forward_hook(count)
    latents, zero = torch.zeros(2, config.in_channels, config.input_size, config.input_size), torch.zeros(2).long()
    model(latents, zero, zero, iterations=(1, 2), with_growth=True)
    counted = step_flops(config, StepIterations(1, 2, 0, with_growth=True))
    assert counted == step_flops(config, StepIterations(done[False], done[True], 0))


def test_sparse_iterations_are_counted_by_the_tokens_they_see() -> None:
    config = denoiser_config(parse_recipe("name: a", SMALL))
    tokens, width, hidden = 64, 32, 128  # a quarter
    one, two = (step_flops(config, StepIterations(0, m, 0, 0.25)) for m in (1, 2))
    linear = 2 * tokens * width * (4 * width + 2 * hidden) + 2 * tokens * (width * 2 * width + 2 * width * width)
    assert (two - one) / 3 == pytest.approx(linear + 4 * tokens**2 * width, rel=0.01)
    dense = [step_flops(config, StepIterations(0, m, 0)) for m in (1, 2)]
    outer, dense_outer = one - (two - one), dense[0] - (dense[1] - dense[0])
    injection = 2 * tokens * (width**2 + 2 * width * width)  # its products are the only ones outside that are sparse
    assert dense_outer - outer == pytest.approx(3 * 3 * injection, rel=0.01)
