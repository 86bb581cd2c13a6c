"""Proving a folder of shards whole: every byte, checksum, count and number, in several processes."""

import math
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import sha256_file
from preprocess.shards.format import (
    INDEX,
    MOMENTS,
    REMEDY,
    SAMPLE,
    SAMPLES,
    checksum,
    member_name,
    npy_header,
    rows_header,
    rows_name,
    rows_size,
)
from preprocess.shards.forms import Index, Shard, read_local_index


@dataclass(frozen=True)
class Part:
    """One shard, and what the index says of it."""

    folder: Path
    number: int
    shard: Shard
    start: int  # index of its first sample
    accepted: int  # samples in all
    shape: tuple[int, int, int]
    flips: bool
    num_classes: int

    @cached_property
    def header(self) -> bytes:
        """Of each moments member."""
        return npy_header(MOMENTS.str, self.shape)


def verify(folder: str | Path, processes: int = 1) -> Iterator[str]:
    """Yields one line a fault, nothing if the folder is whole. Reads every byte; a process works on a shard at a time.

    Raises UserError for an index that cannot be read, or that names files elsewhere: there is nothing to compare with;
    and where a process is killed.
    """
    folder = Path(folder)
    index = read_local_index(folder)
    yield from _index_faults(folder, index)
    parts, start = [], 0
    for number, shard in enumerate(index["shardlist"]):
        channels, height, width = index["shape"]
        known = index["accepted"], (channels, height, width), index["settings"]["flips"], len(index["class_names"])
        parts.append(Part(folder, number, shard, start, *known))
        start += shard["nsamples"]
    if processes == 1:
        for part in parts:
            yield from shard_faults(part)
        return
    try:
        with ProcessPoolExecutor(processes) as pool:
            for faults in pool.map(shard_faults, parts):
                yield from faults
    except BrokenProcessPool:
        raise UserError(
            f"{folder}: one of {processes} processes that prove it was killed, as for lack of memory; "
            "allow more memory or set a smaller --processes"
        ) from None


def _index_faults(folder: Path, index: Index) -> Iterator[str]:
    """Counts that do not add up, and a table of samples that is not the index's."""
    accepted, found = sum(shard["nsamples"] for shard in index["shardlist"]), index["found"]
    if not accepted == index["accepted"] == found - len(index["rejected"]):
        yield (
            f"{folder / INDEX}: {found} found, {index['accepted']} accepted, {len(index['rejected'])} rejected and "
            f"{accepted} in shards do not add up; {REMEDY}"
        )
    if fault := _file_fault(folder / SAMPLES, rows_size(index["accepted"])):
        yield fault
    elif sha256_file(folder / SAMPLES) != index["samples_sha256"]:
        yield _other_bytes(folder / SAMPLES)


def _file_fault(path: Path, size: int) -> str | None:
    found = f"{path.stat().st_size} bytes" if path.is_file() else "missing"
    return None if found == f"{size} bytes" else f"{path}: {found}, the index says {size} bytes; {REMEDY}"


def _other_bytes(path: Path) -> str:
    return f"{path}: not the bytes that were written; {REMEDY}"


def shard_faults(part: Part) -> list[str]:
    """The faults of a shard, of its own rows, and of its rows in the table of all."""
    path = part.folder / part.shard["url"]
    own_rows = path.with_name(rows_name(path.name))
    faults = []
    if fault := _file_fault(own_rows, rows_size(part.shard["nsamples"])):
        faults.append(fault)
    elif sha256_file(own_rows) != part.shard["samples_sha256"]:
        faults.append(_other_bytes(own_rows))
    if fault := _file_fault(path, part.shard["filesize"]):
        return [*faults, fault]
    if _file_fault(part.folder / SAMPLES, rows_size(part.accepted)) or not part.shard["filesize"]:
        return faults  # told already; without rows nothing says where samples lie
    in_samples = _sample_faults(part)
    if not in_samples and sha256_file(path) != part.shard["sha256"]:
        in_samples = [f"{path}: not the bytes that were written, outside any moments; {REMEDY}"]
    return faults + in_samples


def _sample_faults(part: Part) -> list[str]:
    path = part.folder / part.shard["url"]
    data = np.memmap(path, np.uint8, "r").view(np.ndarray)  # slices of a memmap are slow to make
    faults = []
    # Python's own numbers, a sample after the other: the fields of SAMPLE, in their order.
    for index, row in enumerate(_rows(part).tolist(), part.start):
        position, offset, flip_offset, shard, label, crc, flip_crc = row
        name = f"{path}: sample {index} (member {member_name(position)})"
        places = [(offset, crc), (flip_offset, flip_crc)] if part.flips else [(offset, crc)]
        reasons = [reason for place in places if (reason := _moments_fault(part, data, label, *place))]
        faults += [f"{name} {reason}; {REMEDY}" for reason in reasons]
        if shard != part.number or label >= part.num_classes:
            faults.append(
                f"{name} is in shard {shard} and of class {label} by {SAMPLES}, which is not possible in shard "
                f"{part.number} and {part.num_classes} classes; {REMEDY}"
            )
    return faults


def _moments_fault(part: Part, data: np.ndarray, label: int, offset: int, crc: int) -> str | None:
    """What is wrong with a sample's moments (or those of its mirror image) where they lie in the shard."""
    size = math.prod(part.shape) * MOMENTS.itemsize
    moments = data[offset : offset + size]
    if len(moments) != size or checksum(moments, label) != crc:
        return f"does not match its checksum in {SAMPLES}"
    bits = moments.view("<u2")  # float16: sign, 5 bits of exponent, 10 of fraction
    if (bits & 0x7FFF).max() >= 0x7C00:
        return "has moments that are not finite"
    if bits[len(bits) // 2 :].max() > 0x8000:  # the second half; 0x8000 is minus zero
        return "has a negative standard deviation"
    if part.shard["url"].endswith(".tar") and data[offset - len(part.header) : offset].tobytes() != part.header:
        return f"is no .npy file of shape {part.shape}"
    return None


def _rows(part: Part) -> np.ndarray:
    """The shard's rows as the readers find them, in the table of all."""
    shape = (part.shard["nsamples"],)
    offset = len(rows_header(part.accepted)) + part.start * SAMPLE.itemsize
    return np.memmap(part.folder / SAMPLES, SAMPLE, "r", offset=offset, shape=shape)
