"""Where pictures come from. A source lists its pictures in a stable order without reading one, and opens any of them.

`SOURCES` maps `data.source` to what opens `data.images`; each finds out by itself in which form the data set is there.
"""

from collections.abc import Callable
from pathlib import Path

from preprocess.sources.archives import ZipSource
from preprocess.sources.entries import PICTURE_SUFFIXES, Entries, Entry, Source, fingerprint, printable
from preprocess.sources.folders import FolderSource, OneClassFolder
from preprocess.sources.imagenet import ImageNetFolder, ImageNetParquet, ImageNetTar
from preprocess.sources.lsun import DATA, LmdbSource
from preprocess.sources.parquet import ParquetSource
from preprocess.sources.webdataset import WebDatasetSource

__all__ = ["SOURCES", "Entries", "Entry", "FolderSource", "Source", "fingerprint", "printable"]


def _folder(path: str, field: str) -> Source:
    return ZipSource(path, field) if _is_zip(path) else FolderSource(path, field)


def _imagenet(path: str, field: str) -> Source:
    if path.endswith(".parquet") or any(Path(path).glob("*.parquet")):
        return ImageNetParquet(path, field)
    return ImageNetTar(path, field) if path.endswith(".tar") else ImageNetFolder(path, field)


def _faces(path: str, field: str) -> Source:
    """FFHQ (a tree of thousands, or flat) and CelebA-HQ (JPG, PNG or NPY), in a folder or a zip."""
    suffixes = PICTURE_SUFFIXES | {".npy"}
    source = ZipSource if _is_zip(path) else OneClassFolder
    return source(path, field, "face", suffixes)


def _lsun(path: str, field: str) -> Source:
    """A category: its LMDB, or its pictures in a folder or a zip; the class is named as that is."""
    name = Path(path).resolve().stem.removesuffix("_lmdb")
    if _is_zip(path):
        return ZipSource(path, field, name)
    is_lmdb = path.endswith(".mdb") or (Path(path) / DATA).exists()
    return LmdbSource(path, field, name) if is_lmdb else OneClassFolder(path, field, name)


def _is_zip(path: str) -> bool:
    return path.lower().endswith(".zip")


SOURCES: dict[str, Callable[[str, str], Source]] = {
    "folder": _folder,
    "imagenet": _imagenet,
    "ffhq": _faces,
    "celebahq": _faces,
    "lsun": _lsun,
    "webdataset": WebDatasetSource,
    "parquet": ParquetSource,
}
