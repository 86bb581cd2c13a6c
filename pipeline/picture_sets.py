"""The sets of pictures that are compared: the reference, held-out pictures, their reconstructions, and samples."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from common.recipe import Recipe
from pipeline.run_folder import Weights
from pipeline.samples import iterate_samples, sample_set, vae_settings
from preprocess.encoder import Encoder, draw_latents
from preprocess.images import CROPS, Rejected, decode, to_tensor, to_uint8
from preprocess.sources import SOURCES, Entry, Source, fingerprint

Pictures = Iterator[NDArray[np.uint8]]  # each (H, W, 3)


@dataclass(frozen=True)
class PictureSet:
    """Pictures and what they are made of. Sets of equal `content` hold equal pictures."""

    name: str
    label: str  # for people
    content: dict[str, Any]  # JSON-able
    size: int
    open: Callable[[], Pictures]


def reference(recipe: Recipe) -> PictureSet:
    """The training pictures through the crop rule of encoding; `evaluate.reference_samples` of them, or all."""
    return _source_set(recipe, "reference", recipe.data.images, recipe.evaluate.reference_samples)


def held_out(recipe: Recipe) -> PictureSet:
    """Pictures that training never saw, at most as many as samples, so that both distances have the same bias."""
    assert recipe.data.held_out is not None
    return _source_set(recipe, "held_out", recipe.data.held_out, recipe.sample.num_samples)


def reconstruction(recipe: Recipe) -> PictureSet:
    """The held-out pictures after the autoencoder alone (its posterior's mean): no sampler can come out nearer."""
    originals = held_out(recipe)
    return PictureSet(
        name="reconstruction",
        label=f"the autoencoder's reconstruction of {originals.label}",
        content={"originals": originals.content, "vae": vae_settings(recipe)},
        size=originals.size,
        open=lambda: _reconstruct(recipe, originals.open()),
    )


def samples(recipe: Recipe, name: str, weights: Weights) -> PictureSet:
    """The pictures drawn from `weights`; their files are looked for when the set is opened."""
    found = sample_set(recipe, weights)
    count = recipe.sample.num_samples
    return PictureSet(
        name=name,
        label=f"{count:,} samples after {found.samples_seen:,} training samples",
        content=found.settings | {"samples": count, "samples_seen": found.samples_seen},
        size=count,
        open=lambda: (image for images, _ in iterate_samples(found.folder, count) for image in images),
    )


def by_class(recipe: Recipe, label: int, count: int) -> tuple[str, list[NDArray[np.uint8]]]:
    """The name of a class, and its first pictures of the reference."""
    source = SOURCES[recipe.data.source](recipe.data.images, "data.images")
    entries = [entry for entry in source.entries if entry.label == label]
    return source.class_names[label], list(islice(_read(recipe, source, entries), count))


def _source_set(recipe: Recipe, name: str, path: str, limit: int | None) -> PictureSet:
    """At most `limit` pictures of a source, evenly spaced over its sorted list, so that every class keeps its share."""
    data = recipe.data
    source = SOURCES[data.source](path, "data.images" if name == "reference" else "data.held_out")
    found = len(source.entries)
    size = min(limit or found, found)
    chosen = [source.entries[place * found // size] for place in range(size)]

    return PictureSet(
        name=name,
        label=f"{size:,} of {found:,} pictures of {path}" if size < found else f"{size:,} pictures of {path}",
        content={"source": fingerprint(source), "crop": data.crop, "resolution": data.resolution, "chosen": size},
        size=size,
        open=lambda: _read(recipe, source, chosen),
    )


def _read(recipe: Recipe, source: Source, entries: Sequence[Entry]) -> Pictures:
    crop, resolution = CROPS[recipe.data.crop], recipe.data.resolution
    for entry in entries:
        try:
            yield np.asarray(crop(decode(source.open(entry)), resolution))
        except Rejected:  # encoding leaves it out too; the count beside a distance shows it
            continue


def _reconstruct(recipe: Recipe, pictures: Pictures) -> Pictures:
    vae = Encoder(recipe.vae)
    scaling, shift = vae.identity.scaling_factor, vae.identity.shift_factor
    while batch := list(islice(pictures, recipe.vae.batch_size)):
        moments = vae.encode(torch.stack([to_tensor(Image.fromarray(picture)) for picture in batch]))  # (B, 2C, h, w)
        means = draw_latents(moments, torch.zeros(()), scaling, shift)  # (B, C, h, w)
        yield from to_uint8(vae.decode(means)).permute(0, 2, 3, 1).numpy()
