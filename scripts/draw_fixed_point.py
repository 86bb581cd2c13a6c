"""Draws the pictures of docs/fixed-point.md with the network that comes with this project.

python scripts/draw_fixed_point.py    # a minute on one core; writes docs/pictures/
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import torch
from diffusers.utils import logging
from torch import Tensor

from common.command import Parser
from fpdm import Denoised, allocate, build_sampler, sample
from fpdm.pipeline_hf import FPDMPipeline
from fpdm.sampling import sample_noise

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # after the backend is chosen

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs/pictures"
STEPS, GUIDANCE = 20, 1.5
SAMPLES, MOST = 16, 26  # of the curves; MOST iterations a step
SHOWN, ITERATIONS = 4, (1, 2, 3, 5, 8)  # of the images
SOLVED = 0.01  # the residual at which a fixed point counts as reached
CURVES = (0, 6, 8, 13, 18)  # steps whose residuals are drawn
GREY = "#808080"  # legible on white and on black, as are the colours below
BLUE, ORANGE, GREEN = "#3b8eea", "#e07b00", "#2f9e60"

STYLE = {
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), GREY),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    "savefig.transparent": True,
    "svg.fonttype": "none",
    "svg.hashsalt": "fpdm",
    "font.family": "sans-serif",
    "font.size": 10,
}


class Network:
    """The demo's pipeline, drawing samples 0, 1, ... of seed 0, whose classes take turns."""

    def __init__(self) -> None:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.pipeline = FPDMPipeline.from_pretrained(ROOT / "assets/demo")
        self.network = self.pipeline.transformer.denoiser
        self.diffusion = self.pipeline.transformer.diffusion
        self.timesteps = build_sampler(self.diffusion, "ddim", STEPS).timesteps

    def draw(self, count: int, iterations: int, reuse: bool) -> tuple[Tensor, Tensor]:
        """Latents (count, C, H, W), and relative residuals (STEPS, count, iterations)."""
        config, residuals = self.network.config, list[Tensor]()

        def keep(_step: int, denoised: Denoised) -> None:
            assert denoised.residuals is not None
            residuals.append(denoised.residuals[:count])  # of the conditional half

        latents = sample(
            self.network,
            self.diffusion,
            sample_noise(0, torch.arange(count), (config.in_channels, config.input_size, config.input_size)),
            torch.arange(count) % config.num_classes,
            num_steps=STEPS,
            iterations=[iterations] * STEPS,
            reuse=reuse,
            guidance_scale=GUIDANCE,
            with_residuals=True,
            on_step=keep,
        )
        return latents, torch.stack(residuals)


def draw_images(network: Network) -> None:
    """A row of images for each sample, a column for each number of iterations a step."""
    figure, axes = plt.subplots(SHOWN, len(ITERATIONS), figsize=(6.4, 5.4), layout="constrained")
    for column, iterations in zip(axes.T, ITERATIONS, strict=True):
        latents, _ = network.draw(SHOWN, iterations, reuse=False)
        column[0].set_title(f"{iterations} iteration{'s' * (iterations > 1)}", fontsize=10)
        for place, image in zip(column, network.pipeline.decode_latents(latents, "pil", "half_away"), strict=True):
            place.imshow(np.asarray(image))
            place.axis("off")
    figure.savefig(PICTURES / "iterations.webp", dpi=100, pil_kwargs={"quality": 90})


def draw_residuals(timesteps: list[float], residuals: Tensor) -> None:
    """residuals: (STEPS, MOST), means over the samples."""
    figure, axis = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    for place, step in enumerate(CURVES):
        colour = plt.colormaps["viridis"](0.3 + 0.55 * place / (len(CURVES) - 1))
        axis.semilogy(range(1, MOST + 1), residuals[step], color=colour, label=f"{timesteps[step]:.0f}")
    axis.set(xlabel="iteration", ylabel="relative residual", xlim=(1, MOST), xticks=(1, *range(5, MOST, 5)))
    axis.legend(title="timestep")
    save(figure, "residuals")


def draw_counts(timesteps: list[float], cold: Tensor, reused: Tensor) -> None:
    """What each timestep needs, beside ways to spend a budget. cold, reused: (STEPS, SAMPLES, MOST)."""
    figure, (needed, spent) = plt.subplots(1, 2, figsize=(6.4, 3.2), layout="constrained", sharey=True)
    for residuals, colour, name in ((cold, GREY, "from the pre-layers"), (reused, BLUE, "from the last solution")):
        counts = 1 + (residuals > SOLVED).sum(-1).float().mean(-1)
        needed.plot(timesteps, counts, color=colour, label=name)
    needed.set(title=f"until the residual is {SOLVED:.0%}", ylabel="iterations")
    ways = (("constant", GREY), ("more_at_noise", ORANGE), ("more_at_data", GREEN))
    for kind, colour in ways:
        spent.step(timesteps, allocate(kind, STEPS, 5), color=colour, label=kind, where="mid")
    spent.set(title="three ways to spend 100")
    for axis in (needed, spent):
        axis.set(xlabel="timestep (noise to data)", xlim=(timesteps[0], timesteps[-1]), ylim=(0, 12))
        axis.legend(loc="upper center")
    save(figure, "timesteps")


def save(figure: plt.Figure, name: str) -> None:
    figure.savefig(PICTURES / f"{name}.svg", metadata={"Date": None})


def main(argv: Sequence[str] | None = None) -> None:
    Parser(__doc__).parse_args(argv)
    torch.set_num_threads(1)  # sums in one order
    PICTURES.mkdir(exist_ok=True)
    network = Network()
    draw_all = partial(network.draw, SAMPLES, MOST)
    (_, cold), (_, reused) = draw_all(reuse=False), draw_all(reuse=True)
    with plt.rc_context(STYLE):
        draw_residuals(network.timesteps, cold.mean(1))
        draw_counts(network.timesteps, cold, reused)
        draw_images(network)


if __name__ == "__main__":
    sys.exit(main())
