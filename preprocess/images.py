"""Bytes to pixels and back: how a picture is read, cropped, and turned into numbers.

Each rule has its one home here.
"""

import io
import math
import struct
import zlib
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

Rounding = Literal["half_away", "truncate"]
MAX_PIXELS = 2**27  # 134 million; more is taken for a decompression bomb
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # others, EPS above all, run programs or none
WHITE = (255, 255, 255, 255)

# What Pillow's decoders raise on damaged files; its UnidentifiedImageError is an OSError.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    KeyError,
    IndexError,
    TypeError,
    OverflowError,
    NotImplementedError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class Rejected(Exception):
    """A picture that cannot be used; the message is the reason, one line."""


def decode(data: bytes) -> Image.Image:
    """The picture in an encoded file, as RGB.

    - The format is found from the bytes, whatever the file's name says: one of FORMATS, or NPY of uint8 (CelebA-HQ):
      (H, W), (H, W, 3), (3, H, W) or (1, 3, H, W). Of an animation, or several pages, the first counts.
    - EXIF orientation is applied: the picture stands as its photographer saw it.
    - Alpha, a palette's transparent colour included, is composed on white. Grey is repeated in three channels, 16-bit
      values are divided by 256; palettes, 1-bit, CMYK and other colour spaces take Pillow's conversion. ICC profiles
      are not applied.

    Raises Rejected for what is truncated, damaged, above MAX_PIXELS, of floating-point pixels, or no picture.
    """
    if not data:
        raise Rejected("empty file")
    try:
        if data.startswith(np.lib.format.MAGIC_PREFIX):
            return _from_array(data)
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_pixels(image.width, image.height)
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except _DECODER_ERRORS as error:
        raise Rejected(f"not readable as a picture: {' '.join(str(error).split()) or type(error).__name__}") from None


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise Rejected(f"{width} x {height} pixels, above {MAX_PIXELS:,}: decompression bomb")


def _from_array(data: bytes) -> Image.Image:
    """The picture in a .npy file."""
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except MemoryError:
        raise Rejected("an array that claims more than there is memory") from None
    planes = array[0] if array.ndim == 4 and array.shape[0] == 1 else array
    if planes.ndim == 3 and planes.shape[0] == 3 != planes.shape[2]:
        planes = planes.transpose(1, 2, 0)  # (H, W, 3)
    if array.dtype != np.uint8 or not (planes.ndim == 2 or (planes.ndim == 3 and planes.shape[2] == 3)):
        raise Rejected(f"an array of {array.dtype} {array.shape}; only uint8 of (H, W), (H, W, 3), (3, H, W) is read")
    _check_pixels(planes.shape[1], planes.shape[0])
    return Image.fromarray(np.ascontiguousarray(planes)).convert("RGB")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise Rejected(f"pixels of mode {image.mode} have no defined white; convert to 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image).convert("RGB")
    return image.convert("RGB")


def center_crop(image: Image.Image, resolution: int) -> Image.Image:
    """The largest centred square, `resolution` pixels wide, as ADM and DiT prepare ImageNet: box filter by halves while
    the shorter side is at least twice too long, then bicubic, then the crop.

    Raises Rejected for a strip so long that it would have more than MAX_PIXELS before the crop.
    """
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    if math.prod(size) > MAX_PIXELS:
        raise Rejected(f"{image.width} x {image.height} pixels: too long a strip to be resized to {resolution}")
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))


def short_side_crop(image: Image.Image, resolution: int) -> Image.Image:
    """LSUN's rule: the centred square of the shorter side, then one Lanczos resize to `resolution` pixels."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return resize(image.crop((left, top, left + side, top + side)), resolution)


def resize(image: Image.Image, resolution: int) -> Image.Image:
    """The whole picture, `resolution` pixels wide and high, by Lanczos: for pictures that are square and aligned."""
    return image.resize((resolution, resolution), Image.Resampling.LANCZOS)


CROPS: dict[str, Callable[[Image.Image, int], Image.Image]] = {
    "center": center_crop,
    "short_side": short_side_crop,
    "resize": resize,
}


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture -> (3, H, W) float32 in [-1, 1]: 0 is -1, 255 is 1."""
    return from_uint8(torch.from_numpy(np.array(image)).permute(2, 0, 1))


def from_uint8(images: Tensor) -> Tensor:
    """uint8 pixels -> float32 of the same shape in [-1, 1]: 0 is -1, 255 is 1."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor, rounding: Rounding = "half_away") -> Tensor:
    """Pixels in [-1, 1] -> uint8 of the same shape: 127.5 x + 127.5, clamped to 0..255.

    The one rounding rule of the project: halves away from zero, as DiT; it gives back what `to_tensor` was given.
    "truncate" drops the fraction, as REPA and EDM2 do: half a level darker, for comparison with their numbers.
    """
    offset = 128 if rounding == "half_away" else 127.5
    return (images.float() * 127.5 + offset).floor().clamp(0, 255).to(torch.uint8)
