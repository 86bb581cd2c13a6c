"""Trains the demo's autoencoder on composed portraits and writes it as a diffusers folder to `vae.path`.

    python preprocess/train_vae.py --config recipes/demo.yaml

It is measured on the held-out portraits, which it never sees. Every image, noise and initial weight is a function of
the recipe's seed and a count. The autoencoder is exported every few minutes, atomically.
"""

import copy
import os
import platform
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.command import run_command
from common.errors import UserError
from common.files import atomic_folder, sha256_file
from common.recipe import Recipe

if TYPE_CHECKING:
    from diffusers.models import AutoencoderKL

IMAGES = 48_000
EXPORT_SECONDS = 300
WEIGHTS = "diffusion_pytorch_model.safetensors"

NOTE = """# The demo's autoencoder

A `diffusers.AutoencoderKL`, {parameters:,} parameters, fp16: {resolution} px RGB to {channels} x {side} x {side}
latents; the posterior's mean has mean 0 and standard deviation 1 in each channel. Trained by this repository from
nothing, on portraits that `preprocess/demo_images.py` composes from robohash's image parts (CC-BY, see CREDITS.md):
real artwork, combinatorially composed. It is good for nothing else.

| | |
|---|---|
| command | `python preprocess/train_vae.py --config recipes/demo.yaml` |
| machine | {machine} |
| time | {minutes:.0f} minutes |
| images seen | {seen:,} of {images:,}, each once |
| PSNR | {psnr:.2f} dB, mean over {held_out} held-out portraits (combinations of parts never trained on) |
| latents | means {channel_means}, standard deviations {channel_stds}; the posterior's own is {posterior_std:.3f} |
| sha256 | `{sha256}` ({WEIGHTS}) |
"""


def plan(recipe: Recipe) -> list[str]:
    if recipe.demo is None:
        raise UserError("demo: the recipe has no such section; this trains the demo's VAE, use recipes/demo.yaml")
    return [
        f"images: {IMAGES:,} portraits of {recipe.data.resolution} px, each seen once, composed on the way; "
        f"measured on {recipe.demo.held_out_per_class} held-out ones of each class",
        f"result: {recipe.vae.path}, replaced every {EXPORT_SECONDS // 60} minutes and at the end",
    ]


def work(recipe: Recipe) -> None:
    from preprocess.demo.vae_training import Portraits, finish, measure, train

    portraits = Portraits(recipe)
    held_out = portraits.held_out()
    began = last = time.monotonic()
    for seen, vae in train(recipe, portraits, IMAGES):
        now = time.monotonic()
        if now - last > EXPORT_SECONDS or seen == IMAGES:
            last = now
            finished = finish(vae, portraits.training_part())
            measured = measure(finished, held_out)
            note = {"seen": seen, "images": IMAGES, "minutes": (now - began) / 60, "held_out": len(held_out)}
            export(recipe, finished, note | measured)
            print(f"\n{seen} images: {measured}", flush=True)


def export(recipe: Recipe, vae: "AutoencoderKL", note: dict[str, Any]) -> None:
    """Writes the autoencoder in fp16, its config.json and README.md, atomically.

    `note`: the result of `measure`, which sets the scaling in config.json, and the training's progress.
    """
    import torch

    vae.register_to_config(scaling_factor=round(1 / note["std"], 5), shift_factor=round(note["mean"], 5))
    side = recipe.data.resolution // recipe.vae.downsampling
    rounded = {name: ", ".join(f"{value:.2f}" for value in note[name]) for name in ("channel_means", "channel_stds")}
    with atomic_folder(recipe.vae.path) as folder:
        copy.deepcopy(vae).half().save_pretrained(folder)
        (folder / "README.md").write_text(
            NOTE.format(
                **note | rounded,
                parameters=sum(parameter.numel() for parameter in vae.parameters()),
                resolution=recipe.data.resolution,
                channels=recipe.vae.latent_channels,
                side=side,
                machine=f"{platform.machine()} CPU, {torch.get_num_threads()} of {os.cpu_count()} cores",
                sha256=sha256_file(Path(folder) / WEIGHTS),
                WEIGHTS=WEIGHTS,
            )
        )


if __name__ == "__main__":
    sys.exit(run_command(__doc__, plan, work))
