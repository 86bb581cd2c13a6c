"""Pictures drawn from weights: sample i is a function of (seed, i) alone, whatever the batch, the rank or the chunk.

A set of samples is a folder `samples/<samples seen>-<key>/`; the key covers everything that changes a picture, so that
no chunk of other settings is ever counted. It holds `settings.json`, what the key is of, and files
`chunk-<first>-<end>.npz` with samples first to end - 1. Where chunks of different sizes overlap they hold the same
samples, and each sample is counted once.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from tqdm import tqdm

from common.errors import UserError
from common.files import content_key, sha256_file, write_json
from common.recipe import Recipe, denoiser_config, diffusion, latent_shape
from fpdm import rng
from fpdm.allocation import allocate
from fpdm.denoiser import Denoiser
from fpdm.sampling import require_sound
from fpdm.sampling import sample as sample_latents
from fpdm.weights import WEIGHTS_NAME, load_pretrained, read_config, read_extra
from pipeline.arrays import read_arrays, write_arrays
from pipeline.distributed import rank_and_world_size, share_cores
from pipeline.run_folder import Weights, find_weights
from preprocess.encoder import Encoder, fetch_vae, find_vae, identify
from preprocess.images import to_uint8

CHUNK_NAME = re.compile(r"chunk-(\d+)-(\d+)\.npz")
NOT_OF_THE_PICTURE = ("num_samples", "batch_size", "chunk_samples", "weights", "save_images")  # fields of `sample`
COMMAND = "python pipeline/sample.py"

Chunk = tuple[NDArray[np.uint8], NDArray[np.int64]]  # images (N, H, W, 3), labels (N,)


def sample(recipe: Recipe) -> None:
    """The stage: this rank's part of every set that the recipe measures."""
    rank, world_size = rank_and_world_size()
    share_cores()
    for weights in wanted_weights(recipe):
        generate(recipe, weights, rank, world_size)


def finished(recipe: Recipe) -> bool:
    try:
        return not any(missing_chunks(recipe, weights) for weights in wanted_weights(recipe))
    except UserError:  # no weights yet
        return False


def wanted_weights(recipe: Recipe) -> list[Weights]:
    """The weights that the recipe measures: its own, then 0, the network before its first step."""
    own = recipe.sample.weights
    return [own, 0] if recipe.evaluate.untrained_baseline and own != 0 else [own]


@dataclass(frozen=True)
class SampleSet:
    """Which pictures a recipe draws from some weights, and where they lie."""

    folder: Path
    weights: Path
    samples_seen: int
    settings: dict[str, Any]  # all that changes a picture, JSON-able


def sample_set(recipe: Recipe, weights: Weights) -> SampleSet:
    """Resolves `weights`, "latest" or a number of samples seen.

    Raises UserError where there are none, or where they are another network's than the recipe's.
    """
    samples_seen, folder = find_weights(recipe, weights)
    settings = {
        "weights_sha256": sha256_file(folder / WEIGHTS_NAME),
        "network": _network_settings(recipe, folder),
        "seed": recipe.seed,
        "sample": {name: value for name, value in asdict(recipe.sample).items() if name not in NOT_OF_THE_PICTURE},
        "objective": asdict(recipe.objective),
        "vae": vae_settings(recipe),
    }
    name = f"{samples_seen:012d}-{content_key(settings)}"
    return SampleSet(recipe.folder / "samples" / name, folder, samples_seen, settings)


def vae_settings(recipe: Recipe) -> dict[str, Any]:
    """What of the autoencoder changes a picture."""
    folder = find_vae(recipe.vae)
    if folder is None:
        raise UserError(f"vae.path: {recipe.vae.path} is not here; python preprocess/encode_latents.py downloads it")
    return asdict(identify(folder, recipe.vae)) | {"precision": recipe.vae.precision}


def missing_chunks(recipe: Recipe, weights: Weights) -> list[tuple[int, int]]:
    """(first, end) of the chunks that are still to be drawn, over all ranks."""
    folder = sample_set(recipe, weights).folder
    return [span for span in chunk_spans(recipe) if not _chunk_path(folder, *span).exists()]


def chunk_spans(recipe: Recipe) -> list[tuple[int, int]]:
    settings = recipe.sample
    firsts = range(0, settings.num_samples, settings.chunk_samples)
    return [(first, min(first + settings.chunk_samples, settings.num_samples)) for first in firsts]


def generate(recipe: Recipe, weights: Weights, rank: int = 0, world_size: int = 1) -> Path:
    """Draws the chunks of this rank that are not there yet, and returns the set's folder. Chunk k belongs to
    rank k % world_size.

    Raises UserError where there are no such weights, or where latents or pictures come out non-finite or constant.
    """
    fetch_vae(recipe.vae)
    wanted = sample_set(recipe, weights)
    spans = [span for span in chunk_spans(recipe)[rank::world_size] if not _chunk_path(wanted.folder, *span).exists()]
    if not spans:
        return wanted.folder
    if rank == 0:
        write_json(wanted.folder / "settings.json", wanted.settings)
    device = _device()
    model = _load_network(wanted.weights).to(device)
    vae = Encoder(recipe.vae, device)
    total = sum(end - first for first, end in spans)
    with tqdm(total=total, unit="picture", desc=f"sample {wanted.samples_seen}", disable=rank != 0) as bar:
        for first, end in spans:
            pictures = []
            for start in range(first, end, recipe.sample.batch_size):
                index = torch.arange(start, min(start + recipe.sample.batch_size, end), device=device)
                pictures.append(draw_pictures(recipe, model, vae, index))
                bar.update(len(index))
            _write_chunk(_chunk_path(wanted.folder, first, end), np.concatenate(pictures), recipe.model.num_classes)
    return wanted.folder


