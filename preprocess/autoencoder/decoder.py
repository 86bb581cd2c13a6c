"""How an autoencoder's decoder is trained alone: to draw in full what a latent with an error in it leaves open.

An autoencoder that is trained by the error of its pixels answers doubt with blur, and what a denoiser draws is never
quite a latent of an image. So the decoder sees latents with noise, as that of RAE (Zheng et al., arXiv 2510.11690), and
is judged by the maps of an EfficientNet, as by LPIPS (Zhang et al. 2018). The encoder is left as it is, and with it all
latents. A discriminator beside it made no difference that one could see (docs/speedrun.md).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.efficientnet import load_efficientnet, normalised
from common.ranks import own_device
from common.recipe import Recipe
from fpdm.latents import unscale_latents
from fpdm.rng import normal, uniform
from preprocess.autoencoder.loop import BATCH_SIZE, Phase, learning_rate
from preprocess.autoencoder.stage import TEACHER, teacher_weights
from preprocess.autoencoder.training import pixel_error

SIDE = 128  # pixels of the images that the teacher sees
STAGES = (0, 1, 2, 4)  # of the teacher, whose maps are compared: 1/2, 1/4, 1/8 and 1/16 of the side
NOISE = 0.5  # the largest standard deviation of the noise; the latents' own is 1
LEARNING_RATE = 5e-4


class Teacher(nn.Module):
    """The distance between two sets of images by an EfficientNet's maps, each position's features of unit length."""

    def __init__(self) -> None:
        super().__init__()
        self.network = load_efficientnet(TEACHER, teacher_weights()).eval().requires_grad_(False)

    def forward(self, decoded: Tensor, images: Tensor) -> Tensor:
        """Of images (B, 3, H, W) in [-1, 1]: squared distances, a mean over positions, summed over the stages."""
        with torch.no_grad():
            wanted = self.maps(images)
        pairs = zip(self.maps(decoded), wanted, strict=True)
        return torch.stack([(one - other).square().sum(1).mean() for one, other in pairs]).sum()

    def maps(self, images: Tensor) -> list[Tensor]:
        """The maps (B, C, h, w) of STAGES."""
        resized = functional.interpolate(images, size=(SIDE, SIDE), mode="bilinear", antialias=True)
        hidden = self.network.bn1(self.network.conv_stem(normalised(127.5 * (resized + 1))))
        found = []
        for number, stage in enumerate(self.network.blocks[: max(STAGES) + 1]):
            hidden = stage(hidden)
            if number in STAGES:
                found.append(functional.normalize(hidden, dim=1))
        return found


def noisy(latents: Tensor, seed: int, step: int) -> Tensor:
    """Latents (B, C, h, w) with noise of a standard deviation that is uniform in [0, NOISE] for each."""
    indices = torch.arange(step * len(latents), (step + 1) * len(latents), device=latents.device)
    level = NOISE * uniform(seed, "train_vae/decoder/level", indices)
    noise = normal(seed, "train_vae/decoder/noise", indices, tuple(latents.shape[1:]))
    return latents + level[:, None, None, None] * noise


def decoder(recipe: Recipe, vae: Any, batch_of: Callable[[int], Tensor]) -> Phase:
    """The training of `vae`'s decoder. batch_of: a step's images (BATCH_SIZE, 3, H, W).

    vae: an AutoencoderKL, changed in place. Raises UserError where the teacher is not installed.
    """
    assert recipe.vae.training is not None
    device = own_device()
    vae.to(device, memory_format=torch.channels_last)
    teacher = Teacher().to(device).to(memory_format=torch.channels_last)
    parameters = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=0)
    steps = math.ceil(recipe.vae.training.decoder_images / BATCH_SIZE)
    scaling, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0

    def one_step(step: int) -> float:
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * learning_rate(step, steps)
        images = batch_of(step).to(device, memory_format=torch.channels_last)
        with torch.no_grad():
            latents = (vae.encode(images).latent_dist.mean - shift) * scaling
        decoded = vae.decode(unscale_latents(noisy(latents, recipe.seed, step), scaling, shift)).sample
        loss = pixel_error(decoded, images) + teacher(decoded, images)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return loss.item()

    return Phase("decoder", vae, steps, one_step, {"optimizer": optimizer})
