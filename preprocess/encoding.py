"""Pictures to latent shards: what there is to do, and doing it.

Each shard is a pure function of the source list and the settings.
"""

import itertools
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, stack
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from common.errors import UserError
from common.recipe import Recipe, latent_shape
from preprocess.encoder import Encoder, fetch_vae, find_vae, identify
from preprocess.images import CROPS, Rejected, decode, to_tensor
from preprocess.shards import (
    LatentShards,
    Record,
    Rejection,
    Sample,
    Settings,
    finished_record,
    recorded_settings,
    write_index,
    write_shard,
)
from preprocess.sources import SOURCES, Source, fingerprint

PREFETCHED_BATCHES = 4  # a worker
SHOWN_REJECTIONS = 5


@dataclass(frozen=True)
class Encoding:
    """An encoding, resolved and checked."""

    recipe: Recipe
    source: Source
    settings: Settings  # what decides the shards' bytes; the same in every record and in the index

    @property
    def folder(self) -> Path:
        return Path(self.recipe.data.shards)

    @property
    def slices(self) -> list[range]:
        """Positions in the source list, a range a shard."""
        found, size = len(self.source.entries), self.recipe.data.shard_samples
        return [range(start, min(start + size, found)) for start in range(0, found, size)]

    @property
    def is_finished(self) -> bool:
        """Whether the folder opens as shards of these settings; their bytes are checked when they are read."""
        try:
            return LatentShards(self.folder).index["settings"] == self.settings
        except UserError:
            return False

    @property
    def sample_bytes(self) -> int:
        """Of one sample in a tar: headers and padding included."""
        channels, height, width = latent_shape(self.recipe)
        moments = 512 + 512 * math.ceil((128 + 2 * 2 * channels * height * width) / 512)
        return moments * (1 + self.recipe.data.flips) + 2 * (512 + 512)


def resolve(recipe: Recipe, *, download: bool) -> Encoding:
    """Finds source and VAE and checks them against the recipe and against what is in `data.shards` already.

    Raises UserError for: a source that `sources.py` refuses, another number of classes than `model.num_classes`, a VAE
    that cannot be had or differs from the recipe, shards made with other settings. Without `download`, a VAE that is
    not here yet is left unknown.
    """
    data, vae = recipe.data, recipe.vae
    source = SOURCES[data.source](data.images, "data.images")
    classes = len(source.class_names)
    if classes != recipe.model.num_classes:
        raise UserError(
            f"model.num_classes: {recipe.model.num_classes}, but {data.images} has {classes} "
            f"({', '.join(source.class_names[:5])}{', ...' if classes > 5 else ''}); set model.num_classes={classes}"
        )
    folder = fetch_vae(vae) if download else find_vae(vae)
    settings = {
        "source": data.source,
        "source_fingerprint": fingerprint(source),
        "crop": data.crop,
        "resolution": data.resolution,
        "flips": data.flips,
        "shard_samples": data.shard_samples,
        "precision": vae.precision,
        "vae": asdict(identify(folder, vae)) if folder else None,
    }
    encoding = Encoding(recipe, source, settings)
    _check_settings(encoding)
    return encoding


def _check_settings(encoding: Encoding) -> None:
    """Refuses a folder whose shards were made with other settings: another data set is never overwritten."""
    wanted = _flat(encoding.settings)
    for path, recorded in recorded_settings(encoding.folder):
        there = _flat(recorded)
        for name, value in wanted.items():
            if there.get(name) != value:
                raise UserError(
                    f"data.shards: {path} was made with another {name} ({there.get(name)}; now {value}); "
                    f"choose another folder, or delete {encoding.folder}"
                )


def _flat(settings: Settings) -> Settings:
    """The VAE's identity, where it is known, beside the other settings."""
    vae = {f"vae.{name}": value for name, value in (settings["vae"] or {}).items()}
    return {name: value for name, value in settings.items() if name != "vae"} | vae


def check_disk(encoding: Encoding, missing: int) -> str:
    """How much `missing` pictures will take of what is free. Raises UserError where it is not enough."""
    folder = encoding.folder.absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    needed, free = missing * encoding.sample_bytes, shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(f"data.shards: needs {needed / 1e9:.2f} GB, {existing} has {free / 1e9:.2f} GB free; make room")
    return f"{needed / 1e9:.2f} GB of {free / 1e9:.0f} GB free"


