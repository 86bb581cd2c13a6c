"""The images that an autoencoder is trained and measured on, from any source."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from tqdm import tqdm

from common.errors import UserError
from common.recipe import Recipe
from fpdm.rng import integers, permute
from preprocess.encoding.image_loader import ImageLoader
from preprocess.images.images import from_uint8
from preprocess.sources import Source, Which, open_source

AT_MOST = 20_000  # training images that are kept in memory; more do not help an autoencoder of this size
HELD_OUT = 256
HELD_OUT_SHARE = 20  # one image of so many, where the recipe names no held-out images
FEWEST = 20
LOADED_AT_ONCE = 32
STATISTICS = 512  # images from which the latents' means and deviations are measured


@dataclass(frozen=True)
class Images:
    """Training images and held-out ones, (N, 3, H, W) uint8. What is drawn is a function of (seed, position)."""

    seed: int
    flips: bool
    training: Tensor
    held: Tensor

    def batch(self, step: int, size: int) -> Tensor:
        """(size, 3, H, W) in [-1, 1]: every image once an epoch, mirrored at random where the recipe stores flips."""
        count = len(self.training)
        positions = torch.arange(step * size, (step + 1) * size)
        numbers = torch.empty_like(positions)
        for epoch in (positions // count).unique().tolist():
            here = positions // count == epoch
            numbers[here] = permute(self.seed, f"train_vae/order/{epoch}", positions[here] % count, count)
        images = from_uint8(self.training[numbers])
        if self.flips:
            mirrored = integers(self.seed, "train_vae/flip", positions, 2).bool()
            images[mirrored] = images[mirrored].flip(-1)
        return images

    @cached_property
    def held_out(self) -> Tensor:
        return from_uint8(self.held)

    @cached_property
    def statistics(self) -> Tensor:
        return from_uint8(self.training[:STATISTICS])


def load_images(recipe: Recipe, at_most: int = AT_MOST) -> Images:
    """Reads the images, at most so many for training, in an order that is a function of the seed. Those that are
    unusable are passed over: encoding lists them.

    The held-out images are `data.held_out`'s, or else a part of the training images.
    """
    source = open_source(recipe.data)
    if recipe.data.held_out is not None:
        return Images(recipe.seed, recipe.data.flips, _load(recipe, source, at_most), _load_held_out(recipe))
    images = _load(recipe, source, at_most + HELD_OUT)
    held = min(HELD_OUT, max(1, len(images) // HELD_OUT_SHARE))
    return Images(recipe.seed, recipe.data.flips, images[held:], images[:held])


def _load_held_out(recipe: Recipe) -> Tensor:
    return _load(recipe, open_source(recipe.data, "held_out"), HELD_OUT, "held_out")


def _load(recipe: Recipe, source: Source, at_most: int, which: Which = "images") -> Tensor:
    loader, count = ImageLoader(source, recipe.data.crop, recipe.data.resolution), len(source.entries)
    chosen = permute(recipe.seed, f"train_vae/{which}", torch.arange(min(count, at_most)), count).tolist()
    starts = tqdm(range(0, len(chosen), LOADED_AT_ONCE), desc="read images", unit="batch", delay=2, leave=False)
    batches = (loader[chosen[start : start + LOADED_AT_ONCE]].images for start in starts)
    images = [batch for batch in batches if batch is not None]
    usable, fewest = sum(map(len, images)), FEWEST if which == "images" else 1
    if usable < fewest:
        raise UserError(
            f"data.{which}: {getattr(recipe.data, which)} has {usable} usable image{'s' * (usable != 1)}, and an "
            f"autoencoder's training needs {fewest}: add some, or name a finished one in vae.path"
        )
    return torch.cat(images)
