"""The encoding loop: images from worker processes through the VAE, shard by shard."""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common.ranks import own_device, rank_and_world_size, share_cores
from common.recipe import Recipe
from preprocess.encoding.decoding import decoded
from preprocess.encoding.encoder import Encoder, Identity
from preprocess.encoding.image_loader import ImageLoader, LoadedBatch
from preprocess.images.images import from_uint8
from preprocess.shards import Rejection, Sample
from preprocess.sources import Source

Outcome = Sample | Rejection
Moments = Callable[[], list[np.ndarray]]  # waits for the result: none, one or two (B, 2C, h, w) float16


def encode_images(
    recipe: Recipe, source: Source, slices: Mapping[int, range], identity: Identity | None = None
) -> Iterator[tuple[int, list[Outcome]]]:
    """Yields (shard, outcome of each of its images). `slices`: the positions in the source of each shard.

    `identity`: the VAE's, if its files are hashed already.

    Shows images per second, the time left, and the share of time for which the VAE was busy.
    """
    share_cores()
    encoder = Encoder(recipe.vae, own_device(), identity)
    loader = ImageLoader(source, recipe.data.crop, recipe.data.resolution)
    batches = {number: _batches(positions, recipe.vae.batch_size) for number, positions in slices.items()}
    every = [batch for of_shard in batches.values() for batch in of_shard]
    total, others = sum(map(len, every)), rank_and_world_size()[0] > 0  # only rank 0 shows a progress bar
    with (
        decoded(loader, every, recipe.launch.cpus_per_process) as loaded,
        tqdm(total=total, unit="image", desc="encode", disable=others) as bar,
    ):
        started = time.monotonic()
        for number, of_shard in batches.items():
            outcomes: list[Outcome] = []
            for given, moments in _one_ahead(encoder, itertools.islice(loaded, len(of_shard)), recipe.data.flips):
                outcomes += _collect(recipe.vae.precision, source, given, moments())
                bar.set_postfix_str(
                    f"VAE busy {encoder.busy_seconds / (time.monotonic() - started):.0%}", refresh=False
                )
                bar.update(len(given.positions) + len(given.rejected))
            yield number, outcomes
        seconds = time.monotonic() - started
    print(f"encoded {total:,} images, {total / seconds:.1f} images/s, VAE busy {encoder.busy_seconds / seconds:.0%}")


def _batches(positions: range, size: int) -> list[range]:
    """Splits each shard separately, so that the batches do not depend on timing and kills."""
    return [positions[start : start + size] for start in range(0, len(positions), size)]


def _one_ahead(encoder: Encoder, batches: Iterator[LoadedBatch], flips: bool) -> Iterator[tuple[LoadedBatch, Moments]]:
    """Yields batches with their moments, after submitting the next batch, so that the GPU never waits."""
    waiting: list[tuple[LoadedBatch, Moments]] = []
    for loaded in batches:
        waiting.append((loaded, _submit(encoder, loaded.images, flips)))
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting


def _submit(encoder: Encoder, images: Tensor | None, flips: bool) -> Moments:
    """Images (B, 3, H, W) uint8 -> their moments and those of the mirrored images.

    The copy from the GPU is queued at once: a later one would wait for the next batch too.
    """
    if images is None:
        return list
    images = images.pin_memory() if encoder.device.type == "cuda" else images
    pixels = from_uint8(images.to(encoder.device, non_blocking=True))
    given = (pixels, pixels.flip(-1)) if flips else (pixels,)
    copies = [encoder.moments(each).half().to("cpu", non_blocking=True) for each in given]
    if encoder.device.type != "cuda":
        return lambda: [each.numpy() for each in copies]
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(encoder.device))

    def wait() -> list[np.ndarray]:
        copied.synchronize()
        return [each.numpy().copy() for each in copies]  # pinned memory is reused for the next batches

    return wait


def _collect(precision: str, source: Source, loaded: LoadedBatch, moments: Sequence[np.ndarray]) -> Iterator[Outcome]:
    yield from loaded.rejected
    for number, position in enumerate(loaded.positions):
        digest, arrays = loaded.digests[number], [array[number] for array in moments]
        yield _outcome(precision, source, position, loaded.sizes[number], digest, arrays)


def _outcome(
    precision: str, source: Source, position: int, size: tuple[int, int], digest: str, moments: Sequence[np.ndarray]
) -> Outcome:
    entry = source.entries[position]
    if not all(np.isfinite(array).all() for array in moments):
        reason = f"the VAE's moments are not finite in float16 (vae.precision {precision})"
        return Rejection(entry.key, reason, position, digest)
    flipped = moments[1] if len(moments) > 1 else None
    return Sample(position, entry.key, entry.label, *size, moments[0], flipped, digest)
