"""Names, layouts and checksums shared by the writer and the readers of shards."""

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from isal import isal_zlib

VERSION = 3  # 3: records hold the shard's number and the hashes of its images
INDEX = "index.json"
SAMPLES = "samples.npy"
SAMPLE = np.dtype(
    [
        ("position", "<u8"),  # in the source's sorted list
        ("offset", "<u8"),  # of the moments in the shard, after the npy header
        ("flip_offset", "<u8"),  # 0: no flipped moments
        ("shard", "<u4"),
        ("label", "<u4"),
        ("crc32", "<u4"),  # of the moments' bytes, with the label as the initial value
        ("flip_crc32", "<u4"),
    ]
)
MOMENTS = np.dtype("<f2")

# CRC-32 of a buffer with the label as its initial value, so that it also covers the label. isal computes zlib's CRC-32
# seven times as fast. No wrapper: every sample of a batch passes through it.
checksum: Callable[[Any, int], int] = isal_zlib.crc32

REMEDY = "delete that file if it is there, and run preprocess/encode_latents.py again: it encodes what is missing alone"


@dataclass(frozen=True)
class Sample:
    """An image's latents, to be written to a shard."""

    position: int
    key: str
    label: int
    width: int  # pixels, before cropping
    height: int
    moments: np.ndarray  # (2C, h, w) float16
    flipped: np.ndarray | None
    digest: str = ""  # first 16 hex digits of the sha256 of the encoded bytes


@dataclass(frozen=True)
class Rejection:
    """A rejected image, and why."""

    key: str
    reason: str
    position: int = field(default=-1, compare=False)
    digest: str = field(default="", compare=False)  # as in Sample; empty if the bytes could not be read


def shard_name(number: int) -> str:
    return f"latents-{number:06d}.tar"


def rows_name(shard: str) -> str:
    """The name of the file with this shard's rows."""
    return f"{Path(shard).stem}.samples.npy"


def member_name(position: int) -> str:
    return f"{position:010d}"


def npy_header(descr: Any, shape: tuple[int, ...]) -> bytes:
    """The header of a .npy file, version 1.0."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": shape})
    return header.getvalue()


def rows_header(count: int) -> bytes:
    """The header of the .npy file with `count` rows."""
    return npy_header(np.lib.format.dtype_to_descr(SAMPLE), (count,))


def rows_size(count: int) -> int:
    """Bytes of the .npy file with `count` rows."""
    return len(rows_header(count)) + count * SAMPLE.itemsize
