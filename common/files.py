"""Atomic writes, folder locks and checksums: no file is ever half written."""

import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Container, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from common.errors import UserError, printable

_umask = os.umask(0)  # reading it means setting it
os.umask(_umask)


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; after the block, syncs it to disk and renames it to `path`.

    If the block raises, `path` is unchanged and the temporary file is deleted. A kill leaves at most a hidden file
    `.<name>.<node>.<pid>.tmp`, which readers ignore. Raises UserError where the disk is full or not to be written.
    """
    path = Path(path)
    if path.is_dir() and not path.is_symlink():
        raise UserError(f"{path}: a folder, where a file is to be written; name another, or move it away")
    with disk_errors_as_user_errors(path, NOT_WRITTEN):
        _make(path.parent)
        temporary = _beside(path)
        _discard(temporary)
        try:
            yield temporary
            sync(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync(path.parent)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """As `atomic_write`, for a folder, which replaces an existing one.

    Between the moments when the old folder has lost its name and the new one has it, a kill leaves both under hidden
    names; `remove_leftovers` gives the old one its name back. Both functions replace a symbolic link at `path` and
    leave its target unchanged.
    """
    path = Path(path)
    with disk_errors_as_user_errors(path, NOT_WRITTEN):
        _make(path.parent)
        temporary = _beside(path)
        aside = _beside(path, ".old")  # the replaced folder, until the new one has its name
        _discard(temporary)
        temporary.mkdir()
        try:
            yield temporary
            for file in (*temporary.rglob("*"), temporary):
                if file.is_file():
                    file.chmod(0o666 & ~_umask)  # some libraries write files that only their owner can read
                sync(file)
            if path.exists() or path.is_symlink():
                path.replace(aside)
            try:
                temporary.replace(path)
            except OSError:
                if aside.exists():
                    aside.replace(path)
                raise
        finally:
            _discard(temporary)
            _discard(aside)
        sync(path.parent)


def _beside(path: Path, ending: str = "") -> Path:
    """A hidden path beside `path` that is unique to this process; `remove_leftovers` recognises it."""
    return path.with_name(f".{path.name}{ending}.{platform.node()}.{os.getpid()}.tmp")


def _discard(path: Path) -> None:
    """Deletes a file, a folder as far as possible, or a link, but never the target of a link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _make(folder: Path) -> None:
    """Creates the folder and its parents, and fsyncs each parent; a file is not durable until its entry is."""
    if not folder.is_dir():
        _make(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


NOT_WRITTEN = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS),
        *(errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST),
    }
)


@contextmanager
def disk_errors_as_user_errors(place: str | Path, only: Container[int] | None = None) -> Iterator[None]:
    """Re-raises disk errors (a full disk, a quota, a read-only folder) as a UserError naming `place`.

    `only`: the error numbers to convert, such as NOT_WRITTEN, if the block also reads files.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reads = isinstance(error, SafetensorError) and not str(error).startswith("Error while serializing")
        if only is not None and (reads or (isinstance(error, OSError) and error.errno not in only)):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        if getattr(error, "errno", None) in (errno.ENOTDIR, errno.EEXIST):
            raise UserError(f"{place}: a file lies where a folder is needed; choose another folder") from error
        raise UserError(
            f"{place}: not written ({reason}); finished work is kept: make room, let this user write there, or "
            "choose another folder, and run this again"
        ) from error


def not_writable(folder: Path) -> str | None:
    """Why nothing can be written into a folder, which need not be there yet; None if something can."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        return f"{folder} is a file"
    return None if os.access(folder, os.W_OK | os.X_OK) else f"this user cannot write into {folder}"


