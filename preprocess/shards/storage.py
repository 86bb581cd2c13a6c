"""Storage of a data set: a local folder, or any fsspec address behind a verified local cache."""

import errno
import hashlib
import os
import re
import shutil
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

from common.errors import UserError, one_line
from common.files import atomic_write, folder_lock
from preprocess.shards.format import INDEX, REMEDY, rows_name, rows_size
from preprocess.shards.forms import Index, Shard, read_index, read_local_index

CHUNK = 8 << 20  # bytes
ATTEMPTS = 3  # to fetch a file
PAUSE = 1.0  # seconds before the second attempt; twice as long before the third
LOCKS = 64  # lock files: two processes fetch one file once, and different files at the same time
FETCHING_THREADS = 4
ABANDONED = 600  # seconds without progress after which an unfinished file is taken for a killed process's


OURS = re.compile(r"[0-9a-f]{16}-.+|\.[0-9a-f]{16}-.+\.tmp")  # finished and unfinished copies in the cache


ShardFile = tuple[str, int, str]  # name, bytes, sha256


@dataclass(frozen=True)
class Cache:
    """A folder on a local disk for copies of remote files, shared by all processes of the machine."""

    folder: Path
    limit: int | None = None  # bytes; beyond it, the least recently used files are deleted


class LocalFolder:
    """A local folder, read in place."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def read_index(self) -> Index:
        if ":/" in str(self.path):  # Path turns :// into :/
            raise UserError(f"data.cache: not set, but {self.path} is remote; set it to a folder on a local disk")
        if not (self.path / INDEX).is_file():
            raise UserError(f"data.shards: {self.path} has no {INDEX}; run preprocess/encode_latents.py until it ends")
        return read_local_index(self.path)

    def open(self, name: str, size: int, sha256: str) -> int:
        """A file descriptor for reading. Raises UserError if the file is missing or of another size."""
        check_size(self.path / name, size)
        return os.open(self.path / name, os.O_RDONLY)

    def discard(self, name: str, sha256: str) -> bool:
        return False  # it is no copy


def check_size(path: Path, size: int) -> None:
    if fault := size_fault(path, size):
        raise UserError(fault)


def size_fault(path: Path, size: int) -> str | None:
    actual = f"{path.stat().st_size} bytes" if path.is_file() else "missing"
    return None if actual == f"{size} bytes" else f"{path}: {actual}, the index says {size} bytes; {REMEDY}"


def is_missing(error: Exception) -> bool:
    """Whether there is no such file. fsspec's http raises FileNotFoundError for all faults; its cause says which."""
    if not isinstance(error, FileNotFoundError):
        return False
    cause = error.__cause__
    return not type(cause).__module__.startswith("aiohttp") or getattr(cause, "status", None) == HTTPStatus.NOT_FOUND


def reason(error: Exception) -> str:
    return one_line(str(error.__cause__ or error) or type(error).__name__, 200)


