"""How the demo's autoencoder is made: network, images, loss, schedule. `train_vae.py` is the command."""

import math
from collections.abc import Iterator
from typing import cast

import torch
from diffusers.models import AutoencoderKL
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from common.errors import UserError
from common.recipe import Recipe
from fpdm.rng import normal
from preprocess.demo_images import CLASSES, held_out_combinations, load_portraits, training_combinations
from preprocess.images.images import to_tensor

BLOCK_CHANNELS = (24, 48, 96)  # 1.45 M parameters; a wider first block costs most, at full resolution
BATCH_SIZE = 8
LEARNING_RATE = 1e-3
WARMUP_STEPS = 200
EMA_DECAY = 0.998
# Weights of the KL divergence, a mean over latents beside means over pixels: at first, and in the last quarter. It
# rises until the posterior's noise is a good part of the latents' own spread: the decoder then repairs what a small
# denoiser gets wrong by as much, for 0.8 dB of PSNR.
KL_WEIGHTS = (5e-4, 6e-2)
MEASURE_BATCH = 64
STATISTICS_BATCHES = 64


class Portraits:
    """Training and held-out images of all classes, drawn by number."""

    def __init__(self, recipe: Recipe) -> None:
        assert recipe.demo is not None, "train_vae.plan refuses such a recipe"
        self.seed = recipe.seed
        self.sets = {name: load_portraits(name, recipe.data.resolution) for name in CLASSES}
        self.held_out_per_class = recipe.demo.held_out_per_class

    def training_batch(self, step: int) -> torch.Tensor:
        """(BATCH_SIZE, 3, H, W): the classes in equal parts, no image twice."""
        share = BATCH_SIZE // len(self.sets)
        return self._compose(
            {n: training_combinations(self.seed, n, s, step * share, share) for n, s in self.sets.items()}
        )

    def training_part(self) -> torch.Tensor:
        """The first training images, as many as are enough for statistics."""
        return torch.cat([self.training_batch(step) for step in range(STATISTICS_BATCHES)])

    def held_out(self) -> torch.Tensor:
        return self._compose(
            {n: held_out_combinations(self.seed, n, s, self.held_out_per_class) for n, s in self.sets.items()}
        )

    def _compose(self, chosen: dict[str, list[int]]) -> torch.Tensor:
        return torch.stack([to_tensor(self.sets[name].compose(number)) for name in chosen for number in chosen[name]])


def build(recipe: Recipe) -> AutoencoderKL:
    """A new autoencoder whose weights are a function of (seed, parameter's name)."""
    if recipe.vae.downsampling != 2 ** (len(BLOCK_CHANNELS) - 1):
        raise UserError(
            f"vae.downsampling: found {recipe.vae.downsampling}; this network's {len(BLOCK_CHANNELS)} levels make 4"
        )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(BLOCK_CHANNELS),
        up_block_types=("UpDecoderBlock2D",) * len(BLOCK_CHANNELS),
        block_out_channels=BLOCK_CHANNELS,
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


def loss(vae: AutoencoderKL, images: torch.Tensor, seed: int, step: int, weight: float) -> torch.Tensor:
    """L1 + MSE + L1 of the finite differences (edges) + `weight` x KL, means over everything."""

    posterior = vae.encode(images).latent_dist
    indices = torch.arange(step * len(images), (step + 1) * len(images))
    noise = normal(seed, "train_vae/posterior", indices, tuple(posterior.mean.shape[1:]))
    error = vae.decode(posterior.mean + posterior.std * noise).sample - images
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + error.square().mean() + edges + weight * posterior.kl().mean() / noise[0].numel()


def learning_rate(step: int, steps: int) -> float:
    return LEARNING_RATE * min(1, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / steps))


def kl_weight(step: int, steps: int) -> float:
    """From the first of KL_WEIGHTS to the second, by equal factors a step until the last quarter."""
    first, last = KL_WEIGHTS
    return first * (last / first) ** min(1.0, step / (0.75 * steps))


def train(recipe: Recipe, portraits: Portraits, images: int) -> Iterator[tuple[int, AutoencoderKL]]:
    """Yields (images seen, averaged autoencoder) after every step."""
    vae = build(recipe)
    average = AveragedModel(vae, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.99), weight_decay=0)
    steps = images // BATCH_SIZE
    for step in (bar := tqdm(range(steps), unit="step")):
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps)
        value = loss(vae, portraits.training_batch(step), recipe.seed, step, kl_weight(step, steps))
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(vae)
        bar.set_postfix(loss=f"{value.item():.4f}", refresh=False)
        yield (step + 1) * BATCH_SIZE, cast(AutoencoderKL, average.module)


@torch.no_grad()
def finish(vae: AutoencoderKL, images: torch.Tensor) -> AutoencoderKL:
    """A copy, its weights rounded to fp16, that encodes `images` with mean 0 and standard deviation 1 a channel.

    The affine map goes into the 1 x 1 convolutions on either side of the latents, so the images stay the same; the
    noise of diffusion then hides every channel alike.
    """
    finished = AutoencoderKL.from_config(vae.config)
    finished.load_state_dict(vae.state_dict())
    statistics = measure(vae, images)
    mean, std = torch.tensor(statistics["channel_means"]), torch.tensor(statistics["channel_stds"])  # (C,)
    to_moments, from_latents = finished.quant_conv, finished.post_quant_conv
    to_moments.weight[: len(mean)] /= std[:, None, None, None]
    to_moments.bias[: len(mean)] = (to_moments.bias[: len(mean)] - mean) / std
    to_moments.bias[len(mean) :] -= 2 * std.log()  # the second half is the logarithm of the variance
    from_latents.bias += from_latents.weight[:, :, 0, 0] @ mean
    from_latents.weight *= std[:, None, None]
    return finished.half().float()


@torch.no_grad()
def measure(vae: AutoencoderKL, images: torch.Tensor) -> dict[str, float | list[float]]:
    """PSNR in dB (mean over images, decoded from the posterior's mean) and the latents' statistics, as encoded."""
    vae.eval()
    errors, latents, stds = [], [], []
    for batch in images.split(MEASURE_BATCH):
        posterior = vae.encode(batch).latent_dist
        decoded = vae.decode(posterior.mean).sample.clamp(-1, 1)
        errors.append((decoded - batch).square().mean(dim=(1, 2, 3)))
        latents.append(posterior.mean)
        stds.append(posterior.std)
    latent = torch.cat(latents)
    return {
        "psnr": (10 * torch.log10(4 / torch.cat(errors))).mean().item(),
        "mean": latent.mean().item(),
        "std": latent.std().item(),
        "channel_means": latent.mean(dim=(0, 2, 3)).tolist(),
        "channel_stds": latent.std(dim=(0, 2, 3)).tolist(),
        "posterior_std": torch.cat(stds).mean().item(),
    }
