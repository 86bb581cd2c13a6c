"""Images to latent shards: what there is to do, and doing it.

Each shard is a pure function of the source list and the settings.
"""

import math
import shutil
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.errors import UserError, printable
from common.files import NOT_WRITTEN, disk_errors_as_user_errors, folder_lock
from common.recipe import Recipe, latent_shape
from preprocess.encoding.changed_images import check_images
from preprocess.encoding.encoder import Identity, fetch_vae, find_vae, identify
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
ONE_CLASS = {"ffhq", "celebahq", "lsun"}  # sources without labels


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
    def stamp(self) -> str:
        """Of all images."""
        return self.source.entries.stamp(range(len(self.source.entries)))

    @property
    def warnings(self) -> list[str]:
        return warnings(self.recipe.data.source, self.source)

    @property
    def is_finished(self) -> bool:
        """Whether the folder opens as shards of these settings and of images that nobody has written since; the
        shards' bytes are checked when they are read.
        """
        try:
            index = LatentShards(self.folder).index
            return (index["settings"], index["stamp"]) == (self.settings, self.stamp)
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

    Raises UserError for: shards that are not to be in a local folder, a source that `sources.py` refuses, another
    number of classes than `model.num_classes`, a VAE that cannot be had or differs from the recipe, shards made with
    other settings. Without `download`, a VAE that is not here yet is left unknown.
    """
    data, vae = recipe.data, recipe.vae
    if "://" in data.shards:
        raise UserError(f"data.shards: {data.shards} is read by training; encode to a local folder, and copy it there")
    source = open_source(data)
    _check_classes(recipe, source.class_names)
    folder = fetch_vae(vae) if download else find_vae(vae)
    settings: Settings = {
        "source": data.source,
        "source_fingerprint": fingerprint(source),
        "crop": data.crop,
        "resolution": data.resolution,
        "flips": data.flips,
        "shard_samples": data.shard_samples,
        "precision": vae.precision,
        "vae": _autoencoder(identify(folder, vae)) if folder else None,
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
    """Raises UserError for another number than `model.num_classes`; its advice is the number only where it is meant."""
    data, wanted, found = recipe.data, recipe.model.num_classes, len(names)
    if found == wanted:
        return
    remedy = f"set model.num_classes={found}"
    if found == 1 and data.source not in ONE_CLASS:
        remedy = (
            "without labels all images are alike to a class-conditional model: name a folder of one folder a class, or "
            "labelled archives; model.num_classes=1 is for training without classes"
        )
    elif data.source == "imagenet":
        remedy = f"name all 1,000, or {remedy} to train on this part of ImageNet"
    elif data.source not in ONE_CLASS:
        remedy = f"if these are the classes that you mean, {remedy}"
        remedy += "; if all images are one class, data.label_field=none" if wanted == 1 else ""
    raise UserError(
        f"model.num_classes: {wanted}, but {data.images} has {found} {'class' if found == 1 else 'classes'} "
        f"({_some(names)}); {remedy}"
    )


def _some(names: list[str]) -> str:
    first = [printable(name) for name in names[:SHOWN]]
    return ", ".join(first) + (f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else "")


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


def _flat(settings: Settings) -> dict[str, Any]:
    """The VAE's identity, where it is known, beside the other settings."""
    vae = {f"vae.{name}": value for name, value in (settings.get("vae") or {}).items()}
    return {name: value for name, value in settings.items() if name != "vae"} | vae


def check_disk(encoding: Encoding, missing: int) -> str:
    """How much `missing` images will take of what is free. Raises UserError where it is not enough."""
    folder = encoding.folder.absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    needed, free = missing * encoding.sample_bytes, shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(f"data.shards: needs {needed / 1e9:.2f} GB, {existing} has {free / 1e9:.2f} GB free; make room")
    return f"{needed / 1e9:.2f} GB of {free / 1e9:.0f} GB free"


def describe_plan(encoding: Encoding) -> list[str]:
    """A line each: the images, what becomes of them, the shards, and what is to do. Raises UserError without room."""
    recipe, source, slices, data = encoding.recipe, encoding.source, encoding.slices, encoding.recipe.data
    shape = " x ".join(map(str, latent_shape(recipe)))
    vae = recipe.vae.path if encoding.settings["vae"] else f"{recipe.vae.path} (to be downloaded from the hub)"
    records = _records(encoding)
    missing = sum(len(positions) for positions, record in zip(slices, records, strict=True) if record is None)
    flips = " and its mirror image" if data.flips else ""
    return [
        *encoding.warnings,
        f"images: {len(source.entries):,} in {_classes(source.class_names)} below {data.images}",
        *_left_out(source),
        f"latents: {data.crop} to {data.resolution} px, each image{flips} as {shape} by {vae}",
        f"shards: {len(slices)} of {data.shard_samples:,} samples in {data.shards}, "
        f"{len(records) - records.count(None)} there already",
        f"to do: {missing:,} images, {check_disk(encoding, missing)}",
    ]


