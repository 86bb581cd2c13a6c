# PYTHON_ARGCOMPLETE_OK
"""Verifies a folder of latent shards: every byte, checksum, count and number.

    python preprocess/verify_shards.py data/demo/shards [--processes 8]
    python preprocess/verify_shards.py data/demo/shards --deep recipes/demo.yaml [--images 64]

With --deep also encodes some images again and compares the latents.

Exit status 0: no faults. 2: a line for each fault, with the shard, the sample, and what to do.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from common.command import Parser, count_argument, exit_status_of, path_argument
from common.errors import UserError
from common.ranks import own_cores

if TYPE_CHECKING:
    from common.recipe import Recipe


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("folder", help="the folder that holds index.json")
    cores = own_cores()
    parser.add_argument(
        "--processes", type=count_argument, default=cores, help=f"shards verified in parallel (here {cores})"
    )
    parser.add_argument(
        "--deep", type=path_argument, metavar="RECIPE.yaml", help="the recipe that the folder was encoded with"
    )
    parser.add_argument(
        "--images", type=count_argument, default=64, help="with --deep: number of images to encode again (64)"
    )
    arguments = parser.parse_args()
    return exit_status_of(lambda: work(arguments.folder, arguments.processes, arguments.deep, arguments.images))


def work(folder: str, processes: int, deep: Path | None, images: int) -> None:
    from tqdm import tqdm

    from common.loading import expanded, load_recipe
    from preprocess.shards import verify
    from preprocess.shards.forms import read_local_index

    folder = expanded("FOLDER", folder)
    if "://" in folder:
        raise UserError(f"{folder}: only a local folder is verified; training verifies what it fetches")
    recipe = None if deep is None else load_recipe(deep)
    faults = 0
    for fault in verify(folder, processes):
        tqdm.write(fault)
        faults += 1
    if faults:
        raise UserError(f"{folder}: {faults} faults, listed above; do what each line says")
    index = read_local_index(Path(folder))
    print(f"{folder}: {index['accepted']:,} samples in {len(index['shardlist'])} shards, no faults")
    if recipe is not None:
        compare(folder, recipe, images)


def compare(folder: str, recipe: "Recipe", images: int) -> None:
    """Encodes some images again. Raises UserError if their latents or labels differ from those in the folder."""
    from preprocess.encoding.reencode_check import deep_faults

    faults = 0
    for fault in deep_faults(recipe, folder, images):
        print(fault)
        faults += 1
    if faults:
        raise UserError(
            f"{folder}: {faults} of {images} images have other latents or labels, listed above; encode again"
        )
    print(f"{folder}: up to {images} images encoded again, without differences")


if __name__ == "__main__":
    sys.exit(main())
