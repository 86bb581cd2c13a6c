"""Sizes of well-known data sets, to warn about an incomplete one or another split."""

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from common.errors import printable
from preprocess.sources.entries import ENCODED_AS, Source
from preprocess.sources.labels import NONE
from preprocess.sources.parquet import ParquetSource

LSUN = {  # training images of each scene; the validation sets have 300
    "bedroom": 3_033_042,
    "bridge": 818_687,
    "church_outdoor": 126_227,
    "classroom": 168_103,
    "conference_room": 229_069,
    "dining_room": 657_571,
    "kitchen": 2_212_277,
    "living_room": 1_315_802,
    "restaurant": 626_331,
    "tower": 708_264,
}
LSUN_NAME = re.compile(rf"(?:lsun[-_])?({'|'.join(LSUN)})(?:[-_](train|val))?", re.I)


class Known(NamedTuple):
    name: str
    images: int
    others: Mapping[int, str] = MappingProxyType({})  # sizes of related sets


DATA_SETS = {
    "imagenet": Known(
        "ImageNet-1k's training set",
        1_281_167,
        {50_000: "its validation images", 100_000: "its test images", 1_331_167: "those for training and validation"},
    ),
    "ffhq": Known("FFHQ", 70_000, {60_000: "those for training", 10_000: "those for validation"}),
    "celebahq": Known(
        "CelebA-HQ",
        30_000,
        {27_000: "those for training", 3_000: "those for validation", 202_599: "CelebA, which is another set"},
    ),
}


def warnings(kind: str, source: Source) -> list[str]:
    """Warnings, one line each: differences from the data set `kind` (`data.source`), unused columns and files."""
    count, left_out = len(source.entries), source.left_out
    lines = []
    known = _lsun(source.class_names[0]) if kind == "lsun" else DATA_SETS.get(kind)
    if known and count != known.images:
        lines.append(f"warning: {known.name} has {known.images:,} images, found {count:,}{_what(known, count)}")
    if kind == "imagenet" and len(source.class_names) != 1000:
        lines.append(f"warning: ImageNet-1k has 1,000 classes, found {len(source.class_names):,}")
    if isinstance(source, ParquetSource) and source.unread:
        columns = printable(", ".join(source.unread)[:200])
        lines.append(
            f"warning: no labels were found, and all images are one class; columns not read: {columns}; set "
            f"data.label_field to one that labels the images, or to {NONE}"
        )
    if unread := sum(number for reason, number in left_out.items() if reason.startswith(ENCODED_AS)):
        lines.append(f"warning: {unread:,} images are in unsupported formats and left out")
    unnamed = sum(number for reason, number in left_out.items() if reason.startswith("not an image"))
    if unnamed > count:
        lines.append(f"warning: most files are left out: {unnamed:,} have no image's name, {count:,} have")
    return lines


def expected_images(kind: str, images: str) -> int | None:
    """Of the data set `kind` (`data.source`) in the place `images`; None of other sources."""
    name = Path(images).name.removesuffix("_lmdb")
    known = _lsun(name) if kind == "lsun" else DATA_SETS.get(kind)
    return known.images if known else None


def lsun_scene(name: str) -> str | None:
    """The LSUN scene of a folder or archive, by its name."""
    match = LSUN_NAME.fullmatch(name.removesuffix("_lmdb"))
    return match[1].lower() if match else None


def _lsun(name: str) -> Known | None:
    match = LSUN_NAME.fullmatch(name)
    if not match:
        return None
    category = match[1].lower()
    if (match[2] or "train").lower() == "val":
        return Known(f"LSUN's {category}, for validation,", 300, {LSUN[category]: "those for training"})
    return Known(f"LSUN's {category}, for training,", LSUN[category], {300: "those for validation"})


def _what(known: Known, count: int) -> str:
    """A likely explanation of another number of images."""
    if count in known.others:
        return f", as many as {known.others[count]}"
    times, rest = divmod(count, known.images)
    return f", {times} times as many: are there copies?" if times > 1 and not rest else ""
