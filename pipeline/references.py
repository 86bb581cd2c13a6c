"""What a distance is measured from: the training pictures, an ADM file, or another run's samples."""

import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError
from common.files import sha256_file
from common.loading import load_recipe
from common.recipe import Recipe
from pipeline.chunks import iterate
from pipeline.metrics import Statistics
from pipeline.picture_sets import PictureSet, training_pictures
from pipeline.samples import sample_set

ADM_STATISTICS = {"pooled": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
ADM_PICTURES = "arr_0"  # (N, H, W, 3) uint8


def reference(recipe: Recipe) -> PictureSet:
    """What `evaluate.reference` names. Raises UserError where it is not there or has pictures of another resolution."""
    named = recipe.evaluate.reference
    if named is None:
        return training_pictures(recipe)
    if (Path(named) / "recipe.yaml").is_file():
        return _run(recipe, Path(named))
    if Path(named).is_file():
        return _file(recipe, Path(named))
    raise UserError(
        f"evaluate.reference: {named} is neither a run folder with a recipe.yaml nor a file; name one below runs/, "
        "a statistics file of ADM's (mu, sigma, mu_s, sigma_s), or nothing for the training pictures"
    )


def _file(recipe: Recipe, path: Path) -> PictureSet:
    shapes = _shapes(path)
    pictures = shapes.get(ADM_PICTURES)
    if pictures is None and not {"mu", "sigma"} <= shapes.keys():
        raise UserError(
            f"evaluate.reference: {path} holds {', '.join(sorted(shapes)) or 'no arrays'}; "
            f"a reference has mu and sigma, or pictures ({ADM_PICTURES})"
        )
    if pictures is not None:
        _check_resolution(recipe, path, pictures[1])
    count = f" and {pictures[0]:,} pictures" if pictures else ""
    return PictureSet(
        name="reference",
        label=f"statistics{count} of {path}" if "mu" in shapes else f"{count.removeprefix(' and ')} of {path}",
        content={"file_sha256": sha256_file(path)},
        size=pictures[0] if pictures else 0,
        open=(lambda: iter(_arrays(path, [ADM_PICTURES])[ADM_PICTURES])) if pictures else None,
        statistics=(lambda: _statistics(path, shapes)) if "mu" in shapes else None,
    )


def _run(recipe: Recipe, folder: Path) -> PictureSet:
    """The samples of another run, as its own recipe draws them."""
    other = replace(load_recipe(folder / "recipe.yaml"), name=folder.name, runs=str(folder.parent))
    _check_resolution(recipe, folder, other.data.resolution)
    found, count = sample_set(other, other.sample.weights), other.sample.num_samples

    def pictures() -> Iterator[NDArray[np.uint8]]:
        return (image for rows in iterate(found.folder, (0, count)) for image in rows["images"])

    return PictureSet(
        name="reference",
        label=f"{count:,} samples of {folder} after {found.samples_seen:,} training samples",
        content=found.settings | {"samples": count, "samples_seen": found.samples_seen},
        size=count,
        open=pictures,
    )


def _check_resolution(recipe: Recipe, path: Path, found: int) -> None:
    if found != recipe.data.resolution:
        raise UserError(
            f"evaluate.reference: {path} has pictures of {found} pixels, this recipe's have {recipe.data.resolution}; "
            "distances between resolutions mean nothing, name a reference of the same one"
        )


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Of every array of an npz, without reading them."""
    try:
        with zipfile.ZipFile(path) as archive:
            found = {}
            for name in archive.namelist():
                with archive.open(name) as member:
                    np.lib.format.read_magic(member)
                    found[name.removesuffix(".npy")] = np.lib.format.read_array_header_1_0(member)[0]
            return found
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(
            f"evaluate.reference: {path} is not readable as an npz file ({error}); fetch it again"
        ) from None


def _arrays(path: Path, names: list[str]) -> dict[str, NDArray]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in names}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"evaluate.reference: {path} is damaged ({error}); fetch it again") from None


def _statistics(path: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Statistics]:
    found = {}
    for layer, (mean, covariance) in ADM_STATISTICS.items():
        if mean in shapes and covariance in shapes:
            arrays = _arrays(path, [mean, covariance])
            values = [arrays[name].astype(np.float64) for name in (mean, covariance)]
            if values[1].shape != 2 * values[0].shape or not all(np.isfinite(value).all() for value in values):
                raise UserError(
                    f"evaluate.reference: {path}: {mean}, {covariance} are no mean and covariance; fetch it again"
                )
            found[layer] = Statistics(values[0], values[1], count=None)
    return found
