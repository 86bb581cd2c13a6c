"""What a distance is measured from: the training images, an ADM file, or another run's samples."""

import math
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError, errors_as
from common.files import sha256_file
from common.recipe import Recipe
from common.run_folder import RunFolder
from common.run_recipe import read_recipe
from pipeline.evaluation.image_sets import ImageSet, training_images
from pipeline.evaluation.metrics import Statistics, fault_of
from pipeline.features.extractors import WIDTHS, layers_of
from pipeline.sampling.chunks import iterate
from pipeline.sampling.sample_set import sample_set

FIELD = "evaluate.reference"  # with which errors begin
ADM_STATISTICS = {"pooled": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
ADM_IMAGES = "arr_0"  # (N, H, W, 3) uint8


def reference(recipe: Recipe) -> ImageSet:
    """What `evaluate.reference` names. Raises UserError where it is missing or has images of another resolution."""
    named = recipe.evaluate.reference
    if named is None:
        return training_images(recipe)
    if RunFolder(Path(named)).recipe.is_file():
        return run_samples(Path(named), recipe.data.resolution)
    if Path(named).is_file():
        return npz_file(Path(named), recipe.evaluate.feature_extractor, recipe.data.resolution)
    raise UserError(
        f"evaluate.reference: {named} is neither a run folder with a recipe.yaml nor a file; name one below runs/, "
        "a statistics file of ADM's (mu, sigma, mu_s, sigma_s), or nothing for the training images"
    )


def npz_file(path: Path, extractor: str, resolution: int | None, field: str = FIELD) -> ImageSet:
    """Images and statistics of an npz file as ADM's evaluator reads it; of images of this resolution, if one is given.

    Raises UserError, beginning with `field`, for a file of neither, of other arrays, and of another extractor.
    """
    headers = _headers(path, field)
    layers = _check_statistics(extractor, path, headers, field)
    images = headers.get(ADM_IMAGES)
    fitted = "pooled" in layers
    if images is None and not fitted:
        raise UserError(
            f"{field}: {path} holds {', '.join(sorted(headers)) or 'no arrays'}; "
            f"a reference has mu and sigma, or images ({ADM_IMAGES})"
        )
    if images is not None:
        if images.dtype != np.uint8 or len(images.shape) != 4 or images.shape[3] != 3:
            raise UserError(f"{field}: {path}: {ADM_IMAGES} is {images}; images are uint8 of (N, H, W, 3)")
        for side in images.shape[1:3]:
            _check_resolution(path, side, resolution)
    count = images.shape[0] if images else 0
    contents = [*(["statistics"] if fitted else []), *([f"{count:,} images"] if images else [])]
    return ImageSet(
        name="reference",
        label=f"{' and '.join(contents)} of {path}",
        content={"file_sha256": sha256_file(path)},
        size=count,
        open=(lambda: _images(path, field)) if images else None,
        statistics=(lambda: _statistics(path, layers, field)) if fitted else None,
    )


def run_samples(folder: Path, resolution: int | None) -> ImageSet:
    """The samples of another run, as its own recipe draws them; of this resolution, if one is given."""
    other = read_recipe(folder)
    _check_resolution(folder, other.data.resolution, resolution)
    samples, count = sample_set(other, other.sample.weights), other.sample.num_samples

    def images() -> Iterator[NDArray[np.uint8]]:
        return (image for rows in iterate(samples.folder, (0, count)) for image in rows["images"])

    def labels() -> NDArray[np.int64]:
        return np.concatenate([rows["labels"] for rows in iterate(samples.folder, (0, count))]).astype(np.int64)

    return ImageSet(
        name="reference",
        label=f"{count:,} samples of {folder} after {samples.samples_seen:,} training samples",
        content=samples.settings | {"samples": count, "samples_seen": samples.samples_seen},
        size=count,
        open=images,
        labels=labels,
    )


def _check_resolution(path: Path, resolution: int, wanted: int | None) -> None:
    if wanted is not None and resolution != wanted:
        raise UserError(
            f"evaluate.reference: {path} has images of {resolution} pixels, this recipe's have {wanted}; "
            "distances between resolutions mean nothing, name a reference of the same one"
        )


@dataclass(frozen=True)
class Header:
    """Shape and type of an array in a file."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


def _readable(path: Path, field: str) -> AbstractContextManager[None]:
    return errors_as(UserError, f"{field}: {path} is not readable as an npz file; get it again")


def _headers(path: Path, field: str) -> dict[str, Header]:
    """The header of each array of an npz; no array is read."""
    with _readable(path, field), zipfile.ZipFile(path) as archive:
        headers = {}
        for name in archive.namelist():
            with archive.open(name) as member:
                headers[name.removesuffix(".npy")] = _header(member)
        return headers


def _header(member: IO[bytes]) -> Header:
    """Reads on to the first number of the array."""
    np.lib.format.read_magic(member)
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(member)
    if fortran_order and len(shape) > 1:
        raise ValueError("an array in Fortran's order")
    return Header(shape, dtype)


def _check_statistics(extractor: str, path: Path, headers: dict[str, Header], field: str) -> list[str]:
    """The layers whose statistics the file holds, of those that the extractor gives.

    Raises UserError where they are of another extractor, before anything of that size is read.
    """
    layers, otherwise = [], "set evaluate.feature_extractor" if field == FIELD else "choose it with --features"
    for layer in layers_of(extractor):
        mean, covariance = ADM_STATISTICS.get(layer, ("", ""))
        if mean not in headers and covariance not in headers:
            continue
        width = WIDTHS[extractor, layer]
        for name, shape in ((mean, (width,)), (covariance, (width, width))):
            if name not in headers or headers[name].shape != shape or headers[name].dtype.kind != "f":
                raise UserError(
                    f"{field}: {path}: {name} is {headers.get(name, 'not there')}, {extractor}'s is of "
                    f"{shape}; name a reference made with that extractor, or {otherwise}"
                )
        layers.append(layer)
    return layers


def _statistics(path: Path, layers: Sequence[str], field: str) -> dict[str, Statistics]:
    by_layer = {}
    for layer in layers:
        with _readable(path, field), np.load(path, allow_pickle=False) as arrays:
            read = [arrays[name] for name in ADM_STATISTICS[layer]]
        fitted = Statistics(read[0].astype(np.float64), read[1].astype(np.float64), count=None)
        if fault := fault_of(fitted, float(np.finfo(read[1].dtype).eps)):
            names = " and ".join(ADM_STATISTICS[layer])
            raise UserError(f"{field}: {path}: {names} are no mean and covariance: {fault}; get it again")
        by_layer[layer] = fitted
    return by_layer


def _images(path: Path, field: str) -> Iterator[NDArray[np.uint8]]:
    """Each (H, W, 3), one in memory at a time: 50,000 of 256 pixels are 10 GB."""
    with _readable(path, field), zipfile.ZipFile(path) as archive, archive.open(f"{ADM_IMAGES}.npy") as member:
        count, *shape = _header(member).shape
        for _ in range(count):
            content = member.read(math.prod(shape))
            if len(content) < math.prod(shape):
                raise EOFError("images are missing")
            yield np.frombuffer(content, np.uint8).reshape(shape)
