"""Where pictures come from. A source lists its pictures in a stable order without reading one, and opens any of them.

`open_source` opens what the recipe's section `data` names; each kind finds out by itself in which form the data set is
there.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from common.recipe import Data
from preprocess.sources.archives import ZipSource
from preprocess.sources.entries import PICTURE_SUFFIXES, Entries, Entry, Source, fingerprint, printable
from preprocess.sources.folders import FolderSource, OneClassFolder
from preprocess.sources.imagenet import ImageNetFolder, ImageNetParquet, ImageNetTar
from preprocess.sources.lsun import DATA, LmdbSource
from preprocess.sources.parquet import ParquetSource
from preprocess.sources.webdataset import WebDatasetSource

__all__ = ["Entries", "Entry", "FolderSource", "Source", "Which", "fingerprint", "open_source", "printable"]

Which = Literal["images", "held_out"]
HUB_PARQUET = ("*.parquet", "data/*.parquet", "*/train/*.parquet")  # where a clone of the hub's repository has them


def open_source(data: Data, which: Which = "images") -> Source:
    """The pictures that `data.images` names, or `data.held_out`, which is of the same kind.

    Raises UserError that begins with the field's name.
    """
    path = getattr(data, which)
    assert path is not None
    return _OPENERS[data.source](path, f"data.{which}", data)


def _folder(path: str, field: str, data: Data) -> Source:
    return ZipSource(path, field) if _is_zip(path) else FolderSource(path, field)


def _imagenet(path: str, field: str, data: Data) -> Source:
    if path.endswith(".parquet") or any(any(Path(path).glob(form)) for form in HUB_PARQUET):
        return ImageNetParquet(path, field, data.image_field, data.label_field)
    return ImageNetTar(path, field) if path.endswith(".tar") else ImageNetFolder(path, field)


def _faces(path: str, field: str, data: Data) -> Source:
    """FFHQ (a tree of thousands, or flat) and CelebA-HQ (JPG, PNG or NPY), in a folder or a zip."""
    suffixes = PICTURE_SUFFIXES | {".npy"}
    source = ZipSource if _is_zip(path) else OneClassFolder
    return source(path, field, "face", suffixes)


def _lsun(path: str, field: str, data: Data) -> Source:
    """A category: its LMDB, or its pictures in a folder or a zip; the class is named as that is."""
    name = Path(path).resolve().stem.removesuffix("_lmdb")
    if _is_zip(path):
        return ZipSource(path, field, name)
    is_lmdb = path.endswith(".mdb") or (Path(path) / DATA).exists()
    return LmdbSource(path, field, name) if is_lmdb else OneClassFolder(path, field, name)


def _webdataset(path: str, field: str, data: Data) -> Source:
    return WebDatasetSource(path, field, data.image_field, data.label_field)


def _parquet(path: str, field: str, data: Data) -> Source:
    return ParquetSource(path, field, data.image_field, data.label_field)


def _is_zip(path: str) -> bool:
    return path.lower().endswith(".zip")


_OPENERS: dict[str, Callable[[str, str, Data], Source]] = {
    "folder": _folder,
    "imagenet": _imagenet,
    "ffhq": _faces,
    "celebahq": _faces,
    "lsun": _lsun,
    "webdataset": _webdataset,
    "parquet": _parquet,
}
