"""What a folder or archive of images holds: classes, sizes, and every file that is unusable, with the reason."""

import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from common.errors import UserError
from common.ranks import own_cores
from common.recipe import Data
from fpdm.rng import permute
from preprocess.encoding.image_loader import open_image
from preprocess.images.images import WHITE, Rejected, decode
from preprocess.sources import Entry, Source, open_source
from preprocess.sources.entries import ENCODED_AS, kind_of
from preprocess.sources.folders import walk_visible
from preprocess.sources.idx import IMAGES

LOOKED_AT = 5000  # images of a larger data set that are decoded, evenly at random
BY_SUFFIX = {".parquet": "parquet", ".tar": "webdataset"}


@dataclass(frozen=True)
class Seen:
    """One file: its class, and its size in pixels with whether all corners are white; or why it is unusable."""

    key: str
    label: int
    size: tuple[int, int] = (0, 0)
    white: bool = False
    reason: str = ""


@dataclass(frozen=True)
class Look:
    """`found` files that are images by their names, of which `looked_at` were decoded."""

    data: Data  # with the source that reads them
    class_names: list[str]
    found: int
    seen: list[Seen]
    unsupported: list[tuple[str, str]]  # files of other encodings, and why they are left out
    others: Counter[str]  # number of files that are no images, by reason

    @property
    def unusable(self) -> list[tuple[str, str]]:
        """Names and reasons of images that encoding will reject."""
        return [(one.key, one.reason) for one in self.seen if one.reason]

    @property
    def usable(self) -> int:
        """Images that encoding will accept: counted where all were decoded, else estimated."""
        return round(self.found * (1 - len(self.unusable) / len(self.seen)))

    @property
    def per_class(self) -> dict[str, int]:
        """Usable images of each class among those that were decoded."""
        counts = Counter(one.label for one in self.seen if not one.reason)
        return {name: counts[label] for label, name in enumerate(self.class_names)}

    @property
    def sizes(self) -> np.ndarray:
        """(N, 2) widths and heights."""
        return np.array([one.size for one in self.seen if not one.reason])

    @property
    def on_white(self) -> float:
        """Share of images whose four corners are white, as those cut out of their background are."""
        return float(np.mean([one.white for one in self.seen if not one.reason]))


def look(data: Data) -> Look:
    """Decodes the images, at most LOOKED_AT of them. Raises UserError as `open_source`, and where none is usable."""
    data = replace(data, source=_kind(data))
    warnings.filterwarnings("ignore", module="PIL")  # of what is named below
    source = open_source(data)
    count = len(source.entries)
    chosen = torch.arange(count) if count <= LOOKED_AT else permute(0, "init", torch.arange(LOOKED_AT), count).sort()[0]
    with ThreadPoolExecutor(own_cores()) as threads:
        looks = threads.map(lambda position: _look_at(source, source.entries[position]), chosen.tolist())
        seen = list(tqdm(looks, total=len(chosen), desc="look", unit="image", delay=2, leave=False))
    if all(one.reason for one in seen):
        raise UserError(f"{data.images}: none of {len(seen):,} images is usable; {seen[0].key}: {seen[0].reason}")
    others = Counter({reason: n for reason, n in source.left_out.items() if not reason.startswith(ENCODED_AS)})
    return Look(data, source.class_names, count, seen, list(_unsupported(data.images)), others)


def _kind(data: Data) -> Any:
    """The source that reads the files, unless the user has named one."""
    path = Path(data.images)
    files = [path, *sorted(path.glob("*"))] if path.is_dir() else [path]
    kinds = filter(None, ("idx" if IMAGES.fullmatch(one.name) else BY_SUFFIX.get(one.suffix) for one in files))
    return next(kinds, data.source) if data.source == "folder" else data.source


def _look_at(source: Source, entry: Entry) -> Seen:
    try:
        image = decode(open_image(source, entry))
    except Rejected as reason:
        return Seen(entry.key, entry.label, reason=str(reason))
    return Seen(entry.key, entry.label, image.size, _has_white_corners(image))


def _has_white_corners(image: Image.Image) -> bool:
    right, bottom = image.width - 1, image.height - 1
    return all(image.getpixel(corner) == WHITE[:3] for corner in ((0, 0), (right, 0), (0, bottom), (right, bottom)))


def _unsupported(images: str) -> Iterator[tuple[str, str]]:
    """The files of a folder that are images by their suffix, in encodings that are not read."""
    if Path(images).is_dir():
        for folder, _, names in walk_visible(Path(images), "images", Counter()):
            for name in names:
                if (reason := kind_of(name)).startswith(ENCODED_AS):
                    yield str((folder / name).relative_to(images)), reason
