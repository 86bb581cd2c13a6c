"""Whatever is odd, large or damaged around whole pixels: the pixels are those of the image without it."""

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from preprocess.images.images import Rejected, decode
from preprocess.images.metadata import PNG, TIFFS, without_metadata
from tests.mutations import originals
from tests.photographs import encoded, photograph

IMAGE = photograph(0, 40, 28)
PIXELS = np.asarray(IMAGE)
TURNED = np.rot90(PIXELS, -1)  # what orientation 6 says


def directory(*entries: tuple[int, int, int, bytes], order: str = "<") -> bytes:
    """A TIFF of one directory; each entry (tag, type, count, value of four bytes)."""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(entries))
    rows = (struct.pack(order + "HHI", *entry[:3]) + entry[3] for entry in entries)
    return head + b"".join(rows) + bytes(4) + struct.pack("<f", float("nan")) * 32


TURN = (0x0112, 3, 1, b"\6\0\0\0")
FAR = struct.pack("<I", 2**31)
# EXIF blocks; those that begin with TURN can be read so far.
ODD_EXIF = {
    "a description that is a rational": directory((0x010E, 5, 1, b"\x26\0\0\0"), TURN),
    "not a number": directory(TURN, (0x010F, 12, 1, b"\x26\0\0\0"), (0x011A, 11, 1, b"\0\0\xc0\x7f")),
    "infinite floats": directory(TURN, (0x011A, 11, 1, b"\0\0\x80\x7f"), (0x0128, 11, 1, b"\0\0\x80\xff")),
    "a denominator of zero": directory(TURN, (0x011A, 5, 1, b"\0\0\0\x7f"), (0x8769, 4, 1, FAR)),
    "values beyond the end": directory(TURN, (0x010E, 2, 2**31 - 1, FAR), (0x9286, 7, 2**30, FAR)),
    "types that there are not": directory((0x010E, 99, 1, FAR), TURN, (0x010F, 0, 1, FAR)),
}
UNREADABLE_EXIF = {
    "nothing": b"",
    "noise": bytes(range(256)),
    "no directory": b"II*\0\xff\xff\xff\x7f",
    "cut off": directory(TURN)[:12],
    "an orientation of text": directory((0x0112, 2, 4, b"six\0")),
    "an orientation of nine": directory((0x0112, 3, 1, b"\x09\0\0\0")),
    "an orientation of noughts": directory((0x0112, 5, 1, b"\x26\0\0\0")),
}


def jpeg_with(*segments: tuple[int, bytes], image: bytes = encoded(IMAGE, "jpeg", quality=95)) -> bytes:
    return image[:2] + b"".join(struct.pack(">BBH", 255, m, len(s) + 2) + s for m, s in segments) + image[2:]


def chunk(name: bytes, data: bytes, checksum: int = 0) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data) ^ checksum)


def png_with(*chunks: bytes, at_end: bool = False) -> bytes:
    whole = encoded(IMAGE)
    where = whole.index(b"IEND") - 4 if at_end else whole.index(b"IDAT") - 4
    return whole[:where] + b"".join(chunks) + whole[where:]


def webp_with(**chunks: bytes) -> bytes:
    return encoded(IMAGE, "webp", lossless=True, **chunks)


def inflating(size: int) -> bytes:
    return zlib.compress(bytes(size))


