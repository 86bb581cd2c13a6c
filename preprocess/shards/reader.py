"""Random, verified reading of samples from local or remote shards."""

import hashlib
import math
import os
from collections import OrderedDict, deque
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from preprocess.shards.format import (
    INDEX,
    MOMENTS,
    REMEDY,
    SAMPLE,
    SAMPLES,
    checksum,
    member_name,
    rows_header,
    rows_size,
)
from preprocess.shards.forms import Index, Shard
from preprocess.shards.mapping import map_file
from preprocess.shards.storage import Cache, CachedFolder, LocalFolder, ShardFile, check_size, shard_files

Storage = LocalFolder | CachedFolder

PROVED_AT_ONCE = 64  # samples per call of `gather`
MAX_MAPPED = 8192  # shards; Linux lets a process map 65,530 files


class LatentShards:
    """Random, verified access to a finished folder of shards.

    `address` is a local folder or, with a `cache`, any fsspec address such as `s3://bucket/folder`. Opening reads the
    index and checks the sizes of local files; it reads no sample. Picklable: a copy opens the folder again. Not
    thread-safe. Raises UserError if the folder is unfinished, of another version, or contradicts its index.
    """

    def __init__(self, address: str | Path, cache: Cache | None = None) -> None:
        self.address, self.cache = address, cache
        self.storage: Storage = CachedFolder(str(address), cache) if cache else LocalFolder(address)
        self.index = self.storage.read_index()
        channels, height, width = self.index["shape"]
        self.shape = channels, height, width
        self.class_names = self.index["class_names"]
        self.num_classes = len(self.class_names)
        self.rows = _row_reader(self.storage, self.index)
        self._maps: OrderedDict[int, memoryview] = OrderedDict()

    def __reduce__(self) -> tuple[type["LatentShards"], tuple[str | Path, Cache | None]]:
        return LatentShards, (self.address, self.cache)

    def __len__(self) -> int:
        return self.index["accepted"]

    @property
    def content_key(self) -> str:
        """A key of these samples in this order, the same in every format."""
        return self.index.get("converted_from", self.index["samples_sha256"])

    @property
    def scaling(self) -> tuple[float, float]:
        """Scaling and shift factor of the latents. Raises UserError if the index has no autoencoder."""
        autoencoder = self.index["settings"].get("vae")
        if autoencoder is None:
            raise UserError(
                f"{self.address}/{INDEX}: settings.vae: missing, so the latents' scaling is unknown; encode again"
            )
        return autoencoder["scaling_factor"], autoencoder["shift_factor"]

    @cached_property
    def labels(self) -> np.ndarray:
        """(N,) int64 class indices of all samples."""
        return self.labels_at(np.arange(len(self)))

    def labels_at(self, indices: np.ndarray) -> np.ndarray:
        """(B,) int64 class indices of samples `indices`; the checksums that `gather` verifies cover them.

        Raises UserError for an impossible class.
        """
        labels = self.rows(np.asarray(indices))["label"].astype(np.int64)
        if len(labels) and labels.max() >= self.num_classes:
            raise UserError(
                f"{self.address}/{SAMPLES}: class {labels.max()}, but there are {self.num_classes} classes; {REMEDY}"
            )
        return labels

    def prove_places(self, part: int = 0, parts: int = 1) -> None:
        """Verifies the first sample of every shard, or of each `parts`-th from `part` on.

        This detects shards that were exchanged, copied over one another or renamed: their sizes are right. Raises
        UserError naming one. Remote shards are verified by their hashes.
        """
        if isinstance(self.storage, LocalFolder):
            starts = np.cumsum([0] + [shard["nsamples"] for shard in self.index["shardlist"]])
            firsts = np.unique(starts[starts < len(self)])[part::parts]
            for start in range(0, len(firsts), PROVED_AT_ONCE):
                self.gather(firsts[start : start + PROVED_AT_ONCE])

    def gather(self, indices: np.ndarray, flip: np.ndarray | None = None) -> np.ndarray:
        """Samples `indices` (B,) -> moments (B, 2C, h, w) float16: mean and standard deviation, unscaled.

        Where `flip` (B,) is true, those of the mirrored image. Each sample's checksum, which covers its label, is
        verified before anything is returned; a damaged copy in the cache is fetched again, once. Raises UserError
        naming the damaged shard and sample, or for flips if the shards have none.
        """
        indices = np.asarray(indices)
        order = np.argsort(indices)  # in the order on disk
        indices = indices[order]
        rows = self.rows(indices)
        offsets, checksums = rows["offset"], rows["crc32"]
        if flip is not None and np.any(flip):
            if not self.index["settings"]["flips"]:
                raise UserError(f"data.flips: {self.address} was made without flips; encode with data.flips=true")
            flip = np.broadcast_to(flip, indices.shape)[order]
            offsets = np.where(flip, rows["flip_offset"], offsets)
            checksums = np.where(flip, rows["flip_crc32"], checksums)
        size = math.prod(self.shape) * MOMENTS.itemsize
        out = np.empty((len(rows), *self.shape), MOMENTS)
        buffer = out.reshape(-1).view(np.uint8).data
        columns = (order * size, rows["shard"], offsets, rows["label"], checksums)
        current, data = -1, memoryview(b"")
        for start, shard, offset, label, expected in zip(*(column.tolist() for column in columns), strict=True):
            if shard != current:
                current, data = shard, self._maps.get(shard) or self._map(shard)
            target = buffer[start : start + size]
            try:
                target[:] = data[offset : offset + size]
                intact = checksum(target, label) == expected  # of the copy, which the caller gets
            except ValueError:  # the shard ends within the sample
                intact = False
            if not intact:
                number = int(np.flatnonzero(order == start // size)[0])
                data = self._read_again(indices[number], rows[number], offset, target, expected)
        return out

    def _map(self, shard: int) -> memoryview:
        if shard >= len(self.index["shardlist"]):  # a damaged row
            return memoryview(b"")
        shards = self.index["shardlist"]
        entry = shards[shard]
        data = _mapped(self.storage, entry["url"], entry["filesize"], entry["sha256"])
        _unmap(self._maps, self.storage, lambda number: shard_files(shards[number])[1])
        self._maps[shard] = data
        return data

    def _read_again(self, index: int, row: np.void, offset: int, target: memoryview, expected: int) -> memoryview:
        """Fetches a damaged cached copy again; returns the shard. UserError if it is still damaged, or local."""
        shards, shard = self.index["shardlist"], int(row["shard"])
        name = shards[shard]["url"] if shard < len(shards) else SAMPLES
        if shard < len(shards) and self.storage.discard(name, shards[shard]["sha256"]):
            del self._maps[shard]
            fresh = self._map(shard)
            data = fresh[offset : offset + len(target)]
            if len(data) == len(target) and checksum(data, int(row["label"])) == expected:
                target[:] = data
                return fresh
        raise UserError(
            f"{self.address}/{name}: sample {index} (member {member_name(int(row['position']))}) does not match its "
            f"checksum in {SAMPLES}; {REMEDY}"
        )


def _mapped(storage: Storage, name: str, size: int, sha256: str) -> memoryview:
    """Maps a file into memory."""
    file = storage.open(name, size, sha256)
    try:
        return map_file(file)
    finally:
        os.close(file)


def _unmap(maps: OrderedDict[int, Any], storage: Storage, file_of: Callable[[int], ShardFile]) -> None:
    """Unmaps files deleted from the cache, which frees their disk space, and the oldest beyond MAX_MAPPED."""
    if isinstance(storage, CachedFolder) and storage.cache.limit is not None:
        for number in [number for number in maps if not storage.is_here(*file_of(number))]:
            del maps[number]
    if len(maps) >= MAX_MAPPED:
        maps.popitem(last=False)


Rows = Callable[[np.ndarray], np.ndarray]


def _row_reader(storage: Storage, index: Index) -> Rows:
    """A function (B,) sample indices -> (B,) rows."""
    if isinstance(storage, CachedFolder):
        return RemoteRows(storage, index["shardlist"])
    for shard in index["shardlist"]:
        check_size(storage.path / shard["url"], shard["filesize"])
    rows = _map_rows(storage.path / SAMPLES, index["accepted"])
    return rows.take  # indexing a structured array copies field by field, nine times as slow


def _map_rows(path: Path, count: int) -> np.ndarray:
    """Maps samples.npy. Its header follows from the index, so that a damaged one is never parsed."""
    header = rows_header(count)
    check_size(path, rows_size(count))
    with open(path, "rb") as file:
        if file.read(len(header)) != header:
            raise UserError(f"{path}: its header is not that of {count} rows; {REMEDY}")
    return np.memmap(path, SAMPLE, "r", offset=len(header), shape=(count,)).view(np.ndarray)  # indexed faster


class RemoteRows:
    """The rows of remote shards, fetched shard by shard: all of them might not fit on a local disk."""

    def __init__(self, storage: CachedFolder, shardlist: list[Shard]) -> None:
        self.storage, self.shardlist = storage, shardlist
        self.starts = np.cumsum([0] + [shard["nsamples"] for shard in shardlist])  # (shards + 1,)
        self._tables: OrderedDict[int, np.ndarray] = OrderedDict()

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        shards = np.searchsorted(self.starts, indices, side="right") - 1
        rows, needed = np.empty(len(indices), SAMPLE), np.unique(shards).tolist()
        new = [file for shard in needed if shard not in self._tables for file in shard_files(self.shardlist[shard])]
        if new:
            deque(self.storage.fetch(new), maxlen=0)  # together with the shards, which are read next
        for shard in needed:
            here = shards == shard
            rows[here] = self._table(shard).take(indices[here] - self.starts[shard])
        rows["shard"] = shards  # known without the table
        return rows

    def _table(self, shard: int) -> np.ndarray:
        if shard not in self._tables:
            table = self._open(self.shardlist[shard])
            _unmap(self._tables, self.storage, lambda number: shard_files(self.shardlist[number])[0])
            self._tables[shard] = table
        return self._tables[shard]

    def _open(self, shard: Shard) -> np.ndarray:
        """Maps the rows of a shard after verifying their hash: no other checksum covers a whole row."""
        (name, size, sha256), _ = shard_files(shard)
        for _ in range(2):
            data = _mapped(self.storage, name, size, sha256)
            if hashlib.sha256(data).hexdigest() == sha256:
                return np.frombuffer(data, SAMPLE, shard["nsamples"], size - shard["nsamples"] * SAMPLE.itemsize)
            self.storage.discard(name, sha256)
        where = self.storage.cache.folder
        raise UserError(f"data.cache: {where} changed {name} after it was written; check the disk")
