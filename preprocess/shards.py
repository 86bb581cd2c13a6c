"""THE format of latent shards: WebDataset tars with checksums, an index, and a verified random-access reader.

    latents-000000.tar          plain ustar, reproducible to the byte; a sample's members lie next to each other:
        0000000042.moments.npy          float16 (2C, h, w): posterior mean and standard deviation, unscaled
        0000000042.moments_flip.npy     the same of the mirrored picture, where data.flips asks for it
        0000000042.cls                  class index as text
        0000000042.json                 key in the source, width, height
    latents-000000.samples.npy  one row (SAMPLE) a sample
    latents-000000.json         the shard's record; written last, so a shard without one is unfinished
    samples.npy                 all rows, memory-mapped by the reader
    index.json                  all records and what they were made with; written last of all

A member's number is the picture's position in the sorted source list, and shard i covers a fixed slice of that list:
any worker can write any shard, and a kill costs the shard in hand.
"""

import io
import json
import math
import mmap
import tarfile
import zlib
from collections.abc import Container, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from common.errors import UserError
from common.files import atomic_write, content_key, read_json, sha256_file, write_json

VERSION = 1
INDEX = "index.json"
SAMPLES = "samples.npy"
SAMPLE = np.dtype(
    [
        ("position", "<u8"),  # in the sorted source list
        ("offset", "<u8"),  # of the moments' first byte in the tar, past the npy header
        ("flip_offset", "<u8"),  # 0: no flipped moments
        ("shard", "<u4"),
        ("label", "<u4"),
        ("crc32", "<u4"),  # of the moments' bytes, begun with the label in place of 0: it covers both
        ("flip_crc32", "<u4"),
    ]
)
MOMENTS = np.dtype("<f2")

Settings = dict[str, Any]
Record = dict[str, Any]

REMEDY = "delete that file and run preprocess/encode_latents.py again: it makes what is missing and keeps the rest"


@dataclass(frozen=True)
class Sample:
    """One picture's latents, on their way into a shard."""

    position: int
    key: str
    label: int
    width: int  # of the picture before cropping, pixels
    height: int
    moments: np.ndarray  # (2C, h, w) float16
    flipped: np.ndarray | None


@dataclass(frozen=True)
class Rejection:
    """One picture that could not be used, and why."""

    key: str
    reason: str


def shard_name(number: int) -> str:
    return f"latents-{number:06d}.tar"


def member_name(position: int) -> str:
    return f"{position:010d}"


# Writing


def write_shard(folder: Path, number: int, outcomes: Iterable[Sample | Rejection], settings: Settings) -> Record:
    """Writes one shard, whole or not at all, and returns its record. `settings`: what it is made with."""
    tar_path = folder / shard_name(number)
    rows, rejected, sums = [], [], np.zeros(())
    with atomic_write(tar_path) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
        for outcome in outcomes:
            if isinstance(outcome, Rejection):
                rejected.append(asdict(outcome))
            else:
                rows.append(_add_sample(tar, number, outcome))
                sums = sums + _channel_sums(outcome.moments)
    with atomic_write(_rows_path(tar_path)) as temporary, open(temporary, "wb") as file:
        np.save(file, np.array(rows, SAMPLE), allow_pickle=False)
    record = {
        "settings": settings,
        "nsamples": len(rows),
        "filesize": tar_path.stat().st_size,
        "sha256": sha256_file(tar_path),
        "samples_sha256": sha256_file(_rows_path(tar_path)),
        "rejected": rejected,
        "channel_sums": sums.tolist(),
    }
    _write_sealed(tar_path.with_suffix(".json"), record)
    return record


def _add_sample(tar: tarfile.TarFile, shard: int, sample: Sample) -> tuple[int, ...]:
    """Appends a sample's members; returns its row."""
    name = member_name(sample.position)
    offset, crc32 = _add_moments(tar, f"{name}.moments.npy", sample.moments, sample.label)
    flip_offset, flip_crc32 = 0, 0
    if sample.flipped is not None:
        flip_offset, flip_crc32 = _add_moments(tar, f"{name}.moments_flip.npy", sample.flipped, sample.label)
    source = {"key": sample.key, "width": sample.width, "height": sample.height}
    _add_member(tar, f"{name}.cls", str(sample.label).encode())
    _add_member(tar, f"{name}.json", json.dumps(source).encode())
    return sample.position, offset, flip_offset, shard, sample.label, crc32, flip_crc32


def _add_moments(tar: tarfile.TarFile, name: str, moments: np.ndarray, label: int) -> tuple[int, int]:
    """Returns the offset of the array's bytes and their checksum."""
    array, buffer = np.ascontiguousarray(moments, MOMENTS), io.BytesIO()
    np.lib.format.write_array(buffer, array, allow_pickle=False)
    offset = _add_member(tar, name, buffer.getvalue()) + buffer.tell() - array.nbytes
    return offset, zlib.crc32(array.data, label)


