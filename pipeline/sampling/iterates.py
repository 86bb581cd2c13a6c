"""A few images after 1 to 26 iterations a step, and in fewer and in more steps: what the report shows of a
fixed point. Drawn with the samples, since that is where the device is, and kept in one file beside them.
"""

import sys
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.arrays import read_arrays, write_arrays
from common.ranks import own_device
from common.recipe import Recipe, diffusion
from common.recipe.sampling import sampler_settings, stated_iterations
from common.run_folder import SampleFolder
from fpdm.denoiser import Denoised, Denoiser
from fpdm.latents import to_uint8
from fpdm.samplers import build_sampler
from pipeline.sampling.chunks import COMMAND
from pipeline.sampling.plans import bind_sampler, blocks_an_image, unmeasured
from pipeline.sampling.sample_set import SampleSet, Sampling
from preprocess.encoding.encoder import Encoder

SHOWN = 4  # the first samples of the set
ITERATIONS = (1, 2, 3, 5, 8, 26)
OF_THE_STEPS = (1 / 8, 1 / 4, 1 / 2, 1, 2)  # numbers of steps, relative to the recipe's


@dataclass(frozen=True)
class Iterates:
    """K numbers of iterations, S numbers of steps, B samples."""

    iterations: NDArray[np.int64]  # (K,) a step, each from a step's own input
    by_iterations: NDArray[np.uint8]  # (K, B, H, W, 3)
    timesteps: NDArray[np.float32]  # (num_steps,)
    residuals: NDArray[np.float32]  # (num_steps, max(iterations)): relative, mean over the samples
    steps: NDArray[np.int64]  # (S,)
    blocks: NDArray[np.int64]  # (S,) an image
    by_steps: NDArray[np.uint8]  # (S, B, H, W, 3), with the recipe's mean of iterations in each step


def are_missing(sampling: Sampling, samples: SampleSet) -> bool:
    """Of a trained FPDM; a DiT and an untrained network have nothing to show."""
    iterates = sampling.shown and sampling.recipe.model.kind == "fpdm" and samples.samples_seen > 0
    return iterates and not SampleFolder(samples.folder).iterates.exists()


def read(samples: SampleSet) -> Iterates | None:
    """None where there are none. Raises UserError naming a damaged file."""
    path = SampleFolder(samples.folder).iterates
    return Iterates(**read_arrays(path, COMMAND)) if path.exists() else None


def draw(sampling: Sampling, samples: SampleSet, model: Denoiser) -> None:
    """Draws and writes them. `model`: the set's, on this process's device."""
    recipe, device = sampling.recipe, own_device()
    index = torch.arange(min(SHOWN, recipe.sample.num_samples), device=device)
    images = partial(_images, model, sampling.models.load_vae(device), index)
    curves: list[Tensor] = []

    def keep_residuals(_step: int, denoised: Denoised) -> None:
        assert denoised.residuals is not None
        curves.append(denoised.residuals[: len(index)].mean(0))  # with guidance: of the conditional half

    cold = [even(recipe, recipe.sample.num_steps, count, reuse=False) for count in ITERATIONS]
    by_iterations = [images(one) for one in cold[:-1]]
    by_iterations.append(images(cold[-1], with_residuals=True, on_step=keep_residuals))
    how, mean = recipe.sample, sum(stated_iterations(recipe.sample)) / recipe.sample.num_steps
    by_steps = [
        even(recipe, steps, max(1, round(mean * steps)) / steps, reuse=how.reuse == "always")
        for steps in step_counts(recipe)
    ]
    timesteps = build_sampler(diffusion(recipe), how.sampler, how.num_steps, sampler_settings(how)).timesteps
    write_arrays(
        SampleFolder(samples.folder).iterates,
        iterations=np.asarray(ITERATIONS),
        by_iterations=np.stack(by_iterations),
        timesteps=np.asarray(timesteps, np.float32),
        residuals=torch.stack(curves).cpu().numpy(),
        steps=np.asarray([one.sample.num_steps for one in by_steps]),
        blocks=np.asarray([blocks_an_image(one) for one in by_steps]),
        by_steps=np.stack([images(one) for one in by_steps]),
    )


def step_counts(recipe: Recipe) -> list[int]:
    """From an eighth of the recipe's number of steps to twice as many, as the objective allows."""
    steps = recipe.sample.num_steps
    counts = {max(1, round(steps * factor)) for factor in OF_THE_STEPS}
    return sorted(count for count in counts if count <= max(steps, recipe.objective.num_timesteps // 2))


def even(recipe: Recipe, num_steps: int, iterations: float, reuse: bool) -> Recipe:
    """The recipe with constant iterations a step, and without noise where the sampler can do without: the same images
    then emerge in any number of steps. Without guidance by iterates where there is no earlier one.
    """
    how = replace(
        recipe.sample,
        num_steps=num_steps,
        iterations=iterations,
        allocation="constant",
        reuse="always" if reuse else "none",
        start_extrapolation=recipe.sample.start_extrapolation if reuse else 0.0,
        tolerance=None,
        eta=0.0,
    )
    if iterations <= how.weak_iterate:
        how = replace(how, iterate_guidance=0.0, weak_iterate=1)
    return replace(recipe, sample=how)


def _images(model: Denoiser, vae: Encoder, index: Tensor, recipe: Recipe, **observed: Any) -> NDArray[np.uint8]:
    """Samples `index` (B,) as images (B, H, W, 3)."""
    way = unmeasured(recipe)
    draw_latents = bind_sampler(recipe, model, "sample", index)
    try:
        latents = draw_latents(**vars(way), **observed)
    except ValueError as error:  # the iteration of this network diverges: to be seen, and no reason to lose its samples
        shown = f"{way.num_steps} steps of {(way.iterations or [0])[0]} iterations"
        print(f"warning: {shown}: {error}; shown black", file=sys.stderr)
        return np.zeros((len(index), recipe.data.resolution, recipe.data.resolution, 3), np.uint8)
    return to_uint8(vae.decode(latents), recipe.sample.rounding).permute(0, 2, 3, 1).cpu().numpy()
