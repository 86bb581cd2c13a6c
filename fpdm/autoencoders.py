"""diffusers' autoencoders, called alike: images in [-1, 1], latents unscaled, one scaling factor."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

SELF_SCALING = "AutoencoderRAE"  # scales by its own factor and by channel inside; its images are in [0, 1]


def scaling(kind: str, config: Mapping[str, Any]) -> tuple[Any, Any]:
    """The scaling and the shift factor of `fpdm.latents`, as an autoencoder's configuration states them.

    `kind`: the name of its class. Raises ValueError for per-channel scaling outside of the class.
    """
    if kind == SELF_SCALING:
        return 1.0, 0.0
    for name in ("latents_mean", "latents_std"):
        if config.get(name) is not None:
            raise ValueError(
                f"vae: per-channel scaling ({name}) is not supported; choose an autoencoder with one scaling_factor"
            )
    shift = config.get("shift_factor")
    return config["scaling_factor"], 0.0 if shift is None else shift


def encode(autoencoder: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) -> the posterior's mean and standard deviation, 0 where it has none: (B, C, h, w) each."""
    if type(autoencoder).__name__ == SELF_SCALING:
        images = images / 2 + 0.5
    output = autoencoder.encode(images)
    if hasattr(output, "latent_dist"):
        return output.latent_dist.mean, output.latent_dist.std
    return output[0], torch.zeros_like(output[0])


def decode(autoencoder: Any, latents: Tensor) -> Tensor:
    """Latents (B, C, h, w) -> images (B, 3, H, W), not clamped."""
    images: Tensor = autoencoder.decode(latents).sample
    return images * 2 - 1 if type(autoencoder).__name__ == SELF_SCALING else images
