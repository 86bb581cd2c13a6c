"""Grids of samples drawn while training, always from the same noise and labels, so that only the weights change."""

import math
from pathlib import Path

import torch
from torch import Tensor

from common.files import atomic_write
from common.recipe import Recipe, denoiser_config, diffusion, latent_shape
from fpdm import rng
from fpdm.sampling import sample
from fpdm.weights import assemble
from pipeline.sampling.plans import even_iterations
from preprocess.encoding.encoder import Encoder
from preprocess.images.images import to_uint8


class GridPainter:
    """Draws `train.previews.grid_images` samples as one image."""

    def __init__(self, recipe: Recipe, vae: Encoder, device: torch.device) -> None:
        self.recipe, self.vae, self.device = recipe, vae, device

    def paint(self, weights: dict[str, Tensor], samples_seen: int) -> Path:
        """Writes `grids/<samples seen>.png`. Raises ValueError where samples come out non-finite or constant."""
        from PIL import Image

        recipe = self.recipe
        model = assemble(weights, denoiser_config(recipe)).to(self.device).eval()
        index = torch.arange(recipe.train.previews.grid_images, device=self.device)
        steps = recipe.sample.num_steps
        latents = sample(
            model,
            diffusion(recipe),
            rng.normal(recipe.seed, "train/grid", index, latent_shape(recipe)),
            index % recipe.model.num_classes,
            sampler="flow_euler" if recipe.objective.prediction == "flow" else "ddim",
            num_steps=steps,
            iterations=even_iterations(recipe),
        )
        path = recipe.folder / "grids" / f"{samples_seen:012d}.png"
        with atomic_write(path) as file:
            Image.fromarray(_tile(to_uint8(self.vae.decode(latents)).cpu()).numpy()).save(file, format="png")
        return path


def _tile(images: Tensor) -> Tensor:
    """(N, 3, H, W) uint8 -> (rows * H, columns * W, 3), as square as N allows, filled up with black."""
    columns = math.isqrt(len(images) - 1) + 1
    rows = -(-len(images) // columns)
    padded = torch.cat([images, images.new_zeros(rows * columns - len(images), *images.shape[1:])])
    tiles = padded.unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2)  # (rows, H, columns, W, 3)
    return tiles.flatten(2, 3).flatten(0, 1).contiguous()
