"""LSUN's LMDBs: encoded pictures (WebP) under their hashes, read where they lie."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.errors import UserError
from preprocess.images import Rejected
from preprocess.sources.entries import Entries, Entry

DATA = "data.mdb"


class LmdbSource:
    """Every value of an LMDB as a picture of one class, in the order of its keys.

    Raises UserError where the database is empty, damaged or cut off: reading past its end would end the process.
    """

    def __init__(self, path: str | Path, field: str, class_name: str) -> None:
        self.path, self.field, self.left_out = Path(path), field, Counter[str]()
        self.class_names = [class_name]
        self.file = self.path / DATA if self.path.is_dir() else self.path
        self._check_size()
        self.entries = Entries(self._entries())
        if not len(self.entries):
            raise UserError(f"{field}: {path} is an LMDB without entries; get it anew")

    def open(self, entry: Entry) -> bytes:
        import lmdb

        try:
            with self._environment().begin() as transaction:
                value = transaction.get(entry.key.encode(errors="surrogateescape"))
        except lmdb.Error as error:
            raise Rejected(f"cannot be read: {error}") from None
        if value is None:
            raise Rejected("no longer in its LMDB")
        return value

    def _entries(self) -> Iterator[Entry]:
        import lmdb

        try:
            with self._environment().begin(buffers=True) as transaction:  # buffers: values are not read
                for key, value in transaction.cursor():
                    yield Entry(bytes(key).decode(errors="surrogateescape"), 0, len(value))
        except lmdb.Error as error:
            raise UserError(f"{self.field}: {self.path} is damaged ({error}); get it anew") from None

    def _check_size(self) -> None:
        environment = self._environment()
        needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
        if self.file.stat().st_size < needed:
            raise UserError(f"{self.field}: {self.file} has not the {needed:,} bytes it says: cut off; get it anew")

    def _environment(self) -> Any:
        import lmdb

        try:
            return _environment(os.path.realpath(self.file))
        except lmdb.Error as error:
            raise UserError(f"{self.field}: {self.path} is not an LMDB ({error}); get it anew") from None


_opened: dict[str, Any] = {}  # an LMDB must not be opened twice in a process


def _environment(path: str) -> Any:
    import lmdb

    if path not in _opened:
        _opened[path] = lmdb.open(path, subdir=False, readonly=True, lock=False, readahead=False)
    return _opened[path]


def _close_all() -> None:
    """An LMDB must not be carried over a fork either: parent and child open theirs when they read the next picture."""
    while _opened:
        _opened.popitem()[1].close()


os.register_at_fork(before=_close_all)
