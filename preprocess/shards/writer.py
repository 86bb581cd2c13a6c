"""Writing shards, their records, and the index over them."""

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from common.errors import UserError
from common.files import atomic_write, sha256_file
from common.sealed import write_sealed
from preprocess.shards.format import (
    INDEX,
    MOMENTS,
    REMEDY,
    SAMPLE,
    SAMPLES,
    VERSION,
    Rejection,
    Sample,
    checksum,
    member_name,
    rows_header,
    rows_name,
    shard_name,
)
from preprocess.shards.forms import (
    Index,
    OtherVersion,
    Record,
    RejectedImage,
    Settings,
    Statistics,
    read_local_index,
    read_record,
    write_index_file,
)

if TYPE_CHECKING:
    from webdataset import TarWriter


def write_shard(
    folder: Path, number: int, outcomes: Iterable[Sample | Rejection], settings: Settings, stamp: str = ""
) -> Record:
    """Writes a shard atomically and returns its record; `stamp` is `Entries.stamp` of its images."""
    tar_path = folder / shard_name(number)
    rows: list[tuple[int, ...]] = []
    rejected: list[RejectedImage] = []
    sums = np.zeros((2, 0))
    digests: list[tuple[int, str]] = []
    with atomic_write(tar_path) as temporary, open(temporary, "wb") as file, _tar_writer(file) as tar:
        for outcome in outcomes:
            digests.append((outcome.position, outcome.digest))
            if isinstance(outcome, Rejection):
                rejected.append({"key": outcome.key, "reason": outcome.reason})
            else:
                rows.append(_add_sample(tar, number, outcome))
                own = _channel_sums(outcome.moments)
                sums = own if len(rows) == 1 else sums + own
    with atomic_write(rows_path(tar_path)) as temporary, open(temporary, "wb") as file:
        np.save(file, np.array(rows, SAMPLE), allow_pickle=False)
    record: Record = {
        "version": VERSION,
        "number": number,
        "settings": settings,
        "nsamples": len(rows),
        "filesize": tar_path.stat().st_size,
        "sha256": sha256_file(tar_path),
        "samples_sha256": sha256_file(rows_path(tar_path)),
        "rejected": rejected,
        "channel_sums": [row.tolist() for row in sums],
        "pictures": [digest for _, digest in sorted(digests)],
        "stamp": stamp,
    }
    write_sealed(tar_path.with_suffix(".json"), record)
    return record


def _tar_writer(file: BinaryIO) -> "TarWriter":
    """A writer of reproducible tars: no time, no user, bytes as they are given."""
    from webdataset import TarWriter  # imports torch, which readers of shards do without

    return TarWriter(file, user="", group="", mode=0o644, mtime=0, encoder=False)


def _add_sample(tar: "TarWriter", shard: int, sample: Sample) -> tuple[int, ...]:
    """Appends a sample's members; returns its row."""
    name = member_name(sample.position)
    offset, crc32 = _add_moments(tar, name, "moments.npy", sample.moments, sample.label)
    flip_offset, flip_crc32 = 0, 0
    if sample.flipped is not None:
        flip_offset, flip_crc32 = _add_moments(tar, name, "moments_flip.npy", sample.flipped, sample.label)
    source = {"key": sample.key, "width": sample.width, "height": sample.height}
    _add_member(tar, name, "cls", str(sample.label).encode())
    _add_member(tar, name, "json", json.dumps(source).encode())
    return sample.position, offset, flip_offset, shard, sample.label, crc32, flip_crc32


def _add_moments(tar: "TarWriter", name: str, field: str, moments: np.ndarray, label: int) -> tuple[int, int]:
    """Appends an array; returns the offset of its bytes and their checksum."""
    array, buffer = np.ascontiguousarray(moments, MOMENTS), io.BytesIO()
    np.lib.format.write_array(buffer, array, allow_pickle=False)
    offset = _add_member(tar, name, field, buffer.getvalue()) + buffer.tell() - array.nbytes
    return offset, checksum(array.data.cast("B"), label)


def _add_member(tar: "TarWriter", name: str, field: str, data: bytes) -> int:
    """Appends a member; returns the offset of its first byte. A `write` of several members would sort them."""
    offset = tar.tarstream.offset + tarfile.BLOCKSIZE
    tar.write({"__key__": name, field: data})
    return offset


def _channel_sums(moments: np.ndarray) -> np.ndarray:
    """(2, C): sums over pixels of E[x] and E[x^2] = mean^2 + std^2, for x drawn from the posterior."""
    mean, std = np.split(moments.astype(np.float64), 2)
    return np.stack([mean.sum(axis=(1, 2)), (mean**2 + std**2).sum(axis=(1, 2))])


