"""Encodes pictures to verified latent shards.

    python preprocess/encode_latents.py --config recipes/demo.yaml

Reads `data.images`, writes WebDataset tars with an index to `data.shards` (the format: preprocess/shards.py). Run it
again after a kill or damage: it makes what is missing and keeps the rest.
"""

import sys

from common.command import run_command
from common.errors import UserError
from common.recipe import Recipe, latent_shape


def plan(recipe: Recipe) -> list[str]:
    """Checks source, VAE, disk and what is there already; touches nothing."""
    from preprocess.encoding import check_disk, resolve
    from preprocess.shards import finished_record

    encoding = resolve(recipe, download=False)
    source, slices, data = encoding.source, encoding.slices, recipe.data
    shape = " x ".join(map(str, latent_shape(recipe)))
    vae = recipe.vae.path if encoding.settings["vae"] else f"{recipe.vae.path} (to be downloaded from the hub)"
    records = [finished_record(encoding.folder, number, thorough=False) for number in range(len(slices))]
    missing = sum(len(positions) for positions, record in zip(slices, records, strict=True) if record is None)
    flips = " and its mirror image" if data.flips else ""
    left_out = f"; {source.left_out:,} other files left out" if source.left_out else ""
    return [
        f"pictures: {len(source.entries):,} in {len(source.class_names)} classes below {data.images}{left_out}",
        f"latents: {data.crop} to {data.resolution} px, each picture{flips} as {shape} by {vae}",
        f"shards: {len(slices)} of {data.shard_samples:,} samples in {data.shards}, "
        f"{len(records) - records.count(None)} there already",
        f"to do: {missing:,} pictures, {check_disk(encoding, missing)}",
    ]


def finished(recipe: Recipe) -> bool:
    from preprocess import beton
    from preprocess.encoding import resolve

    try:
        return resolve(recipe, download=False).is_finished and not beton.is_missing(recipe)
    except UserError:  # something is missing or does not fit; the stage says what
        return False


def encode(recipe: Recipe) -> None:
    """The whole stage; returns at once where it is finished."""
    from preprocess import beton
    from preprocess.encoding import describe, encode_missing, resolve
    from preprocess.shards import LatentShards

    encoding = resolve(recipe, download=True)
    if not encoding.is_finished:
        encode_missing(encoding)
    index = LatentShards(encoding.folder).index
    mean, std = (" ".join(f"{value:.3f}" for value in index["latents"][name]) for name in ("mean", "std"))
    counts = f"{index['accepted']:,} samples of {index['found']:,} pictures"
    print(f"{encoding.folder}: {counts} in {len(index['shardlist'])} shards")
    print(f"latents, unscaled, a channel: mean {mean}, standard deviation {std}")
    if index["rejected"]:
        print(f"{len(index['rejected']):,} rejected: {describe(index['rejected'])} (all of them: index.json)")
    if beton.is_missing(recipe):
        beton.convert(encoding.folder, recipe.launch.cpus_per_process)


if __name__ == "__main__":
    sys.exit(run_command(__doc__, plan, encode))
