"""Verification of a folder of shards: every byte, checksum, count and number, in several processes."""

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
from preprocess.shards.storage import size_fault


@dataclass(frozen=True)
class ShardCheck:
    """A shard to verify, with its entry in the index."""

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
        """The .npy header of each moments member."""
        return npy_header(MOMENTS.str, self.shape)


def verify(folder: str | Path, processes: int = 1) -> Iterator[str]:
    """Yields a line for each fault. Reads every byte; each process verifies one shard at a time.

    Raises UserError for an unreadable index, and if a process is killed.
    """
    folder = Path(folder)
    index = read_local_index(folder)
    yield from _index_faults(folder, index)
    checks, start = [], 0
    for number, shard in enumerate(index["shardlist"]):
        channels, height, width = index["shape"]
        known = index["accepted"], (channels, height, width), index["settings"]["flips"], len(index["class_names"])
        checks.append(ShardCheck(folder, number, shard, start, *known))
        start += shard["nsamples"]
    if processes == 1:
        for check in checks:
            yield from shard_faults(check)
        return
    try:
        with ProcessPoolExecutor(processes) as pool:
            for faults in pool.map(shard_faults, checks):
                yield from faults
    except BrokenProcessPool:
        raise UserError(
            f"{folder}: one of {processes} verifying processes was killed, probably for lack of memory; "
            "allow more memory or set a smaller --processes"
        ) from None


def _index_faults(folder: Path, index: Index) -> Iterator[str]:
    """Faults in the counts of the index, and in the table of all samples."""
    accepted, images = sum(shard["nsamples"] for shard in index["shardlist"]), index["found"]
    if not accepted == index["accepted"] == images - len(index["rejected"]):
        yield (
            f"{folder / INDEX}: {images} found, {index['accepted']} accepted, {len(index['rejected'])} rejected and "
            f"{accepted} in shards do not add up; {REMEDY}"
        )
    if fault := size_fault(folder / SAMPLES, rows_size(index["accepted"])):
        yield fault
    elif sha256_file(folder / SAMPLES) != index["samples_sha256"]:
        yield _other_bytes(folder / SAMPLES)


def _other_bytes(path: Path) -> str:
    return f"{path}: changed after it was written; {REMEDY}"


def shard_faults(check: ShardCheck) -> list[str]:
    """Faults of a shard, of its rows file, and of its rows in samples.npy."""
    path = check.folder / check.shard["url"]
    own_rows = path.with_name(rows_name(path.name))
    faults = []
    if fault := size_fault(own_rows, rows_size(check.shard["nsamples"])):
        faults.append(fault)
    elif sha256_file(own_rows) != check.shard["samples_sha256"]:
        faults.append(_other_bytes(own_rows))
    if fault := size_fault(path, check.shard["filesize"]):
        return [*faults, fault]
    if size_fault(check.folder / SAMPLES, rows_size(check.accepted)) or not check.shard["filesize"]:
        return faults  # already reported; without rows the samples cannot be located
    in_samples = _sample_faults(check)
    if not in_samples and sha256_file(path) != check.shard["sha256"]:
        in_samples = [f"{path}: changed after it was written, outside of the moments; {REMEDY}"]
    return faults + in_samples


def _sample_faults(check: ShardCheck) -> list[str]:
    path = check.folder / check.shard["url"]
    data = np.memmap(path, np.uint8, "r").view(np.ndarray)  # slicing a memmap is slow
    faults = []
    # Rows as Python numbers, in the order of the fields of SAMPLE.
    for index, row in enumerate(_rows(check).tolist(), check.start):
        position, offset, flip_offset, shard, label, crc, flip_crc = row
        name = f"{path}: sample {index} (member {member_name(position)})"
        places = [(offset, crc), (flip_offset, flip_crc)] if check.flips else [(offset, crc)]
        reasons = [reason for place in places if (reason := _moments_fault(check, data, label, *place))]
        faults += [f"{name} {reason}; {REMEDY}" for reason in reasons]
        if shard != check.number or label >= check.num_classes:
            faults.append(
                f"{name} has shard {shard} and class {label} in {SAMPLES}, which is impossible in shard "
                f"{check.number} and {check.num_classes} classes; {REMEDY}"
            )
    return faults


def _moments_fault(check: ShardCheck, data: np.ndarray, label: int, offset: int, crc: int) -> str | None:
    """The fault of a sample's moments, or of its mirror image's, in the shard; None if they are intact."""
    size = math.prod(check.shape) * MOMENTS.itemsize
    moments = data[offset : offset + size]
    if len(moments) != size or checksum(moments, label) != crc:
        return f"does not match its checksum in {SAMPLES}"
    bits = moments.view("<u2")  # float16: sign, 5 bits of exponent, 10 of fraction
    if (bits & 0x7FFF).max() >= 0x7C00:
        return "has moments that are not finite"
    if bits[len(bits) // 2 :].max() > 0x8000:  # the second half; 0x8000 is minus zero
        return "has a negative standard deviation"
    if check.shard["url"].endswith(".tar") and data[offset - len(check.header) : offset].tobytes() != check.header:
        return f"is no .npy file of shape {check.shape}"
    return None


def _rows(check: ShardCheck) -> np.ndarray:
    """The shard's rows in samples.npy, which readers use."""
    shape = (check.shard["nsamples"],)
    offset = len(rows_header(check.accepted)) + check.start * SAMPLE.itemsize
    return np.memmap(check.folder / SAMPLES, SAMPLE, "r", offset=offset, shape=shape)
