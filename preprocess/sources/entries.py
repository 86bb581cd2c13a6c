"""The interface of sources: entries in a stable order, and the encoded bytes of each image."""

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
UNSUPPORTED = {  # suffixes of unsupported images, and their encodings
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
ENCODED_AS = "encoded as"  # how the reasons for UNSUPPORTED files begin
HIDDEN = "hidden"
HIDDEN_FOLDER = "hidden folder, not looked into"  # counts as one file
SYSTEMS_OWN = re.compile(  # system folders of macOS, Windows, Synology, Linux, Python and old tars
    r"__MACOSX|\$RECYCLE\.BIN|System Volume Information|@eaDir|#recycle|lost\+found|__pycache__|PaxHeaders?(\.\d+)?"
)
MAX_ENCODED = 2**28  # bytes; a larger file is rejected unread
MAX_NAME = 4096  # characters of a path, the limit of common systems
MAX_CLASSES = 1_000_000  # larger labels are refused


class Entry(NamedTuple):
    """One image of a source."""

    key: str  # unique name within the source
    label: int  # class index
    size: int  # bytes of the encoded image, or of its file if the format does not state it
    place: tuple[int, int] = (0, 0)  # location, private to the source
    stamp: int = 0  # `file_stamp` of its file; 0 if `place` holds a checksum of its content


class Entries:
    """Entries in arrays: about 70 bytes each, and shared with forked workers without copying."""

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
        """Sixteen hex digits of the images' locations and file times: if they are equal, so are the images."""
        columns = np.ascontiguousarray(self._columns[positions.start : positions.stop, 1:])
        return hashlib.sha256(columns.tobytes()).hexdigest()[:16]

    def labelled(self, labels: NDArray[np.int64]) -> "Entries":
        """These entries with other labels, (N,)."""
        self._columns[:, 0] = labels
        return self

    def __iter__(self) -> Iterator[Entry]:
        return (self[position] for position in range(len(self)))


class Source(Protocol):
    """A data set. Opening one reads names and labels, no pixels."""

    class_names: list[str]
    entries: Entries
    left_out: Counter[str]  # number of all other files by reason; a hidden folder counts as one

    def open(self, entry: Entry) -> bytes:
        """An image's encoded bytes. Raises Rejected if they cannot be read."""
        ...


def fingerprint(source: Source) -> str:
    """sha256 over class names, keys, labels and sizes in order: identifies the list of images."""
    digest = hashlib.sha256("\n".join(source.class_names).encode(errors="surrogateescape"))
    for entry in source.entries:
        digest.update(f"\n{entry.key}\t{entry.label}\t{entry.size}".encode(errors="surrogateescape"))
    return digest.hexdigest()


def file_stamp(status: os.stat_result) -> int:
    """The modification time of a file in ns: it changes when the file is written or replaced.

    Another stamp means that the bytes may have changed. Inodes and ctime are not used, since they differ between nodes
    and mounts.
    """
    return status.st_mtime_ns


def read_at(path: os.PathLike[str], offset: int, size: int) -> bytes:
    """`size` bytes of a file, through a new descriptor, so that forked workers can read at once. Raises Rejected."""
    check_size(size)
    with errors_as(Rejected, "cannot be opened"), open(path, "rb") as file:
        file.seek(offset)
        return file.read(size)


def check_size(size: int) -> None:
    """Raises Rejected for more bytes than an image may have, before they are read."""
    if size > MAX_ENCODED:
        raise Rejected(f"{size:,} bytes, above {MAX_ENCODED:,}: too many for an image")


def read_whole(path: os.PathLike[str], size: int) -> bytes:
    """Reads a file that had `size` bytes when it was listed. Raises Rejected if its size changed."""
    data = read_at(path, 0, size)
    if len(data) != size or read_at(path, size, 1):
        raise Rejected(f"changed while images were read: it had {size:,} bytes")
    return data


def is_image(name: str, suffixes: frozenset[str] = IMAGE_SUFFIXES) -> bool:
    return os.path.splitext(name)[1].lower() in suffixes


def kind_of(name: str) -> str:
    """The reason in `Source.left_out` for a file that is no image by its name."""
    if is_hidden(name):
        return HIDDEN
    suffix = os.path.splitext(name)[1].lower()
    if suffix in UNSUPPORTED:
        return f"{ENCODED_AS} {UNSUPPORTED[suffix]}, which is not supported; convert to PNG or JPEG"
    if len(suffix) > 12 or not suffix[1:].isalnum():  # not a suffix, but part of a name
        suffix = ""
    return f"not an image: {suffix or 'no suffix'}"


def is_hidden(name: str) -> bool:
    """Whether a part of a path begins with a dot or is a system folder."""
    return any(part.startswith(".") or SYSTEMS_OWN.fullmatch(part) for part in name.split("/"))


def member_name(field: str, archive: object, name: str) -> str:
    """A member's normalised path: `./a//b.jpg`, which `tar -C folder -cf x.tar .` writes, becomes `a/b.jpg`.

    Raises UserError for a path that leads out of the archive.
    """
    if len(name) > MAX_NAME:
        raise UserError(f"{field}: {archive} has a member {name!r}, of {len(name):,} characters: no path is so long")
    if name.startswith("/") or "\\" in name or "\0" in name or ".." in name.split("/"):
        raise UserError(
            f"{field}: {archive} has a member {name!r}, a path that leads out of it; no data set has one: pack it again"
        )
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def refuse_lfs_pointer(path: object, field: str, start: bytes) -> None:
    """Raises UserError for a Git LFS pointer, which a clone without Git LFS has in place of a file."""
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{field}: {path} is only Git LFS's note of a file; get the file itself: git lfs pull")
