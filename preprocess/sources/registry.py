"""Which source reads which data set, in which form: add a new one here.

Each kind of `data.source` detects the form in which its data set is distributed: folder, zip, tar, parquet, LMDB.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from common.errors import UserError
from common.recipe import Data
from preprocess.sources.entries import IMAGE_SUFFIXES, Source
from preprocess.sources.folder_classes import all_as_one_class, class_folders
from preprocess.sources.folders import list_folder
from preprocess.sources.idx import IdxSource
from preprocess.sources.imagenet import ImageNetParquet, ImageNetTar, wnid_folders
from preprocess.sources.labels import NONE
from preprocess.sources.listing import ListedSource, Listing
from preprocess.sources.lmdbs import LmdbSource
from preprocess.sources.lsun import find_lmdb, scene
from preprocess.sources.one_class import faces
from preprocess.sources.parquet import ParquetSource
from preprocess.sources.webdataset import WebDatasetSource
from preprocess.sources.zips import find_zip, list_zip

Which = Literal["images", "held_out"]
HUB_PARQUET = ("*.parquet", "data/*.parquet", "*/train/*.parquet")  # in a clone of the hub's repository


def open_source(data: Data, which: Which = "images") -> Source:
    """Opens `data.images`, or `data.held_out`, which is of the same kind.

    Raises UserError beginning with the field's name.
    """
    path = getattr(data, which)
    assert path is not None
    return _OPENERS[data.source](path, f"data.{which}", data)


def _folder(path: str, field: str, data: Data) -> Source:
    listing = _listing(path, field, data)
    return ListedSource(listing, all_as_one_class(listing) if data.label_field == NONE else class_folders(listing))


def _imagenet(path: str, field: str, data: Data) -> Source:
    if path.endswith(".parquet") or any(any(Path(path).glob(form)) for form in HUB_PARQUET):
        return ImageNetParquet(path, field, data.image_field, data.label_field)
    for name in ("image_field", "label_field"):
        if (named := getattr(data, name)) is not None:
            raise UserError(
                f"data.{name}: {named} names a column of parquet files, but {path} is not parquet; leave it out"
            )
    if path.endswith(".tar"):
        return ImageNetTar(path, field)
    listing = _listing(path, field, data)
    return ListedSource(listing, wnid_folders(listing))


def _faces(path: str, field: str, data: Data) -> Source:
    """FFHQ (a tree of thousands, or flat) and CelebA-HQ (JPG, PNG or NPY), in a folder or a zip."""
    listing = _listing(path, field, data, IMAGE_SUFFIXES | {".npy"})
    return ListedSource(listing, faces(listing))


def _lsun(path: str, field: str, data: Data) -> Source:
    """A category: its LMDB, or its images in a folder or zip, which also names the class."""
    if database := find_lmdb(path, field):
        return LmdbSource(database, field)
    listing = _listing(path, field, data)
    return ListedSource(listing, scene(listing))


def _listing(path: str, field: str, data: Data, suffixes: frozenset[str] = IMAGE_SUFFIXES) -> Listing:
    if archive := find_zip(path):
        return list_zip(*archive, field, suffixes)
    return list_folder(path, field, suffixes, follow_links=data.follow_links)


def _webdataset(path: str, field: str, data: Data) -> Source:
    return WebDatasetSource(path, field, data.image_field, data.label_field)


def _idx(path: str, field: str, data: Data) -> Source:
    return IdxSource(path, field)


def _parquet(path: str, field: str, data: Data) -> Source:
    return ParquetSource(path, field, data.image_field, data.label_field)


# A recipe's field data.source lists these too.
_OPENERS: dict[str, Callable[[str, str, Data], Source]] = {
    "folder": _folder,
    "imagenet": _imagenet,
    "ffhq": _faces,
    "celebahq": _faces,
    "lsun": _lsun,
    "webdataset": _webdataset,
    "parquet": _parquet,
    "idx": _idx,
}
