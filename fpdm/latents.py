"""The scaling between an autoencoder's latents and those of diffusion, with diffusers' factors, and 8-bit images.

Rombach et al., "High-resolution image synthesis with latent diffusion models" (CVPR 2022), appendix G.
"""

from typing import Literal

import torch
from torch import Tensor

Rounding = Literal["half_away", "truncate"]  # a recipe's sample.rounding lists these too


def draw_latents(moments: Tensor, normals: Tensor, scaling_factor: float, shift_factor: float) -> Tensor:
    """A draw from the posterior, scaled for diffusion: (mean + std * normal - shift_factor) * scaling_factor.

    Args:
        moments: (B, 2C, h, w) posterior mean and standard deviation, unscaled, of any floating-point type.
        normals: (B, C, h, w) standard normal numbers; zeros give the posterior's mean.

    Returns:
        (B, C, h, w) float32, of about unit variance.
    """
    mean, std = moments.float().chunk(2, dim=1)
    return (mean + std * normals - shift_factor) * scaling_factor


def unscale_latents(latents: Tensor, scaling_factor: float, shift_factor: float) -> Tensor:
    """Latents of diffusion (B, C, h, w) -> latents for the decoder: the inverse of the scaling in `draw_latents`."""
    return latents / scaling_factor + shift_factor


def to_uint8(images: Tensor, rounding: Rounding = "half_away") -> Tensor:
    """Pixels (...) in [-1, 1] -> (...) uint8: 127.5 x + 127.5, clamped to 0..255.

    By default rounds halves away from zero, as DiT; it inverts `preprocess.images.images.to_tensor`. "truncate" drops
    the fraction, as REPA and EDM2 do: half a level darker, for comparison with their numbers.
    """
    offset = 128 if rounding == "half_away" else 127.5
    return (images.float() * 127.5 + offset).floor().clamp(0, 255).to(torch.uint8)
