"""Without an autoencoder (`vae.path: null`) latents are the images, from the shards to the exported pipeline."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from common.loading import dump_recipe, parse_recipe
from common.recipe import VAE, Data, Evaluate, Model, Recipe, Sample, denoiser_config
from common.run_folder import RunFolder
from fpdm import rng
from fpdm.denoiser import build_denoiser
from fpdm.latents import draw_latents, to_uint8
from fpdm.pipeline_hf import FPDMPipeline
from pipeline.evaluation.stage import STAGE as EVALUATE
from pipeline.exporting.export import export
from pipeline.planning.estimate import compared, vae_flops
from pipeline.training.checkpoint import export_weights
from pipeline.training.warnings import warnings
from preprocess.encoding.encoder import Encoder
from preprocess.shards import LatentShards
from tests.conftest import generated, load_samples
from tests.encoding_stage import encode, finished, plan

FIELDS = {"path": "null", "latent_channels": "3", "downsampling": "1"}


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Six images of two classes and 16 px, and a network of random weights."""
    for part in ("images", "held-out"):
        for number in range(6):
            path = tmp_path / part / ("cat" if number < 3 else "dog") / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)).save(path)
    made = Recipe(
        name="pixels",
        runs=str(tmp_path / "runs"),
        data=Data(
            images=str(tmp_path / "images"),
            held_out=str(tmp_path / "held-out"),
            shards=str(tmp_path / "shards"),
            resolution=16,
            flips=True,
        ),
        vae=VAE(path=None, latent_channels=3, downsampling=1),
        model=Model(size=None, hidden_size=16, num_heads=2, patch_size=4, num_classes=2),
        sample=Sample(num_samples=4, batch_size=4, chunk_samples=4, sampler="ddim", num_steps=3, iterations=2),
        evaluate=Evaluate(feature_extractor="efficientnet-lite0", untrained_baseline=False),
    )
    state = {
        name: parameter + 0.1 * rng.normal(0, name, torch.arange(1), tuple(parameter.shape))[0]
        for name, parameter in build_denoiser(denoiser_config(made), seed=0).named_parameters()
    }
    export_weights(made, state, 64)
    return made


def test_shards_hold_the_images_themselves(recipe: Recipe) -> None:
    assert any("each image and its mirror image as 3 x 16 x 16 by no autoencoder" in line for line in plan(recipe))
    encode(recipe)
    assert finished(recipe)
    moments = torch.from_numpy(LatentShards(recipe.data.shards).gather(np.arange(6)).copy())
    assert (moments[:, 3:] == 0).all()  # no posterior: nothing is drawn
    latents = draw_latents(moments, torch.ones(6, 3, 16, 16), 1.0, 0.0)
    paths = sorted(Path(recipe.data.images).rglob("*.png"))
    expected = np.stack([np.asarray(Image.open(path)) for path in paths])
    assert np.array_equal(to_uint8(Encoder(recipe.vae).decode(latents)).permute(0, 2, 3, 1).numpy(), expected)


def test_samples_and_the_exported_pipeline_are_the_same_images(recipe: Recipe) -> None:
    encode(recipe)
    images, labels = load_samples(generated(recipe), 4)
    export(recipe)
    folder = RunFolder(recipe.folder).pipeline
    assert "The autoencoder loses fine detail" not in (folder / "README.md").read_text()
    pipeline = FPDMPipeline.from_pretrained(folder)
    pipeline.enable_vae_slicing()
    drawn = np.stack([np.asarray(image) for image in pipeline(labels.tolist(), seed=recipe.seed).images])
    assert np.abs(drawn.astype(int) - images).max() <= 1
    assert pipeline(labels.tolist(), output_type="np").images.shape == (4, 16, 16, 3)


def test_nothing_is_measured_or_warned_of_an_autoencoder(recipe: Recipe) -> None:
    encode(recipe)
    assert [images.name for images in EVALUATE.resolve(recipe).compared] == ["trained", "held_out"]
    assert vae_flops(recipe) == (0.0, 0.0)
    assert compared(recipe, 6) == 6 + 4
    assert list(warnings(replace(recipe, train=replace(recipe.train, total_samples=64)), 6)) == []


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("latent_channels", "4", "vae.latent_channels: 4, but vae.path is null: latents are the images; set it to 3"),
        ("downsampling", "8", "vae.downsampling: 8, but vae.path is null: latents are the images; set it to 1"),
        ("precision", "bf16", "vae.precision: bf16, but vae.path is null: latents are the images; set it to fp32"),
        ("training.images", "9", "vae.training: set, but vae.path is null: latents are the images; set it to null"),
    ],
)
def test_a_field_of_an_autoencoder_is_refused_by_its_name(recipe: Recipe, field: str, value: str, said: str) -> None:
    own = [f"vae.{name}={text}" for name, text in (FIELDS | {field: value}).items()]
    with pytest.raises(UserError, match=said):
        parse_recipe(dump_recipe(replace(recipe, vae=VAE())), own)
