"""An autoencoder as a diffusers folder, with what was measured on it."""

import copy
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import with_config
from typing_extensions import TypedDict

from common.errors import UserError
from common.files import atomic_folder
from common.recipe import VAE, Recipe
from common.sealed import STRICT, read_sealed, write_sealed

if TYPE_CHECKING:
    from diffusers.models import AutoencoderKL  # importing it takes seconds, and each training reads `measured.json`

MEASURED = "measured.json"
STANDARDISED = "; the posterior's mean has mean 0 and standard deviation 1 in each channel"

NOTE = """# An autoencoder

A `diffusers.AutoencoderKL`, {parameters:,} parameters, fp16: {resolution} px RGB to {channels} x {side} x {side}
latents{standardised}.

| | |
|---|---|
| trained on | {training:,} images of {source}, cropped by `{crop}` |
| by | `preprocess/train_vae.py`, {seen} in {minutes:.1f} minutes, {started} |
| machine | {machine} |
| PSNR | {psnr:.2f} dB, mean over {held_out} held-out images, from the posterior's mean |
| latents | the posterior's own standard deviation is {posterior_std:.3f} |
"""


@with_config(STRICT)
class Measured(TypedDict):
    """What an autoencoder was trained with, and its PSNR in dB on images that its training did not see."""

    settings: dict[str, Any]
    psnr: float
    held_out: int
    minutes: float


def export(recipe: Recipe, vae: "AutoencoderKL", settings: dict[str, Any], measured: dict[str, Any]) -> None:
    """Writes the autoencoder in fp16, its config.json, README.md and measured.json to `vae.path`, atomically.

    `vae`: with weights that fp16 holds. `settings`: what decides the weights.
    `measured`: the result of `training.measure` on held-out images, with the numbers of images and the minutes.
    """
    assert recipe.vae.training is not None
    training = recipe.vae.training
    seen = f"{training.images:,} images seen" if training.images else ""
    further = f"{training.decoder_images:,} by its decoder alone" if training.decoder_images else ""
    with atomic_folder(recipe.vae.folder) as folder:
        copy.deepcopy(vae).half().save_pretrained(folder)
        (folder / "README.md").write_text(
            NOTE.format(
                **measured,
                parameters=sum(parameter.numel() for parameter in vae.parameters()),
                resolution=recipe.data.resolution,
                channels=recipe.vae.latent_channels,
                side=recipe.data.resolution // recipe.vae.downsampling,
                source=recipe.data.images,
                crop=recipe.data.crop,
                seen=" and ".join(filter(None, (seen, further))),
                standardised=STANDARDISED if training.images else "",
                started=f"from the weights of {training.start}" if training.start else "from nothing",
                machine=f"{platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} cores",
            ),
            encoding="utf-8",
        )
        kept = {name: measured[name] for name in ("psnr", "held_out", "minutes")}
        write_sealed(folder / MEASURED, {"settings": settings, **kept})


def read_measured(folder: str | Path) -> Measured | None:
    """None where the autoencoder was not trained by this project, or is not there. Raises UserError where the file was
    changed."""
    path = Path(folder) / MEASURED
    return read_sealed(path, Measured, f"delete {folder}") if path.is_file() else None


def finished(vae: VAE, settings: dict[str, Any]) -> bool:
    """Raises UserError for a folder that was not made with these settings: nothing is overwritten."""
    folder = vae.folder
    if not folder.exists():
        return False
    measured = read_measured(folder)
    if measured is None:
        raise UserError(
            f"vae.path: {folder} is there, and vae.training did not make it; leave out vae.training to use it as it "
            "is, or name another folder"
        )
    before = measured["settings"]
    for name in before | settings:
        if before.get(name) != settings.get(name):
            raise UserError(
                f"vae.path: {folder} was trained with another {name} ({before.get(name)}; now {settings.get(name)}); "
                "name another folder, or delete it"
            )
    return True
