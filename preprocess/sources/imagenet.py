"""ImageNet-1k in its common forms, with the usual class indices: the wnids in sorted order."""

import os
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from common.errors import UserError, errors_as
from preprocess.sources.entries import Entries, Entry, file_stamp, is_image, kind_of, read_at
from preprocess.sources.folder_classes import check_classes, check_not_empty
from preprocess.sources.listing import Layout, Listing, base, some
from preprocess.sources.parquet import ParquetSource
from preprocess.sources.tars import TarMember, Window, tar_members

if TYPE_CHECKING:
    from timm.data.imagenet_info import ImageNetInfo


def class_names(wnids: list[str]) -> list[str]:
    """`n01440764 tench, Tinca tinca`: the wnid, because two of the thousand names are the same (crane)."""
    return [f"{wnid} {_information().label_name_to_description(wnid, detailed=False)}".strip() for wnid in wnids]


def all_wnids() -> list[str]:
    return list(_information().label_names())


@cache
def _information() -> "ImageNetInfo":
    from timm.data.imagenet_info import ImageNetInfo

    return ImageNetInfo("imagenet-1k")


def check_wnids(names: list[str], path: object, field: str) -> None:
    known = set(all_wnids())
    strange = next((name for name in names if name not in known), None)
    if strange is not None:
        raise UserError(
            f"{field}: {path} holds {strange!r}, which is none of ImageNet-1k's 1,000 wnids "
            "(n01440764, ...); name the folder or tar of the training images, or set data.source=folder"
        )


def wnid_folders(listing: Listing) -> Layout:
    """`n01440764/n01440764_10026.JPEG`: one folder per wnid; a subset of the wnids is numbered from 0.

    Raises UserError for images outside of such folders, and for several parents of such folders.
    """
    check_not_empty(listing)
    known, root = set(all_wnids()), listing.root
    homes = [folder for folder in root.walk() if not known.isdisjoint(folder.with_images())] or [root]
    home, folders = homes[0], homes[0].with_images()
    if len(homes) > 1 or (home is not root and home.count() < root.count()):
        where = some([listing.where(folder) for folder in homes])
        raise listing.refusal(root, f"holds ImageNet's folders of wnids further down; name one of them: {where}")
    check_wnids([*folders, *map(base, home.images[:1])], listing.where(home), listing.field)
    check_classes(listing, home, known.intersection(home.folders))
    return Layout(class_names(list(folders)), [folder.keys() for folder in folders.values()], Counter())


class ImageNetTar:
    """ILSVRC2012_img_train.tar: a tar with one tar per wnid, read in place."""

    def __init__(self, path: str | Path, field: str) -> None:
        self.path, self.left_out = Path(path), Counter[str]()
        with errors_as(UserError, f"{field}: {path} cannot be read"):
            file = open(self.path, "rb")  # noqa: SIM115
        with file:
            members = sorted(tar_members(self.path, field, Window(file, 0, os.stat(path).st_size), self.left_out))
            classes = [member for member in members if member.name.endswith(".tar")]
            self.left_out.update(kind_of(member.name) for member in members if member not in classes)
            wnids = [member.name.removesuffix(".tar") for member in classes]
            if not wnids:
                raise UserError(f"{field}: {path} holds no tars of wnids, as n01440764.tar; set data.source=webdataset")
            check_wnids(wnids, self.path, field)
            self.entries = Entries(self._entries(classes, field, file))
        self.class_names = class_names(wnids)

    def open(self, entry: Entry) -> bytes:
        return read_at(self.path, entry.place[0], entry.size)

    def _entries(self, classes: list[TarMember], field: str, file: BinaryIO) -> Iterator[Entry]:
        stamp = file_stamp(os.fstat(file.fileno()))
        for label, inner in enumerate(classes):
            inside = Path(f"{self.path}/{inner.name}")
            members = sorted(tar_members(inside, field, Window(file, inner.offset, inner.size), self.left_out))
            images = [member for member in members if is_image(member.name)]
            if not images:
                raise UserError(f"{field}: {inside} holds no images; complete {self.path}, or pack it without that one")
            self.left_out.update(kind_of(member.name) for member in members if not is_image(member.name))
            for member in images:
                yield Entry(f"{inner.name[:-4]}/{member.name}", label, member.size, (member.offset, 0), stamp)


class ImageNetParquet(ParquetSource):
    """Hugging Face's parquet files; their labels are the standard indices."""

    def __init__(
        self, path: str | Path, field: str, image_field: str | None = None, label_field: str | None = None
    ) -> None:
        super().__init__(path, field, image_field, label_field)
        wnids = all_wnids()
        if self.labels is None:
            raise UserError(f"{field}: {path} has no supported labels; set data.label_field to the column of them")
        if self.named_by_labels:
            check_wnids(self.class_names, self.path, field)
        if len(self.class_names) != len(wnids):
            raise UserError(
                f"{field}: {path} has {len(self.class_names)} classes, ImageNet-1k has {len(wnids)}; "
                "set data.source=parquet"
            )
        self.class_names = class_names(wnids)
