# PYTHON_ARGCOMPLETE_OK
"""Converts finished latent shards to one FFCV file, and verifies that they are equal.

    python preprocess/beton.py --config recipes/demo.yaml

Writes <data.shards>/ffcv/: latents.beton for FFCV's loader and for training with data.format=ffcv, and the index that
lets LatentShards read it, with the same checksums and in the same order as from the tars.
"""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from common.command import run_command
from common.errors import UserError
from common.files import atomic_write, folder_lock, remove_leftovers, sha256_file
from common.recipe import Data, Recipe
from preprocess.shards import INDEX, SAMPLE, SAMPLES, LatentShards, rows_name, verify
from preprocess.shards.forms import Index, Shard, write_index_file

FOLDER = "ffcv"  # below data.shards
BETON = "latents.beton"
PAGE = 8 << 20  # bytes; FFCV reads whole pages
CHUNK = 1024  # samples


class Samples:
    """Samples for FFCV's writer: moments (, those of the mirror image), label.

    float16 is stored as int16 of the same bits, because FFCV's reader hangs on float16 arrays; `View(torch.float16)` at
    the end of its pipeline converts them back.
    """

    def __init__(self, shards: LatentShards) -> None:
        self.shards, self.flips = shards, (False, True) if shards.index["settings"]["flips"] else (False,)

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        indices = np.full(len(self.flips), index)
        moments = self.shards.gather(indices, np.array(self.flips)).view(np.int16)  # (1 or 2, 2C, h, w)
        return *moments, int(self.shards.labels_at(indices)[0])


def is_converted(folder: Path) -> bool:
    """Whether the FFCV file of these shards exists; its samples are verified when they are read."""
    try:
        return LatentShards(folder / FOLDER).content_key == LatentShards(folder).content_key
    except UserError:
        return False


def is_missing(data: Data) -> bool:
    """Whether `data.format` needs the FFCV file and it does not exist yet."""
    return data.format == "ffcv" and not is_converted(Path(data.shards))


def convert(folder: Path, processes: int = 1) -> None:
    """Writes `folder`/ffcv; its index last, so that an incomplete one has none.

    Raises UserError for damaged shards, for lack of disk space, and without FFCV.
    """
    from importlib.util import find_spec

    if find_spec("ffcv") is None:
        raise UserError("data.format: ffcv is not installed; scripts/setup.sh --ffcv installs it, or keep format tar")
    for fault in verify(folder, processes):  # FFCV's writer hangs on errors
        raise UserError(fault)
    shards, target = LatentShards(folder), folder / FOLDER
    with folder_lock(target, wait=True):
        if is_converted(folder):  # by another process, which this one has waited for
            return
        remove_leftovers(target)
        needed, free = _bytes(shards), shutil.disk_usage(target).free
        if needed > free:
            raise UserError(f"data.format: ffcv needs {needed / 1e9:.3g} GB, {target} has {free / 1e9:.3g}; make room")
        (target / INDEX).unlink(missing_ok=True)
        _convert(shards, target, processes)


def _convert(shards: LatentShards, target: Path, processes: int) -> None:
    with atomic_write(target / BETON) as temporary:
        _write(shards, temporary, processes)
        rows = _rows(shards, temporary)
    for name in (SAMPLES, rows_name(BETON)):
        with atomic_write(target / name) as temporary, open(temporary, "wb") as file:
            np.save(file, rows, allow_pickle=False)
    shard: Shard = {
        "url": BETON,
        "nsamples": len(shards),
        "filesize": (target / BETON).stat().st_size,
        "sha256": sha256_file(target / BETON),
        "samples_sha256": sha256_file(target / SAMPLES),
    }
    own: Index = {
        **shards.index,
        "shardlist": [shard],
        "samples_sha256": shard["samples_sha256"],
        "converted_from": shards.content_key,
    }
    write_index_file(target, own)
    try:
        _prove_equal(shards, LatentShards(target))
    except UserError:
        (target / INDEX).unlink()
        raise


def _bytes(shards: LatentShards) -> int:
    """Approximate size of the FFCV file."""
    return len(shards) * (1 + shards.index["settings"]["flips"]) * int(np.prod(shards.shape)) * 2


def _write(shards: LatentShards, path: Path, processes: int) -> None:
    from ffcv.fields import IntField, NDArrayField
    from ffcv.writer import DatasetWriter

    samples = Samples(shards)
    names = ("moments", "moments_flip")[: len(samples.flips)]
    fields = {name: NDArrayField(np.dtype("int16"), shards.shape) for name in names}
    size = len(names) * int(np.prod(shards.shape)) * 2
    page = max(PAGE, 1 << (size - 1).bit_length())  # a power of two that holds a sample
    writer = DatasetWriter(str(path), {**fields, "label": IntField()}, page_size=page, num_workers=processes)
    writer.from_indexed_dataset(samples, chunksize=CHUNK)


def _rows(shards: LatentShards, path: Path) -> np.ndarray:
    """The shards' rows with offsets in the FFCV file, whose metadata have a pointer to each array."""
    from ffcv.reader import Reader

    metadata = Reader(str(path)).metadata
    rows = shards.rows(np.arange(len(shards))).astype(SAMPLE)
    rows["shard"], rows["offset"] = 0, metadata["f0"]
    if shards.index["settings"]["flips"]:
        rows["flip_offset"] = metadata["f1"]
    return rows


def _prove_equal(shards: LatentShards, converted: LatentShards) -> None:
    """Reads and compares all samples. Raises UserError if one differs."""
    flips = (False, True) if shards.index["settings"]["flips"] else (False,)
    for start in range(0, len(shards), CHUNK):
        indices = np.arange(start, min(start + CHUNK, len(shards)))
        for flip in flips:
            mirrored = np.full(len(indices), flip)
            if not np.array_equal(shards.gather(indices, mirrored), converted.gather(indices, mirrored)):
                raise UserError(f"{converted.address}/{BETON}: differs from the shards; delete it and convert again")


def plan(recipe: Recipe) -> Iterator[str]:
    folder = Path(recipe.data.shards)
    shards = LatentShards(folder)
    state = "finished" if is_converted(folder) else "to be made"
    yield f"{folder / FOLDER / BETON}: {len(shards):,} samples, {_bytes(shards) / 1e9:.2f} GB, {state}"


def work(recipe: Recipe) -> None:
    folder = Path(recipe.data.shards)
    if not is_converted(folder):
        convert(folder, recipe.launch.cpus_per_process)
    print(f"converted: {folder / FOLDER / BETON}")


if __name__ == "__main__":
    sys.exit(run_command(__doc__, plan, work))