def _classes(names: list[str]) -> str:
    return f"1 class ({printable(names[0])})" if len(names) == 1 else f"{len(names):,} classes ({_some(names)})"


def _left_out(source: Source) -> list[str]:
    """A line for each of the most common reasons."""
    reasons = source.left_out.most_common()
    lines = [f"left out: {count:,} ({printable(reason)})" for reason, count in reasons[:SHOWN]]
    if more := sum(count for _, count in reasons[SHOWN:]):
        lines.append(f"left out: {more:,} more for {len(reasons) - SHOWN} other reasons (all of them: index.json)")
    return lines


def encode_part(recipe: Recipe, part: int = 0, parts: int = 1) -> None:
    """Makes the shards i with i % parts == part that are missing or damaged, and keeps the rest.

    Raises UserError where another run is at work in the folder (the other parts of the same array are not another
    run), as soon as more than `data.max_rejected` of all images are rejected, and where the disk is full.
    """
    make_shards(resolve(recipe, download=True), part, parts)


def make_shards(encoding: Encoding, part: int = 0, parts: int = 1) -> None:
    """As `encode_part`."""
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
    """Reads every byte of the shards that are there; a data set of terabytes takes its time."""
    prove = partial(finished_record, encoding.folder, thorough=True)
    with ThreadPoolExecutor(encoding.recipe.launch.cpus_per_process) as threads:
        proved = tqdm(threads.map(prove, numbers), total=len(numbers), desc="prove", unit="shard", delay=2, leave=False)
        return dict(zip(numbers, proved, strict=True))


def _make_missing(encoding: Encoding, missing: list[int], finished: list[Record]) -> None:
    """A thread writes a shard while the next one is encoded."""
    slices = {number: encoding.slices[number] for number in missing}
    stamps = {number: encoding.source.entries.stamp(positions) for number, positions in slices.items()}
    writing: Future[Record] | None = None
    with ThreadPoolExecutor(1) as writer:
        for number, outcomes in encode_images(encoding.recipe, encoding.source, slices):
            if writing:
                finished.append(writing.result())
            writing = writer.submit(write_shard, encoding.folder, number, outcomes, encoding.settings, stamps[number])
            check_rejected(encoding, finished)
    assert writing is not None
    check_rejected(encoding, [*finished, writing.result()])


def merge_shards(encoding: Encoding) -> None:
    """Checks that all shards are there and writes the index over them; anyone may, at any time, any number of times.

    Raises UserError naming the shards that are missing, and where too many images are rejected.
    """
    found = _records(encoding)
    missing = [number for number, record in enumerate(found) if record is None]
    if missing:
        names = ", ".join(shard_name(number) for number in missing[:SHOWN])
        raise UserError(
            f"data.shards: {encoding.folder} has {len(found) - len(missing)} of {len(found)} shards, not {names}"
            f"{', ...' if len(missing) > SHOWN else ''}; run preprocess/encode_latents.py again"
        )
    records = [record for record in found if record is not None]
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
    """Whether every shard is, whoever made it."""
    return None not in _records(encoding)


def _records(encoding: Encoding) -> list[Record | None]:
    return [finished_record(encoding.folder, number, thorough=False) for number in range(len(encoding.slices))]


def check_rejected(encoding: Encoding, records: Sequence[Record]) -> None:
    rejected = [rejection for record in records for rejection in record["rejected"]]
    found, allowed = len(encoding.source.entries), encoding.recipe.data.max_rejected
    if len(rejected) > allowed * found:
        raise UserError(
            f"data.max_rejected: {len(rejected)} of {found} images are unusable, {allowed:.2%} may be; "
            f"{describe(rejected)}; repair or remove them, or raise data.max_rejected"
        )


def describe(rejected: Sequence[RejectedImage]) -> str:
    """The first few rejected images with their reasons, one line."""
    first = "; ".join(f"{printable(rejection['key'])}: {rejection['reason']}" for rejection in rejected[:SHOWN])
    more = len(rejected) - SHOWN
    return first + (f"; and {more} more" if more > 0 else "")


def summarise(encoding: Encoding) -> None:
    """Prints what there is now, with the latents' statistics and what was rejected."""
    shards = LatentShards(encoding.folder)
    index, (scaling, _) = shards.index, shards.scaling
    counts = f"{index['accepted']:,} samples of {index['found']:,} images"
    print(f"{encoding.folder}: {counts} in {len(index['shardlist'])} shards")
    print("latents over all images, unscaled; scaled for diffusion, deviations about 1 are wanted:")
    print("  channel     mean  deviation  scaled")
    for channel, (mean, std) in enumerate(zip(index["latents"]["mean"], index["latents"]["std"], strict=True)):
        print(f"  {channel:7} {mean:8.3f}  {std:9.3f}  {std * scaling:6.3f}")
    for line in [*_left_out(encoding.source), *encoding.warnings]:
        print(line)
    if index["rejected"]:
        print(f"{len(index['rejected']):,} rejected: {describe(index['rejected'])} (all of them: index.json)")
