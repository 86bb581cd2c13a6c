"""Encoding images to latent shards: the plan, its checks, and the work.

Each shard is a pure function of the source's list of images and the settings.
"""

import math
import shutil
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.errors import UserError, printable
from common.files import NOT_WRITTEN, disk_errors_as_user_errors, folder_lock
from common.recipe import Recipe, latent_shape
from preprocess.encoding.changed_images import check_images
from preprocess.encoding.encoder import Identity, check_side, find_identity
from preprocess.encoding.guards import at_work, memory_errors_as_user_errors
from preprocess.encoding.loop import encode_images
from preprocess.shards import (
    LatentShards,
    Record,
    Settings,
    finished_record,
    recorded_settings,
    remove_unfinished,
    shard_name,
    write_index,
    write_shard,
)
from preprocess.shards.forms import Autoencoder, RejectedImage
from preprocess.sources import Source, fingerprint, open_source, warnings

SHOWN = 5  # of many names, reasons or rejected images
RECORDED = 105  # bytes of a sample in the shards' records and tables
ONE_CLASS = {"ffhq", "celebahq", "lsun"}  # sources without labels


class LazyEncoding:
    """The encoding of a recipe: its images are listed and its VAE is hashed once, however many functions use them."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    @cached_property
    def offline(self) -> "Encoding":
        """For plans: nothing is downloaded."""
        return resolve(self.recipe, download=False)

    @cached_property
    def ready(self) -> "Encoding":
        """For work: with the VAE, downloaded if it is missing."""
        return self.offline if self.offline.identity else resolve(self.recipe, download=True)


@dataclass(frozen=True)
class Encoding:
    """A checked encoding."""

    recipe: Recipe
    source: Source
    settings: Settings  # what decides the shards' bytes; the same in every record and in the index

    @property
    def identity(self) -> Identity | None:
        """The VAE's; None while it is not downloaded."""
        vae = self.settings["vae"]
        return Identity(**vae) if vae else None

    @property
    def folder(self) -> Path:
        return Path(self.recipe.data.shards)

    @property
    def slices(self) -> list[range]:
        """The positions in the source of each shard."""
        count, size = len(self.source.entries), self.recipe.data.shard_samples
        return [range(start, min(start + size, count)) for start in range(0, count, size)]

    @property
    def stamp(self) -> str:
        """`Entries.stamp` of all images."""
        return self.source.entries.stamp(range(len(self.source.entries)))

    @property
    def warnings(self) -> list[str]:
        return warnings(self.recipe.data.source, self.source)

    @property
    def is_finished(self) -> bool:
        """Whether the folder holds shards with these settings, of images not modified since; does not read samples."""
        try:
            index = LatentShards(self.folder).index
            return (index["settings"], index["stamp"]) == (self.settings, self.stamp)
        except UserError:
            return False


def sample_bytes(recipe: Recipe) -> int:
    """Bytes of a sample on disk: in a tar, with headers and padding, and in the tables beside it."""
    channels, height, width = latent_shape(recipe)
    moments = 512 + 512 * math.ceil((128 + 2 * 2 * channels * height * width) / 512)
    return moments * (1 + recipe.data.flips) + 2 * (512 + 512) + RECORDED


def resolve(recipe: Recipe, *, download: bool) -> Encoding:
    """Opens the source, finds the VAE, and checks both against the recipe and the shards in `data.shards`.

    Raises UserError for a remote `data.shards`, a source that cannot be opened, another number of classes than
    `model.num_classes`, a missing or different VAE, and shards made with other settings. Without `download`, a VAE that
    is not in the hub's cache is left unknown.
    """
    data, vae = recipe.data, recipe.vae
    if "://" in data.shards:
        raise UserError(f"data.shards: {data.shards} is remote; encode to a local folder, and upload it")
    source = open_source(data)
    _check_classes(recipe, source.class_names)
    identity = find_identity(vae, download=download)
    check_side(vae, data.resolution)
    settings: Settings = {
        "source": data.source,
        "source_fingerprint": fingerprint(source),
        "crop": data.crop,
        "resolution": data.resolution,
        "flips": data.flips,
        "shard_samples": data.shard_samples,
        "precision": vae.precision,
        "vae": _autoencoder(identity) if identity else None,
    }
    encoding = Encoding(recipe, source, settings)
    _check_settings(encoding)
    return encoding


def _autoencoder(identity: Identity) -> Autoencoder:
    return {
        "config_sha256": identity.config_sha256,
        "weights_sha256": identity.weights_sha256,
        "scaling_factor": identity.scaling_factor,
        "shift_factor": identity.shift_factor,
    }


