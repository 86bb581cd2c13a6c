"""What every source of images gives: entries in a stable order, and the bytes of any of them."""

import hashlib
import os
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError, errors_as
from preprocess.images.images import Rejected

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg"}
    | {".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
)
UNREAD = {  # suffixes of images that are not read, and how they are encoded
    **dict.fromkeys((".heic", ".heif", ".hif"), "HEIC"),
    **dict.fromkeys((".avif", ".avifs"), "AVIF"),
    ".jxl": "JPEG XL",
    **dict.fromkeys((".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"), "JPEG 2000"),
    **dict.fromkeys((".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2"), "a camera's raw data"),
    **dict.fromkeys((".exr", ".hdr"), "floating-point pixels"),
    ".tga": "TGA",
    ".psd": "PSD",
    ".svg": "SVG",
}
ENCODED_AS = "encoded as"  # how reasons for files of UNREAD begin
HIDDEN = "hidden"
HIDDEN_FOLDER = "hidden folder, not looked into"  # however much is in it, it counts as one
SYSTEMS_OWN = re.compile(  # folders that macOS, Windows, Synology, Linux, Python and an old tar keep for themselves
    r"__MACOSX|\$RECYCLE\.BIN|System Volume Information|@eaDir|#recycle|lost\+found|__pycache__|PaxHeaders?(\.\d+)?"
)
MAX_ENCODED = 2**28  # bytes; a file that claims more is taken for a bomb, and not read
MAX_NAME = 4096  # characters of a path, which no system has more of
MAX_CLASSES = 1_000_000  # a label above is taken for damage


class Entry(NamedTuple):
    """One image of a source."""

    key: str  # its name within the source; no two entries share one
    label: int  # class index
    size: int  # of the encoded image, bytes; of the file it lies in where the format does not tell
    place: tuple[int, int] = (0, 0)  # where the source finds it: the source's own affair
    stamp: int = 0  # of the file it lies in: `file_stamp`; 0 where `place` tells its content, as a checksum does


class Entries:
    """Entries as columns of numbers: some 70 bytes each, and forked workers share them without copying."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        keys, columns, ends = bytearray(), array("q"), array("q", [0])
        for entry in entries:
            keys += entry.key.encode(errors="surrogateescape")
            ends.append(len(keys))
            columns.extend((entry.label, entry.size, *entry.place, entry.stamp))
        self._keys, self._ends = bytes(keys), np.array(ends)
        self._columns = np.array(columns).reshape(-1, 5)  # (N, 5): label, size, place, stamp

    def __len__(self) -> int:
        return len(self._columns)

    def __getitem__(self, position: int) -> Entry:
        if not 0 <= position < len(self):
            raise IndexError(position)
        key = self._keys[self._ends[position] : self._ends[position + 1]].decode(errors="surrogateescape")
        label, size, *place, stamp = self._columns[position].tolist()
        return Entry(key, label, size, (place[0], place[1]), stamp)

    def stamp(self, positions: range) -> str:
        """Of where these images lie: while it is the same, so are their bytes. Sixteen hex digits."""
        columns = np.ascontiguousarray(self._columns[positions.start : positions.stop, 1:])
        return hashlib.sha256(columns.tobytes()).hexdigest()[:16]

    def labelled(self, labels: NDArray[np.int64]) -> "Entries":
        """The same entries with other labels, (N,)."""
        self._columns[:, 0] = labels
        return self

    def __iter__(self) -> Iterator[Entry]:
        return (self[position] for position in range(len(self)))


class Source(Protocol):
    """A data set as people have it. Opening one reads names and labels, no pixels."""

    class_names: list[str]
    entries: Entries
    left_out: Counter[str]  # files not taken, by reason: with those taken every one; a hidden folder counts as one

    def open(self, entry: Entry) -> bytes:
        """An image's encoded bytes. Raises Rejected where they cannot be read."""
        ...


def fingerprint(source: Source) -> str:
    """sha256 over every key, label and size and the class names, in order: another list of images has another one."""
    digest = hashlib.sha256("\n".join(source.class_names).encode(errors="surrogateescape"))
    for entry in source.entries:
        digest.update(f"\n{entry.key}\t{entry.label}\t{entry.size}".encode(errors="surrogateescape"))
    return digest.hexdigest()


def file_stamp(status: os.stat_result) -> int:
    """The time when a file was last written, in ns: another one once it was written, or exchanged for another file.

    It tells that bytes may be others, never that they are. Inodes and the time of the last change of anything are left
    out: they differ from node to node and from mount to mount.
    """
    return status.st_mtime_ns


def read_at(path: os.PathLike[str], offset: int, size: int) -> bytes:
    """`size` bytes of a file, opened anew: any number of forked workers may read at once. Raises Rejected."""
    check_size(size)
    with errors_as(Rejected, "cannot be opened"), open(path, "rb") as file:
        file.seek(offset)
        return file.read(size)


def check_size(size: int) -> None:
    """Raises Rejected for more bytes than an image may have, before they are read."""
    if size > MAX_ENCODED:
        raise Rejected(f"{size:,} bytes, above {MAX_ENCODED:,}: too many for an image")


def read_whole(path: os.PathLike[str], size: int) -> bytes:
    """A file that had `size` bytes when it was listed. Raises Rejected where it has not."""
    data = read_at(path, 0, size)
    if len(data) != size or read_at(path, size, 1):
        raise Rejected(f"changed while images were read: it had {size:,} bytes")
    return data


def is_image(name: str, suffixes: frozenset[str] = IMAGE_SUFFIXES) -> bool:
    return os.path.splitext(name)[1].lower() in suffixes


def kind_of(name: str) -> str:
    """Why a file that is no image by its name is left out: its suffix, as a reason for `Source.left_out`."""
    if is_hidden(name):
        return HIDDEN
    suffix = os.path.splitext(name)[1].lower()
    if suffix in UNREAD:
        return f"{ENCODED_AS} {UNREAD[suffix]}, which is not read; convert to PNG or JPEG"
    if len(suffix) > 12 or not suffix[1:].isalnum():  # no kind, but part of a name
        suffix = ""
    return f"not an image: {suffix or 'no suffix'}"


def is_hidden(name: str) -> bool:
    """Whether some part of a path begins with a dot, or is a folder that a system keeps for itself."""
    return any(part.startswith(".") or SYSTEMS_OWN.fullmatch(part) for part in name.split("/"))


def member_name(field: str, archive: object, name: str) -> str:
    """A member's name as a path has it: `./a//b.jpg`, which `tar -C folder -cf x.tar .` writes, is `a/b.jpg`.

    Raises UserError for a name that would leave the folder it were unpacked in.
    """
    if len(name) > MAX_NAME:
        raise UserError(f"{field}: {archive} has a member {name!r}, of {len(name):,} characters: no path is so long")
    if name.startswith("/") or "\\" in name or "\0" in name or ".." in name.split("/"):
        raise UserError(
            f"{field}: {archive} has a member {name!r}, a path that leads out of it; no data set has one: pack it again"
        )
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def refuse_lfs_pointer(path: object, field: str, start: bytes) -> None:
    """Raises UserError for the note that a clone without Git LFS has in place of a file, by its first bytes."""
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{field}: {path} is only Git LFS's note of a file; get the file itself: git lfs pull")
