"""Encoded images of every format that is read, and damaged ones made of them: mutation i is a function of i alone."""

import io
import struct
import zlib
from collections import Counter
from functools import cache

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin

from preprocess.images.metadata import PNG
from preprocess.sources import Entries, Entry
from tests.photographs import encoded, photograph

EXTREMES = (0, 1, 2, 3, 7, 8, 127, 128, 255, 256, 32767, 65535, 2**31 - 1, 2**31, 2**32 - 1)


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def exif(orientation: int = 6) -> bytes:
    block = Image.Exif()
    block[0x0112], block[0x010E], block[0x011A] = orientation, "a description", 72.5
    return block.tobytes()


@cache
def originals() -> list[bytes]:
    """Small ones, so that mutations meet headers."""
    colour, other = photograph(0, 20, 14), photograph(1, 20, 14)
    grey, alpha, palette = colour.convert("L"), colour.convert("RGBA"), colour.quantize(16)
    alpha.putalpha(grey)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    notes = PngImagePlugin.PngInfo()
    notes.add_text("Comment", "text " * 20)
    notes.add_text("Software", "text " * 20, zip=True)
    notes.add_itxt("XML:com.adobe.xmp", "<x:xmpmeta/>", "en", "key", zip=True)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = profile[:24] + bytes(12) + profile[36:]  # without its time
    frames = {"save_all": True, "append_images": [other, colour]}
    jpeg, tiff = {"exif": exif(), "icc_profile": profile, "comment": b"a comment"}, {"resolution": 72.0}
    return [
        encoded(colour, "jpeg"),
        encoded(colour, "jpeg", progressive=True, quality=95, subsampling=0),
        encoded(colour, "jpeg", restart_marker_blocks=1, **jpeg),
        encoded(grey, "jpeg", optimize=True),
        encoded(colour.convert("CMYK"), "jpeg"),
        encoded(colour),
        encoded(alpha, pnginfo=notes, exif=exif(), icc_profile=profile, dpi=(72, 72)),
        encoded(palette, transparency=3),
        encoded(deep),
        encoded(colour.convert("1")),
        encoded(colour, **frames),
        encoded(palette, "gif", transparency=2, comment=b"a comment"),
        encoded(colour, "gif", **frames),
        encoded(colour, "webp", exif=exif(), icc_profile=profile),
        encoded(alpha, "webp", lossless=True),
        encoded(colour, "webp", **frames),
        encoded(colour, "bmp"),
        encoded(palette, "bmp"),
        encoded(colour.convert("1"), "bmp"),
        *(
            encoded(colour, "tiff", compression=each, **tiff)
            for each in (None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")
        ),
        encoded(colour.convert("1"), "tiff", compression="group4"),
        encoded(alpha, "tiff", exif=exif(), icc_profile=profile, description="a description"),
        encoded(deep, "tiff", big_tiff=True),
        encoded(palette, "tiff", **frames),
        encoded(colour, "ppm"),
        encoded(colour.convert("1"), "ppm"),
        encoded(deep, "ppm"),
        b"P2 # a comment\n4 3\n1023\n" + b" ".join(b"%d" % (93 * number) for number in range(12)),
        b"P3\n2 2\n255\n1 2 3 4 5 6 7 8 9 10 11 12\n",
        _npy(np.asarray(colour)),
        _npy(np.asarray(grey)),
        _npy(np.asarray(colour).transpose(2, 0, 1)[None]),
    ]


def mutated(number: int) -> bytes:
    random = np.random.default_rng([8, number])
    files = originals()
    data = bytearray(files[random.integers(len(files))])
    for _ in range(random.integers(1, 5)):
        _mutate(data, random, files)
    return with_checksums(bytes(data)) if random.integers(2) else bytes(data)


def _mutate(data: bytearray, random: np.random.Generator, files: list[bytes]) -> None:
    kind = random.integers(9)
    start = int(random.integers(min(len(data), 80) if random.integers(2) else len(data))) if data else 0
    end = start + int(random.integers(1, 40))
    if kind < 2:  # a byte, or a bit
        data[start : start + 1] = bytes([int(random.integers(256)) if kind else (data[start] if data else 0) ^ 4])
    elif kind < 4:  # a number
        value, size = EXTREMES[random.integers(len(EXTREMES))], int(2 ** random.integers(3))
        order = "big" if random.integers(2) else "little"
        data[start : start + size] = (value % 256**size).to_bytes(size, order)
    elif kind == 4:
        del data[start:end]
    elif kind == 5:
        data[start:start] = data[start:end]
    elif kind == 6:
        data[start:start] = random.bytes(end - start)
    elif kind == 7:
        del data[start:]
    else:
        other = files[random.integers(len(files))]
        data[start:] = other[int(random.integers(len(other))) :]


def with_checksums(data: bytes) -> bytes:
    """A PNG whose chunks have the right checksums, however damaged they are; else the same file."""
    if not data.startswith(PNG):
        return data
    mended, start = bytearray(data), len(PNG)
    while start + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, start)
        end = start + 8 + length
        if end + 4 <= len(data):
            struct.pack_into(">I", mended, end, zlib.crc32(data[start + 4 : end]))
        start = end + 4
    return bytes(mended)


class Mutations:
    """A source of mutations first to first + count - 1."""

    def __init__(self, first: int, count: int) -> None:
        self.class_names, self.left_out = ["mutations"], Counter[str]()
        self.entries = Entries(Entry(str(first + number), 0, 0, (first + number, 0)) for number in range(count))

    def open(self, entry: Entry) -> bytes:
        return mutated(entry.place[0])