def _check_classes(recipe: Recipe, names: list[str]) -> None:
    """Raises UserError for another number of classes than `model.num_classes`, with advice for the likely mistake."""
    data, wanted, count = recipe.data, recipe.model.num_classes, len(names)
    if wanted in (None, count):
        return
    remedy = f"set model.num_classes={count}"
    if count == 1 and data.source not in ONE_CLASS:
        remedy = (
            "without labels a class-conditional model sees one class: name a folder with one sub-folder per class, or "
            "labelled archives; model.num_classes=1 is for training without classes"
        )
    elif data.source == "imagenet":
        remedy = f"name all 1,000, or {remedy} to train on this part of ImageNet"
    elif data.source not in ONE_CLASS:
        remedy = f"if these are the intended classes, {remedy}"
        remedy += "; if all images are one class, set data.label_field=none" if wanted == 1 else ""
    raise UserError(
        f"model.num_classes: {wanted}, but {data.images} has {count} {'class' if count == 1 else 'classes'} "
        f"({_some(names)}); {remedy}"
    )


def _some(names: list[str]) -> str:
    first = [printable(name) for name in names[:SHOWN]]
    return ", ".join(first) + (f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else "")


def _check_settings(encoding: Encoding) -> None:
    """Raises UserError for a folder with shards made with other settings: another data set is never overwritten."""
    wanted = _flat(encoding.settings)
    for path, recorded in recorded_settings(encoding.folder):
        previous = _flat(recorded)
        for name, value in wanted.items():
            if previous.get(name) != value:
                raise UserError(
                    f"data.shards: {path} was made with another {name} ({previous.get(name)}; now {value}); "
                    f"choose another folder, or delete {encoding.folder}"
                )


def _flat(settings: Settings) -> dict[str, Any]:
    """The settings with the VAE's identity, if known, in one flat dict."""
    vae = {f"vae.{name}": value for name, value in (settings.get("vae") or {}).items()}
    return {name: value for name, value in settings.items() if name != "vae"} | vae


def check_disk(encoding: Encoding, missing: int) -> str:
    """The disk space that `missing` images will take. Raises UserError if there is too little."""
    folder = encoding.folder.absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    needed, free = missing * sample_bytes(encoding.recipe), shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(f"data.shards: needs {needed / 1e9:.3g} GB, {existing} has {free / 1e9:.3g} GB free; make room")
    return f"{needed / 1e9:.2f} GB of {free / 1e9:.0f} GB free"


def describe_plan(encoding: Encoding) -> list[str]:
    """Lines on the images, latents, shards and the work to do. Raises UserError if the disk is too full."""
    recipe, source, slices, data = encoding.recipe, encoding.source, encoding.slices, encoding.recipe.data
    shape = " x ".join(map(str, latent_shape(recipe)))
    missing_vae = "to be trained" if recipe.vae.training else "to be downloaded from the hub"
    vae = recipe.vae.path if encoding.settings["vae"] else f"{recipe.vae.path} ({missing_vae})"
    records = _records(encoding)
    missing = sum(len(positions) for positions, record in zip(slices, records, strict=True) if record is None)
    flips = " and its mirror image" if data.flips else ""
    return [
        *encoding.warnings,
        f"images: {len(source.entries):,} in {_classes(source.class_names)} below {data.images}",
        *_left_out(source),
        f"latents: {data.crop} to {data.resolution} px, each image{flips} as {shape} by {vae or 'no autoencoder'}",
        f"shards: {len(slices)} of {data.shard_samples:,} samples in {data.shards}, "
        f"{len(records) - records.count(None)} finished",
        f"to do: {missing:,} images, {check_disk(encoding, missing)}",
    ]


def _classes(names: list[str]) -> str:
    return f"1 class ({printable(names[0])})" if len(names) == 1 else f"{len(names):,} classes ({_some(names)})"


def _left_out(source: Source) -> list[str]:
    """A line for each of the most common reasons for leaving files out."""
    reasons = source.left_out.most_common()
    lines = [f"left out: {count:,} ({printable(reason)})" for reason, count in reasons[:SHOWN]]
    if more := sum(count for _, count in reasons[SHOWN:]):
        lines.append(f"left out: {more:,} more for {len(reasons) - SHOWN} other reasons (all of them: index.json)")
    return lines


def make_shards(encoding: Encoding, part: int = 0, parts: int = 1) -> None:
    """Encodes the missing and damaged ones of the shards i with i % parts == part.

    Raises UserError while another run works in the folder (other parts of the same array are allowed), as soon as more
    than `data.max_rejected` of all images are rejected, and if the disk is full.
    """
    mine = range(part, len(encoding.slices), parts)
    with (
        disk_errors_as_user_errors(f"data.shards: {encoding.folder}", NOT_WRITTEN),
        memory_errors_as_user_errors(encoding.recipe),
        at_work(encoding.folder, part, parts),
    ):
        remove_unfinished(encoding.folder, mine)
        records = _proved_records(encoding, mine)
        missing = [number for number, record in records.items() if record is None]
        finished = [record for record in records.values() if record is not None]
        check_images(encoding.source, encoding.slices, encoding.folder, finished)
        check_rejected(encoding, finished)
        if missing:
            _make_missing(encoding, missing, finished)


