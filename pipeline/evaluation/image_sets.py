"""The sets of images that are compared: the reference, held-out images, their reconstructions, and samples."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from common.ranks import share_of_cores
from common.recipe import VAE, Data, Recipe
from fpdm.latents import draw_latents, to_uint8
from pipeline.evaluation.metrics import Statistics
from pipeline.evaluation.statistics import Summary, summarise
from pipeline.sampling.chunks import Span, check_cover, cover_gap
from pipeline.sampling.models import Models
from pipeline.sampling.plans import read_plan
from pipeline.sampling.sample_set import SampleSet, Sampling
from preprocess.encoding.decoding import decoded
from preprocess.encoding.image_loader import ImageLoader
from preprocess.images.images import to_tensor
from preprocess.sources import Source, Which, fingerprint, open_source

if TYPE_CHECKING:
    from pipeline.evaluation.yardstick import Yardstick

BATCH = 64  # images that a decoding process prepares at a time; neighbours may lie in one part of a parquet file

Images = Iterator[NDArray[np.uint8]]  # each (H, W, 3)


class ComparedSet(Protocol):
    """What is measured against a reference. Sets of equal `content` hold equal images."""

    @property
    def name(self) -> str: ...

    @property
    def label(self) -> str:
        """For people."""

    @property
    def content(self) -> dict[str, Any]:
        """All that the images are made of, JSON-able."""

    @property
    def plan(self) -> dict[str, Any] | None:
        """Of samples, the iterations and the reuse of each step, measured ones too."""

    def summaries(self, yardstick: "Yardstick") -> Iterator[Summary]:
        """Of each range that is measured apart."""


@dataclass(frozen=True)
class ImageSet:
    """Images of a source or a file."""

    name: str
    label: str
    content: dict[str, Any]
    size: int
    open: Callable[[], Images] | None  # None: there are statistics alone
    statistics: Callable[[], dict[str, Statistics]] | None = None  # by layer, where a file gives them
    labels: Callable[[], NDArray[np.int64]] | None = None  # (N,), of samples
    plan: None = None

    def iterate(self) -> Images:
        assert self.open is not None
        return self.open()

    def summaries(self, yardstick: "Yardstick") -> Iterator[Summary]:
        yield yardstick.summary(self)


@dataclass(frozen=True)
class SampleRanges:
    """Samples of one set, in ranges of equal size that are measured apart."""

    name: str
    sampling: Sampling
    samples: SampleSet

    @property
    def label(self) -> str:
        ranges = len(self.spans)
        times = f"{ranges} x " if ranges > 1 else ""
        count, samples_seen = self.sampling.recipe.sample.num_samples, self.samples.samples_seen
        return f"{times}{count:,} samples after {samples_seen:,} training samples"

    @property
    def content(self) -> dict[str, Any]:
        return self.samples.settings | {"ranges": self.spans, "samples_seen": self.samples.samples_seen}

    @property
    def spans(self) -> list[Span]:
        count = self.sampling.recipe.sample.num_samples
        return [(number * count, (number + 1) * count) for number in range(self.sampling.recipe.evaluate.seed_ranges)]

    @property
    def plan(self) -> dict[str, Any]:
        return asdict(read_plan(self.sampling.recipe, self.samples.folder))

    def check(self) -> None:
        """Raises UserError naming the samples that are missing."""
        if not self.is_extracted:
            check_cover(self.samples.folder, self._whole)

    @property
    def is_extracted(self) -> bool:
        """Whether there are features of all samples."""
        return cover_gap(self.sampling.features(self.samples).folder, self._whole) is None

    def extract(self, part: int = 0, parts: int = 1) -> None:
        """The features of this part's chunks that have none yet: chunk k belongs to part k % parts."""
        self.sampling.features(self.samples).extract(self.sampling.spans[part::parts])

    def summaries(self, yardstick: "Yardstick") -> Iterator[Summary]:
        """From the features of the chunks; those that are missing are extracted first."""
        self.extract()
        for span in self.spans:
            yield summarise([self.sampling.features(self.samples).read(span)], span[1] - span[0])

    @property
    def _whole(self) -> Span:
        return 0, self.spans[-1][1]


def training_images(recipe: Recipe) -> ImageSet:
    """The training images through the crop rule of encoding; `evaluate.reference_samples` of them, or all."""
    return _source_set(recipe.data, "reference", "images", recipe.evaluate.reference_samples)


def held_out(recipe: Recipe) -> ImageSet:
    """Images that training never saw, at most as many as samples, so that both distances have the same bias."""
    return _source_set(recipe.data, "held_out", "held_out", recipe.sample.num_samples)


def reconstruction(originals: ImageSet, vae: VAE, models: Models) -> ImageSet:
    """Images after the autoencoder alone (its posterior's mean): no sampler can come out nearer."""
    return ImageSet(
        name="reconstruction",
        label=f"the autoencoder's reconstruction of {originals.label}",
        content={"originals": originals.content, "vae": asdict(models.vae) | {"precision": vae.precision}},
        size=originals.size,
        open=lambda: _reconstruct(models, vae.batch_size, originals.iterate()),
    )


def by_class(data: Data, source: Source, label: int, count: int) -> tuple[str, list[NDArray[np.uint8]]]:
    """The name of a class, and its first images of the source."""
    positions = [position for position, entry in enumerate(source.entries) if entry.label == label]
    return source.class_names[label], list(islice(read_images(data, source, positions), count))


def _source_set(data: Data, name: str, which: Which, limit: int | None) -> ImageSet:
    """At most `limit` images of a source, evenly spaced over its sorted list, so that every class keeps its share."""
    source = open_source(data, which)
    count = len(source.entries)
    chosen = evenly_spaced(count, limit).tolist()
    size = len(chosen)
    how_many = f"{size:,} of {count:,}" if size < count else f"{size:,}"
    return ImageSet(
        name=name,
        label=f"{how_many} images of {getattr(data, which)} ({data.crop}, {data.resolution} pixels)",
        content={"source": fingerprint(source), "crop": data.crop, "resolution": data.resolution, "chosen": size},
        size=size,
        open=lambda: read_images(data, source, chosen),
    )


def evenly_spaced(count: int, most: int | None) -> NDArray[np.int64]:
    """At most `most` positions of `count`, ascending; all for None."""
    size = min(most or count, count)
    return np.arange(size, dtype=np.int64) * count // max(1, size)


def read_images(data: Data, source: Source, positions: Sequence[int]) -> Images:
    """In order, decoded by one process a core. What encoding rejects is left out here too; the count beside a distance
    shows it.
    """
    images = ImageLoader(source, data.crop, data.resolution)
    batches = [positions[start : start + BATCH] for start in range(0, len(positions), BATCH)]
    with decoded(images, batches, share_of_cores()) as loaded:
        for batch in loaded:
            if batch.images is not None:
                yield from batch.images.permute(0, 2, 3, 1).numpy()


def _reconstruct(models: Models, batch_size: int, images: Images) -> Images:
    vae = models.load_vae()
    scaling, shift = vae.identity.scaling_factor, vae.identity.shift_factor
    while batch := list(islice(images, batch_size)):
        moments = vae.encode(torch.stack([to_tensor(Image.fromarray(image)) for image in batch]))  # (B, 2C, h, w)
        means = draw_latents(moments, torch.zeros(()), scaling, shift)  # (B, C, h, w)
        yield from to_uint8(vae.decode(means)).permute(0, 2, 3, 1).cpu().numpy()
