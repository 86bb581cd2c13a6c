"""The stage `encode`. Importing it takes no time: `--help` needs nothing of torch."""

from typing import TYPE_CHECKING

from common.errors import UserError
from common.recipe import Recipe
from common.stage import Stage, the_recipe

if TYPE_CHECKING:
    from preprocess.encoding.encoding import Encoding


def plan(recipe: Recipe) -> list[str]:
    """Checks source, VAE, disk and the shards that are finished; writes nothing."""
    from preprocess.encoding.encoding import describe_plan, resolve

    return describe_plan(resolve(recipe, download=False))


def finished(recipe: Recipe) -> bool:
    from preprocess import beton
    from preprocess.encoding.encoding import resolve

    try:
        return resolve(recipe, download=False).is_finished and not beton.is_missing(recipe.data)
    except UserError:  # something is missing or does not fit; the stage says what
        return False


def encode(recipe: Recipe) -> None:
    """The stage in this process, or this rank's share of it; the last rank writes the index.

    Finished shards are proved by their hashes, and kept.
    """
    from common.ranks import rank_and_world_size
    from preprocess.encoding.encoding import all_there, make_shards, resolve

    rank, ranks = rank_and_world_size()
    encoding = resolve(recipe, download=True)
    make_shards(encoding, rank, ranks)
    if ranks == 1 or all_there(encoding):
        complete(encoding)
    else:
        print(f"rank {rank} of {ranks}: its shards are made; the last rank to end makes the index of all", flush=True)


def encode_part(recipe: Recipe, part: int, parts: int) -> None:
    from preprocess.encoding import encoding

    encoding.encode_part(recipe, part, parts)


def merge(recipe: Recipe) -> None:
    """Completes the shards that any number of jobs have made; any number of times, by any process.

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
    if beton.is_missing(encoding.recipe.data):
        beton.convert(encoding.folder, encoding.recipe.launch.cpus_per_process)


def fetch(recipe: Recipe) -> None:
    """Downloads the autoencoder, so that no two jobs do."""
    from preprocess.encoding.encoder import fetch_vae

    fetch_vae(recipe.vae)


STAGE = Stage(
    name="encode",
    resolve=the_recipe,
    plan=plan,
    finished=finished,
    work=encode,
    ranks_share=True,
    part=encode_part,
    merge=merge,
    fetch=fetch,
)
