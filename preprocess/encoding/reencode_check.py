"""Compares shards with their images: a sheet to look at, and a check by encoding images again."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid

from common.errors import UserError, printable
from common.recipe import Recipe
from fpdm.latents import draw_latents, to_uint8
from preprocess.encoding.encoder import Encoder
from preprocess.encoding.encoding import Encoding, resolve
from preprocess.encoding.image_loader import ImageLoader
from preprocess.images.images import from_uint8
from preprocess.shards import LatentShards, shard_name
from preprocess.sources import Entry

# Largest allowed relative distance ||a - b|| / ||b|| between two encodings of an image, on different machines and in
# different batches. Between different images it is about 1.
TOLERANCES = {"fp32": 0.02, "fp16": 0.05, "bf16": 0.2}
PAIRS_A_ROW, CAPTION, GAP = 4, 18, 8  # pixels


@dataclass(frozen=True)
class Batch:
    """Samples of the shards with their images."""

    entries: list[Entry]
    rows: np.ndarray  # the samples' rows in the shards
    images: Tensor  # (B, 3, resolution, resolution) uint8
    moments: Tensor  # (B, 2C, h, w) float16, from the shards


def read_again(encoding: Encoding, count: int) -> Iterator[Batch]:
    """`count` evenly spaced samples, or all. Raises UserError if an image has become unreadable."""
    recipe, shards = encoding.recipe, LatentShards(encoding.folder)
    loader = ImageLoader(encoding.source, recipe.data.crop, recipe.data.resolution)
    count = min(count, len(shards))
    chosen = np.arange(count) * len(shards) // max(1, count)
    for start in range(0, count, recipe.vae.batch_size):
        indices = chosen[start : start + recipe.vae.batch_size]
        rows = shards.rows(indices)
        positions = rows["position"].tolist()
        loaded = loader[positions]
        for rejection in loaded.rejected:
            raise UserError(
                f"data.images: {printable(rejection.key)} was encoded, but is unusable now: {rejection.reason}; mend it"
            )
        assert loaded.images is not None
        moments = torch.from_numpy(shards.gather(indices))  # (B, 2C, h, w)
        yield Batch([encoding.source.entries[position] for position in positions], rows, loaded.images, moments)


def deep_faults(recipe: Recipe, folder: str, count: int) -> Iterator[str]:
    """Encodes `count` images again; yields a line for each whose latents or label in `folder` differ.

    Raises UserError if the folder was made from other images, by another VAE or with other settings.
    """
    encoding = resolve(replace(recipe, data=replace(recipe.data, shards=folder)), download=True)
    encoder, allowed = Encoder(recipe.vae, identity=encoding.identity), TOLERANCES[recipe.vae.precision]
    for batch in read_again(encoding, count):
        again = encoder.encode(from_uint8(batch.images))  # (B, 2C, h, w)
        difference = (batch.moments.float() - again).flatten(1).norm(dim=1) / again.flatten(1).norm(dim=1)  # (B,)
        for entry, row, distance in zip(batch.entries, batch.rows, difference.tolist(), strict=True):
            where = f"{encoding.folder / shard_name(int(row['shard']))}: {entry.key}"
            if not distance <= allowed:
                yield (
                    f"{where}: latents differ by {distance:.3f} (relative) from a fresh encoding; at most {allowed} is "
                    "allowed: encode again"
                )
            if entry.label != row["label"]:
                yield f"{where}: label {row['label']}, but {entry.label} in the source; encode again"


def draw_sheet(recipe: Recipe, count: int) -> tuple[Image.Image, list[float]]:
    """A sheet of cropped images beside their decoded posterior means, and the PSNR of each pair in dB."""
    encoding = resolve(recipe, download=True)
    encoder, pairs, ratios = Encoder(recipe.vae, identity=encoding.identity), [], []
    scaling, shift = encoder.identity.scaling_factor, encoder.identity.shift_factor
    for batch in read_again(encoding, count):
        means = draw_latents(batch.moments, torch.zeros(()), scaling, shift)  # (B, C, h, w)
        decoded = to_uint8(encoder.decode(means)).cpu().permute(0, 2, 3, 1).numpy()  # (B, H, W, 3)
        for entry, original, again in zip(
            batch.entries, batch.images.permute(0, 2, 3, 1).numpy(), decoded, strict=True
        ):
            ratios.append(psnr(original, again))
            name = f"{encoding.source.class_names[entry.label]}: {entry.key.rpartition('/')[2]}"
            pairs.append(_pair(original, again, f"{ratios[-1]:.1f} dB  {printable(name)}"))
    sheet = make_grid([pil_to_tensor(pair) for pair in pairs], nrow=PAIRS_A_ROW, padding=GAP, pad_value=255)
    return to_pil_image(sheet), ratios


def psnr(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio of two uint8 images in dB; infinite where they are equal."""
    error = float(np.mean((first.astype(np.float64) - second) ** 2))
    return 10 * math.log10(255**2 / error) if error else math.inf


def _pair(original: NDArray[np.uint8], again: NDArray[np.uint8], caption: str) -> Image.Image:
    side = original.shape[0]
    scale = max(1, 128 // side)  # enlarge small images for viewing
    shown = [Image.fromarray(each).resize((side * scale,) * 2, Image.Resampling.NEAREST) for each in (original, again)]
    pair = Image.new("RGB", (2 * side * scale, side * scale + CAPTION), "white")
    for number, image in enumerate(shown):
        pair.paste(image, (number * side * scale, 0))
    font = ImageFont.load_default(12)
    while caption and font.getlength(caption) > pair.width:
        caption = caption[:-1]
    ImageDraw.Draw(pair).text((0, side * scale + 2), caption, fill="black", font=font)
    return pair
