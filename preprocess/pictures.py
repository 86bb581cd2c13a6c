"""Batches of pictures, read, decoded and cropped in worker processes, so that the VAE never waits for them."""

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from preprocess.images import CROPS, Rejected, decode
from preprocess.shards import Rejection
from preprocess.sources import Source

PREFETCHED_BATCHES = 4  # a worker
PR_SET_PDEATHSIG = 1  # of Linux's prctl


@dataclass(frozen=True)
class Loaded:
    """A batch as it comes from a worker: one tensor for all that could be read, and the rest by name."""

    positions: list[int]
    sizes: list[tuple[int, int]]  # width, height before cropping
    images: Tensor | None  # (B, 3, resolution, resolution) uint8; None if none could be read
    rejected: list[Rejection]

    def pin_memory(self) -> "Loaded":
        """Called by the DataLoader: what is pinned is copied to a GPU while that computes."""
        return self if self.images is None else replace(self, images=self.images.pin_memory())


class Pictures(Dataset[Loaded]):
    """Batches by their positions in a source."""

    def __init__(self, source: Source, crop: str, resolution: int) -> None:
        self.source, self.crop, self.resolution = source, CROPS[crop], resolution

    def __getitem__(self, batch: Sequence[int]) -> Loaded:
        positions, sizes, images, rejected = [], [], [], []
        for position in batch:
            entry = self.source.entries[position]
            try:
                image = decode(self.source.open(entry))
                images.append(np.asarray(self.crop(image, self.resolution)))  # (H, W, 3)
            except Rejected as reason:
                rejected.append(Rejection(entry.key, str(reason)))
            else:
                positions.append(position)
                sizes.append(image.size)
        stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous() if images else None
        return Loaded(positions, sizes, stacked, rejected)


def load_pictures(pictures: Pictures, batches: Sequence[range], workers: int) -> "DataLoader[Loaded]":
    """The batches, in their order; `workers` processes prepare them, or this one where that is 0."""
    return DataLoader(
        pictures,
        sampler=batches,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,  # shares the source's list
        worker_init_fn=partial(_end_with, os.getpid()),
        prefetch_factor=PREFETCHED_BATCHES if workers else None,
        pin_memory=torch.cuda.is_available(),
    )


def _end_with(parent: int, _: int) -> None:
    """In a worker: torch's own watch would never end it where `parent` was killed before that watch began."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _as_it_is(loaded: Any) -> Any:
    return loaded
