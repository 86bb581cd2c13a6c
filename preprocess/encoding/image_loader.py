"""Loads batches of images: reads, decodes and crops them."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from common.errors import errors_as
from preprocess.images.images import CROPS, Rejected, decode
from preprocess.shards import Rejection
from preprocess.sources import Entry, Source


@dataclass(frozen=True)
class LoadedBatch:
    """A batch: a tensor of the readable images, and the rejected ones with their reasons."""

    positions: list[int]
    sizes: list[tuple[int, int]]  # width, height before cropping
    digests: list[str]  # `image_digest` of each
    images: Tensor | None  # (B, 3, resolution, resolution) uint8; None if all were rejected
    rejected: list[Rejection]

    def with_images(self, places: Tensor) -> "LoadedBatch":
        """This batch with the pixels that `ImageLoader.fill` wrote to `places`."""
        return replace(self, images=places[: len(self.positions)] if self.positions else None)


class ImageLoader:
    """Loads images by their positions in a source."""

    def __init__(self, source: Source, crop: str, resolution: int) -> None:
        self.source, self.crop, self.resolution = source, CROPS[crop], resolution

    def __getitem__(self, batch: Sequence[int]) -> LoadedBatch:
        places = np.empty((len(batch), 3, self.resolution, self.resolution), np.uint8)
        return self.fill(places, batch).with_images(torch.from_numpy(places))

    def fill(self, places: np.ndarray, batch: Iterable[int]) -> LoadedBatch:
        """Writes the readable images to the first of `places` (B, 3, resolution, resolution) uint8."""
        loaded = LoadedBatch([], [], [], None, [])
        for position in batch:
            entry, digest = self.source.entries[position], ""
            try:
                data = open_image(self.source, entry)
                digest = image_digest(data)
                image = decode(data)
                with errors_as(Rejected, "cannot be cropped"):
                    cropped = np.asarray(self.crop(image, self.resolution)).transpose(2, 0, 1)  # (3, H, W) uint8
                places[len(loaded.positions)] = cropped
            except Rejected as reason:
                loaded.rejected.append(Rejection(entry.key, str(reason), position, digest))
            else:
                loaded.positions.append(position)
                loaded.sizes.append(image.size)
                loaded.digests.append(digest)
        return loaded


def open_image(source: Source, entry: Entry) -> bytes:
    """An image's encoded bytes. Raises Rejected if they cannot be read."""
    with errors_as(Rejected, "cannot be read"):
        return source.open(entry)


def image_digest(data: bytes) -> str:
    """The first sixteen hex digits of the sha256 of an image's encoded bytes."""
    return hashlib.sha256(data).hexdigest()[:16]
