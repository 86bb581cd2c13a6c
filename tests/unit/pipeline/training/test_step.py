"""A step's loss, gradient and update are those of plain PyTorch; one that is not finite leaves the weights."""

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from common.loading import parse_recipe
from common.recipe import Recipe, denoiser_config, diffusion
from fpdm.denoiser import Denoiser, build_denoiser
from pipeline.training import step
from pipeline.training.data import Batch
from pipeline.training.distributed import Ranks
from pipeline.training.schedule import StepIterations
from pipeline.training.step import StepResult, train_step
from pipeline.training.throughput import GROWTH, INTERMEDIATE

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
    timesteps, labels = torch.tensor([3, 400, 600, 999]), torch.tensor([0, 1, 2, 0])
    tokens = torch.rand(BATCH, config.num_tokens, generator=generator).argsort(dim=1)
    return Batch(latents, noise, timesteps, labels, torch.tensor([1.0, 2.0, 0.5, 1.0]), tokens)


def halves(batch: Batch) -> list[Batch]:
    return [Batch(*(tensor[part] for tensor in vars(batch).values())) for part in (slice(0, 2), slice(2, 4))]


def one_step(recipe: Recipe, model: Denoiser, batches: list[Batch]) -> StepResult:
    engine, watch = Engine(model, len(batches)), lambda part: nullcontext()
    intermediate = int(recipe.train.intermediate_loss > 0)
    growth = recipe.train.contraction > 0
    iterations = StepIterations(1, 2, intermediate, recipe.train.sparse_tokens, growth)
    return train_step(
        engine, diffusion(recipe), batches, iterations, recipe.train, Ranks(0, 1, None), watch, with_residuals=True
    )


@pytest.mark.parametrize(("parts", "clipping"), [(1, 0.0), (2, 0.0), (2, 1e-3)])
def test_loss_gradient_and_update_are_those_of_plain_pytorch(parts: int, clipping: float) -> None:
    recipe = recipe_with(f"train.optimizer.gradient_clipping={clipping}")
    batch, process = batch_of(recipe), diffusion(recipe)
    expected = network(recipe)
    noisy = process.add_noise(batch.latents, batch.noise, batch.timesteps)
    answer = expected(noisy, batch.timesteps, batch.labels, iterations=(1, 2), with_residuals=True)
    losses = process.loss(answer.output, batch.latents, batch.noise, batch.timesteps)["loss"]
    (losses * batch.weights).mean().backward()
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


def test_the_intermediate_loss_is_that_of_fewer_iterations_and_only_its_gradient_is_added() -> None:
    recipe = recipe_with("train.optimizer.gradient_clipping=0", "train.intermediate_loss=0.5")
    batch, process = batch_of(recipe), diffusion(recipe)
    expected = network(recipe)
    noisy = process.add_noise(batch.latents, batch.noise, batch.timesteps)
    last, early = (expected(noisy, batch.timesteps, batch.labels, iterations=(1, m)).output for m in (2, 1))
    losses = [process.loss(each, batch.latents, batch.noise, batch.timesteps)["loss"] for each in (last, early)]
    both = losses[0] + 0.5 * losses[1]
    (both * batch.weights).mean().backward()

    model = network(recipe)
    result = one_step(recipe, model, [batch])
    assert torch.allclose(result.losses, both.detach(), rtol=1e-5)
    assert float(result.sums[0]) == pytest.approx(float(losses[0].detach().sum()), rel=1e-5)
    assert result.sums[INTERMEDIATE].tolist() == pytest.approx([float(losses[1].detach().sum()), BATCH], rel=1e-5)
    for name, parameter in model.named_parameters():
        update = RATE * expected.get_parameter(name).grad
        assert torch.allclose(parameter, expected.get_parameter(name) - update, rtol=1e-5, atol=1e-7), name


def test_growth_above_what_is_allowed_is_added_to_the_gradient_and_not_to_the_loss() -> None:
    recipe = recipe_with("train.optimizer.gradient_clipping=0", "train.contraction=3", "train.precision=fp32")
    batch, process, expected = batch_of(recipe), diffusion(recipe), network(recipe)
    noisy = process.add_noise(batch.latents, batch.noise, batch.timesteps)
    answer = expected(noisy, batch.timesteps, batch.labels, iterations=(1, 2), with_growth=True)
    losses = process.loss(answer.output, batch.latents, batch.noise, batch.timesteps)["loss"]
    allowed = float(answer.growth.detach().median())  # below some samples' growth and not below others'
    both = losses + 3 * (answer.growth - allowed).clamp(min=0) ** 2
    (both * batch.weights).mean().backward()

    model = network(recipe)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(step, "ALLOWED_GROWTH", allowed)
        result = one_step(recipe, model, [batch])
    assert torch.allclose(result.losses, both.detach(), rtol=1e-4)
    assert float(result.sums[0]) == pytest.approx(float(losses.detach().sum()), rel=1e-5)
    assert result.sums[GROWTH].tolist() == pytest.approx([float(answer.growth.detach().sum()), BATCH], rel=1e-4)
    for name, parameter in model.named_parameters():
        update = RATE * expected.get_parameter(name).grad
        assert torch.allclose(parameter, expected.get_parameter(name) - update, rtol=1e-5, atol=1e-6), name


def test_sparse_iterations_see_the_first_of_each_samples_tokens() -> None:
    recipe, model = recipe_with("train.sparse_tokens=0.25"), network(recipe_with())
    batch, process = batch_of(recipe), diffusion(recipe)
    noisy = process.add_noise(batch.latents, batch.noise, batch.timesteps)
    seen = batch.tokens[:, : batch.tokens.shape[1] // 4]
    expected = model(noisy, batch.timesteps, batch.labels, iterations=(1, 2), seen=seen)
    losses = process.loss(expected.output, batch.latents, batch.noise, batch.timesteps)["loss"]
    assert torch.allclose(one_step(recipe, model, [batch]).losses, losses.detach(), rtol=1e-5)


def test_a_loss_that_is_not_finite_leaves_the_weights() -> None:
    recipe, batch = recipe_with(), batch_of(recipe_with())
    batch.latents[3, 0, 0, 0] = torch.nan
    model = network(recipe)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    result = one_step(recipe, model, halves(batch))
    assert not math.isfinite(result.norm)
    assert result.losses.isfinite().tolist() == [True, True, True, False]
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
