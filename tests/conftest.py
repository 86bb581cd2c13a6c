"""Parts that many tests need: real ones, small enough for seconds."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.recipe import VAE, Data, Evaluate, Model, Objective, Recipe, Sample, denoiser_config
from common.run_weights import Weights
from common.stage import Stage


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those on SLURM first, the longest: no process of `pytest -n` is alone with one of them at the end."""
    items.sort(key=lambda item: not item.path.name.startswith("test_slurm_"))


@pytest.fixture(autouse=True)
def _own_random_weights() -> None:
    """A network that a test makes at random is the same in every run, and whatever ran before."""
    import torch

    torch.manual_seed(0)


@pytest.fixture
def chromium(tmp_path: Path) -> list[str]:
    """A headless browser that reaches nothing. Where there is none the test does not run, which is a failure in CI."""
    program = shutil.which("chromium")
    if program is None:
        reason = "needs chromium: sudo apt-get install -y --no-install-recommends chromium"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    offline = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")
    return [
        program,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",  # containers have 64 MB there
        *offline,
        f"--user-data-dir={tmp_path / 'chromium'}",
    ]


@pytest.fixture(scope="session")
def tiny_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `save_pretrained` AutoencoderKL of seeded, untrained weights: 4 latent channels, downsampling 4."""
    import torch
    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("tiny-vae")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 8),
            norm_num_groups=4,
            latent_channels=4,
            layers_per_block=1,
            mid_block_add_attention=False,
            scaling_factor=1.0,
        )
    vae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, tiny_vae: Path) -> Recipe:
    """A run with weights after 0 and 64 training samples: not the zeros that every network starts with, but noise.

    Tests that write into a run take `tiny_recipe`, a copy of their own.
    """
    import torch

    from fpdm import rng
    from fpdm.denoiser import build_denoiser
    from pipeline.training.checkpoint import export_weights

    folder = tmp_path_factory.mktemp("tiny-run")
    recipe = Recipe(
        name="tiny",
        runs=str(folder / "runs"),
        data=Data(images=str(folder / "images"), held_out=str(folder / "held-out"), resolution=16),
        vae=VAE(path=str(tiny_vae), downsampling=4),
        model=Model(size=None, hidden_size=16, num_heads=2, patch_size=2, num_classes=3),
        objective=Objective(learned_variance=False),
        sample=Sample(num_samples=10, batch_size=4, chunk_samples=4, sampler="ddpm", num_steps=3, iterations=2),
        evaluate=Evaluate(feature_extractor="efficientnet-lite0", untrained_baseline=False),
    )
    config = denoiser_config(recipe)
    for samples_seen in (0, 64):
        state = {
            name: parameter + 0.1 * rng.normal(samples_seen, name, torch.arange(1), tuple(parameter.shape))[0]
            for name, parameter in build_denoiser(config, seed=0).named_parameters()
        }
        export_weights(recipe, state, samples_seen)
    return recipe


@pytest.fixture
def tiny_recipe(tmp_path: Path, tiny_run: Recipe) -> Recipe:
    return copied(tiny_run, tmp_path / "runs")


def copied(recipe: Recipe, runs: Path) -> Recipe:
    """The same run, with all it has written, in another folder."""
    copy = replace(recipe, runs=str(runs))
    shutil.copytree(recipe.folder, copy.folder)
    return copy


def load_samples(folder: Path, num_samples: int) -> tuple[np.ndarray, np.ndarray]:
    """(images, labels) of samples 0 to num_samples - 1, as `chunks.iterate` gives them."""
    from pipeline.sampling.chunks import iterate

    rows = list(iterate(folder, (0, num_samples)))
    return np.concatenate([part["images"] for part in rows]), np.concatenate([part["labels"] for part in rows])


def run_stage(stage: Stage, recipe: Recipe) -> None:
    """As its command does, in this process."""
    stage.work(stage.resolve(recipe))


def generated(recipe: Recipe, weights: Weights = "latest", rank: int = 0, world_size: int = 1) -> Path:
    """The folder of a set of samples, with the chunks of this rank."""
    from pipeline.sampling.generate import generate
    from pipeline.sampling.sample_set import Sampling, sample_set

    samples = sample_set(recipe, weights)
    generate(Sampling.of(recipe), samples, rank, world_size)
    return samples.folder


def features_folder(recipe: Recipe) -> Path:
    """Of the recipe's own samples."""
    from pipeline.sampling.sample_set import Sampling

    sampling = Sampling.of(recipe)
    return sampling.features(sampling.sets[0]).folder
