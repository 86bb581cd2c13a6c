"""The stage `encode`. Importing it takes no time: `--help` needs nothing of torch."""

from typing import TYPE_CHECKING

from common.errors import UserError
from common.recipe import Recipe
from common.stage import Input, Stage

if TYPE_CHECKING:
    from preprocess.encoding.encoding import Encoding, LazyEncoding


def resolve(recipe: Recipe) -> "LazyEncoding":
    from preprocess.encoding.encoding import LazyEncoding

    return LazyEncoding(recipe)


def plan(encoding: "LazyEncoding") -> list[str]:
    """Checks source, VAE, disk and the shards that are finished; writes nothing."""
    from preprocess.encoding.encoding import describe_plan

    return describe_plan(encoding.offline)


def finished(encoding: "LazyEncoding") -> bool:
    from preprocess import beton

    try:
        return encoding.offline.is_finished and not beton.is_missing(encoding.recipe.data)
    except UserError:  # something is missing or does not fit; the stage says what
        return False


def encode(encoding: "LazyEncoding") -> None:
    """The stage in this process, or this rank's share of it; the last rank writes the index.

    Finished shards are proved by their hashes, and kept.
    """
    from common.ranks import rank_and_world_size
    from preprocess.encoding.encoding import all_there, make_shards

    rank, ranks = rank_and_world_size()
    make_shards(encoding.ready, rank, ranks)
    if ranks == 1 or all_there(encoding.ready):
        complete(encoding.ready)
    else:
        print(f"rank {rank} of {ranks}: its shards are finished; the last rank to end writes the index", flush=True)


def encode_part(encoding: "LazyEncoding", part: int, parts: int) -> None:
    from preprocess.encoding.encoding import make_shards

    make_shards(encoding.ready, part, parts)


def merge(encoding: "LazyEncoding") -> None:
    """Completes the shards that any number of jobs have made; any number of times, by any process.

    Raises UserError naming the shards that are missing, and if too many images are rejected.
    """
    complete(encoding.ready)


def complete(encoding: "Encoding") -> None:
    """The index, a summary, and the FFCV file where `data.format` asks for one."""
    from preprocess import beton
    from preprocess.encoding.encoding import merge_shards, summarise

    merge_shards(encoding)
    summarise(encoding)
    if beton.is_missing(encoding.recipe.data):
        beton.convert(encoding.folder, encoding.recipe.launch.cpus_per_process)


def fetch(recipe: Recipe) -> None:
    """Downloads the autoencoder, so that no two jobs do; one that a stage trains is never downloaded."""
    from preprocess.encoding.encoder import fetch_vae

    if recipe.vae.training is None:
        fetch_vae(recipe.vae)


STAGE = Stage(
    name="encode",
    resolve=resolve,
    plan=plan,
    finished=finished,
    work=encode,
    ranks_share=True,
    part=encode_part,
    merge=merge,
    merge_needs_all_cores=lambda recipe: recipe.data.format == "ffcv",
    fetch=fetch,
    inputs=(Input(plan, ("compose",)),),
    place=lambda recipe: recipe.data.shards,
)
