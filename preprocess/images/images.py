"""Bytes to pixels and back: decoding, cropping, and conversion between uint8 and float pixels."""

import io
import math
import re
from collections.abc import Callable

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from common.errors import OneLineError, errors_as
from preprocess.images.file_kinds import kind_of_file
from preprocess.images.metadata import ORIENTATION, UPRIGHT, orientation, without_metadata

MAX_PIXELS = 2**27  # 134 million; a larger image is taken for a decompression bomb
FORMATS = (
    "BMP",
    "GIF",
    "JPEG",
    "PNG",
    "PPM",
    "TIFF",
    "WEBP",
)  # Pillow's other formats run external programs (EPS), or are rare
WHITE = (255, 255, 255, 255)

UNREADABLE = "not readable as an image"


class Rejected(OneLineError):
    """An unusable image. The message is the reason, and the same in every run."""

    limit = 200

    def __init__(self, reason: str) -> None:
        super().__init__(re.sub(r" at 0x[0-9A-Fa-f]+", "", reason))  # the memory address of an object


def decode(data: bytes) -> Image.Image:
    """The image in an encoded file, as RGB.

    - The format follows from the bytes, not from the file's name: one of FORMATS, or NPY of uint8 (CelebA-HQ), (H, W),
      (H, W, 3), (3, H, W) or (1, 3, H, W). Only the first frame of an animation, or the first page, is read.
    - EXIF orientation is applied. Other metadata are ignored, ICC profiles too, even if they are damaged.
    - Alpha, or a palette's transparent colour, is composed on white. Grey is repeated in three channels. 16-bit values
      are divided by 256 and 12-bit ones by 16; a PGM with another maximum is scaled to 16 bits first. Palettes, 1-bit,
      CMYK and other colour spaces are converted by Pillow.

    Raises Rejected for images that are truncated, damaged, above MAX_PIXELS or of floating-point pixels, for files that
    are no images, and for any other error of a decoder.
    """
    if not data:
        raise Rejected("empty file")
    with errors_as(Rejected, UNREADABLE):
        if data.startswith(np.lib.format.MAGIC_PREFIX):
            return _from_array(data)
        bare, exif = without_metadata(data)
        try:
            opened = Image.open(io.BytesIO(bare), formats=FORMATS)
        except UnidentifiedImageError:
            raise Rejected(f"{UNREADABLE}: {kind_of_file(data)}") from None
        with opened as image:
            _check_pixels(image.width, image.height)
            image.load()
            return _to_rgb(_upright(image, orientation(exif or image.info.get("exif", b""))))


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise Rejected(f"{width} x {height} pixels, above {MAX_PIXELS:,}: decompression bomb")
    if not width * height:
        raise Rejected(f"{width} x {height} pixels")


def _from_array(data: bytes) -> Image.Image:
    """The image in a .npy file."""
    file = io.BytesIO(data)
    with errors_as(Rejected, f"{UNREADABLE}: its .npy header is damaged"):
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, by_columns, dtype = read(file)
    other = Rejected(f"an array of {dtype} {shape}; only uint8 of (H, W), (H, W, 3), (3, H, W) is read")
    if dtype != np.uint8 or min(shape, default=0) < 0:
        raise other
    size, left = math.prod(shape), len(data) - file.tell()
    if size != left:
        fault = "cut off" if size > left else "its header is damaged"
        raise Rejected(f"{UNREADABLE}: an array of {size:,} bytes, but the file has {left:,}: {fault}")
    planes = np.frombuffer(data, np.uint8, size, file.tell()).reshape(shape, order="F" if by_columns else "C")
    planes = planes[0] if planes.ndim == 4 and planes.shape[0] == 1 else planes
    if planes.ndim == 3 and planes.shape[0] == 3 != planes.shape[2]:
        planes = planes.transpose(1, 2, 0)  # (H, W, 3)
    if not (planes.ndim == 2 or (planes.ndim == 3 and planes.shape[2] == 3)):
        raise other
    _check_pixels(planes.shape[1], planes.shape[0])
    return Image.fromarray(np.ascontiguousarray(planes)).convert("RGB")


def _upright(image: Image.Image, turned: int) -> Image.Image:
    """Applies an EXIF orientation. Pillow has already applied a TIFF's when it loaded it."""
    if turned == UPRIGHT:
        return image
    image.info = {name: value for name, value in image.info.items() if name == "transparency"}
    image.getexif()[ORIENTATION] = turned
    return ImageOps.exif_transpose(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        return _from_deep_grey(image)
    if image.mode in ("I", "F"):
        raise Rejected(f"pixels of mode {image.mode} have no defined white; convert to 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image).convert("RGB")
    return image.convert("RGB")


def _from_deep_grey(image: Image.Image) -> Image.Image:
    """Converts grey of 16 bits per pixel, or of a TIFF's 12 bits."""
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    grey = values >> (4 if tags.get(ExifTags.Base.BitsPerSample) == (12,) else 8)
    if tags.get(ExifTags.Base.PhotometricInterpretation) == 0:
        grey = 255 - grey  # white is zero, which Pillow handles for 8 bits only
    transparent = values == image.info.get("transparency")
    return Image.fromarray(np.where(transparent, 255, grey).astype(np.uint8)).convert("RGB")


def center_crop(image: Image.Image, resolution: int) -> Image.Image:
    """ADM's and DiT's crop for ImageNet: halve with a box filter while the shorter side is at least 2 x `resolution`,
    resize it to `resolution` with a bicubic filter, crop the centre.

    Raises Rejected for a strip that would have more than MAX_PIXELS before the crop.
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
    """LSUN's crop: the centred square of the shorter side, resized to `resolution` pixels with a Lanczos filter."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return resize(image.crop((left, top, left + side, top + side)), resolution)


def resize(image: Image.Image, resolution: int) -> Image.Image:
    """Resizes without a crop, with a Lanczos filter: for square, aligned images."""
    return image.resize((resolution, resolution), Image.Resampling.LANCZOS)


def fit(image: Image.Image, resolution: int) -> Image.Image:
    """The whole image, its longer side resized with a Lanczos filter; the rest of the square is white."""
    scale = resolution / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    square = Image.new("RGB", (resolution, resolution), WHITE[:3])
    corner = (resolution - size[0]) // 2, (resolution - size[1]) // 2
    square.paste(image.resize(size, Image.Resampling.LANCZOS), corner)
    return square


CROPS: dict[str, Callable[[Image.Image, int], Image.Image]] = {
    "center": center_crop,
    "short_side": short_side_crop,
    "resize": resize,
    "fit": fit,
}


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image -> (3, H, W) float32 in [-1, 1]: 0 is -1, 255 is 1."""
    return from_uint8(torch.from_numpy(np.array(image)).permute(2, 0, 1))


def from_uint8(images: Tensor) -> Tensor:
    """uint8 pixels -> float32 of the same shape in [-1, 1]: 0 is -1, 255 is 1."""
    return images.float() / 127.5 - 1