class CachedFolder:
    """Files at an fsspec address, each fetched completely, verified by its sha256 and kept in the cache.

    A copy's name contains the sha256: another version of a file has another copy. Copies are complete or absent.
    """

    def __init__(self, address: str, cache: Cache) -> None:
        self.address, self.cache = address.rstrip("/"), cache
        self.filesystem, self.root = _filesystem(self.address)

    def read_index(self) -> Index:
        where = f"{self.address}/{INDEX}"
        try:
            data = self.filesystem.cat_file(f"{self.root}/{INDEX}")
        except Exception as error:  # noqa: BLE001 # each file system has errors of its own, aiohttp's are no OSError
            if is_missing(error):
                words = f"data.shards: {self.address} has no {INDEX}; finish it, and upload {INDEX} last"
            else:
                words = f"{where}: cannot be read ({reason(error)}); check the address and the credentials"
            raise UserError(words) from None
        return read_index(data, where)

    def open(self, name: str, size: int, sha256: str) -> int:
        """A file descriptor of the copy, which is fetched first if it is missing.

        Raises UserError if the file cannot be fetched, contradicts the index, or does not fit.
        """
        for _ in range(ATTEMPTS):
            path = self._fetch(name, size, sha256)
            with suppress(FileNotFoundError):  # another process has deleted it to make room
                file = os.open(path, os.O_RDONLY)
                with suppress(OSError):  # another user's copy, or a read-only one
                    # Marks it as just used; the kernel's own clock has milliseconds only.
                    os.utime(file, ns=(time.time_ns(),) * 2)
                return file
        raise UserError(f"data.cache_gb: {self.cache.folder} loses {name} before it is opened; raise it")

    def discard(self, name: str, sha256: str) -> bool:
        """Deletes a damaged copy; True: it can be fetched again."""
        copy = self._copy(name, sha256)
        try:
            copy.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"data.cache: {copy} is damaged, and cannot be deleted here ({error.strerror})") from None
        return True

    def fetch(self, files: list[ShardFile]) -> Iterator[Path]:
        """Fetches missing files, several at a time, and yields paths as they arrive."""
        with ThreadPoolExecutor(FETCHING_THREADS) as threads:
            for fetched in as_completed([threads.submit(self._fetch, *file) for file in files]):
                yield fetched.result()

    def stage(self, shardlist: list[Shard]) -> None:
        """Fetches all shards; one process of the machine does, the others wait.

        Raises UserError as `open`, and if they do not fit.
        """
        from tqdm import tqdm

        files = [file for shard in shardlist for file in shard_files(shard)]
        total = sum(size for _, size, _ in files)
        if self.cache.limit is not None and total > self.cache.limit:
            raise UserError(
                f"data.stage_in: {self.address} holds {total / 1e9:.2f} GB, data.cache_gb allows "
                f"{self.cache.limit / 1e9:.2f}; raise it, or set data.stage_in=false"
            )
        if all(self.is_here(*file) for file in files):
            return
        with self._lock("stage"):
            missing = [file for file in files if not self.is_here(*file)]
            needed, free = sum(size for _, size, _ in missing), shutil.disk_usage(self.cache.folder).free
            if needed > free:
                raise UserError(
                    f"data.stage_in: needs {needed / 1e9:.3g} GB more, {self.cache.folder} has {free / 1e9:.3g} GB free"
                )
            with tqdm(total=needed, unit="B", unit_scale=True, desc="stage in", disable=not missing) as bar:
                for path in self.fetch(missing):
                    bar.update(path.stat().st_size)

    def _copy(self, name: str, sha256: str) -> Path:
        return self.cache.folder / f"{sha256[:16]}-{name}"

    def is_here(self, name: str, size: int, sha256: str) -> bool:
        """Whether the cache holds the file."""
        path = self._copy(name, sha256)
        return path.is_file() and path.stat().st_size == size

    def _fetch(self, name: str, size: int, sha256: str) -> Path:
        """The path of the copy, fetched if it is missing."""
        path = self._copy(name, sha256)
        if not self.is_here(name, size, sha256):
            with self._lock(str(zlib.crc32(path.name.encode()) % LOCKS)):
                if not self.is_here(name, size, sha256):  # else another process has just fetched it
                    with atomic_write(path) as temporary:
                        self._reserve(temporary, size)
                        self._download(name, temporary, size, sha256)
        return path

    def _download(self, name: str, path: Path, size: int, sha256: str) -> None:
        where = f"{self.address}/{name}"
        fault = ""
        for attempt in range(ATTEMPTS):
            time.sleep(PAUSE * attempt)
            try:
                if self._copy_hashed(name, path, size) == sha256:
                    return
                fault = "not the bytes that its index describes"
            except Exception as error:  # noqa: BLE001 # see `read_index`
                if is_missing(error):
                    raise UserError(f"{where}: missing; {REMEDY}, and upload it again") from None
                if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                    raise UserError(f"data.cache: no room in {self.cache.folder}; set data.cache_gb") from None
                fault = f"cannot be read ({reason(error)})"
        raise UserError(f"{where}: {fault}, {ATTEMPTS} times; check the address, or upload it again")

    def _copy_hashed(self, name: str, path: Path, size: int) -> str:
        """Copies a file, at most `size` + 1 bytes whatever the other side sends; returns the sha256."""
        digest, left = hashlib.sha256(), size
        with self.filesystem.open(f"{self.root}/{name}", "rb") as source, open(path, "r+b") as target:
            while chunk := source.read(min(CHUNK, left + 1)):
                digest.update(chunk)
                left -= len(chunk)
                if left < 0:
                    break
                target.write(chunk)
        return digest.hexdigest()

    def _reserve(self, path: Path, size: int) -> None:
        """Reserves `size` bytes at `path`, deleting the least recently used copies to stay within the limit."""
        limit = self.cache.limit
        if limit is not None and size > limit:
            raise UserError(
                f"data.cache_gb: {limit / 1e9:.2f} GB do not hold a shard of {size / 1e9:.2f} GB; allow several"
            )
        while True:
            with self._lock("room"):
                if limit is None or self._make_room(size, limit):
                    with open(path, "wb") as file:
                        file.truncate(size)  # so that other processes count it
                    return
            time.sleep(0.05)  # files being fetched can be deleted only afterwards

    def _make_room(self, size: int, limit: int) -> bool:
        """Deletes copies until `size` more bytes fit; whether they do. Neither counts nor deletes other files."""
        try:
            files = [(path.lstat(), path) for path in self.cache.folder.iterdir() if OURS.fullmatch(path.name)]
        except FileNotFoundError:  # a file was renamed or deleted meanwhile
            return False
        excess = sum(status.st_size for status, _ in files) + size - limit
        for status, path in sorted(files, key=lambda file: file[0].st_mtime_ns):
            if excess <= 0:
                break
            if path.suffix != ".tmp" or time.time() - status.st_mtime > ABANDONED:
                path.unlink(missing_ok=True)
                excess -= status.st_size
        return excess <= 0

    def _lock(self, name: str) -> AbstractContextManager[None]:
        return folder_lock(self.cache.folder / ".locks", name, wait=True, place=f"data.cache: {self.cache.folder}")


def shard_files(shard: Shard) -> tuple[ShardFile, ShardFile]:
    """The files that a reader needs for a shard: its rows and its tar."""
    rows = rows_name(shard["url"]), rows_size(shard["nsamples"]), shard["samples_sha256"]
    return rows, (shard["url"], shard["filesize"], shard["sha256"])


def _filesystem(address: str) -> tuple[Any, str]:
    """The fsspec file system of an address, and the path there."""
    from fsspec.core import url_to_fs

    try:
        filesystem, root = url_to_fs(address)
    except (ValueError, ImportError) as error:  # an unknown protocol; its package is not installed
        raise UserError(f"data.shards: {address} cannot be opened: {error}") from None
    return filesystem, root.rstrip("/")
