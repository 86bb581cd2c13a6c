"""Every kind of image is read by its documented rule or rejected with a reason, and pixels survive the round trip."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fpdm.latents import to_uint8
from preprocess.encoding.image_loader import ImageLoader
from preprocess.images.images import CROPS, Rejected, decode, to_tensor
from preprocess.shards import Rejection
from tests.photographs import source_of

RESOLUTION = 16


def encoded(image: Image.Image, suffix: str = "png", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, suffix, **options)
    return buffer.getvalue()


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, len(mode)), dtype=np.uint8)
    return Image.fromarray(values.squeeze())


def test_every_uint8_value_survives_the_round_trip() -> None:
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 256, 1).repeat(1, 1, 3)
    image = Image.fromarray(values.numpy())
    assert torch.equal(to_uint8(to_tensor(image)), values.permute(2, 0, 1))


def test_halves_round_up_and_values_outside_are_clamped() -> None:
    halves = (torch.tensor([0.5, 1.5, 2.5, 254.5]) - 127.5) / 127.5
    assert to_uint8(halves.double()).tolist() == [1, 2, 3, 255]
    assert to_uint8(torch.tensor([-3.0, -1.0, 1.0, 3.0])).tolist() == [0, 0, 255, 255]


def test_grey_is_repeated_and_16_bit_grey_is_divided_by_256() -> None:
    grey = Image.fromarray(np.array([[0, 7, 255]], np.uint8))
    deep = Image.fromarray(np.array([[0, 7 * 256 + 255, 65535]], np.uint16))
    for image in (grey, deep):
        assert np.asarray(decode(encoded(image))).tolist() == [[[0] * 3, [7] * 3, [255] * 3]]


def test_alpha_is_composed_on_white() -> None:
    pixels = np.array([[[9, 8, 7, 255], [9, 8, 7, 0], [0, 0, 0, 51]]], np.uint8)
    assert np.asarray(decode(encoded(Image.fromarray(pixels)))).tolist() == [[[9, 8, 7], [255] * 3, [204] * 3]]


def test_a_palettes_transparent_colour_is_white() -> None:
    image = Image.fromarray(np.array([[0, 1]], np.uint8))
    image.putpalette([10, 20, 30, 40, 50, 60])
    assert np.asarray(decode(encoded(image))).tolist() == [[[10, 20, 30], [40, 50, 60]]]
    assert np.asarray(decode(encoded(image, transparency=1))).tolist() == [[[10, 20, 30], [255] * 3]]


def test_cmyk_and_bilevel_images_become_rgb() -> None:
    cmyk = Image.new("CMYK", (8, 8), (0, 0, 0, 0))
    assert np.asarray(decode(encoded(cmyk, "jpeg"))).min() >= 250
    assert np.asarray(decode(encoded(Image.new("1", (8, 8), 1)))).min() == 255


def test_exif_orientation_is_applied() -> None:
    image = noise(4, 2)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rows are columns
    turned = decode(encoded(image, exif=exif.tobytes()))
    assert np.array_equal(np.asarray(turned), np.rot90(np.asarray(image), -1))


def test_of_an_animation_the_first_frame_counts() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    animation = encoded(frames[0], "gif", save_all=True, append_images=frames[1:])
    assert decode(animation).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("suffix", ["png", "jpeg", "gif", "webp", "bmp"])
def test_a_truncated_image_is_rejected_with_a_reason(suffix: str) -> None:
    whole = encoded(noise(48, 48), suffix)
    decode(whole)
    for length in [0, 1, *(len(whole) * twelfth // 12 for twelfth in range(1, 12))]:
        with pytest.raises(Rejected) as reason:
            decode(whole[:length])
        assert str(reason.value)
        assert "\n" not in str(reason.value)


def test_a_png_with_a_wrong_checksum_is_rejected() -> None:
    whole = bytearray(encoded(noise(16, 16)))
    whole[whole.index(b"IDAT") + 40] ^= 1
    with pytest.raises(Rejected, match="not readable"):
        decode(bytes(whole))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [12_000, 60_000])
def test_a_decompression_bomb_is_rejected_before_it_is_decoded(side: int) -> None:
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = [header, b"IDAT" + zlib.compress(b"\0" * 1000), b"IEND"]
    bomb = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )
    with pytest.raises(Rejected, match="decompression bomb"):
        decode(bomb)


@pytest.mark.parametrize("rule", sorted(CROPS))
@pytest.mark.parametrize("size", [(16, 16), (17, 16), (16, 90), (63, 64), (5, 9), (200, 33), (1, 1)])
def test_every_crop_gives_a_square_of_the_resolution(rule: str, size: tuple[int, int]) -> None:
    assert CROPS[rule](noise(*size), RESOLUTION).size == (RESOLUTION, RESOLUTION)


def test_a_strip_that_would_be_resized_to_a_bomb_is_rejected_by_name(tmp_path: Path) -> None:
    Image.new("RGB", (1, 40_000)).save(tmp_path / "strip.png")  # 256 x 10,240,000 on the way to 256 x 256
    noise(8, 9).save(tmp_path / "whole.png")
    loader = ImageLoader(source_of("folder", tmp_path), "center", 256)
    loaded = loader[[0, 1]]
    assert loaded.rejected == [
        Rejection("strip.png", "1 x 40000 pixels: too long a strip to be resized to 256"),
    ]
    assert (loaded.positions, loaded.sizes) == ([1], [(8, 9)])


@pytest.mark.parametrize("rule", sorted(CROPS))
def test_an_image_of_the_right_size_is_kept_to_the_bit(rule: str) -> None:
    image = noise(RESOLUTION, RESOLUTION)
    assert np.array_equal(np.asarray(CROPS[rule](image, RESOLUTION)), np.asarray(image))


def test_the_centre_crop_is_the_middle_of_box_halves() -> None:
    image = noise(8 * RESOLUTION, 4 * RESOLUTION)
    halves = image.resize((4 * RESOLUTION, 2 * RESOLUTION), Image.Resampling.BOX)
    halves = halves.resize((2 * RESOLUTION, RESOLUTION), Image.Resampling.BOX)
    middle = np.asarray(halves)[:, RESOLUTION // 2 : RESOLUTION // 2 + RESOLUTION]
    assert np.array_equal(np.asarray(CROPS["center"](image, RESOLUTION)), middle)


@pytest.mark.parametrize("size", [(64, 40), (40, 64)])
def test_the_short_side_crop_is_the_middle_square_resized_once(size: tuple[int, int]) -> None:
    image = noise(*size)
    left, top = (size[0] - 40) // 2, (size[1] - 40) // 2
    square = Image.fromarray(np.asarray(image)[top : top + 40, left : left + 40])
    expected = square.resize((RESOLUTION, RESOLUTION), Image.Resampling.LANCZOS)
    assert np.array_equal(np.asarray(CROPS["short_side"](image, RESOLUTION)), np.asarray(expected))
