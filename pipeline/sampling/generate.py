"""Images drawn from weights: sample i is a function of (seed, i) alone, whatever the batch, the rank or the chunk."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from common.background import Background
from common.errors import UserError
from common.files import folder_lock, shared_folder_lock
from common.ranks import float32_throughout, own_device, rank_and_world_size, share_cores
from common.recipe import Recipe
from common.run_folder import SampleFolder
from common.run_weights import load_network
from common.sealed import write_sealed
from fpdm.calibration import Way
from fpdm.denoiser import Denoiser
from fpdm.latents import to_uint8
from fpdm.sampling import UnsoundError, require_sound
from pipeline.sampling import iterates
from pipeline.sampling.chunks import Chunk, Span
from pipeline.sampling.outputs import Chunks, output
from pipeline.sampling.plans import UnsoundSamples, bind_sampler, labels_for, open_plan
from pipeline.sampling.sample_set import SampleSet, Sampling
from preprocess.encoding.encoder import Encoder, fetch_vae

WAITING = 4  # batches that are drawn and not yet finished: bounds the memory


def sample(sampling: Sampling, part: int = 0, parts: int = 1) -> None:
    """The stage: draws this rank's share of this part of every set that the recipe measures.

    Who draws the last chunk of a set also writes what `sample.output` makes of it.
    """
    rank, world_size = rank_and_world_size()
    share_cores()
    float32_throughout()
    fetch_vae(sampling.recipe.vae)
    if finished(sampling):
        return
    for samples in sampling.sets:
        network = cache(partial(_load, samples.weights))
        with shared_folder_lock(samples.folder):
            generate(sampling, samples, part * world_size + rank, parts * world_size, network)
            if not missing_chunks(sampling, samples):
                _complete(sampling, samples, network)


def _complete(sampling: Sampling, samples: SampleSet, network: Callable[[], Denoiser]) -> None:
    """What is written once all chunks exist: by one of the ranks that see them, while the others wait."""
    with folder_lock(samples.folder, ".completing", wait=True):
        output(sampling, samples).complete()
        if iterates.are_missing(sampling, samples):
            iterates.draw(sampling, samples, network())


def finished(sampling: Sampling) -> bool:
    try:
        return all(
            not missing_chunks(sampling, samples)
            and output(sampling, samples).is_complete
            and not iterates.are_missing(sampling, samples)
            for samples in sampling.sets
        )
    except UserError:  # no weights yet
        return False


def missing_chunks(sampling: Sampling, samples: SampleSet) -> list[Span]:
    """The chunks that are still to be drawn, over all ranks."""
    form = output(sampling, samples)
    return [span for span in sampling.spans if not all(path.exists() for path in form.paths(span))]


def _load(weights: Path) -> Denoiser:
    return load_network(weights).to(own_device())


def generate(
    sampling: Sampling,
    samples: SampleSet,
    rank: int = 0,
    world_size: int = 1,
    network: Callable[[], Denoiser] | None = None,
) -> None:
    """Draws the chunks of this rank that are missing. Chunk k belongs to rank k % world_size.

    `network`: loads that of the set, if it is needed elsewhere too.

    While one batch is drawn, a thread rounds, checks, compresses and writes those before it: a GPU need not wait for
    that. Raises UnsoundSamples.
    """
    missing = set(missing_chunks(sampling, samples))
    spans = [span for span in sampling.spans[rank::world_size] if span in missing]
    if not spans:
        return
    write_sealed(SampleFolder(samples.folder).settings, samples.settings)
    recipe, device = sampling.recipe, own_device()
    float32_throughout()
    model = network() if network else _load(samples.weights)
    way = open_plan(recipe, samples.folder, lambda: model)
    vae = sampling.models.load_vae(device)
    form = output(sampling, samples)
    total = sum(end - first for first, end in spans)
    with (
        tqdm(total=total, unit="image", desc=f"sample {samples.samples_seen}", disable=rank != 0) as bar,
        Background(_batches_in_the_background()) as background,
    ):
        for span in spans:
            batches: list[Chunk] = []
            for start in range(*span, recipe.sample.batch_size):
                index = torch.arange(start, min(start + recipe.sample.batch_size, span[1]), device=device)
                images, labels = draw_images(recipe, way, model, vae, index), labels_for(recipe, index)
                background.submit(partial(_finish_batch, index, images, labels, recipe.sample.rounding, batches))
                bar.update(len(index))
            background.submit(partial(_write_chunk, form, span, batches))


def _batches_in_the_background() -> int:
    """At once. None where torch has several threads on a CPU: two teams of threads would stall one another."""
    return WAITING if torch.cuda.is_available() or torch.get_num_threads() == 1 else 0


def draw_images(
    recipe: Recipe, way: Way, model: Denoiser, vae: Encoder, index: torch.Tensor, label: int | None = None
) -> torch.Tensor:
    """Samples `index` (B,) as (B, 3, H, W) in [-1, 1], of their own classes or all of one. Raises UnsoundSamples, with
    their count.
    """
    draw = bind_sampler(recipe, model, "sample", index, label)
    try:
        latents = draw(**vars(way), tolerance=recipe.sample.tolerance)  # (B, C, h, w)
    except ValueError as error:
        raise _unsound(index, error) from None
    return vae.decode(latents)


def _finish_batch(
    index: torch.Tensor,
    images: torch.Tensor,
    labels: torch.Tensor,
    rounding: Literal["half_away", "truncate"],
    batches: list[Chunk],
) -> None:
    """Appends samples `index` (B,), drawn as (B, 3, H, W) in [-1, 1]: images (B, H, W, 3) uint8 and labels (B,)."""
    pixels = to_uint8(images, rounding)
    try:
        require_sound(images)
        require_sound(pixels)
    except ValueError as error:
        raise _unsound(index, error) from None
    batches.append({"images": pixels.permute(0, 2, 3, 1).cpu().numpy(), "labels": labels.cpu().numpy()})


def _write_chunk(form: Chunks, span: Span, batches: Sequence[Chunk]) -> None:
    form.write(span, {name: np.concatenate([batch[name] for batch in batches]) for name in ("images", "labels")})


def _unsound(index: torch.Tensor, error: ValueError) -> UserError:
    kind = UnsoundSamples if isinstance(error, UnsoundError) else UserError
    return kind(f"samples {int(index[0])} to {int(index[-1])}: {error}")