def _add_member(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Returns the offset of the member's first byte. TarInfo's own defaults are time 0, user 0, mode 0644."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    offset = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(member, io.BytesIO(data))
    return offset


def _channel_sums(moments: np.ndarray) -> np.ndarray:
    """(2, C): sums over a sample's pixels of x and x^2, x drawn from the posterior: E[x^2] = mean^2 + std^2."""
    mean, std = np.split(moments.astype(np.float64), 2)
    return np.stack([mean.sum(axis=(1, 2)), (mean**2 + std**2).sum(axis=(1, 2))])


def finished_record(folder: Path, number: int, *, thorough: bool) -> Record | None:
    """A shard's record, if the shard is there of the recorded size and, where `thorough`, hashes."""
    path = folder / shard_name(number)
    if not (path.is_file() and _rows_path(path).is_file()):
        return None
    try:
        record = _read_sealed(path.with_suffix(".json"))
    except UserError:  # missing or damaged: the shard is made again
        return None
    whole = path.stat().st_size == record["filesize"]
    if whole and thorough:
        whole = (sha256_file(path), sha256_file(_rows_path(path))) == (record["sha256"], record["samples_sha256"])
    return record if whole else None


def remove_unfinished(folder: Path, numbers: Container[int]) -> None:
    """Deletes what killed writers of the shards `numbers` left; only for who alone writes these."""
    for path in folder.glob(".latents-*.tmp"):
        if int(path.name.split("-")[1].partition(".")[0]) in numbers:
            path.unlink()


def recorded_settings(folder: Path) -> Iterator[tuple[Path, Settings]]:
    """What the finished shards of a folder, and its index, were made with."""
    for path in [folder / INDEX, *sorted(folder.glob("latents-*.json"))]:
        try:
            yield path, _read_sealed(path)["settings"]
        except UserError:  # missing or damaged: it is made again, and decides nothing
            continue


def write_index(folder: Path, records: list[Record], shape: tuple[int, int, int], class_names: list[str]) -> None:
    """Merges the shards' records into samples.npy and index.json. `shape` is (2C, h, w)."""
    paths = [folder / shard_name(number) for number in range(len(records))]
    with atomic_write(folder / SAMPLES) as temporary, open(temporary, "wb") as file:
        rows = [np.load(_rows_path(path), allow_pickle=False) for path in paths]
        np.save(file, np.concatenate(rows), allow_pickle=False)
    accepted = sum(record["nsamples"] for record in records)
    rejected = [rejection for record in records for rejection in record["rejected"]]
    index = {
        "__kind__": "wids-shard-index-v1",
        "wids_version": 1,
        "version": VERSION,
        "shardlist": [
            {"url": path.name, **{name: record[name] for name in ("nsamples", "filesize", "sha256")}}
            for path, record in zip(paths, records, strict=True)
        ],
        "settings": records[0]["settings"],
        "class_names": class_names,
        "shape": list(shape),
        "found": accepted + len(rejected),
        "accepted": accepted,
        "rejected": rejected,
        "samples_sha256": sha256_file(folder / SAMPLES),
        "latents": _statistics(records, accepted * shape[1] * shape[2]),
    }
    _write_sealed(folder / INDEX, index)


def _statistics(records: list[Record], count: int) -> dict[str, list[float]]:
    """Mean and standard deviation a channel of unscaled latents, over all pixels of all pictures, without flips."""
    sums = [np.array(record["channel_sums"]) for record in records if record["nsamples"]]
    if not sums:
        return {"mean": [], "std": []}
    mean, square = np.sum(sums, axis=0) / count
    return {"mean": mean.tolist(), "std": np.sqrt(square - mean**2).tolist()}


def _write_sealed(path: Path, value: Record) -> None:
    write_json(path, {**value, "content_key": content_key(value)})


def _read_sealed(path: Path) -> Record:
    """Raises UserError where the file is missing or not as `_write_sealed` left it."""
    value = read_json(path)
    if not isinstance(value, dict) or value.pop("content_key", None) != content_key(value):
        raise UserError(f"{path}: changed after it was written; {REMEDY}")
    return value


def _rows_path(tar_path: Path) -> Path:
    return tar_path.with_suffix(".samples.npy")


# Reading


class LatentShards:
    """Random, verified access to a finished folder of shards.

    Opening reads the index and the files' sizes, no sample. Picklable: a copy opens the folder anew. Raises UserError
    where the folder is unfinished, of another version, or not what its index says.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / INDEX).is_file():
            raise UserError(f"data.shards: {folder} has no {INDEX}; run preprocess/encode_latents.py until it ends")
        self.index = _read_sealed(self.folder / INDEX)
        if self.index["version"] != VERSION:
            found = self.index["version"]
            raise UserError(f"{self.folder / INDEX}: version {found}, this reads {VERSION}; encode again")
        for shard in self.index["shardlist"]:
            _check_size(self.folder / shard["url"], shard["filesize"])
        self._rows = self._open_rows()
        self._maps: dict[int, mmap.mmap] = {}
        self.shape: tuple[int, int, int] = tuple(self.index["shape"])
        self.class_names: list[str] = self.index["class_names"]
        self.num_classes = len(self.class_names)

    def __reduce__(self) -> tuple[type["LatentShards"], tuple[Path]]:
        return LatentShards, (self.folder,)

    def __len__(self) -> int:
        return len(self._rows)

    @cached_property
    def labels(self) -> np.ndarray:
        """(N,) int64 class indices."""
        return self._rows["label"].astype(np.int64)

    def gather(self, indices: np.ndarray, flip: np.ndarray | None = None) -> np.ndarray:
        """Samples `indices` (B,) -> moments (B, 2C, h, w) float16: mean and standard deviation, unscaled.

        Where `flip` (B,) is true, those of the mirrored picture. Each sample's checksum, which covers its label, is
        verified before anything is returned. Raises UserError naming shard and sample for damage, or for flips that
        the shards do not hold.
        """
        rows = self._rows[indices]
        flip = np.zeros(len(rows), bool) if flip is None else np.asarray(flip, bool)
        if flip.any() and not self.index["settings"]["flips"]:
            raise UserError(f"data.flips: {self.folder} was made without flips; encode with data.flips=true")
        offsets = np.where(flip, rows["flip_offset"], rows["offset"]).tolist()
        checksums = np.where(flip, rows["flip_crc32"], rows["crc32"]).tolist()
        size = math.prod(self.shape) * MOMENTS.itemsize
        out = np.empty((len(rows), size), np.uint8)
        columns = zip(rows["shard"].tolist(), offsets, rows["label"].tolist(), checksums, out, strict=True)
        for number, (shard, offset, label, checksum, target) in enumerate(columns):
            data = self._map(shard)[offset : offset + size] if shard < len(self.index["shardlist"]) else b""
            if len(data) != size or zlib.crc32(data, label) != checksum:
                self._report_damage(int(np.asarray(indices)[number]), rows[number])
            target[:] = np.frombuffer(data, np.uint8)
        return out.view(MOMENTS).reshape(-1, *self.shape)

    def _map(self, shard: int) -> mmap.mmap:
        if shard not in self._maps:
            with open(self.folder / self.index["shardlist"][shard]["url"], "rb") as file:
                self._maps[shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[shard]

    def _report_damage(self, index: int, row: np.void) -> NoReturn:
        name = shard_name(int(row["shard"]))
        raise UserError(
            f"{self.folder / name}: sample {index} (member {member_name(int(row['position']))}) does not match its "
            f"checksum in {SAMPLES}; {REMEDY}"
        )

    def _open_rows(self) -> np.ndarray:
        """Maps samples.npy, whose header and size the index foretells: a damaged header is never parsed."""
        path, count = self.folder / SAMPLES, self.index["accepted"]
        header = _rows_header(count)
        size = len(header) + count * SAMPLE.itemsize
        _check_size(path, size)
        with open(path, "rb") as file:
            if file.read(len(header)) != header:
                raise UserError(f"{path}: not one row for each of {count} samples; {REMEDY}")
        return np.memmap(path, SAMPLE, "r", offset=len(header), shape=(count,))


def _check_size(path: Path, size: int) -> None:
    found = f"{path.stat().st_size} bytes" if path.is_file() else "missing"
    if found != f"{size} bytes":
        raise UserError(f"{path}: {found}, the index says {size} bytes; {REMEDY}")


def _rows_header(count: int) -> bytes:
    """The first bytes of the .npy file that holds `count` rows."""
    header = io.BytesIO()
    layout = {"descr": np.lib.format.dtype_to_descr(SAMPLE), "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(header, layout)
    return header.getvalue()


def verify(folder: str | Path) -> Iterator[str]:
    """Proves a folder whole: yields one line a fault, nothing if there is none. Reads every byte."""
    shards = LatentShards(folder)
    if sha256_file(shards.folder / SAMPLES) != shards.index["samples_sha256"]:
        yield f"{shards.folder / SAMPLES}: not the bytes that were written; {REMEDY}"
    if len(shards) and shards.labels.max() >= shards.num_classes:
        yield f"{shards.folder / SAMPLES}: label {shards.labels.max()} of {shards.num_classes} classes; {REMEDY}"
    start = 0
    for shard in shards.index["shardlist"]:
        stop = start + shard["nsamples"]
        faults = [fault for index in range(start, stop) if (fault := _sample_fault(shards, index))]
        yield from faults
        if not faults and sha256_file(shards.folder / shard["url"]) != shard["sha256"]:
            yield f"{shards.folder / shard['url']}: not the bytes that were written, outside any moments; {REMEDY}"
        start = stop


def _sample_fault(shards: LatentShards, index: int) -> str | None:
    flips = (False, True) if shards.index["settings"]["flips"] else (False,)
    try:
        moments = shards.gather(np.full(len(flips), index), np.array(flips))  # (1 or 2, 2C, h, w)
    except UserError as error:
        return str(error)
    if not np.isfinite(moments).all() or (np.split(moments, 2, axis=1)[1] < 0).any():
        return f"{shards.folder}: sample {index} has moments that are not finite, or a negative standard deviation"
    return None
