"""The scaling between an autoencoder's latents and those that diffusion works on (Rombach et al., CVPR 2022).

Its two numbers mean what they mean in diffusers.
"""

from torch import Tensor


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
    """Latents (B, C, h, w) of diffusion -> those for the decoder, same shape: inverts the scaling in `draw_latents`."""
    return latents / scaling_factor + shift_factor
