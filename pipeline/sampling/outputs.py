"""What is kept of samples, by `sample.output`: chunks of pictures or of features, and what is made of all chunks."""

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from common.files import atomic_folder, atomic_write
from common.recipe import Recipe
from pipeline.sampling.chunks import Chunk, Span, chunk_path, iterate, write_chunk

# What is made of a set's first N samples; the name says how many.
ADM_NAME = "samples-{}.npz"  # arr_0 (N, H, W, 3) uint8 and arr_1 (N,) labels, as ADM's evaluator reads them
FOLDER_NAME = "pictures-{}"  # <index>.png


def paths(recipe: Recipe, folder: Path, span: Span) -> list[Path]:
    """The files that samples first to end - 1 lie in."""
    if recipe.sample.output == "webdataset":
        return [chunk_path(folder, span, "tar")]
    if recipe.sample.output != "features":
        return [chunk_path(folder, span)]
    from pipeline.sampling.features import features_folder

    shown = [chunk_path(folder, span)] if span[0] < recipe.sample.save_images else []
    return [*shown, chunk_path(features_folder(recipe, folder), span)]


def keeper(recipe: Recipe, folder: Path) -> Callable[[Span, Chunk], None]:
    """Writes a chunk of images and labels to its `paths`."""
    if recipe.sample.output != "features":
        return lambda span, rows: write_chunk(paths(recipe, folder, span)[0], rows)
    from pipeline.sampling.features import FeatureWriter

    write_features = FeatureWriter(recipe, folder)

    def keep(span: Span, rows: Chunk) -> None:
        for path in paths(recipe, folder, span)[:-1]:
            write_chunk(path, rows)
        write_features(span, rows["images"])

    return keep


def finished(recipe: Recipe, folder: Path) -> bool:
    """Whether what is made of all chunks is there."""
    made = made_path(recipe, folder)
    return made is None or made.exists()


def made_path(recipe: Recipe, folder: Path) -> Path | None:
    """The one file or folder that is made of all chunks, where `sample.output` asks for one."""
    name = {"npz": ADM_NAME, "folder": FOLDER_NAME}.get(recipe.sample.output)
    return folder / name.format(recipe.sample.num_samples) if name else None


def finish(recipe: Recipe, folder: Path) -> None:
    """Makes of all chunks what `sample.output` asks for; any number of times, by anyone."""
    made = made_path(recipe, folder)
    if made is not None and not made.exists():
        write = _write_adm if recipe.sample.output == "npz" else _write_pictures
        write(made, folder, recipe.sample.num_samples)


def _write_adm(path: Path, folder: Path, count: int) -> None:
    """A chunk in memory at a time: 50,000 pictures of 256 pixels are 10 GB."""
    shape = next(iter(iterate(folder, (0, count))))["images"].shape[1:]
    with atomic_write(path) as temporary, zipfile.ZipFile(temporary, "w", allowZip64=True) as archive:
        for name, source, dtype, row in (("arr_0", "images", "|u1", shape), ("arr_1", "labels", "<i8", ())):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                header = {"descr": dtype, "fortran_order": False, "shape": (count, *row)}
                np.lib.format.write_array_header_1_0(member, header)
                for rows in iterate(folder, (0, count)):
                    member.write(np.ascontiguousarray(rows[source]).tobytes())


def _write_pictures(path: Path, folder: Path, count: int) -> None:
    with atomic_folder(path) as temporary:
        index = 0
        for rows in iterate(folder, (0, count)):
            for image in rows["images"]:
                Image.fromarray(image).save(temporary / f"{index:08d}.png")
                index += 1
