"""Opens sets of images of any origin: folders, zips, WebDatasets, npz files, sample sets, runs, a recipe's images.

What generators write is read as it lies: JiT's, SiT's and RAE's flat folders of numbered PNGs, EDM2's folders of a
thousand each, ADM's npz. Sub-folders are classes unless they count images; EDM2's dataset.json, `.cls` members and
`arr_1` hold labels too.
"""

import io
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from common.errors import UserError, errors_as
from common.loading import load_recipe
from common.ranks import share_of_cores
from common.run_folder import RunFolder
from pipeline.evaluation.image_sets import ImageSet, training_images
from pipeline.evaluation.metrics import Statistics
from pipeline.evaluation.references import ADM_IMAGES, npz_file, run_samples
from pipeline.sampling.chunks import find_chunks, iterate
from preprocess.images.images import CROPS, Rejected, decode
from preprocess.sources import Source
from preprocess.sources.folder_classes import all_as_one_class, check_not_empty, class_folders
from preprocess.sources.folders import list_folder
from preprocess.sources.listing import Folder, ListedSource, base
from preprocess.sources.webdataset import WebDatasetSource
from preprocess.sources.zips import find_zip, list_zip

Images = Iterator[NDArray[np.uint8]]  # each (H, W, 3)

ADM_LABELS = "arr_1"
A_FOLDER_OF = 1000  # images that EDM2's `--subdirs` puts into one folder, named by the first
COLOURS = ("RGB", "P", "YCbCr")  # modes of files that hold what an extractor sees
AT_ONCE = 256  # images that are decoded together
FORMS = "a folder of images, a zip, tars, an npz with arr_0, a set of samples or a run's folder"


@dataclass(frozen=True)
class Judged:
    """A set of images: SAMPLES, a reference, or what samples are compared with."""

    path: str
    label: str  # for people
    open: Callable[[], Images] | None  # None: there are statistics alone
    labels: NDArray[np.int64] | None = None  # (N,)
    statistics: dict[str, Statistics] | None = None  # by layer, where a file gives them
    crop: str | None = None  # the rule by which its originals are cropped
    cropped: Callable[[str], Images] | None = None  # by another one

    def iterate(self) -> Images:
        assert self.open is not None
        return self.open()


def open_judged(path: Path, field: str, extractor: str, crop: tuple[str, int] | None = None) -> Judged:
    """Opens what lies at `path`. `crop`: the rule and the resolution for images that are not cropped yet.

    Raises UserError, beginning with `field`, for anything that is no set of images; what is wrong with a single image
    is said when it is read.
    """
    if path.suffix in (".yaml", ".yml"):
        if field == "SAMPLES":
            raise UserError(f"SAMPLES: {path} is a recipe, which stands for its training images; name {FORMS}")
        return _of_images(path, training_images(load_recipe(path)))
    if RunFolder(path).recipe.is_file():
        return _of_images(path, run_samples(path, None))
    if path.is_dir() and find_chunks(path):
        return _of_chunks(path)
    if path.suffix == ".npz":
        return _of_npz(path, field, extractor)
    if not path.exists() and find_zip(str(path)) is None and not any(mark in path.name for mark in "*{"):
        raise UserError(f"{field}: {path} is not there; name {FORMS}")
    return _of_source(path, field, _source(path, field), crop)


def _of_images(path: Path, images: ImageSet) -> Judged:
    return Judged(str(path), images.label, images.open, images.labels and images.labels())


def _of_chunks(folder: Path) -> Judged:
    span = (0, max(end for _, end in find_chunks(folder)))
    labels = [rows["labels"] for rows in iterate(folder, span)]

    def images() -> Images:
        return (image for rows in iterate(folder, span) for image in rows["images"])

    return Judged(str(folder), f"{span[1]:,} samples of {folder}", images, np.concatenate(labels).astype(np.int64))


def _of_npz(path: Path, field: str, extractor: str) -> Judged:
    if not path.is_file():
        raise UserError(f"{field}: {path} is not there; name {FORMS}")
    file = npz_file(path, extractor, None, field)
    return Judged(
        str(path),
        file.label,
        file.open,
        _npz_labels(path, field, file.size) if file.open else None,
        file.statistics() if file.statistics else None,
    )


