"""The diffusers pipeline draws the same images as `sample.py`, and loads from what `export.py` wrote."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from diffusers.models import AutoencoderDC, AutoencoderKL, AutoencoderTiny

from common.recipe import Recipe
from common.run_folder import RunFolder, weights_folder
from fpdm.pipeline_hf import FPDMPipeline, FPDMTransformer2DModel
from pipeline import export
from tests.conftest import generated, load_samples
from tests.seals import resealed


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_the_pipeline_draws_the_same_images_as_the_command(tiny_recipe: Recipe, sampler: str) -> None:
    recipe = replace(tiny_recipe, sample=replace(tiny_recipe.sample, sampler=sampler, guidance_scale=1.5))
    images, labels = load_samples(generated(recipe, "latest"), 10)
    export.export(recipe)
    loaded = FPDMPipeline.from_pretrained(RunFolder(recipe.folder).pipeline)
    found = loaded(labels[3:7], num_inference_steps=3, iterations=2, sampler=sampler, guidance_scale=1.5, first_index=3)
    pictures = np.stack([np.asarray(image) for image in found.images])
    assert np.abs(pictures.astype(int) - images[3:7]).max() <= 1
    assert (pictures == images[3:7]).mean() > 0.99


def tiny() -> AutoencoderTiny:
    channels = {"encoder_block_out_channels": (8,) * 3, "decoder_block_out_channels": (8,) * 3}
    return AutoencoderTiny(**channels, num_encoder_blocks=(1,) * 3, num_decoder_blocks=(1,) * 3)


def deep() -> AutoencoderDC:
    channels = {"encoder_block_out_channels": (8,) * 3, "decoder_block_out_channels": (8,) * 3}
    layers = {"encoder_layers_per_block": (1,) * 3, "decoder_layers_per_block": (1,) * 3}
    kinds = {"encoder_block_types": ("ResBlock",) * 3, "decoder_block_types": ("ResBlock",) * 3}
    scales = {"encoder_qkv_multiscales": ((),) * 3, "decoder_qkv_multiscales": ((),) * 3}
    return AutoencoderDC(latent_channels=4, scaling_factor=0.41407, **channels, **layers, **kinds, **scales)


@pytest.mark.parametrize("autoencoder", [tiny, deep])
def test_a_run_of_another_kind_of_autoencoder_is_exported_too(tiny_recipe: Recipe, tmp_path: Path, autoencoder) -> None:
    autoencoder().save_pretrained(tmp_path / "vae")
    recipe = replace(tiny_recipe, vae=replace(tiny_recipe.vae, path=str(tmp_path / "vae")))
    images, labels = load_samples(generated(recipe, "latest"), 10)
    export.export(recipe)
    found = FPDMPipeline.from_pretrained(RunFolder(recipe.folder).pipeline)(labels, num_inference_steps=3, iterations=2)
    pictures = np.stack([np.asarray(image) for image in found.images])
    assert np.abs(pictures.astype(int) - images).max() <= 1


def test_guidance_by_a_network_that_never_saw_the_null_label_is_refused_also_after_an_export(
    tiny_recipe: Recipe,
) -> None:
    resealed(weights_folder(tiny_recipe, 64) / "config.json", lambda stated: stated["extra"].update(label_dropout=0))
    export.export(tiny_recipe)
    loaded = FPDMPipeline.from_pretrained(RunFolder(tiny_recipe.folder).pipeline)
    with pytest.raises(ValueError, match=r"guidance_scale: 1\.5, but .* never saw the null label"):
        loaded([0], num_inference_steps=2, iterations=1, guidance_scale=1.5)
    assert loaded([0], num_inference_steps=2, iterations=1).images


def test_an_autoencoder_that_scales_by_channel_is_refused(tiny_recipe: Recipe) -> None:
    transformer = FPDMTransformer2DModel.from_pretrained(weights_folder(tiny_recipe, 64))
    vae = AutoencoderKL.from_pretrained(tiny_recipe.vae.path, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    with pytest.raises(ValueError, match="vae: per-channel scaling"):
        FPDMPipeline(transformer, vae)


def test_it_loads_the_weights_of_a_run_as_they_lie(tiny_recipe: Recipe) -> None:
    transformer = FPDMTransformer2DModel.from_pretrained(weights_folder(tiny_recipe, 64))
    vae = AutoencoderKL.from_pretrained(tiny_recipe.vae.path)
    images = FPDMPipeline(transformer, vae)([0, 1], num_inference_steps=2, iterations=1, output_type="np").images
    assert images.shape == (2, 16, 16, 3)


def test_weights_without_an_objective_are_refused(tiny_recipe: Recipe) -> None:
    path = weights_folder(tiny_recipe, 64) / "config.json"
    resealed(path, lambda config: {name: value for name, value in config.items() if name != "extra"})
    with pytest.raises(ValueError, match=r"config\.json has no extra\.objective"):
        FPDMTransformer2DModel.from_pretrained(path.parent)


def test_an_exported_pipeline_needs_nothing_but_fpdm(tiny_recipe: Recipe) -> None:
    export.export(tiny_recipe)
    program = (
        "import sys; from fpdm.pipeline_hf import FPDMPipeline;"
        f"pipeline = FPDMPipeline.from_pretrained({str(RunFolder(tiny_recipe.folder).pipeline)!r});"
        "pipeline([0], num_inference_steps=2, iterations=1);"
        "assert not {'pipeline', 'preprocess', 'common', 'slurm'} & set(sys.modules)"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
