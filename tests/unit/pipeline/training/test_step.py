"""A step's loss, gradient and update are those of plain PyTorch; one that is not finite leaves the weights."""

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch

from common.loading import parse_recipe
from common.recipe import Recipe, denoiser_config, diffusion
from fpdm.denoiser import Denoiser, build_denoiser
from pipeline.training.data import Batch
from pipeline.training.distributed import Ranks
from pipeline.training.guards import check_finite, not_finite_error
from pipeline.training.state import WINDOW, TrainState
from pipeline.training.step import StepResult, train_step

BATCH, RATE = 4, 0.1


class Engine:
    """DeepSpeed's engine of one rank in fp32 at ZeRO stage 0: torch's optimizer as it is."""

    device = torch.device("cpu")

    def __init__(self, module: Denoiser, accumulations: int) -> None:
        self.module, self.accumulations, self.steps = module, accumulations, 0
        self.optimizer = torch.optim.SGD(module.parameters(), lr=RATE)

    def __call__(self, *tensors: torch.Tensor, **settings: Any) -> Any:
        return self.module(*tensors, **settings)

    def backward(self, loss: torch.Tensor) -> None:
        (loss / self.accumulations).backward()

    def step(self) -> None:
        self.steps += 1
        if self.steps % self.accumulations == 0:
            self.optimizer.step()
            self.optimizer.zero_grad()


def recipe_with(*overrides: str) -> Recipe:
    network = [f"model.{each}" for each in ("size=null", "hidden_size=8", "num_heads=2", "num_classes=2")]
    objective = ("objective.learned_variance=false", f"train.batch_size={BATCH}")
    return parse_recipe("name: a", (*network, *objective, *overrides))


def network(recipe: Recipe) -> Denoiser:
    """Not the zeros that training begins with, of which most gradients are zero."""
    model = build_denoiser(denoiser_config(recipe), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def batch_of(recipe: Recipe) -> Batch:
    config, generator = denoiser_config(recipe), torch.Generator().manual_seed(2)
    shape = (BATCH, config.in_channels, config.input_size, config.input_size)
    latents, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    return Batch(latents, noise, torch.tensor([3, 400, 600, 999]), torch.tensor([0, 1, 2, 0]))


def halves(batch: Batch) -> list[Batch]:
    return [Batch(*(tensor[part] for tensor in vars(batch).values())) for part in (slice(0, 2), slice(2, 4))]


def one_step(recipe: Recipe, model: Denoiser, batches: list[Batch]) -> StepResult:
    engine, watch = Engine(model, len(batches)), lambda part: nullcontext()
    return train_step(engine, diffusion(recipe), batches, (1, 2), recipe.train, watch, with_residuals=True)


@pytest.mark.parametrize(("parts", "clipping"), [(1, 0.0), (2, 0.0), (2, 1e-3)])
def test_loss_gradient_and_update_are_those_of_plain_pytorch(parts: int, clipping: float) -> None:
    recipe = recipe_with(f"train.optimizer.gradient_clipping={clipping}")
    batch, process = batch_of(recipe), diffusion(recipe)
    expected = network(recipe)
    noisy = process.add_noise(batch.latents, batch.noise, batch.timesteps)
    answer = expected(noisy, batch.timesteps, batch.labels, iterations=(1, 2), with_residuals=True)
    losses = process.loss(answer.output, batch.latents, batch.noise, batch.timesteps)["loss"]
    losses.mean().backward()
    losses, residual = losses.detach(), float(answer.residuals[:, -1].mean())
    norm = torch.cat([parameter.grad.flatten() for parameter in expected.parameters()]).norm()
    scale = min(1.0, clipping / float(norm)) if clipping else 1.0
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter -= RATE * scale * parameter.grad

    model = network(recipe)
    result = one_step(recipe, model, [batch] if parts == 1 else halves(batch))
    assert torch.allclose(result.losses, losses, rtol=1e-5)
    assert float(result.sums[0]) == pytest.approx(float(losses.sum()), rel=1e-5)
    assert float(result.sums[-1]) == pytest.approx(residual, rel=1e-5)
    assert result.norm == pytest.approx(float(norm), rel=1e-5)
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, expected.get_parameter(name), rtol=1e-5, atol=1e-7), name


