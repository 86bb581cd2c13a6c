"""The demo's autoencoder is trained on images that are not held out, and finished without changing an image."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers.models import AutoencoderKL

from common.errors import UserError
from common.recipe import VAE, Data, DemoImages, Recipe
from preprocess.demo.vae_training import (
    KL_WEIGHTS,
    Portraits,
    build,
    finish,
    kl_weight,
    learning_rate,
    loss,
    measure,
)
from preprocess.train_vae import export

RECIPE = Recipe(name="test", demo=DemoImages(held_out_per_class=2), data=Data(resolution=16), vae=VAE(downsampling=4))


def images(count: int) -> torch.Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_weights_are_a_function_of_the_seed() -> None:
    first, second = build(RECIPE), build(RECIPE)
    other = build(Recipe(name="test", seed=1, data=RECIPE.data, vae=RECIPE.vae))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.encoder.conv_in.weight, other.encoder.conv_in.weight)


def test_a_step_follows_the_gradient_of_every_parameter() -> None:
    vae = build(RECIPE)
    loss(vae, images(2), seed=0, step=0, weight=1e-3).backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in vae.parameters())


def test_the_learning_rate_rises_and_falls_to_zero() -> None:
    rates = [learning_rate(step, 1000) for step in range(1000)]
    assert rates[0] < rates[100] < max(rates) <= 1e-3
    assert rates[-1] < 1e-8


@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_finishing_standardises_the_latents_and_keeps_the_images(offset: float) -> None:
    vae, batch = build(RECIPE), images(8)
    vae.quant_conv.bias.data[:4] = offset
    finished = finish(vae, batch)
    before, after = measure(vae, batch), measure(finished, batch)
    assert after["psnr"] == pytest.approx(before["psnr"], abs=0.01)
    assert after["channel_means"] == pytest.approx([0] * 4, abs=0.01)
    assert after["channel_stds"] == pytest.approx([1] * 4, abs=0.01)


def test_an_exported_autoencoder_loads_with_its_note(tmp_path: Path) -> None:
    recipe = Recipe(name="test", data=RECIPE.data, vae=VAE(path=str(tmp_path / "vae"), downsampling=4))
    vae, batch = build(recipe), images(8)
    finished = finish(vae, batch)
    measured = measure(finished, batch)
    export(recipe, finished, {"seen": 8, "images": 16, "minutes": 1.0, "held_out": 8} | measured)
    loaded = AutoencoderKL.from_pretrained(tmp_path / "vae")
    assert measure(loaded, batch)["psnr"] == pytest.approx(measured["psnr"], abs=0.01)
    assert loaded.config.scaling_factor == pytest.approx(1, abs=0.02)
    assert f"PSNR | {measured['psnr']:.2f} dB" in (tmp_path / "vae/README.md").read_text(encoding="utf-8")


def test_another_downsampling_is_refused() -> None:
    with pytest.raises(UserError, match=r"vae\.downsampling: found 8"):
        build(Recipe(name="test"))


def test_training_never_sees_a_held_out_portrait(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("robohash")
    monkeypatch.setattr("preprocess.demo.vae_training.CLASSES", {"monster": "set2", "cat": "set4"})
    portraits = Portraits(RECIPE)
    training = torch.cat([portraits.training_batch(step) for step in range(4)])
    held_out = portraits.held_out()
    assert (training.shape, held_out.shape) == ((32, 3, 16, 16), (4, 3, 16, 16))
    assert len({image.numpy().tobytes() for image in [*training, *held_out]}) == 36


def test_the_divergence_weighs_more_from_step_to_step_until_the_last_quarter() -> None:
    weights = [kl_weight(step, 100) for step in range(100)]
    assert (weights[0], weights[75], weights[99]) == (KL_WEIGHTS[0], pytest.approx(KL_WEIGHTS[1]), KL_WEIGHTS[1])
    factors = [after / before for before, after in pairwise(weights[:76])]
    assert factors == pytest.approx([factors[0]] * 75)