def _npz_labels(path: Path, field: str, count: int) -> NDArray[np.int64] | None:
    with zipfile.ZipFile(path) as archive:
        if f"{ADM_LABELS}.npy" not in archive.namelist():
            return None
    with errors_as(UserError, f"{field}: {path}: {ADM_LABELS} is not readable"), np.load(path) as arrays:
        labels = arrays[ADM_LABELS]
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        found = f"{labels.dtype} {labels.shape}"
        raise UserError(f"{field}: {path}: {ADM_LABELS} is {found}; labels are integers of ({count},), as {ADM_IMAGES}")
    return labels.astype(np.int64)


def _source(path: Path, field: str) -> Source:
    archive = find_zip(str(path))
    if archive is None and (not path.is_dir() or _holds_tars(path)):
        return WebDatasetSource(path, field)
    listing = list_zip(*archive, field) if archive else list_folder(path, field, follow_links=True)
    if not listing.root.has_images():
        try:
            check_not_empty(listing)
        except UserError as error:  # its advice is for recipes
            raise UserError(f"{str(error).partition(';')[0]}; name {FORMS}") from None
    counted = _counts_images(listing.root)
    return ListedSource(listing, all_as_one_class(listing) if counted else class_folders(listing))


def _holds_tars(folder: Path) -> bool:
    return next(folder.glob("*.tar"), None) is not None


def _counts_images(root: Folder) -> bool:
    """Whether the folders are EDM2's, which are named by the number of their first image."""
    folders = root.with_images()
    numbers = [(name, base(key).partition(".")[0]) for name, folder in folders.items() for key in folder.images]
    return bool(numbers) and all(
        name.isdecimal() and number.isdecimal() and int(number) // A_FOLDER_OF * A_FOLDER_OF == int(name)
        for name, number in numbers
    )


def _of_source(path: Path, field: str, source: Source, crop: tuple[str, int] | None) -> Judged:
    count, classes = len(source.entries), len(source.class_names)
    labels = np.array([entry.label for entry in source.entries], np.int64) if classes > 1 else None
    of_classes = f" of {classes:,} classes" if classes > 1 else ""
    how = f" ({crop[0]}, {crop[1]} pixels)" if crop else ""
    rule = crop or _first_size(path, field, source)

    def images(crop_rule: str | None) -> Images:
        read = partial(_read, path, field, source, (crop_rule, rule[1]))
        with ThreadPoolExecutor(share_of_cores()) as pool:
            for first in range(0, count, AT_ONCE):
                yield from pool.map(read, range(first, min(first + AT_ONCE, count)))

    own = crop[0] if crop else None
    return Judged(
        path=str(path),
        label=f"{count:,} images{of_classes} of {path}{how}",
        open=lambda: images(own),
        labels=labels,
        crop=own,
        cropped=images if crop else None,
    )


def _first_size(path: Path, field: str, source: Source) -> tuple[None, int]:
    image = _decoded(path, field, source, 0)
    if image.width != image.height:
        raise UserError(
            f"{field}: {path}: {source.entries[0].key} has {image.width} x {image.height} pixels; generated images are "
            "square: crop them, or name the rule of a reference with --crop"
        )
    return None, image.width


def _read(path: Path, field: str, source: Source, crop: tuple[str | None, int], position: int) -> NDArray[np.uint8]:
    """Image `position` (R, R, 3)."""
    rule, resolution = crop
    image = _decoded(path, field, source, position, any_mode=rule is not None)
    if rule is not None:
        with errors_as(UserError, f"{field}: {path}: {source.entries[position].key} cannot be cropped"):
            image = CROPS[rule](image, resolution)
    if image.size != (resolution, resolution):
        raise UserError(
            f"{field}: {path}: {source.entries[position].key} has {image.width} x {image.height} pixels, the first "
            f"image has {resolution} x {resolution}; a set is of one size: name a reference's rule with --crop"
        )
    return np.asarray(image)


def _decoded(path: Path, field: str, source: Source, position: int, *, any_mode: bool = False) -> Image.Image:
    entry = source.entries[position]
    try:
        data = source.open(entry)
        image = decode(data)
    except Rejected as reason:
        raise UserError(f"{field}: {path}: {entry.key}: {reason}; remove it or write it again") from None
    if not any_mode:
        with errors_as(UserError, f"{field}: {path}: {entry.key} is no image file"):
            mode = Image.open(io.BytesIO(data)).mode
        if mode not in COLOURS:
            raise UserError(
                f"{field}: {path}: {entry.key} is of mode {mode}, not RGB: evaluators read grey and transparency "
                "differently; convert it, Image.convert('RGB')"
            )
    return image
