"""Grids of the recipe's first samples, drawn while training: the same noise and labels, so only the weights change."""

import math
from pathlib import Path

import torch
from torch import Tensor

from common.files import atomic_write
from common.recipe import Recipe, denoiser_config
from common.run_folder import RunFolder
from fpdm.latents import to_uint8
from fpdm.weights import assemble
from pipeline.sampling.generate import draw_images
from pipeline.sampling.plans import unmeasured
from preprocess.encoding.encoder import Encoder


class GridPainter:
    """Draws `train.previews.grid_images` samples as one image."""

    def __init__(self, recipe: Recipe, vae: Encoder, device: torch.device) -> None:
        self.recipe, self.vae, self.device = recipe, vae, device

    def paint(self, weights: dict[str, Tensor], samples_seen: int) -> Path:
        """Writes `grids/<samples seen>.png`. Raises UserError where samples come out non-finite or constant."""
        from torchvision.io import write_png
        from torchvision.utils import make_grid

        recipe = self.recipe
        model = assemble(weights, denoiser_config(recipe)).to(self.device).eval()
        index = torch.arange(recipe.train.previews.grid_images, device=self.device)
        images = to_uint8(draw_images(recipe, unmeasured(recipe), model, self.vae, index)).cpu()  # (N, 3, H, W)
        path = RunFolder(recipe.folder).grid(samples_seen)
        with atomic_write(path) as file:
            write_png(make_grid(images, nrow=math.isqrt(len(images) - 1) + 1, padding=0), str(file))
        return path