def _proved_records(encoding: Encoding, numbers: range) -> dict[int, Record | None]:
    """Checks every byte of the finished shards, with a progress bar: a large data set takes long."""
    prove = partial(finished_record, encoding.folder, thorough=True)
    with ThreadPoolExecutor(encoding.recipe.launch.cpus_per_process) as threads:
        proved = tqdm(threads.map(prove, numbers), total=len(numbers), desc="prove", unit="shard", delay=2, leave=False)
        return dict(zip(numbers, proved, strict=True))


def _make_missing(encoding: Encoding, missing: list[int], finished: list[Record]) -> None:
    """Encodes the missing shards; a thread writes each while the next one is encoded."""
    slices = {number: encoding.slices[number] for number in missing}
    stamps = {number: encoding.source.entries.stamp(positions) for number, positions in slices.items()}
    writing: Future[Record] | None = None
    with ThreadPoolExecutor(1) as writer:
        for number, outcomes in encode_images(encoding.recipe, encoding.source, slices, encoding.identity):
            if writing:
                finished.append(writing.result())
            writing = writer.submit(write_shard, encoding.folder, number, outcomes, encoding.settings, stamps[number])
            check_rejected(encoding, finished)
    assert writing is not None
    check_rejected(encoding, [*finished, writing.result()])


def merge_shards(encoding: Encoding) -> None:
    """Writes the index over all shards. Idempotent, and safe in several processes at once.

    Raises UserError naming the missing shards, and if too many images are rejected.
    """
    all_records = _records(encoding)
    missing = [number for number, record in enumerate(all_records) if record is None]
    if missing:
        names = ", ".join(shard_name(number) for number in missing[:SHOWN])
        raise UserError(
            f"data.shards: {encoding.folder} lacks {len(missing)} of {len(all_records)} shards: {names}"
            f"{', ...' if len(missing) > SHOWN else ''}; run preprocess/encode_latents.py again"
        )
    records = [record for record in all_records if record is not None]
    check_rejected(encoding, records)
    channels, height, width = latent_shape(encoding.recipe)
    with (
        disk_errors_as_user_errors(f"data.shards: {encoding.folder}", NOT_WRITTEN),
        folder_lock(encoding.folder, ".merging", wait=True),
    ):
        check_images(encoding.source, encoding.slices, encoding.folder, records)
        shape, source = (2 * channels, height, width), encoding.source
        write_index(
            encoding.folder, records, shape, source.class_names, source.left_out, encoding.warnings, encoding.stamp
        )


def all_there(encoding: Encoding) -> bool:
    """Whether every shard is finished."""
    return None not in _records(encoding)


def _records(encoding: Encoding) -> list[Record | None]:
    return [finished_record(encoding.folder, number, thorough=False) for number in range(len(encoding.slices))]


def check_rejected(encoding: Encoding, records: Sequence[Record]) -> None:
    rejected = [rejection for record in records for rejection in record["rejected"]]
    count, allowed = len(encoding.source.entries), encoding.recipe.data.max_rejected
    if len(rejected) > allowed * count:
        raise UserError(
            f"data.max_rejected: {len(rejected)} of {count} images are unusable, {allowed:.2%} are allowed; "
            f"{describe(rejected)}; repair or remove them, or raise data.max_rejected"
        )


def describe(rejected: Sequence[RejectedImage]) -> str:
    """The first rejected images with their reasons, on one line."""
    first = "; ".join(f"{printable(rejection['key'])}: {rejection['reason']}" for rejection in rejected[:SHOWN])
    more = len(rejected) - SHOWN
    return first + (f"; and {more} more" if more > 0 else "")


def summarise(encoding: Encoding) -> None:
    """Prints the numbers of samples, the latents' statistics and the rejected images."""
    shards = LatentShards(encoding.folder)
    index, (scaling, _) = shards.index, shards.scaling
    counts = f"{index['accepted']:,} samples of {index['found']:,} images"
    print(f"{encoding.folder}: {counts} in {len(index['shardlist'])} shards")
    print("unscaled latents over all images, and their deviation when scaled for diffusion, which should be about 1:")
    print("  channel     mean  deviation  scaled")
    for channel, (mean, std) in enumerate(zip(index["latents"]["mean"], index["latents"]["std"], strict=True)):
        print(f"  {channel:7} {mean:8.3f}  {std:9.3f}  {std * scaling:6.3f}")
    for line in [*_left_out(encoding.source), *encoding.warnings]:
        print(line)
    if index["rejected"]:
        print(f"{len(index['rejected']):,} rejected: {describe(index['rejected'])} (all of them: index.json)")
