"""diffusers' autoencoders, called alike: images in [-1, 1], and one scaling factor outside of the class.

An AutoencoderRAE scales latents by itself, by channel too, and has images in [0, 1]. It is told by its configuration,
which it keeps where it is wrapped.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def scales_itself(config: Mapping[str, Any]) -> bool:
    """Whether the configuration is an AutoencoderRAE's."""
    return "encoder_input_size" in config


def scaling(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """The scaling and the shift factor of `fpdm.latents`. Raises ValueError for scaling by channel, and for none."""
    if scales_itself(config):
        return 1.0, 0.0
    for name in ("latents_mean", "latents_std"):
        if config.get(name) is not None:
            raise ValueError(f"scaling by channel ({name}) is not supported; choose an autoencoder with one factor")
    if "scaling_factor" not in config:
        raise ValueError("the configuration has no scaling_factor; choose another autoencoder")
    shift = config.get("shift_factor")
    return config["scaling_factor"], 0.0 if shift is None else shift


def encode(autoencoder: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) -> the posterior's mean and standard deviation, 0 where it has none: (B, C, h, w) each."""
    output = autoencoder.encode(images / 2 + 0.5 if _from_0_to_1(autoencoder) else images)
    if hasattr(output, "latent_dist"):
        return output.latent_dist.mean, output.latent_dist.std
    return output[0], torch.zeros_like(output[0])


def decode(autoencoder: Any, latents: Tensor) -> Tensor:
    """Latents (B, C, h, w) as `encode` gives them -> images (B, 3, H, W), not clamped."""
    images: Tensor = autoencoder.decode(latents).sample
    return images * 2 - 1 if _from_0_to_1(autoencoder) else images


def _from_0_to_1(autoencoder: Any) -> bool:
    return scales_itself(getattr(autoencoder, "config", {}))
