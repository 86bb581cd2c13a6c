"""How many images known data sets have, so that a part of one or another split is reported."""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from common.errors import printable
from preprocess.sources.entries import ENCODED_AS, Source
from preprocess.sources.labels import NONE
from preprocess.sources.parquet import ParquetSource

LSUN = {  # images to train with of each scene; 300 are for validation
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
    others: Mapping[int, str] = MappingProxyType({})  # counts by which something else is known


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
    """One line each: what is unlike the data set `kind` (`data.source`), and what is left out that may be meant."""
    found, left_out = len(source.entries), source.left_out
    told = []
    known = _lsun(source.class_names[0]) if kind == "lsun" else DATA_SETS.get(kind)
    if known and found != known.images:
        told.append(f"warning: {known.name} has {known.images:,} images, here are {found:,}{_what(known, found)}")
    if kind == "imagenet" and len(source.class_names) != 1000:
        told.append(f"warning: ImageNet-1k has 1,000 classes, here are {len(source.class_names):,}")
    if isinstance(source, ParquetSource) and source.unread:
        columns = printable(", ".join(source.unread)[:200])
        told.append(
            f"warning: no labels were found, and all images are one class; columns that are not read: {columns}; set "
            f"data.label_field to one that labels the images, or to {NONE}"
        )
    if unread := sum(count for reason, count in left_out.items() if reason.startswith(ENCODED_AS)):
        told.append(f"warning: {unread:,} images are in formats that are not read, and left out")
    unnamed = sum(count for reason, count in left_out.items() if reason.startswith("not an image"))
    if unnamed > found:
        told.append(f"warning: most files are left out: {unnamed:,} are no images by their names, {found:,} are")
    return told


def lsun_scene(name: str) -> str | None:
    """The scene that a folder or archive of LSUN's is of, by its name."""
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


def _what(known: Known, found: int) -> str:
    """What the number found is known for."""
    if found in known.others:
        return f", as many as {known.others[found]}"
    times, rest = divmod(found, known.images)
    return f", {times} times as many: are there copies?" if times > 1 and not rest else ""