def _load_network(folder: Path) -> Denoiser:
    """In float32. Raises UserError where the weights are damaged."""
    try:
        return load_pretrained(folder).float().eval()
    except (ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: damaged ({error}); delete it and run python pipeline/train.py again") from None


def _network_settings(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """The network that the weights belong to. Raises UserError where the recipe means another network or objective."""
    try:
        found = asdict(read_config(folder))
        trained_for = read_extra(folder).get("objective", {})
    except ValueError as error:
        raise UserError(f"{error}; delete the folder and run python pipeline/train.py again") from None
    for there, wanted in ((found, denoiser_config(recipe)), (trained_for, recipe.objective)):
        for name, value in asdict(wanted).items():
            if there.get(name) != value:
                raise UserError(f"{folder}: weights with {name} {there.get(name)}, the recipe has {value}; set that")
    return found


def labels_of(index: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Label of sample i: i % num_classes. Any number of samples is balanced: exactly, where the classes divide it."""
    return index % num_classes


def draw_pictures(recipe: Recipe, model: Denoiser, vae: Encoder, index: torch.Tensor) -> NDArray[np.uint8]:
    """Samples `index` (B,) as pictures (B, H, W, 3) uint8. Raises UserError for unsound ones, with their count."""
    settings, shape = recipe.sample, latent_shape(recipe)

    def noise(stream: str) -> torch.Tensor:
        return rng.normal(recipe.seed, stream, index, shape)  # (B, C, h, w)

    try:
        latents = sample_latents(
            model,
            diffusion(recipe),
            noise("sample/noise"),
            labels_of(index, recipe.model.num_classes),
            sampler=settings.sampler,
            num_steps=settings.num_steps,
            iterations=iterations_a_step(recipe),
            reuse=settings.reuse,
            guidance_scale=settings.guidance_scale,
            step_noise=(lambda step: noise(f"sample/step/{step}")) if settings.sampler == "ddpm" else None,
        )
        images = vae.decode(latents)  # (B, 3, H, W) in [-1, 1]
        require_sound(images)
        pixels = to_uint8(images)
        require_sound(pixels)
    except ValueError as error:
        raise UserError(f"samples {int(index[0])} to {int(index[-1])}: {error}") from None
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def iterations_a_step(recipe: Recipe) -> list[int] | None:
    """Fixed-point iterations of each step, noisiest first; None for DiT, which has none."""
    settings = recipe.sample
    if recipe.model.kind == "dit":
        return None
    return allocate(settings.allocation, settings.num_steps, settings.iterations)


def blocks_a_picture(recipe: Recipe) -> int:
    """Transformer blocks that one picture costs; guidance computes each twice."""
    config = denoiser_config(recipe)
    counts = iterations_a_step(recipe) or [0] * recipe.sample.num_steps
    return sum(config.blocks(count) for count in counts) * (1 if recipe.sample.guidance_scale == 1 else 2)


def iterate_samples(folder: Path, num_samples: int) -> Iterator[Chunk]:
    """Samples 0 to num_samples - 1 in order, none missing and none twice, a chunk at a time.

    Raises UserError naming the samples that are missing, before anything is read, or the chunk that is damaged.
    """
    parts = _cover(folder, num_samples)
    return ((images[rows], labels[rows]) for path, rows in parts for images, labels in [read_chunk(path)])


def read_chunk(path: Path) -> Chunk:
    """(images, labels) of a chunk. Raises UserError naming the file where it is damaged or not what its name says."""
    first, end = _span(path)
    arrays = read_arrays(path, COMMAND)
    found = {name: (array.dtype.name, array.shape) for name, array in arrays.items()}
    height, width = found.get("images", ("", (0, 0, 0)))[1][1:3]
    expected = {"images": ("uint8", (end - first, height, width, 3)), "labels": ("int64", (end - first,))}
    if found != expected | {"first": ("int64", ())} or arrays["first"] != first:
        raise UserError(f"{path}: holds {found}, not the samples of its name; delete it and run {COMMAND} again")
    return arrays["images"], arrays["labels"]


def _write_chunk(path: Path, images: NDArray[np.uint8], num_classes: int) -> None:
    first, end = _span(path)
    labels = labels_of(torch.arange(first, end), num_classes).numpy()
    write_arrays(path, images=images, labels=labels, first=first)


def _cover(folder: Path, num_samples: int) -> list[tuple[Path, slice]]:
    """Files, and which rows of each, that hold samples 0 to num_samples - 1 once each."""
    spans = {_span(path): path for path in folder.glob("chunk-*.npz") if CHUNK_NAME.fullmatch(path.name)}
    parts, position = [], 0
    while position < num_samples:
        first, end = max(
            (span for span in spans if span[0] <= position < span[1]), key=lambda span: span[1], default=(0, 0)
        )
        if not end:
            found = min((first for first, _ in spans if first > position), default=num_samples)
            raise UserError(
                f"{folder}: samples {position} to {min(found, num_samples) - 1} of {num_samples} are missing; "
                f"run {COMMAND} with this recipe"
            )
        parts.append((spans[first, end], slice(position - first, min(end, num_samples) - first)))
        position = end
    return parts


def _span(path: Path) -> tuple[int, int]:
    match = CHUNK_NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1]), int(match[2])


def _chunk_path(folder: Path, first: int, end: int) -> Path:
    return folder / f"chunk-{first:08d}-{end:08d}.npz"


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
