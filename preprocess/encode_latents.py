"""Encodes images to verified latent shards.

    python preprocess/encode_latents.py --config recipes/demo.yaml
    torchrun --nproc-per-node 8 preprocess/encode_latents.py --config recipes/imagenet256.yaml
    python preprocess/encode_latents.py --config recipes/imagenet256.yaml --cluster slurm --jobs 64

Reads `data.images`, writes WebDataset tars with an index to `data.shards` (the format: preprocess/shards). Run it again
after a kill or damage: it makes what is missing and keeps the rest, with any number of jobs.
"""

import sys
from typing import TYPE_CHECKING

from common.command import run_command
from common.errors import UserError
from common.parts import run_parts
from common.ranks import rank_and_world_size
from common.recipe import Recipe

if TYPE_CHECKING:
    from preprocess.encoding.encoding import Encoding


def plan(recipe: Recipe) -> list[str]:
    """Checks source, VAE, disk and what is there already; touches nothing."""
    from preprocess.encoding.encoding import describe_plan, resolve

    return describe_plan(resolve(recipe, download=False))


def finished(recipe: Recipe) -> bool:
    from preprocess import beton
    from preprocess.encoding.encoding import resolve

    try:
        return resolve(recipe, download=False).is_finished and not beton.is_missing(recipe)
    except UserError:  # something is missing or does not fit; the stage says what
        return False


def encode(recipe: Recipe) -> None:
    """The whole stage in this process, or this rank's part of it; the last rank makes the index.

    What is there already is proved by its hashes, and kept.
    """
    from preprocess.encoding.encoding import all_there, make_shards, resolve

    rank, ranks = rank_and_world_size()
    encoding = resolve(recipe, download=True)
    make_shards(encoding, rank, ranks)
    if ranks == 1 or all_there(encoding):
        complete(encoding)
    else:
        print(f"rank {rank} of {ranks}: its shards are made; the last rank to end makes the index of all", flush=True)


def encode_in_jobs(recipe: Recipe, cluster: str, jobs: int) -> None:
    """The whole stage as an array of jobs, each making every `jobs`-th shard; then the index."""
    from preprocess.encoding.encoding import resolve

    encoding = resolve(recipe, download=True)  # here, so that no job downloads what another does
    print(f"{jobs} jobs; what each does is told in {recipe.folder / 'logs/encode'}", flush=True)
    run_parts(recipe, cluster, "encode", "preprocess.encoding.encoding", "encode_part", jobs)
    complete(encoding)


def merge(recipe: Recipe) -> None:
    """What follows when all shards are made, by however many jobs; anyone may, any number of times.

    Raises UserError naming the shards that are missing, and where too many images are rejected.
    """
    from preprocess.encoding.encoding import resolve

    complete(resolve(recipe, download=True))


def complete(encoding: "Encoding") -> None:
    """The index, a summary, and the FFCV file where `data.format` asks for one."""
    from preprocess import beton
    from preprocess.encoding.encoding import merge_shards, summarise

    merge_shards(encoding)
    summarise(encoding)
    if beton.is_missing(encoding.recipe):
        beton.convert(encoding.folder, encoding.recipe.launch.cpus_per_process)


if __name__ == "__main__":
    sys.exit(run_command(__doc__, plan, encode, in_jobs=encode_in_jobs, shared=True))
