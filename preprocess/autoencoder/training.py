"""How an autoencoder is trained as a whole: network, loss, schedule, and what is measured on it."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.models import AutoencoderKL

from common.errors import UserError
from common.ranks import own_device
from common.recipe import Recipe
from fpdm.rng import normal
from preprocess.autoencoder.loop import BATCH_SIZE, Phase, learning_rate
from preprocess.encoding.encoder import load_vae

# 1.45 M parameters where the latents have a quarter of the images' side; a wider first block costs most, at full
# resolution.
BLOCK_CHANNELS = (24, 48, 96, 96, 96)
LEARNING_RATE = 1e-3
FIRST_KL_WEIGHT = 5e-4  # of the KL divergence, a mean over latents beside means over pixels
MEASURE_BATCH = 64


def build(recipe: Recipe) -> AutoencoderKL:
    """A new autoencoder whose weights are a function of (seed, parameter's name)."""
    levels = 1 + round(math.log2(recipe.vae.downsampling))
    if levels > len(BLOCK_CHANNELS) or recipe.vae.downsampling != 2 ** (levels - 1):
        raise UserError(
            f"vae.downsampling: found {recipe.vae.downsampling}; an autoencoder of 1, 2, 4, 8 or 16 can be trained here"
        )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=BLOCK_CHANNELS[:levels],
        latent_channels=recipe.vae.latent_channels,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=recipe.data.resolution,
    )
    for name, parameter in vae.named_parameters():
        if parameter.ndim > 1:
            weights = normal(recipe.seed, f"train_vae/{name}", torch.tensor([0]), tuple(parameter.shape))[0]
            parameter.data = weights / math.sqrt(parameter[0].numel())
        elif name.endswith("bias"):
            parameter.data.zero_()
    return vae.to(memory_format=torch.channels_last)


def start(recipe: Recipe) -> AutoencoderKL:
    """`build`, or the autoencoder in `vae.training.start`. Raises UserError where that is another network."""
    vae = build(recipe)
    assert recipe.vae.training is not None
    if (folder := recipe.vae.training.start) is None:
        return vae
    given: Any = load_vae(Path(folder))
    shapes = [{name: value.shape for name, value in each.state_dict().items()} for each in (vae, given)]
    if shapes[0] != shapes[1]:
        raise UserError(
            f"vae.training.start: {folder} holds another network than is trained here, of "
            f"{recipe.vae.downsampling} x downsampling and {recipe.vae.latent_channels} channels; leave it out"
        )
    own = {name: value for name, value in given.config.items() if not name.startswith("_")}  # not where it was read
    vae = AutoencoderKL.from_config(own | {"sample_size": recipe.data.resolution})
    vae.load_state_dict(given.state_dict())
    return vae.to(memory_format=torch.channels_last)


def loss(vae: AutoencoderKL, images: torch.Tensor, seed: int, step: int, weight: float) -> torch.Tensor:
    """`pixel_error` of decoded draws + `weight` x KL, a mean over latents."""
    posterior = vae.encode(images).latent_dist
    indices = torch.arange(step * len(images), (step + 1) * len(images), device=images.device)
    noise = normal(seed, "train_vae/posterior", indices, tuple(posterior.mean.shape[1:]))
    decoded = vae.decode(posterior.mean + posterior.std * noise).sample
    return pixel_error(decoded, images) + weight * posterior.kl().mean() / noise[0].numel()


def pixel_error(decoded: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """L1 + MSE + L1 of the finite differences (edges), means over everything."""
    error = decoded - images
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + error.square().mean() + edges


def kl_weight(step: int, steps: int, last: float) -> float:
    """From FIRST_KL_WEIGHT to `last`, by equal factors a step until the last quarter.

    It rises until the posterior's noise is a part of the latents' own spread: the decoder then repairs what a small
    denoiser gets wrong by as much, for some PSNR.
    """
    first = min(FIRST_KL_WEIGHT, last)
    return first * (last / first) ** min(1.0, step / (0.75 * steps)) if last else 0.0


def whole(recipe: Recipe, batch_of: Callable[[int], torch.Tensor]) -> Phase:
    """The training of all its weights. batch_of: a step's images (BATCH_SIZE, 3, H, W)."""
    assert recipe.vae.training is not None
    settings = recipe.vae.training
    vae: Any = start(recipe)
    vae.to(device := own_device())
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.99), weight_decay=0)
    steps = math.ceil(settings.images / BATCH_SIZE)

    def one_step(step: int) -> float:
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * learning_rate(step, steps)
        value = loss(vae, batch_of(step).to(device), recipe.seed, step, kl_weight(step, steps, settings.kl_weight))
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        return value.item()

    return Phase("autoencoder", vae, steps, one_step, {"optimizer": optimizer})


@torch.no_grad()
def finish(vae: AutoencoderKL, images: torch.Tensor) -> AutoencoderKL:
    """A copy, its weights rounded to fp16, that encodes `images` with mean 0 and standard deviation 1 a channel.

    The affine map goes into the 1 x 1 convolutions on either side of the latents, so the images stay the same; the
    noise of diffusion then hides every channel alike.
    """
    finished = _copy(vae)
    finished.register_to_config(scaling_factor=1.0, shift_factor=0.0)
    statistics = measure(vae, images)
    mean, std = torch.tensor(statistics["channel_means"]), torch.tensor(statistics["channel_stds"])  # (C,)
    to_moments, from_latents = finished.quant_conv, finished.post_quant_conv
    to_moments.weight[: len(mean)] /= std[:, None, None, None]
    to_moments.bias[: len(mean)] = (to_moments.bias[: len(mean)] - mean) / std
    to_moments.bias[len(mean) :] -= 2 * std.log()  # the second half is the logarithm of the variance
    from_latents.bias += from_latents.weight[:, :, 0, 0] @ mean
    from_latents.weight *= std[:, None, None]
    return finished.half().float()


def rounded(vae: AutoencoderKL) -> AutoencoderKL:
    """A copy, its weights rounded to fp16."""
    return _copy(vae).half().float()


def _copy(vae: AutoencoderKL) -> Any:
    """On the CPU, wherever it was trained."""
    copied = AutoencoderKL.from_config(vae.config)
    copied.load_state_dict(vae.state_dict())
    return copied


@torch.no_grad()
def measure(vae: AutoencoderKL, images: torch.Tensor) -> dict[str, Any]:
    """PSNR in dB (mean over images, decoded from the posterior's mean) and the latents' statistics, as encoded."""
    vae.eval()
    ratios, latents, stds = [], [], []
    for batch in images.split(MEASURE_BATCH):
        posterior = vae.encode(batch.to(vae.device)).latent_dist
        decoded = vae.decode(posterior.mean).sample.clamp(-1, 1).cpu()
        ratios.append(psnr(decoded, batch))
        latents.append(posterior.mean.cpu())
        stds.append(posterior.std.cpu())
    latent = torch.cat(latents)
    return {
        "psnr": torch.cat(ratios).mean().item(),
        "mean": latent.mean().item(),
        "std": latent.std().item(),
        "channel_means": latent.mean(dim=(0, 2, 3)).tolist(),
        "channel_stds": latent.std(dim=(0, 2, 3)).tolist(),
        "posterior_std": torch.cat(stds).mean().item(),
    }


def psnr(decoded: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Of each image (B, 3, H, W) in [-1, 1], in dB (B,): 20 is blurred, 26 soft, above 30 hard to tell apart."""
    return 10 * torch.log10(4 / (decoded - images).square().mean(dim=(1, 2, 3)).clamp(min=1e-10))
