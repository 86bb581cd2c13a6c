"""One pass over a set of images: features, thumbnails and hashes. All else is computed from these."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.errors import UserError
from common.ranks import own_device
from pipeline.features.extractors import ExtractorWeights, Features
from pipeline.judging.inputs import Judged

THUMBNAIL = 16  # side in pixels
SAME = 0.1  # thumbnails whose difference is this share of their contrast are of the same image
BLOCK = 4096  # images whose distances to all others are held at once


@dataclass(frozen=True)
class Measuring:
    """An extractor as the judge uses it: `features` as `NamedExtractor.features`."""

    weights: ExtractorWeights
    layers: tuple[str, ...]
    features: Callable[[Iterable[NDArray[np.uint8]]], Iterator[Features]]
    network: Callable[[], torch.nn.Module]  # loads it

    def rows(self, images: Iterable[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """The pooled features of images, (N, D)."""
        return np.concatenate([batch["pooled"] for batch in self.features(images)])


@dataclass(frozen=True)
class Scan:
    """What one pass over a set of N images found."""

    images: Judged
    resolution: int
    features: dict[str, NDArray[np.float32]]  # by layer, each (N, D)
    thumbnails: NDArray[np.uint8]  # (N, THUMBNAIL, THUMBNAIL, 3)
    digests: list[bytes]  # sha256 of each image's pixels

    @property
    def count(self) -> int:
        return len(self.digests)

    @property
    def pooled(self) -> NDArray[np.float32]:
        return self.features["pooled"]

    @property
    def pixels_sha256(self) -> str:
        """Of the images in whatever order and container."""
        return hashlib.sha256(b"".join(sorted(self.digests))).hexdigest()

    @property
    def small(self) -> NDArray[np.float32]:
        """The thumbnails as rows, (N, 768)."""
        return self.thumbnails.reshape(self.count, -1).astype(np.float32)

    def chosen(self, positions: NDArray[np.integer]) -> list[NDArray[np.uint8]]:
        """The images at these positions, in the order of the set."""
        return pick(self.images.iterate(), positions)


def scan(images: Judged, measuring: Measuring, field: str) -> Scan:
    """Raises UserError for fewer than two images, and for images of several sizes."""
    digests: list[bytes] = []
    thumbnails: list[NDArray[np.uint8]] = []
    shape: tuple[int, ...] = ()

    def watched() -> Iterator[NDArray[np.uint8]]:
        nonlocal shape
        for image in images.iterate():
            shape = shape or image.shape
            if image.shape != shape or shape[0] != shape[1]:
                raise UserError(
                    f"{field}: {images.path}: images of {shape} and {image.shape}; all are square, of one size"
                )
            digests.append(hashlib.sha256(np.ascontiguousarray(image).data).digest())
            thumbnails.append(thumbnail(image))
            yield image

    batches = list(measuring.features(watched()))
    if len(digests) < 2:
        raise UserError(f"{field}: {images.path} has {len(digests)} images; a distance needs two at least")
    features = {layer: np.concatenate([batch[layer] for batch in batches]) for layer in batches[0]}
    return Scan(images, shape[0], features, np.stack(thumbnails), digests)


def thumbnail(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(THUMBNAIL, THUMBNAIL, 3): means of areas."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    small = torch.nn.functional.adaptive_avg_pool2d(pixels, THUMBNAIL)[0].permute(1, 2, 0)
    return small.round().to(torch.uint8).numpy()


def pick(images: Iterable[NDArray[np.uint8]], positions: NDArray[np.integer]) -> list[NDArray[np.uint8]]:
    """The images at these ascending positions; the rest is passed over."""
    rest, steps = iter(images), [-1, *positions.tolist()]
    return [next(islice(rest, later - earlier - 1, None)) for earlier, later in pairwise(steps)]


def nearest(
    rows: NDArray[np.floating], others: NDArray[np.floating], *, beside_itself: bool = False
) -> NDArray[np.int64]:
    """For each row the position of the nearest of the others, (N,); `beside_itself`: the two are one set."""
    device = own_device()
    middle = others.mean(axis=0)  # small numbers, so that their squares keep their digits
    first, second = (torch.from_numpy(each - middle).float().to(device) for each in (rows, others))
    found: list[Tensor] = []
    size = max(1, BLOCK * BLOCK // len(second))  # bounds the memory
    for start in range(0, len(first), size):
        distances = torch.cdist(first[start : start + size], second)
        if beside_itself:
            places = torch.arange(start, start + len(distances), device=device)
            distances[torch.arange(len(distances), device=device), places] = torch.inf
        found.append(distances.argmin(dim=1))
    return torch.cat(found).cpu().numpy()


def copies(found: Scan) -> NDArray[np.bool_]:
    """(N,): whether an image is, exactly or nearly, mirrored or not, one that comes earlier in the set."""
    seen: set[bytes] = set()
    repeated = np.zeros(found.count, bool)
    for position, digest in enumerate(found.digests):
        repeated[position] = digest in seen
        seen.add(digest)
    unique = np.flatnonzero(~repeated)
    if len(unique) > 1:
        near, partner = _near(found.small[unique], found.small[unique], beside_itself=True)
        repeated[unique[near & (partner < np.arange(len(unique)))]] = True
    return repeated


def copies_of(found: Scan, reference: Scan) -> NDArray[np.bool_]:
    """(N,): whether an image is a near-copy, mirrored or not, of one of the reference's."""
    return _near(found.small, reference.small)[0]


def _near(
    rows: NDArray[np.float32], others: NDArray[np.float32], *, beside_itself: bool = False
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Of thumbnails (N, 768): whether each is of the same image as its nearest other, and the place of that one."""
    mirrored = rows.reshape(-1, THUMBNAIL, THUMBNAIL, 3)[:, :, ::-1].reshape(rows.shape)
    turns = [(each, nearest(each, others, beside_itself=beside_itself)) for each in (rows, mirrored)]
    differences = np.stack([np.sqrt(np.square(each - others[place]).mean(axis=1)) for each, place in turns])
    best = differences.argmin(axis=0)
    place = np.stack([place for _, place in turns])[best, np.arange(len(rows))]
    contrast = others[place].reshape(-1, THUMBNAIL**2, 3).std(axis=1).mean(axis=1)
    return differences.min(axis=0) < SAME * contrast, place
