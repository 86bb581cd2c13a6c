"""The crop rules are those of the published pipelines to the bit: computed again here without Pillow's resampling."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from preprocess.images.images import CROPS, fit
from tests.photographs import photograph

Pixels = NDArray[np.uint8]
BITS = 22  # of Pillow's fixed-point weights for 8-bit pixels
SIDE = 32


def box(x: float) -> float:
    return float(-0.5 < x <= 0.5)


def bicubic(x: float) -> float:
    x = abs(x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * -0.5 if x < 2 else 0.0


def lanczos(x: float) -> float:
    return float(np.sinc(x) * np.sinc(x / 3)) if -3 <= x < 3 else 0.0


SUPPORT = {box: 0.5, bicubic: 2.0, lanczos: 3.0}


def weights(size: int, wanted: int, kernel: Callable[[float], float]) -> NDArray[np.int64]:
    """(wanted, size): what each pixel of a line counts for each resampled one; the kernel widens where it shrinks."""
    table, step = np.zeros((wanted, size), np.int64), size / wanted
    widening = max(1.0, step)
    reach = SUPPORT[kernel] * widening
    for place in range(wanted):
        centre = (place + 0.5) * step
        first, last = max(0, int(centre - reach + 0.5)), min(size, int(centre + reach + 0.5))
        values = [kernel((pixel - centre + 0.5) * (1 / widening)) for pixel in range(first, last)]
        share = 1 / sum(values)
        table[place, first:last] = [int(math.copysign(0.5, value) + value * share * 2**BITS) for value in values]
    return table


def along(pixels: Pixels, axis: int, wanted: int, kernel: Callable[[float], float]) -> Pixels:
    if pixels.shape[axis] == wanted:
        return pixels
    sums = np.tensordot(weights(pixels.shape[axis], wanted, kernel), pixels.astype(np.int64), (1, axis))
    return np.moveaxis((sums + 2 ** (BITS - 1) >> BITS).clip(0, 255).astype(np.uint8), 0, axis)


def resized(pixels: Pixels, width: int, height: int, kernel: Callable[[float], float]) -> Pixels:
    """Rows, then columns. Pillow 13 begins with the columns of some tall images, and rounds some pixels otherwise."""
    return along(along(pixels, 1, width, kernel), 0, height, kernel)


def adm(pixels: Pixels) -> Pixels:
    """guided-diffusion's `center_crop_arr`, on arrays (H, W, 3)."""
    while min(pixels.shape[:2]) >= 2 * SIDE:
        height, width = pixels.shape[:2]
        pixels = resized(pixels, width // 2, height // 2, box)
    height, width = pixels.shape[:2]
    scale = SIDE / min(height, width)
    pixels = resized(pixels, round(width * scale), round(height * scale), bicubic)
    top, left = (pixels.shape[0] - SIDE) // 2, (pixels.shape[1] - SIDE) // 2
    return pixels[top : top + SIDE, left : left + SIDE]


def short_side(pixels: Pixels) -> Pixels:
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return resized(pixels[top : top + side, left : left + side], SIDE, SIDE, lanczos)


RULES = {"center": adm, "short_side": short_side, "resize": lambda pixels: resized(pixels, SIDE, SIDE, lanczos)}


@pytest.mark.parametrize("size", [(75, 50), (75, 100), (131, 129), (63, 64), (20, 27), (97, 33), (200, 140)])
@pytest.mark.parametrize("rule", RULES)
def test_a_crop_is_its_published_rule_to_the_bit(rule: str, size: tuple[int, int]) -> None:
    image = photograph(3, *size)
    expected = Image.fromarray(np.ascontiguousarray(RULES[rule](np.asarray(image))))
    assert CROPS[rule](image, SIDE).tobytes() == expected.tobytes()


def test_fit_keeps_the_whole_image_in_a_white_square() -> None:
    image = Image.new("RGB", (40, 20), (255, 0, 0))
    pixels = np.asarray(fit(image, 16))
    assert (pixels[4:12] == (255, 0, 0)).all()
    assert (pixels[:4] == 255).all()
    assert (pixels[12:] == 255).all()
    assert fit(Image.new("RGB", (1, 5000)), 16).size == (16, 16)