ODD_JPEGS = {
    "a colour profile without its numbers": [(0xE2, b"ICC_PROFILE\0")],
    "a colour profile whose parts are missing": [(0xE2, b"ICC_PROFILE\0\2\3" + bytes(100))],
    "Photoshop's notes, cut off": [(0xED, b"Photoshop 3.0\0" + b"8BIM\3\xed")],
    "Photoshop's notes with a short resolution": [(0xED, b"Photoshop 3.0\x008BIM\3\xed\0\0\0\0\0\1\0\0")],
    "JFIF, cut off": [(0xE0, b"JFIF\0\1")],
    "Adobe, cut off": [(0xEE, b"Adobe\0")],
    "a table of several images that is none": [(0xE2, b"MPF\0" + bytes(range(200)))],
    "XMP that is no XML": [(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + b"\xff\0<" * 99)],
    "an orientation that is in its XMP alone": [(0xE1, b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6"/>')],
    "4 MB of comments": [(0xFE, b"comment" * 9000)] * 64,
    "4 MB of IPTC": [(0xED, b"Photoshop 3.0\x008BIM\4\4\0\0" + b"\xff" * 60_000)] * 64,
    "two EXIF blocks": [(0xE1, b"Exif\0\0" + directory()), (0xE1, b"Exif\0\0" + directory(TURN))],
}
ODD_PNGS = {
    "2 MB of compressed text": chunk(b"zTXt", b"Comment\0\0" + inflating(2**21)),
    "2 MB of compressed international text": chunk(b"iTXt", b"Comment\0\1\0\0\0" + inflating(2**21)),
    "2 MB of a colour profile": chunk(b"iCCP", b"sRGB\0\0" + inflating(2**21)),
    "2 MB of plain text": chunk(b"tEXt", b"Comment\0" + bytes(2**21)),
    "text by an unknown method": chunk(b"zTXt", b"Comment\0\7" + inflating(9)),
    "a profile by an unknown method": chunk(b"iCCP", b"sRGB\0\7" + inflating(9)),
    "a profile without its parts": chunk(b"iCCP", b""),
    "text in no encoding": chunk(b"iTXt", b"Comment\0\0\0\xff\0\xff\0\xff\xfe"),
    "text without its parts": chunk(b"iTXt", b"Comment") + chunk(b"zTXt", b"") + chunk(b"tEXt", b"\0"),
    "density, gamma and colours cut off": chunk(b"pHYs", b"\0") + chunk(b"gAMA", b"\0") + chunk(b"cHRM", b"\0"),
    "sRGB without a value": chunk(b"sRGB", b""),
    "an animation cut off": chunk(b"acTL", b"\0"),
    "an animation in disorder": chunk(b"acTL", struct.pack(">II", 2, 0)) + chunk(b"fcTL", b"\0\0\0\7" + bytes(22)),
    "wrong checksums": b"".join(chunk(name, bytes(9), 1) for name in (b"tEXt", b"pHYs", b"eXIf", b"prVt")),
    "XMP that is no XML": chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<<\0"),
    "EXIF as ImageMagick writes it, no hexadecimals": chunk(b"tEXt", b"Raw profile type exif\0\nexif\n  9\nxyz"),
}


def test_every_original_keeps_its_pixels_without_metadata() -> None:
    for data in originals():
        bare, _ = without_metadata(data)
        if data.startswith(np.lib.format.MAGIC_PREFIX):
            assert bare == data
            continue
        with Image.open(io.BytesIO(bare)) as image, Image.open(io.BytesIO(data)) as whole:
            assert np.array_equal(np.asarray(image.convert("RGBA")), np.asarray(whole.convert("RGBA")))
        assert len(bare) <= len(data)


@pytest.mark.parametrize("case", ODD_JPEGS)
def test_a_jpegs_odd_metadata_are_dropped(case: str) -> None:
    assert np.array_equal(np.asarray(decode(jpeg_with(*ODD_JPEGS[case]))), np.asarray(decode(jpeg_with())))


def test_a_jpegs_colour_space_segments_are_kept() -> None:
    red = np.zeros((8, 8, 3), np.uint8) + np.array([200, 30, 40], np.uint8)
    plain = encoded(Image.fromarray(red), "jpeg", keep_rgb=True)  # says so by its Adobe segment or components' names
    cmyk = encoded(Image.new("CMYK", (8, 8), (200, 30, 40, 5)), "jpeg")
    for data in (plain, cmyk):
        with Image.open(io.BytesIO(data)) as image:
            assert np.array_equal(np.asarray(decode(data)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("case", ODD_PNGS)
def test_a_pngs_odd_metadata_are_dropped(case: str, at_end: bool) -> None:
    assert np.array_equal(np.asarray(decode(png_with(ODD_PNGS[case], at_end=at_end))), PIXELS)


@pytest.mark.parametrize(
    "entries",
    [
        [(0x011A, 2, 4, b"300\0"), (0x011B, 2, 4, b"300\0"), (0x0128, 3, 1, b"\3\0\0\0")],  # centimetres, as text
        [(0x011A, 5, 1, FAR), (0x0131, 11, 1, b"\0\0\xc0\x7f")],
        [(0x8773, 12, 3, b"\1\0\0\0")],  # a profile of numbers
        [(0x8769, 4, 1, FAR)],  # an EXIF directory beyond the end
        [(0x8825, 2, 4, b"GPS\0")],
        [(0xC6F8, 7, 2**30, FAR)],
        [(0xBC02 + number, 3, 1, FAR) for number in range(3000)],
    ],
)
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_a_tiffs_odd_tags_are_dropped(entries: list[tuple[int, int, int, bytes]], compression: str | None) -> None:
    data = encoded(IMAGE, "tiff", compression=compression)
    (start,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, start)
    rows = [data[start + 2 + 12 * number :][:12] for number in range(count)]
    rows += [struct.pack("<HHI", *entry[:3]) + entry[3] for entry in (*entries, TURN)]
    rows = sorted({row[:2]: row for row in rows}.values(), key=lambda row: row[1::-1])
    moved = struct.pack("<H", len(rows)) + b"".join(rows) + struct.pack("<I", len(data))  # and leads back into itself
    odd = data[:4] + struct.pack("<I", len(data)) + data[8:] + moved
    assert np.array_equal(np.asarray(decode(odd)), TURNED)


@pytest.mark.parametrize("case", ODD_EXIF)
def test_orientation_is_applied_where_it_can_be_read(case: str) -> None:
    block = ODD_EXIF[case]
    jpeg = jpeg_with((0xE1, b"Exif\0\0" + block))
    for data in (png_with(chunk(b"eXIf", block)), webp_with(exif=b"Exif\0\0" + block), webp_with(exif=block)):
        assert np.array_equal(np.asarray(decode(data)), TURNED)
    assert np.array_equal(np.asarray(decode(jpeg)), np.rot90(np.asarray(decode(jpeg_with())), -1))


@pytest.mark.parametrize("case", UNREADABLE_EXIF)
def test_an_orientation_that_cannot_be_read_is_none(case: str) -> None:
    block = UNREADABLE_EXIF[case]
    jpeg = jpeg_with((0xE1, b"Exif\0\0" + block))
    for data in (png_with(chunk(b"eXIf", block)), webp_with(exif=b"Exif\0\0" + block)):
        assert np.array_equal(np.asarray(decode(data)), PIXELS)
    assert np.array_equal(np.asarray(decode(jpeg)), np.asarray(decode(jpeg_with())))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "webp", "tiff"])
def test_every_orientation_stands_upright(suffix: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if suffix == "webp" else {}
    lying = np.rot90(PIXELS, -(0, 0, 2, 2, 1, 1, 3, 3)[orientation - 1])
    upright = lying[:, ::-1] if orientation in (2, 4, 5, 7) else lying
    assert np.array_equal(np.asarray(decode(encoded(IMAGE, suffix, exif=exif, **options))), upright)


def test_text_that_inflates_to_gigabytes_is_not_inflated() -> None:
    bomb = inflating(2**26)
    data = png_with(*[chunk(b"zTXt", b"Comment\0\0" + bomb), chunk(b"iCCP", b"sRGB\0\0" + bomb)] * 16)
    tracemalloc.start()
    decode(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * len(data) + 2**20


def test_pixels_that_are_cut_off_stay_rejected_whatever_the_metadata() -> None:
    text = chunk(b"zTXt", b"Comment\0\0" + inflating(2**21))
    for whole in (png_with(text), jpeg_with((0xE2, b"ICC_PROFILE\0"))):
        for share in (0.3, 0.6, 0.9):
            with pytest.raises(Rejected, match="not readable"):
                decode(whole[: int(len(whole) * share)])


def test_damaged_transparency_is_not_metadata() -> None:
    with pytest.raises(Rejected, match="not readable"):
        decode(png_with(chunk(b"tRNS", bytes(6), 1)))


def test_a_directory_that_leads_out_of_its_file_is_left_as_it_is() -> None:
    for head, order in TIFFS.items():
        data = head + struct.pack(order + "IIII", 2**31, 2**31, 2**31, 2**31)
        assert without_metadata(data) == (data, b"")
    assert without_metadata(PNG) == (PNG, b"")