def test_a_loss_that_is_not_finite_leaves_the_weights() -> None:
    recipe, batch = recipe_with(), batch_of(recipe_with())
    batch.latents[3, 0, 0, 0] = torch.nan
    model = network(recipe)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    result = one_step(recipe, model, halves(batch))
    assert not math.isfinite(result.norm)
    assert result.losses.isfinite().tolist() == [True, True, True, False]
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def judged(state: TrainState, losses: list[float], norm: float, *, scaled: bool = False) -> tuple[TrainState, Any]:
    """`check_finite` of one rank's step with these losses, of samples 10 to 13."""
    sums = torch.tensor([sum(losses), *losses, *[1.0] * 4, 0.0], dtype=torch.float64)
    result, ranks = StepResult(sums, norm, torch.tensor(losses)), Ranks(0, 1, None)
    return check_finite(
        recipe_with(), state, result, ranks, scaled=scaled, sample_ids=lambda: list(range(10, 10 + BATCH))
    )


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_gather_object(into: list[Any], own: Any, group: Any) -> None:
        into[:] = [own]

    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)


def test_a_finite_step_is_counted_and_a_spike_is_not_compared_with() -> None:
    state, event = judged(TrainState(skipped=1), [1.0, 2.0, 3.0, 2.0], 1.0)
    assert event is None
    assert (state.samples_seen, state.updates, state.skipped, state.recent_losses) == (BATCH, 1, 0, (2.0,))
    usual = tuple(1.0 + 0.01 * (step % 5) for step in range(WINDOW))
    state, event = judged(TrainState(40, recent_losses=usual), [50.0] * BATCH, 1.0)
    assert (event["event"], event["step"], event["stream"]) == ("loss spike", 11, [40, 44])
    assert (state.updates, state.recent_losses) == (1, usual)
    state, event = judged(state, [1.02] * BATCH, 1.0)
    assert state.recent_losses == (*usual[1:], pytest.approx(1.02))


@pytest.mark.usefixtures("one_rank")
def test_a_step_that_is_not_finite_is_counted_as_skipped_and_named_with_its_samples() -> None:
    state, event = judged(TrainState(40, updates=7), [1.0, math.nan, 1.0, 1.0], math.nan)
    assert (state.samples_seen, state.updates, state.skipped, state.interval.skipped) == (44, 7, 1, 1)
    assert (event["step"], event["loss"], event["sample_ids"]) == (11, None, [11])
    assert "step 11: the loss is not finite, through samples 11 of" in str(not_finite_error(recipe_with(), event, 1))
    state, event = judged(state, [1.0] * BATCH, math.inf)
    assert (state.skipped, event["loss"], event["gradient_norm"], event["sample_ids"]) == (2, 1.0, None, [])
    error = str(not_finite_error(recipe_with(), event, state.skipped))
    assert "step 12: the gradient is not finite after 1 skipped steps in a row, through no single sample" in error


def test_a_gradient_that_overflows_under_the_loss_scaler_is_no_event() -> None:
    state, event = judged(TrainState(skipped=1), [1.0] * BATCH, math.inf, scaled=True)
    assert event is None
    assert (state.samples_seen, state.updates, state.skipped, state.interval.skipped) == (BATCH, 0, 1, 1)


def test_a_state_comes_back_from_json() -> None:
    state, _ = judged(TrainState(40, updates=7), [1.0, 2.0, 3.0, 2.0], 1.0)
    state = replace(state, scaler={"cur_scale": 1024.0})
    assert TrainState.from_json(state.samples_seen, json.loads(json.dumps(state.to_json()))) == state
