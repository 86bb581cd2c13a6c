"""Changes that evaluations make to images without saying so, each made on images that are there.

All take and give an image (H, W, 3) uint8. What is random is a function of the image's number.
"""

import io

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from fpdm import rng

SEED = 0
INSIDE = (7, 8)  # share of a side that torchvision's usual crop keeps: Resize(256), CenterCrop(224)
MOST = 255

Pixels = NDArray[np.uint8]


def truncated(image: Pixels, number: int) -> Pixels:
    """What truncation to 8 bits would have given where rounding gave these: one level less in half of the values.

    Values at both ends were clamped, and stay.
    """
    lower = rng.uniform(SEED, "judge/rounding", torch.tensor([number]), image.shape)[0].numpy() < 0.5
    return image - (lower & (image > 0) & (image < MOST)).astype(np.uint8)


def jpeg(image: Pixels, quality: int, subsampling: int = 2) -> Pixels:
    """Encoded and decoded; `subsampling`: of colours, 2 for 4:2:0, 0 for 4:4:4."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling=subsampling)
    return np.asarray(Image.open(buffer))


def refiltered(image: Pixels, filter: Image.Resampling) -> Pixels:
    """Reduced from twice its size with this filter; with Lanczos, about as it was."""
    opened = Image.fromarray(image)
    twice = opened.resize((2 * opened.width, 2 * opened.height), Image.Resampling.LANCZOS)
    return np.asarray(twice.resize(opened.size, filter))


def cropped_inside(image: Pixels) -> Pixels:
    """The inner 7/8 of each side at full size, as Resize(256) and CenterCrop(224) keep of a square."""
    opened = Image.fromarray(image)
    margin = opened.width * (INSIDE[1] - INSIDE[0]) / (2 * INSIDE[1])
    box = (margin, margin, opened.width - margin, opened.height - margin)
    return np.asarray(opened.resize(opened.size, Image.Resampling.BICUBIC, box=box))