@contextmanager
def folder_lock(
    folder: Path, name: str = ".lock", *, shared: bool = False, wait: bool = False, place: str = ""
) -> Iterator[None]:
    """Locks `folder` until the block, or the process, ends.

    Args:
        name: the lock file in `folder`.
        shared: allows other shared locks at the same time, but no exclusive one.
        wait: waits for the lock instead of raising.
        place: what errors name; `folder` by default.

    Raises:
        UserError: naming the process that holds the lock; for a file system without locks; for a read-only `folder`.
    """
    place = place or str(folder)
    with _open_lock(folder, name, place) as lock:
        _take(place, lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        yield


@contextmanager
def shared_folder_lock(folder: Path) -> Iterator[None]:
    """Locks `folder` together with other processes that write in it or in its sub-folders.

    The first of them deletes what killed processes left in these folders.
    """
    with _open_lock(folder, ".lock", str(folder)) as lock:
        with suppress(BlockingIOError):
            _flock(str(folder), lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for written in (folder, *(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())):
                remove_leftovers(written)
        _flock(str(folder), lock, fcntl.LOCK_SH)
        yield


@contextmanager
def _open_lock(folder: Path, name: str, place: str) -> Iterator[int]:
    """The lock file's descriptor."""
    with disk_errors_as_user_errors(place):
        _make(folder)
        lock = open_own(folder / name)
    _locks.add(lock)
    try:
        yield lock
    finally:
        if lock in _locks:  # not in a forked copy of this process
            _locks.remove(lock)
            os.close(lock)


def open_own(path: Path, flags: int = 0) -> int:
    """Opens a file to read and write in place, creating it if missing; returns its descriptor.

    Raises UserError for a symbolic link, whose target may be somebody else's file.
    """
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | flags, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(f"{path}: a symbolic link, but a regular file is needed here; delete the link") from None
        raise


_locks: set[int] = set()  # descriptors


def _take(place: str, lock: int, how: int) -> None:
    try:
        _flock(place, lock, how)
    except BlockingIOError:
        holder = printable(os.pread(lock, 1000, 0).decode(errors="replace"))
        raise UserError(f"{place}: {holder} is at work in it; wait for it or end it") from None
    with suppress(OSError):  # the name is for messages only: a full disk must not keep a process from its lock
        os.truncate(lock, 0)
        os.pwrite(lock, f"process {os.getpid()} on {platform.node()}".encode(), 0)


def _flock(place: str, lock: int, how: int) -> None:
    """Raises BlockingIOError if another process holds the lock, UserError if the file system has no locks."""
    try:
        fcntl.flock(lock, how)
    except BlockingIOError:
        raise
    except OSError as error:
        raise UserError(
            f"{place}: no file locks on its file system ({error.strerror}); mount it with them (Lustre: -o flock), "
            "or choose another folder"
        ) from None


def _leave_locks() -> None:
    """Without this, a forked worker that outlives its parent would keep the parent's locks."""
    while _locks:
        os.close(_locks.pop())


os.register_at_fork(after_in_child=_leave_locks)


def remove_leftovers(folder: Path) -> None:
    """Deletes what killed atomic writes left in `folder`, and gives a folder that was to be replaced, and was not, its
    name back. No other process must be writing there.
    """
    for path in folder.glob(".*.tmp"):
        if (old := _OLD.fullmatch(path.name)) and not (folder / old[1]).exists():
            path.replace(folder / old[1])
        elif _LEFTOVER.fullmatch(path.name):
            _discard(path)


_LEFTOVER = re.compile(r"\..+\.[0-9]+\.tmp")
_OLD = re.compile(r"\.(.+)\.old\..+\.[0-9]+\.tmp")


def remove_folder(folder: Path) -> None:
    """Deletes a folder; a kill in the middle leaves no part of it under its name."""
    aside = _beside(folder)
    folder.replace(aside)
    _discard(aside)


def sync(path: Path) -> None:
    """Flushes a file, or a folder's entries, to disk, so that a later rename never shows an empty file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: str | Path, value: Any) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")


def content_key(value: Any) -> str:
    """Sixteen hex digits of a JSON-able value's hash: equal for equal settings, different otherwise."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
