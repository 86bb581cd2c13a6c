"""Bad images and odd ones, by what is wrong with them."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

from tests.photographs import encoded, photograph

JPEG, PNG = encoded(photograph(0), "jpeg"), encoded(photograph(1))


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=array.dtype == object)
    return buffer.getvalue()


def png_claiming(side: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = [header, b"IDAT" + zlib.compress(bytes(1000)), b"IEND"]
    parts = (struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def flipped(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


# One image's bytes, and what the reason says.
REJECTED_IMAGES: dict[str, tuple[bytes, str]] = (
    {
        "zero bytes": (b"", "empty file"),
        "text": (b"an image of a cat", "not readable as an image"),
        "html, as downloads that failed": (b"<!DOCTYPE html><html></html>", "not readable as an image: an HTML page"),
        "a png with a wrong checksum": (flipped(PNG, PNG.index(b"IDAT") + 100), "not readable"),
        "a bomb of 3.6 gigapixels": (png_claiming(60_000), "decompression bomb"),
        "a bomb below Pillow's own limit": (png_claiming(12_000), "decompression bomb"),
        "a script in PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "not readable"),
        "an npy of objects, which is a pickle": (npy(np.array([{}])), "an array of object .*only uint8"),
        "an npy of floats": (npy(np.zeros((4, 4, 3))), "only uint8"),
        "an npy cut off": (npy(np.zeros((9, 9, 3), np.uint8))[:-50], "not readable"),
        "an npy that claims a terabyte": (
            npy(np.zeros((1000, 1, 1), np.uint8)).replace(b"(1000, 1, 1), }     ", b"(1000000, 1000000), }")[:200],
            "of 1,000,000,000,000 bytes, but the file has .* cut off",
        ),
    }
    | {
        f"a jpeg cut off at {twelfth}/12": (JPEG[: len(JPEG) * twelfth // 12], "not readable|truncated")
        for twelfth in range(1, 12)
    }
    | {"a jpeg cut off before its last bytes": (JPEG[:-60], "truncated")}
)


def sixteen_bit_rgb(values: list[int]) -> bytes:
    """A PNG of one row, each pixel grey of a 16-bit value."""
    row = b"\0" + b"".join(struct.pack(">HHH", value, value, value) for value in values)
    header = b"IHDR" + struct.pack(">IIBBBBB", len(values), 1, 16, 2, 0, 0, 0)
    chunks = [header, b"IDAT" + zlib.compress(row), b"IEND"]
    parts = (struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def pages(*images: np.ndarray) -> bytes:
    first, *others = (Image.fromarray(image) for image in images)
    return encoded(first, "tiff", save_all=True, append_images=others)


GREY = np.arange(12, dtype=np.uint8).reshape(3, 4)
COLOUR = np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
# What looks odd and is accepted by a rule, with the pixels that the rule gives.
ACCEPTED_IMAGES: dict[str, tuple[bytes, np.ndarray]] = {
    "a wrong extension: the bytes tell the format": (PNG, np.asarray(photograph(1))),
    "bytes after the end": (PNG + b"appended", np.asarray(photograph(1))),
    "16-bit colour is divided by 256": (
        sixteen_bit_rgb([0, 255, 256, 65535]),
        np.array([[[0] * 3, [0] * 3, [1] * 3, [255] * 3]]),
    ),
    "of several pages the first counts": (pages(COLOUR, COLOUR[::-1]), COLOUR),
    "npy (H, W)": (npy(GREY), np.stack([GREY] * 3, axis=2)),
    "npy (H, W, 3)": (npy(COLOUR), COLOUR),
    "npy (3, H, W)": (npy(COLOUR.transpose(2, 0, 1)), COLOUR),
    "npy (1, 3, H, W)": (npy(COLOUR.transpose(2, 0, 1)[None]), COLOUR),
}
