"""A file that is no image of the formats that are read is rejected by what it is, in the same words every time."""

import io
import struct
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from preprocess.images.images import Rejected, decode
from tests.photographs import encoded, photograph

IMAGE = photograph(0, 24, 16)


def archive(kind: str) -> bytes:
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as file:
            file.writestr("a.jpg", b"x")
    else:
        with tarfile.open(fileobj=buffer, mode=kind) as file:
            file.addfile(tarfile.TarInfo("a.jpg"))
    return buffer.getvalue()


def media(brand: bytes, *others: bytes) -> bytes:
    content = b"ftyp" + brand + bytes(4) + b"".join(others)
    return struct.pack(">I", len(content) + 4) + content + bytes(100)


KINDS = {
    "JPEG 2000": [encoded(IMAGE, "jpeg2000"), encoded(IMAGE, "jpeg2000", no_jp2=True)],
    "JPEG XL": [b"\xff\x0a" + bytes(99), b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(99)],
    "AVIF": [encoded(IMAGE, "avif"), media(b"mif1", b"mif1", b"avif")],
    "HEIC": [media(b"heic"), media(b"mif1", b"mif1", b"heic"), media(b"hevc")],
    "a video": [media(b"isom"), media(b"qt  "), b"\x1a\x45\xdf\xa3" + bytes(99)],
    "SVG": [b"<svg xmlns='x'/>", b"<?xml version='1.0'?>\n<!-- a --><!-- b -->\n<svg/>", b"\xef\xbb\xbf  <SVG>"],
    "PDF": [b"%PDF-1.7\n"],
    "PSD": [b"8BPS\0\1" + bytes(99)],
    "PostScript": [b"%!PS-Adobe-3.0"],
    "an HTML page": [
        b"<!DOCTYPE html>\n<html>",
        b"\n\n<html lang=en>",
        b"<!-- x --><HTML>",
        b"<head><title>404</title>",
    ],
    "an XML text": [b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>"],
    "a JSON text": [b'{"message": "rate limit"}', b"[1, 2]"],
    "Git LFS": [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"],
    "all of them zero": [bytes(1), bytes(5000)],
    "a zip": [archive("zip")],
    "a tar": [archive("w")],
    "a compressed file": [archive("w:gz"), archive("w:bz2"), archive("w:xz")],
    "PFM": [encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "ppm").replace(b"Pf", b"PF")],
    "ICO": [encoded(IMAGE, "ico")],
    "empty file": [b""],
    "of no known format": [b"an image of a cat", bytes(range(200, 256)) * 9, b"\0" * 500 + b"x"],
    "header of its PNG or JPEG": [b"\xff\xd8\xff\xc0\0\x0b\x0c" + bytes(9), b"\xff\xd8\xff\xe0" + bytes(50)],
    "header of its TIFF": [b"II*\0" + bytes(99)],
    "header of its GIF or WebP": [b"GIF89b" + bytes(20), b"RIFF\0\0\0\0WEBPVP9 "],
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_another_kind_is_rejected_by_its_kind(kind: str) -> None:
    for data in KINDS[kind]:
        with pytest.raises(Rejected, match=kind) as found:
            decode(data)
        assert str(found.value).isprintable()


def test_a_reason_is_one_short_printable_line_without_an_address() -> None:
    reason = str(Rejected(f"\x1b[2J two\nlines of {object()!r} at {io.BytesIO()} \ud800 {'x' * 999}"))
    assert reason.startswith("\\x1b[2J two\\nlines of <object object> at <_io.BytesIO object> \\ud800 xxx")
    assert len(reason) == Rejected.limit
    assert reason.isprintable()
    assert str(Rejected("plain")) == "plain"


@pytest.mark.parametrize(
    "error",
    [
        AttributeError("x"),
        ZeroDivisionError(),
        AssertionError(),
        RecursionError(),
        MemoryError(),
        UserWarning("w"),
    ],
)
def test_whatever_a_decoder_raises_rejects_the_image_by_the_errors_type(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load_prepare", fail)
    with pytest.raises(Rejected, match=rf"^not readable as an image \({type(error).__name__}"):
        decode(encoded(IMAGE))


def pgm(maximum: int, values: list[int], plain: bool = False) -> bytes:
    head = b"P%d %d 1 %d\n" % (2 if plain else 5, len(values), maximum)
    if plain:
        return head + b" ".join(b"%d" % value for value in values)
    return head + struct.pack(f">{len(values)}{'H' if maximum > 255 else 'B'}", *values)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("maximum", [1, 100, 255, 256, 1023, 4095, 16383, 65534, 65535])
def test_a_pgm_of_any_maximum_is_scaled_by_it(maximum: int, plain: bool) -> None:
    values = sorted({0, 1, maximum // 3, maximum // 2, maximum - 1, maximum})
    found = np.asarray(decode(pgm(maximum, values, plain)))[0]
    if maximum > 255:
        expected = [round(value / maximum * 65535) // 256 for value in values]
    else:
        expected = [round(value / maximum * 255) for value in values]
    assert found.tolist() == [[value] * 3 for value in expected]


def tiff(bits: int, photometric: int, order: str, data: bytes) -> bytes:
    """Two pixels in a row."""
    tags = {
        256: 2,
        257: 1,
        258: bits,
        259: 1,
        262: photometric,
        273: 8 + 2 + 9 * 12 + 4,
        277: 1,
        278: 1,
        279: len(data),
    }
    rows = (struct.pack(order + "HHIHH", tag, 3, 1, value, 0) for tag, value in tags.items())
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(tags))
    return head + b"".join(rows) + bytes(4) + data


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (tiff(16, 1, "<", struct.pack("<HH", 0x12FF, 65535)), [0x12, 255]),
        (tiff(16, 1, ">", struct.pack(">HH", 0x12FF, 65535)), [0x12, 255]),
        (tiff(16, 0, "<", struct.pack("<HH", 0x1200, 65535)), [255 - 0x12, 0]),  # white is zero
        (tiff(8, 0, "<", bytes([0x12, 255])), [255 - 0x12, 0]),
        (tiff(12, 1, "<", bytes([0xFF, 0xF1, 0x20])), [255, 0x12]),
    ],
)
def test_deep_grey_of_a_tiff_keeps_its_brightest_bits(data: bytes, expected: list[int]) -> None:
    assert np.asarray(decode(data))[0].tolist() == [[value] * 3 for value in expected]


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate"])
def test_16_bit_grey_is_the_same_in_every_format(compression: str | None) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (5, 7), dtype=np.uint16)
    deep = Image.fromarray(values)
    for data in (encoded(deep), encoded(deep, "ppm"), encoded(deep, "tiff", compression=compression)):
        assert np.array_equal(np.asarray(decode(data)), np.stack([values >> 8] * 3, axis=2))


def test_the_transparent_colour_of_16_bit_grey_is_white() -> None:
    row = b"\0" + struct.pack(">HH", 1000, 2000)
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", 2, 1, 16, 0, 0, 0, 0), b"tRNS" + struct.pack(">H", 2000)]
    parts = [*chunks, b"IDAT" + zlib.compress(row), b"IEND"]
    data = b"".join(struct.pack(">I", len(each) - 4) + each + struct.pack(">I", zlib.crc32(each)) for each in parts)
    assert np.asarray(decode(b"\x89PNG\r\n\x1a\n" + data))[0].tolist() == [[3] * 3, [255] * 3]


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(np.zeros((4, 4), np.float32)),
        Image.fromarray(np.zeros((4, 4), np.int32)),
    ],
)
def test_floats_and_32_bits_are_rejected(image: Image.Image) -> None:
    with pytest.raises(Rejected, match=f"pixels of mode {image.mode} have no defined white"):
        decode(encoded(image, "tiff"))
    if image.mode == "F":
        with pytest.raises(Rejected, match="pixels of mode F"):
            decode(encoded(image, "ppm"))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0, 3), (4,), (), (2, 3, 4, 5), (5, 5, 4)])
def test_arrays_of_other_shapes_are_rejected(shape: tuple[int, ...]) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(shape, np.uint8))
    with pytest.raises(Rejected, match=r"pixels|an array of uint8"):
        decode(buffer.getvalue())


def test_an_array_by_columns_is_read() -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.asfortranarray(np.asarray(IMAGE)))
    assert np.array_equal(np.asarray(decode(buffer.getvalue())), np.asarray(IMAGE))