def finished_record(folder: Path, number: int, *, thorough: bool) -> Record | None:
    """The record of a finished shard, or None. Checks number and size and, if `thorough`, the hashes."""
    path = folder / shard_name(number)
    if not (path.is_file() and rows_path(path).is_file()):
        return None
    try:
        record = read_record(path.with_suffix(".json"))
    except UserError:  # missing or damaged: the shard is encoded again
        return None
    intact = (record["number"], record["filesize"]) == (number, path.stat().st_size)
    if intact and thorough:
        intact = (sha256_file(path), sha256_file(rows_path(path))) == (record["sha256"], record["samples_sha256"])
    return record if intact else None


def remove_unfinished(folder: Path, numbers: Container[int]) -> None:
    """Deletes temporary files of killed writers of the shards `numbers`, which nobody else may be writing."""
    for path in folder.glob(".latents-*.tmp"):
        left = re.fullmatch(r"\.latents-(\d{6,})\.(tar|samples\.npy|json)\..+\.tmp", path.name)
        if left and int(left[1]) in numbers:
            path.unlink()


def recorded_settings(folder: Path) -> Iterator[tuple[Path, Settings]]:
    """The settings in a folder's index and records. Raises UserError for another format version."""
    for path in [folder / INDEX, *sorted(folder.glob("latents-*.json"))]:
        try:
            yield path, (read_local_index(folder) if path.name == INDEX else read_record(path))["settings"]
        except OtherVersion:
            raise
        except UserError:  # missing or damaged: it is written again
            continue


def write_index(
    folder: Path,
    records: list[Record],
    shape: tuple[int, int, int],
    class_names: list[str],
    left_out: Mapping[str, int] = MappingProxyType({}),
    warnings: Sequence[str] = (),
    stamp: str = "",
) -> None:
    """Merges the shards' records into samples.npy and index.json; not for several processes at once.

    `shape` is (2C, h, w); `left_out` counts the source's files that are no samples, by reason; `warnings` lists
    differences from the known data set; `stamp` is `Entries.stamp` of all images.
    """
    for name in (SAMPLES, INDEX):
        for left in folder.glob(f".{name}.*.tmp"):  # from a killed merge
            left.unlink()
    paths = [folder / shard_name(number) for number in range(len(records))]
    accepted = sum(record["nsamples"] for record in records)
    with atomic_write(folder / SAMPLES) as temporary, open(temporary, "wb") as file:
        file.write(rows_header(accepted))
        for path, record in zip(paths, records, strict=True):
            file.write(_rows_data(path, record))
    for path, record in zip(paths, records, strict=True):
        if record["nsamples"] and 2 * len(record["channel_sums"][0]) != shape[0]:
            raise UserError(f"{path.with_suffix('.json')}: channel_sums: not of {shape[0] // 2} channels; {REMEDY}")
    rejected = [rejection for record in records for rejection in record["rejected"]]
    index: Index = {
        "wids_version": 1,
        "version": VERSION,
        "shardlist": [
            {
                "url": path.name,
                "nsamples": record["nsamples"],
                "filesize": record["filesize"],
                "sha256": record["sha256"],
                "samples_sha256": record["samples_sha256"],
            }
            for path, record in zip(paths, records, strict=True)
        ],
        "settings": records[0]["settings"],
        "class_names": class_names,
        "shape": list(shape),
        "found": accepted + len(rejected),
        "accepted": accepted,
        "rejected": rejected,
        "left_out": dict(sorted(left_out.items())),
        "warnings": list(warnings),
        "samples_sha256": sha256_file(folder / SAMPLES),
        "latents": _statistics(records, accepted * shape[1] * shape[2]),
        "stamp": stamp,
    }
    write_index_file(folder, index)


def _rows_data(tar_path: Path, record: Record) -> bytes:
    """A shard's rows without their header. Raises UserError if they contradict the record."""
    path = rows_path(tar_path)
    with open(path, "rb") as file:
        data = file.read()
    if hashlib.sha256(data).hexdigest() != record["samples_sha256"]:
        raise UserError(f"{path}: changed after it was written; {REMEDY}")
    return data[len(rows_header(record["nsamples"])) :]


def _statistics(records: list[Record], count: int) -> Statistics:
    """Mean and standard deviation per channel of unscaled latents, over all pixels, without flips."""
    sums = [np.array(record["channel_sums"]) for record in records if record["nsamples"]]
    if not sums:
        return {"mean": [], "std": []}
    mean, square = np.sum(sums, axis=0) / count
    return {"mean": mean.tolist(), "std": np.sqrt(square - mean**2).tolist()}


def rows_path(tar_path: Path) -> Path:
    return tar_path.with_name(rows_name(tar_path.name))
