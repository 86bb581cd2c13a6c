"""Images side by side, for a person to look at."""

import base64
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from common.errors import one_line
from common.recipe import num_classes
from pipeline.evaluation.image_sets import by_class
from pipeline.sampling.chunks import cover_gap, iterate
from pipeline.sampling.sample_set import SampleSet, Sampling
from preprocess.sources import open_source

MAX_CLASSES = 8
PANELS_A_ROW = 4
GAP = 2  # pixels between images
MARGIN = 16  # between blocks
NEAREST = "the training image nearest to each of these"
Images = dict[int, NDArray[np.uint8]]  # by number of the sample
Neighbours = Callable[[list[int]], list[NDArray[np.uint8]]]
INK, PAPER = (32, 32, 32), (255, 255, 255)


@dataclass(frozen=True)
class Block:
    """Images of one class and one origin, in a square grid `(H, W, 3)` uint8."""

    title: str
    origin: str
    grid: NDArray[np.uint8]


def class_panels(sampling: Sampling, nearest: Neighbours | None = None) -> list[list[Block]]:
    """For each of the first classes: real images, then samples of each of the recipe's sets, as many of each.

    nearest: gives an image for each of these samples of the first set, or none at all; they follow those, each in the
    place of its sample.
    """
    recipe = sampling.recipe
    classes = min(num_classes(recipe.model), MAX_CLASSES)
    each = max(1, recipe.sample.save_images // classes)
    drawn = {_origin(samples): _samples_by_class(sampling, samples, classes, each) for samples in sampling.sets}
    own = next(iter(drawn))
    neighbours = _neighbours(drawn[own], nearest) if nearest else None
    source, panels = open_source(recipe.data), []
    for label in range(classes):
        name, real = by_class(recipe.data, source, label, each)
        origins = {"real": real}
        for origin, by_label in drawn.items():
            origins[origin] = list(by_label[label].values())
            if origin == own and neighbours:
                origins[NEAREST] = neighbours[label]
        title = one_line(name, 100)  # whatever the class is called, fonts and pages show it
        panels.append([Block(title, origin, grid(images)) for origin, images in origins.items() if images])
    return panels


def _neighbours(by_label: list[Images], nearest: Neighbours) -> list[list[NDArray[np.uint8]]] | None:
    found = iter(nearest([index for images in by_label for index in images]))
    return [[image for _, image in zip(images, found, strict=False)] for images in by_label]


def _origin(samples: SampleSet) -> str:
    return f"drawn after {samples.samples_seen:,} training samples" if samples.samples_seen else "drawn before training"


def _samples_by_class(sampling: Sampling, samples: SampleSet, classes: int, each: int) -> list[Images]:
    """The first samples of each class; a set of few samples, or of few images, may have fewer than `each`."""
    by_label: list[Images] = [{} for _ in range(classes)]
    count, first = sampling.recipe.sample.num_samples, 0
    gap = cover_gap(samples.folder, (0, count)) if sampling.recipe.sample.output == "features" else None
    for rows in iterate(samples.folder, (0, gap[0] if gap else count)):
        for label, images in enumerate(by_label):
            of_class = np.flatnonzero(rows["labels"] == label)[: each - len(images)]
            images.update({first + int(place): rows["images"][place] for place in of_class})
        first += len(rows["labels"])
        if all(len(images) == each for images in by_label):
            break
    return by_label


def grid(images: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Images (H, W, 3) of one size, row by row in the smallest square that holds them."""
    import torch
    from torchvision.utils import make_grid

    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)  # (N, 3, H, W)
    sheet = make_grid(stacked, nrow=math.isqrt(len(images) - 1) + 1, padding=GAP, pad_value=255)
    frame = GAP if len(images) > 1 else 0  # make_grid draws none around a single image
    return sheet[:, frame : sheet.shape[1] - frame, frame : sheet.shape[2] - frame].permute(1, 2, 0).numpy()


def contact_sheet(panels: Sequence[Sequence[Block]], resolution: int) -> Image.Image:
    """All blocks with their captions, a column of blocks a class; images under 128 px are enlarged, pixels kept."""
    scale = max(1, 128 // resolution)
    columns = [_column(panel, scale) for panel in panels]
    rows = [columns[start : start + PANELS_A_ROW] for start in range(0, len(columns), PANELS_A_ROW)]
    width = max(sum(column.width + MARGIN for column in row) for row in rows) + MARGIN
    sheet = Image.new("RGB", (width, sum(max(column.height for column in row) for row in rows) + MARGIN), PAPER)
    top = 0
    for row in rows:
        left = MARGIN
        for column in row:
            sheet.paste(column, (left, top))
            left += column.width + MARGIN
        top += max(column.height for column in row)
    return sheet


def _column(panel: Sequence[Block], scale: int) -> Image.Image:
    """One class: its blocks below one another, each under its caption."""
    line = 56
    grids = [Image.fromarray(block.grid) for block in panel]
    grids = [image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST) for image in grids]
    column = Image.new("RGB", (max(image.width for image in grids), sum(image.height + line for image in grids)), PAPER)
    draw, top = ImageDraw.Draw(column), 0
    for block, image in zip(panel, grids, strict=True):
        draw.text((0, top + 8), block.title, fill=INK, font=_font(20))
        draw.text((0, top + 34), block.origin, fill=INK, font=_font(14))
        column.paste(image, (0, top + line))
        top += image.height + line
    return column


def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings: most alphabets that a class may be named in."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def png_uri(image: NDArray[np.uint8] | bytes) -> str:
    """An image (H, W, 3), or an encoded PNG, as the address that an HTML page holds it under."""
    if isinstance(image, np.ndarray):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="PNG", optimize=True)
        image = buffer.getvalue()
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"
