"""Names, layouts and checksums that the writer and the readers of shards share."""

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from isal import isal_zlib

VERSION = 3  # 3: records say which shard they are of, and what it was made of
INDEX = "index.json"
SAMPLES = "samples.npy"
SAMPLE = np.dtype(
    [
        ("position", "<u8"),  # in the sorted source list
        ("offset", "<u8"),  # of the moments' first byte in the shard, past the npy header
        ("flip_offset", "<u8"),  # 0: no flipped moments
        ("shard", "<u4"),
        ("label", "<u4"),
        ("crc32", "<u4"),  # of the moments' bytes, begun with the label in place of 0: it covers both
        ("flip_crc32", "<u4"),
    ]
)
MOMENTS = np.dtype("<f2")

# CRC-32 of a buffer, begun with the label: a sample with another label does not match. isal's is zlib's, bit for bit,
# and seven times as fast; no function of ours around it, because every sample of a batch passes through it.
checksum: Callable[[Any, int], int] = isal_zlib.crc32

REMEDY = "delete that file and run preprocess/encode_latents.py again: it makes what is missing and keeps the rest"


@dataclass(frozen=True)
class Sample:
    """One image's latents, on their way into a shard."""

    position: int
    key: str
    label: int
    width: int  # of the image before cropping, pixels
    height: int
    moments: np.ndarray  # (2C, h, w) float16
    flipped: np.ndarray | None
    digest: str = ""  # the first 16 hex digits of the sha256 of its encoded bytes


@dataclass(frozen=True)
class Rejection:
    """One image that could not be used, and why."""

    key: str
    reason: str
    position: int = field(default=-1, compare=False)
    digest: str = field(default="", compare=False)  # as a Sample's, where its bytes could be read


def shard_name(number: int) -> str:
    return f"latents-{number:06d}.tar"


def rows_name(shard: str) -> str:
    """The file with the rows of the shard of this name."""
    return f"{Path(shard).stem}.samples.npy"


def member_name(position: int) -> str:
    return f"{position:010d}"


def npy_header(descr: Any, shape: tuple[int, ...]) -> bytes:
    """The first bytes of a .npy file, version 1.0, of an array of this type and shape."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": shape})
    return header.getvalue()


def rows_header(count: int) -> bytes:
    """The first bytes of the .npy file that holds `count` rows."""
    return npy_header(np.lib.format.dtype_to_descr(SAMPLE), (count,))


def rows_size(count: int) -> int:
    """Bytes of the .npy file that holds `count` rows."""
    return len(rows_header(count)) + count * SAMPLE.itemsize
