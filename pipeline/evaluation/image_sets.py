"""The sets of pictures that are compared: the reference, held-out pictures, their reconstructions, and samples."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from common.ranks import share_of_cores
from common.recipe import Data, Recipe
from common.run_folder import Weights
from fpdm.latents import draw_latents
from pipeline.evaluation.metrics import Statistics
from pipeline.evaluation.statistics import Summary, summarise
from pipeline.sampling.chunks import Span, cover_gap, iterate
from pipeline.sampling.features import extract_missing, features_folder, read_features
from pipeline.sampling.plans import read_plan
from pipeline.sampling.sample_set import sample_set, vae_settings
from preprocess.encoding.decoding import decoded
from preprocess.encoding.encoder import Encoder
from preprocess.encoding.image_loader import ImageLoader
from preprocess.images.images import to_tensor, to_uint8
from preprocess.sources import Source, Which, fingerprint, open_source

BATCH = 64  # pictures that a decoding process prepares at a time; neighbours may lie in one part of a parquet file

Pictures = Iterator[NDArray[np.uint8]]  # each (H, W, 3)


@dataclass(frozen=True)
class PictureSet:
    """Pictures and what they are made of. Sets of equal `content` hold equal pictures."""

    name: str
    label: str  # for people
    content: dict[str, Any]  # JSON-able
    size: int
    open: Callable[[], Pictures] | None  # None: only their statistics are to be had
    statistics: Callable[[], dict[str, Statistics]] | None = None  # by layer, where a file gives them


@dataclass(frozen=True)
class SampleRanges:
    """Samples of one set of weights, in ranges of equal size that are measured apart."""

    recipe: Recipe
    name: str
    weights: Weights

    @property
    def label(self) -> str:
        ranges = len(self.spans)
        times = f"{ranges} x " if ranges > 1 else ""
        samples_seen = sample_set(self.recipe, self.weights).samples_seen
        return f"{times}{self.recipe.sample.num_samples:,} samples after {samples_seen:,} training samples"

    @property
    def content(self) -> dict[str, Any]:
        found = sample_set(self.recipe, self.weights)
        return found.settings | {"ranges": self.spans, "samples_seen": found.samples_seen}

    @property
    def spans(self) -> list[Span]:
        count = self.recipe.sample.num_samples
        return [(number * count, (number + 1) * count) for number in range(self.recipe.evaluate.seed_ranges)]

    @property
    def plan(self) -> dict[str, Any]:
        """Iterations and reuse of each step, measured ones too."""
        return asdict(read_plan(self.recipe, sample_set(self.recipe, self.weights).folder))

    def check(self) -> None:
        """Raises UserError naming the samples that are missing."""
        if not self.extracted:
            iterate(sample_set(self.recipe, self.weights).folder, (0, self.spans[-1][1]))

    @property
    def extracted(self) -> bool:
        """Whether the features of all samples are there."""
        folder = features_folder(self.recipe, sample_set(self.recipe, self.weights).folder)
        return cover_gap(folder, (0, self.spans[-1][1])) is None

    def extract(self, part: int = 0, parts: int = 1) -> None:
        """The features of this part's chunks, where they are not there yet."""
        extract_missing(self.recipe, self.weights, part, parts)

    def summaries(self) -> Iterator[Summary]:
        """Of each range, from the features of its chunks; those that are not there yet are extracted first."""
        self.extract()
        for span in self.spans:
            yield summarise([read_features(self.recipe, self.weights, span)], span[1] - span[0])


def training_pictures(recipe: Recipe) -> PictureSet:
    """The training pictures through the crop rule of encoding; `evaluate.reference_samples` of them, or all."""
    return _source_set(recipe, "reference", "images", recipe.evaluate.reference_samples)


def held_out(recipe: Recipe) -> PictureSet:
    """Pictures that training never saw, at most as many as samples, so that both distances have the same bias."""
    return _source_set(recipe, "held_out", "held_out", recipe.sample.num_samples)


def reconstruction(recipe: Recipe) -> PictureSet:
    """The held-out pictures after the autoencoder alone (its posterior's mean): no sampler can come out nearer."""
    originals = held_out(recipe)
    return PictureSet(
        name="reconstruction",
        label=f"the autoencoder's reconstruction of {originals.label}",
        content={"originals": originals.content, "vae": vae_settings(recipe)},
        size=originals.size,
        open=lambda: _reconstruct(recipe, opened(originals)),
    )


def by_class(recipe: Recipe, label: int, count: int) -> tuple[str, list[NDArray[np.uint8]]]:
    """The name of a class, and its first pictures of the reference."""
    source = open_source(recipe.data)
    positions = [position for position, entry in enumerate(source.entries) if entry.label == label]
    return source.class_names[label], list(islice(_read(recipe, source, positions), count))


def _source_set(recipe: Recipe, name: str, which: Which, limit: int | None) -> PictureSet:
    """At most `limit` pictures of a source, evenly spaced over its sorted list, so that every class keeps its share."""
    data = recipe.data
    source, made_of = _listed(data, which)
    found = len(source.entries)
    size = min(limit or found, found)
    chosen = [place * found // size for place in range(size)]
    how_many = f"{size:,} of {found:,}" if size < found else f"{size:,}"
    return PictureSet(
        name=name,
        label=f"{how_many} pictures of {getattr(data, which)} ({data.crop}, {data.resolution} pixels)",
        content={"source": made_of, "crop": data.crop, "resolution": data.resolution, "chosen": size},
        size=size,
        open=lambda: _read(recipe, source, chosen),
    )


@lru_cache(maxsize=2)
def _listed(data: Data, which: Which) -> tuple[Source, str]:
    """A source and its fingerprint. Once a process: each point of a sweep asks, and a million names take seconds."""
    source = open_source(data, which)
    return source, fingerprint(source)


def opened(pictures: PictureSet) -> Pictures:
    assert pictures.open is not None
    return pictures.open()


def _read(recipe: Recipe, source: Source, positions: Sequence[int]) -> Pictures:
    """In order, decoded by one process a core. What encoding rejects is left out here too; the count beside a distance
    shows it.
    """
    loader = ImageLoader(source, recipe.data.crop, recipe.data.resolution)
    batches = [positions[start : start + BATCH] for start in range(0, len(positions), BATCH)]
    with decoded(loader, batches, share_of_cores()) as loaded:
        for batch in loaded:
            if batch.images is not None:
                yield from batch.images.permute(0, 2, 3, 1).numpy()


def _reconstruct(recipe: Recipe, pictures: Pictures) -> Pictures:
    vae = Encoder(recipe.vae)
    scaling, shift = vae.identity.scaling_factor, vae.identity.shift_factor
    while batch := list(islice(pictures, recipe.vae.batch_size)):
        moments = vae.encode(torch.stack([to_tensor(Image.fromarray(picture)) for picture in batch]))  # (B, 2C, h, w)
        means = draw_latents(moments, torch.zeros(()), scaling, shift)  # (B, C, h, w)
        yield from to_uint8(vae.decode(means)).permute(0, 2, 3, 1).cpu().numpy()
