"""Removes metadata (text, profiles, previews, notes) from encoded images.

Pillow reads all metadata when it opens an image and refuses the image if they are odd, large or damaged, although the
pixels do not depend on them.
"""

import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress

PNG = b"\x89PNG\r\n\x1a\n"
JPEG = b"\xff\xd8"
TIFFS = {b"II*\0": "<", b"MM\0*": ">", b"II+\0": "<", b"MM\0+": ">"}  # byte orders; + is BigTIFF
ORIENTATION, SHORT, UPRIGHT = 274, 3, 1
STANDALONE_OR_SCAN = range(0xD0, 0xDB)  # restarts, start and end of the image, start of a scan
# Tags that the pixels depend on, and the orientation, which Pillow applies itself.
TIFF_TAGS = frozenset(
    {254, 255, 256, 257, 258, 259, 262, 263, 264, 265, 266, 273, 274, 277, 278, 279, 280, 281, 284, 292, 293, 301}
    | {317, 318, 319, 320, 321, 322, 323, 324, 325, 330, 332, 333, 334, 336, 338, 339, 340, 341, 347}
    | {*range(512, 522), 529, 530, 531, 532, 34016, 34925, 48129, 50674}
)


def without_metadata(data: bytes) -> tuple[bytes, bytes]:
    """The file without metadata, and its EXIF block, which is empty if missing or damaged.

    For JPEG, PNG and TIFF; other files are returned unchanged, and so is the rest of a file after damage.
    """
    if data.startswith(PNG):
        return _png(data)
    if data.startswith(JPEG):
        return _jpeg(data)
    return (_tiff(data) if data[:4] in TIFFS else data), b""


def _png(data: bytes) -> tuple[bytes, bytes]:
    """Keeps the critical chunks, whose names begin with a capital letter, and transparency."""
    kept, exif, start = [PNG], b"", len(PNG)
    while start + 12 <= len(data):
        length, name = struct.unpack_from(">I4s", data, start)
        end = start + 12 + length
        if end > len(data):
            break
        if name[0] & 32 == 0 or name == b"tRNS":
            kept.append(data[start:end])
        elif name == b"eXIf" and zlib.crc32(data[start + 4 : end - 4]) == int.from_bytes(data[end - 4 : end]):
            exif = data[start + 8 : end - 4]
        start = end
    kept.append(data[start:])
    return b"".join(kept), exif


def _jpeg(data: bytes) -> tuple[bytes, bytes]:
    """Drops comments and application segments, except the two that state the colour space."""
    kept, exif, start = [JPEG], b"", len(JPEG)
    while start + 4 <= len(data):
        mark, marker, length = struct.unpack_from(">BBH", data, start)
        if mark == 0xFF and marker == 0xFF:  # padding
            start += 1
            continue
        end = start + 2 + length
        if mark != 0xFF or marker < 0xC0 or marker in STANDALONE_OR_SCAN or end > len(data):
            break  # the scans begin, or the file is damaged
        segment = data[start:end]
        jfif = marker == 0xE0 and segment[4:9] == b"JFIF\0" and length >= 16
        adobe = marker == 0xEE and segment[4:9] == b"Adobe" and length >= 14
        if jfif or adobe or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            kept.append(segment)
        elif marker == 0xE1 and segment[4:10] == b"Exif\0\0":
            exif = exif or segment[10:]
        start = end
    kept.append(data[start:])
    return b"".join(kept), exif


def _tiff(data: bytes) -> bytes:
    """Removes the other tags from the first page's directory in place, and all later pages."""
    try:
        start, count_of, offset_of = _directory(data)
        entries = [entry for tag, entry in _entries(data) if tag in TIFF_TAGS]
    except Exception:  # noqa: BLE001 # cut off: Pillow says so
        return data
    page = struct.pack(count_of, len(entries)) + b"".join(entries) + struct.pack(offset_of, 0)
    return data[:start] + page + data[start + len(page) :]


def orientation(exif: bytes) -> int:
    """The EXIF orientation, 1 to 8; 1 (upright) if the block does not state it."""
    block = exif.removeprefix(b"Exif\0\0")
    if block[:4] not in TIFFS:
        return UPRIGHT
    with suppress(Exception):  # truncated
        for tag, entry in _entries(block):
            _, kind, count, value = struct.unpack_from(TIFFS[block[:4]] + "HHIH", entry)
            if (tag, kind, count) == (ORIENTATION, SHORT, 1):
                return int(value) if 1 <= value <= 8 else UPRIGHT
    return UPRIGHT


def _directory(data: bytes) -> tuple[int, str, str]:
    """Offset of a TIFF's first directory, and the struct formats of its entry count and of offsets."""
    order, is_big = TIFFS[data[:4]], b"+" in data[2:4]
    offset_of, count_of = order + ("Q" if is_big else "I"), order + ("Q" if is_big else "H")
    (start,) = struct.unpack_from(offset_of, data, 8 if is_big else 4)
    return start, count_of, offset_of


def _entries(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Tags of the first directory with their entries. Raises struct.error if it is truncated."""
    start, count_of, offset_of = _directory(data)
    (count,) = struct.unpack_from(count_of, data, start)
    start, size = start + struct.calcsize(count_of), 4 + 2 * struct.calcsize(offset_of)
    for each in range(start, start + count * size, size):
        (tag,) = struct.unpack_from(f"{count_of[0]}H{size - 2}x", data, each)
        yield tag, data[each : each + size]