def encode_missing(encoding: Encoding) -> None:
    """Makes what is missing or damaged, keeps the rest, and merges the index.

    Raises UserError as soon as more than `data.max_rejected` of all pictures are rejected.
    """
    folder, slices = encoding.folder, encoding.slices
    folder.mkdir(parents=True, exist_ok=True)
    records: list[Record | None] = [finished_record(folder, number, thorough=True) for number in range(len(slices))]
    missing = [number for number, record in enumerate(records) if record is None]
    _check_rejected(encoding, records)
    if missing:
        encoder = Encoder(encoding.recipe.vae)
        batches = {number: _batches(slices[number], encoding.recipe.vae.batch_size) for number in missing}
        loaded = iter(_loader(encoding, [batch for number in missing for batch in batches[number]]))
        with tqdm(total=sum(len(slices[number]) for number in missing), unit="picture", desc="encode") as bar:
            for number in missing:
                of_shard = itertools.islice(loaded, len(batches[number]))
                outcomes = _encode(encoder, encoding, of_shard, bar)
                records[number] = write_shard(folder, number, outcomes, encoding.settings)
                _check_rejected(encoding, records)
    channels, height, width = latent_shape(encoding.recipe)
    finished = [record for record in records if record is not None]
    write_index(folder, finished, (2 * channels, height, width), encoding.source.class_names)


def _batches(positions: range, size: int) -> list[range]:
    """Batches are cut inside a shard, so that timing and kills never decide which pictures meet in one."""
    return [positions[start : start + size] for start in range(0, len(positions), size)]


def _check_rejected(encoding: Encoding, records: Sequence[Record | None]) -> None:
    rejected = [rejection for record in records if record for rejection in record["rejected"]]
    found, allowed = len(encoding.source.entries), encoding.recipe.data.max_rejected
    if len(rejected) > allowed * found:
        raise UserError(
            f"data.max_rejected: {len(rejected)} of {found} pictures are unusable, {allowed:.2%} may be; "
            f"{describe(rejected)}; repair or remove them, or raise data.max_rejected"
        )


def describe(rejected: Sequence[dict[str, str]]) -> str:
    """The first few rejected pictures with their reasons, one line."""
    first = "; ".join(f"{rejection['key']}: {rejection['reason']}" for rejection in rejected[:SHOWN_REJECTIONS])
    more = len(rejected) - SHOWN_REJECTIONS
    return first + (f"; and {more} more" if more > 0 else "")


@dataclass(frozen=True)
class Loaded:
    """A batch as it comes from a worker: one tensor for all that could be read, and the rest by name."""

    positions: list[int]
    sizes: list[tuple[int, int]]  # width, height before cropping
    images: Tensor | None  # (B, 3, resolution, resolution) in [-1, 1]; None if none could be read
    rejected: list[Rejection]


class Pictures(Dataset[Loaded]):
    """Batches of pictures by their positions, read, decoded and cropped in the loader's worker processes."""

    def __init__(self, encoding: Encoding) -> None:
        self.source = encoding.source
        self.crop = CROPS[encoding.recipe.data.crop]
        self.resolution = encoding.recipe.data.resolution

    def __getitem__(self, batch: range) -> Loaded:
        positions, sizes, images, rejected = [], [], [], []
        for position in batch:
            entry = self.source.entries[position]
            try:
                image = decode(self.source.open(entry))
            except Rejected as reason:
                rejected.append(Rejection(entry.key, str(reason)))
            else:
                positions.append(position)
                sizes.append(image.size)
                images.append(to_tensor(self.crop(image, self.resolution)))
        return Loaded(positions, sizes, stack(images) if images else None, rejected)


def _loader(encoding: Encoding, batches: list[range]) -> "DataLoader[Loaded]":
    return DataLoader(
        Pictures(encoding),
        sampler=batches,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=encoding.recipe.launch.cpus_per_process,
        prefetch_factor=PREFETCHED_BATCHES,
    )


def _as_it_is(loaded: Any) -> Any:
    return loaded


def _encode(encoder: Encoder, encoding: Encoding, batches: Iterator[Loaded], bar: tqdm) -> Iterator[Sample | Rejection]:
    for loaded in batches:
        yield from loaded.rejected
        if loaded.images is not None:
            moments = _moments(encoder, loaded.images)
            flipped = _moments(encoder, loaded.images.flip(-1)) if encoding.recipe.data.flips else [None] * len(moments)
            for number, position in enumerate(loaded.positions):
                yield _outcome(encoding, position, loaded.sizes[number], moments[number], flipped[number])
        bar.update(len(loaded.positions) + len(loaded.rejected))


def _moments(encoder: Encoder, images: Tensor) -> np.ndarray:
    return encoder.encode(images).half().numpy()  # (B, 2C, h, w)


def _outcome(
    encoding: Encoding, position: int, size: tuple[int, int], moments: np.ndarray, flipped: np.ndarray | None
) -> Sample | Rejection:
    entry = encoding.source.entries[position]
    if not all(np.isfinite(array).all() for array in (moments, flipped) if array is not None):
        return Rejection(entry.key, "the VAE's moments are not finite in float16")
    return Sample(position, entry.key, entry.label, *size, moments, flipped)
