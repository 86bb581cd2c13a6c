"""LMDBs of encoded images, read in place: LSUN's own (WebP under hashes), and those with numbers for keys."""

import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from common.errors import UserError, errors_as
from preprocess.images.images import Rejected
from preprocess.sources.entries import Entries, Entry, check_size, file_stamp, is_image, kind_of
from preprocess.sources.folders import walk_visible

DATA = "data.mdb"
NO_IMAGES = frozenset({b"length", b"num-samples", b"__len__", b"__keys__", b"__meta__", b"meta", b"metadata"})  # keys
OF_A_SIDE = re.compile(rb"(\d{2,4})-\d{5,}")  # a key of StyleGAN2's: 256-00000
STARTS = re.compile(rb"\xff\xd8|\x89PNG|GIF8|BM|II\*\0|MM\0\*|P[4-6]\s|\x93NUMPY|RIFF....WEBP", re.S)  # of images
PICKLED = re.compile(rb"\x80[\2-\5]")
LOOKED_AT = 8  # first values that are checked when the LMDB is opened
NAMED_DATABASE = 48  # bytes of its record, which is a value of the main database


class LmdbSource:
    """The images in an LMDB, ordered by key, as one class named after its folder.

    Leaves out values without image keys (`length`) and, if all keys start with a resolution (`256-00000`),
    all but the largest. Raises UserError if the database is empty, damaged or cut off (reading past its end crashes the
    process), holds named databases, or if its first values are no encoded images.
    """

    def __init__(self, file: Path, field: str) -> None:
        self.file, self.field, self.left_out = file, field, Counter[str]()
        named_as = file
        if file.name == DATA:
            self._count_beside()
            named_as = file.parent.resolve()
        self.class_names = [re.sub(r"(\.lmdb|\.mdb|_lmdb)$", "", named_as.name)]
        self._check_size()
        self.entries = Entries(self._entries())
        if not len(self.entries):
            raise UserError(f"{field}: {file} is an LMDB without images; name another")

    def open(self, entry: Entry) -> bytes:
        check_size(entry.size)
        with errors_as(Rejected, "cannot be read"), _environment(self.file).begin() as transaction:
            value = transaction.get(entry.key.encode(errors="surrogateescape"))
        if value is None:
            raise Rejected("no longer in its LMDB")
        return value

    def _count_beside(self) -> None:
        """Counts the other files in its folder, without opening them."""
        for parent, links, names in walk_visible(self.file.parent, self.field, self.left_out):
            others = [name for name in names + links if parent / name != self.file]
            self.left_out.update(
                "beside the LMDB, which is read" if is_image(name) else kind_of(name) for name in others
            )

    def _entries(self) -> Iterator[Entry]:
        stamp = file_stamp(os.stat(self.file))
        damaged = f"{self.field}: {self.file} is damaged; download it again"
        with errors_as(UserError, damaged), _environment(self.file).begin(buffers=True) as transaction:
            self._check_values(transaction)
            side = self._largest_side(transaction)
            previous = None
            for key, value in transaction.cursor():  # buffers: values are not read
                name = bytes(key)
                if name == previous:
                    raise UserError(f"{self.field}: {self.file} has two values of the key {name!r}; keep one of them")
                previous = name
                if name in NO_IMAGES:
                    self.left_out["not an image: metadata of an LMDB"] += 1
                elif side and not name.startswith(side):
                    self.left_out["of a smaller resolution"] += 1
                else:
                    yield Entry(name.decode(errors="surrogateescape"), 0, len(value), stamp=stamp)

    def _check_values(self, transaction: Any) -> None:
        """Raises UserError if none of the first values is an encoded image."""
        values = ((bytes(key), value) for key, value in transaction.cursor())
        first = [(key, value) for key, value in islice(values, LOOKED_AT) if key not in NO_IMAGES]
        if first and not any(STARTS.match(value) for _, value in first):
            key, value = first[0]
            raise UserError(
                f"{self.field}: {self.file} has {_what(value)} under its key {key.decode(errors='replace')!r}; encoded "
                "images are read (JPEG, PNG, WebP, ...): encode them, or name another LMDB"
            )

    def _largest_side(self, transaction: Any) -> bytes | None:
        """The prefix of the largest images' keys, if all keys begin with a resolution."""
        cursor = transaction.cursor()
        if not cursor.first() or not OF_A_SIDE.fullmatch(cursor.key()):
            return None
        keys = [bytes(key) for key in cursor.iternext(values=False)]
        matches = [OF_A_SIDE.fullmatch(key) for key in keys if key not in NO_IMAGES]
        sides = {match[1] for match in matches if match}
        return max(sides, key=int) + b"-" if all(matches) else None

    def _check_size(self) -> None:
        remedy = "name another, or download it again if it is damaged"
        with errors_as(UserError, f"{self.field}: {self.file} is not a readable LMDB; {remedy}"):
            environment = _environment(self.file)
            needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
            size = self.file.stat().st_size
        if size < needed:
            raise UserError(f"{self.field}: {self.file} has {size:,} of {needed:,} bytes: cut off; download it again")


def _what(value: memoryview) -> str:
    """Describes a value that is no image."""
    size = len(value)
    if size == NAMED_DATABASE:
        return "a named database"
    if PICKLED.match(value):
        return f"a pickle ({size:,} bytes), which is never opened,"
    for colours in (3, 1, 4):
        side = math.isqrt(size // colours)
        if side >= 8 and colours * side**2 == size:
            return f"raw pixels ({size:,} bytes = {side} x {side} x {colours})"
    return f"{size:,} bytes that begin {bytes(value[:8])!r}"


_opened: dict[str, Any] = {}  # LMDB forbids opening a file twice in a process


def _environment(file: Path) -> Any:
    import lmdb

    path = os.path.realpath(file)
    if path not in _opened:
        _opened[path] = lmdb.open(path, subdir=False, readonly=True, lock=False, readahead=False)
    return _opened[path]


def _close_all() -> None:
    """LMDB forbids using an environment after a fork: parent and child open their own at the next read."""
    while _opened:
        _opened.popitem()[1].close()


os.register_at_fork(before=_close_all)
