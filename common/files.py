"""Artefacts appear whole or not at all."""

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

_umask = os.umask(0)  # it is read by setting it
os.umask(_umask)


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; after the block it is synced to disk and renamed to `path`.

    If the block raises, `path` is as it was and the temporary file is gone. A kill leaves at most a file named
    `.<name>.<node>.<pid>.tmp`, which no reader takes for an artefact.
    """
    path = Path(path)
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
    """As `atomic_write`, for a folder: it is filled under a temporary name and takes the place of `path` at the end.

    Of either, a link at `path` is replaced; what it leads to stays as it is.
    """
    path = Path(path)
    _make(path.parent)
    temporary = _beside(path)
    aside = _beside(path, ".old")  # the one that is replaced, until the new one is there
    _discard(temporary)
    temporary.mkdir()
    try:
        yield temporary
        for file in (*temporary.rglob("*"), temporary):
            if file.is_file():
                file.chmod(0o666 & ~_umask)  # some libraries let nobody else read what they write
            sync(file)
        if path.exists() or path.is_symlink():
            path.replace(aside)
        temporary.replace(path)
    finally:
        _discard(temporary)
        _discard(aside)
    sync(path.parent)


def _beside(path: Path, ending: str = "") -> Path:
    """A name for this process alone, which `remove_leftovers` knows and no reader takes for an artefact."""
    return path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}{ending}.tmp")


def _discard(path: Path) -> None:
    """Deletes a file, a folder or a link, as far as that can be done; never what a link leads to."""
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
    """Makes a UserError that names `place` of what a full disk, a read-only folder or a quota raises.

    `only`: the errors, such as NOT_WRITTEN, that come of writing, where the block also reads what may be missing.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if only is not None and getattr(error, "errno", None) not in only:
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"{place}: not written ({reason}); what is finished is kept: make room, let this user write there, or "
            "choose another folder, and run this again"
        ) from error


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
    with disk_errors_as_user_errors(place, NOT_WRITTEN):
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
    """A descriptor of a file to read and write in place, made where it is missing. Raises UserError for a symbolic
    link: what it leads to is not ours to write.
    """
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | flags, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(f"{path}: a symbolic link where a file of ours is needed; delete the link") from None
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
    """A forked worker would hold its parent's locks for as long as it outlives it."""
    while _locks:
        os.close(_locks.pop())


os.register_at_fork(after_in_child=_leave_locks)


def remove_leftovers(folder: Path) -> None:
    """Deletes what a killed `atomic_write` or `atomic_folder` left in `folder`; only for who alone writes there."""
    for path in folder.glob(".*.tmp"):
        if _LEFTOVER.fullmatch(path.name):
            _discard(path)


_LEFTOVER = re.compile(r"\..+\.[0-9]+(\.old)?\.tmp")


def remove_folder(folder: Path) -> None:
    """Deletes a folder that `atomic_folder` made; a kill in the middle leaves no part of it under its name."""
    aside = _beside(folder, ".old")
    folder.replace(aside)
    _discard(aside)


def sync(path: Path) -> None:
    """Flushes a file or a folder's entries to disk, so that a rename after it never shows an empty file."""
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
    """Sixteen hex digits that name a JSON-able value: results made from equal settings share it, others never do."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
