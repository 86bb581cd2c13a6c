"""What a person looks at: pictures side by side, and the loss over time."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from common.errors import one_line
from common.recipe import Recipe
from common.run_folder import Weights
from pipeline.evaluation.image_sets import by_class
from pipeline.sampling.chunks import cover_gap, iterate
from pipeline.sampling.samples import sample_set, wanted_weights

MAX_CLASSES = 8
PANELS_A_ROW = 4
GAP = 2  # pixels between pictures
MARGIN = 16  # between blocks
SOFT = "#858585"
COLOURS = ("#3b82c4", "#d1793b", "#4f9d69", "#a35fb5", "#b8475a", "#8c8c3e")
INK, PAPER = (32, 32, 32), (255, 255, 255)


@dataclass(frozen=True)
class Block:
    """Pictures of one class and one origin, in a square grid `(H, W, 3)` uint8."""

    title: str
    origin: str
    grid: NDArray[np.uint8]


def class_panels(recipe: Recipe) -> list[list[Block]]:
    """For each of the first classes: real pictures, then samples of each of the recipe's weights, as many of each."""
    classes = min(recipe.model.num_classes, MAX_CLASSES)
    each = max(1, recipe.sample.save_images // classes)
    found = {
        _origin(recipe, weights): _samples_by_class(recipe, weights, classes, each)
        for weights in wanted_weights(recipe)
    }
    panels = []
    for label in range(classes):
        name, real = by_class(recipe, label, each)
        origins = {"real": real} | {origin: pictures[label] for origin, pictures in found.items()}
        title = one_line(name, 100)  # whatever the class is called, fonts and pages show it
        panels.append([Block(title, origin, grid(pictures)) for origin, pictures in origins.items() if pictures])
    return panels


def _origin(recipe: Recipe, weights: Weights) -> str:
    samples_seen = sample_set(recipe, weights).samples_seen
    return f"drawn after {samples_seen:,} training samples" if samples_seen else "drawn before training"


def _samples_by_class(recipe: Recipe, weights: Weights, classes: int, each: int) -> list[list[NDArray[np.uint8]]]:
    """The first samples of each class; a set of few samples, or of few pictures, may have fewer than `each`."""
    found: list[list[NDArray[np.uint8]]] = [[] for _ in range(classes)]
    folder, count = sample_set(recipe, weights).folder, recipe.sample.num_samples
    gap = cover_gap(folder, (0, count)) if recipe.sample.output == "features" else None
    for rows in iterate(folder, (0, gap[0] if gap else count)):
        for label, pictures in enumerate(found):
            pictures += list(rows["images"][rows["labels"] == label][: each - len(pictures)])
        if all(len(pictures) == each for pictures in found):
            break
    return found


def grid(pictures: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Pictures (H, W, 3) of one size, row by row in the smallest square that holds them."""
    columns = int(np.ceil(np.sqrt(len(pictures))))
    rows = -(-len(pictures) // columns)
    height, width, _ = pictures[0].shape
    sheet = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), PAPER, dtype=np.uint8)
    for place, picture in enumerate(pictures):
        top, left = place // columns * (height + GAP), place % columns * (width + GAP)
        sheet[top : top + height, left : left + width] = picture
    return sheet


def contact_sheet(panels: Sequence[Sequence[Block]], resolution: int) -> Image.Image:
    """All blocks with their captions, a column of blocks a class; pictures under 128 px are enlarged, pixels kept."""
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


def loss_curve(lines: Sequence[dict[str, Any]]) -> bytes:
    """The training loss as a PNG, from lines of `metrics.jsonl`."""
    figure, (axes,) = _panels(1)
    axes.plot([line["samples"] for line in lines], [line["loss"] for line in lines], color=COLOURS[0], linewidth=1.5)
    axes.set(xlabel="training samples", ylabel="loss", xlim=(0, None))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    return _png(figure)


def sweep_picture(rows: Sequence[dict[str, Any]]) -> bytes:
    """The distance against blocks a picture, a line a way of sampling (the paper's Table 1); where several numbers of
    steps were tried, also against iterations a step, a line a budget (its Figure 4). From rows of `sweep/table.json`.
    """
    ways = ("sampler", "allocation", "reuse", "guidance_scale")
    iterated = len({round(row["iterations"] or 0) for row in rows}) > 1
    figure, axes = _panels(2 if iterated else 1)
    _draw_lines(axes[0], rows, "blocks", (*ways, "about") if iterated else ways)
    axes[0].set(xlabel="blocks a picture", ylabel=rows[0]["distance"], xscale="log")
    if iterated:
        _draw_lines(axes[1], rows, "iterations", ("budget", *ways))
        axes[1].set(xlabel="iterations a step", xscale="log")
    ticks = (sorted({row["blocks"] for row in rows}), sorted({round(row["iterations"] or 0) for row in rows}))
    for one, values in zip(axes, ticks, strict=False):
        one.set_xticks(values, [f"{value:,}" for value in values], minor=False)
        one.set_xticks([], minor=True)
    return _png(figure)


def _draw_lines(axes: Any, rows: Sequence[dict[str, Any]], across: str, fields: Sequence[str]) -> None:
    """One line for each combination of the fields that vary, named by those."""
    marked = [
        row | {"about": f"about {round(row['iterations'])} iterations" if row["iterations"] else ""} for row in rows
    ]
    varying = [field for field in fields if len({row[field] for row in marked}) > 1]
    lines: dict[tuple[Any, ...], list[tuple[float, float]]] = {}
    for row in marked:
        name = tuple(row[field] for field in varying)
        lines.setdefault(name, []).append((row[across], row["numbers"]["frechet"]["value"]))
    for number, (name, points) in enumerate(lines.items()):
        label = ", ".join(_word(field, value) for field, value in zip(varying, name, strict=True))
        x, y = zip(*sorted(points), strict=True)
        axes.plot(x, y, "o-", color=COLOURS[number % len(COLOURS)], linewidth=1.5, markersize=4, label=label)
    if varying:
        axes.legend(frameon=False, labelcolor=SOFT, fontsize=8)


def _word(field: str, value: Any) -> str:
    words = {"reuse": f"reuse {value}", "guidance_scale": f"guidance {value}", "budget": f"{value} blocks"}
    return words.get(field, str(value))


def _panels(count: int) -> tuple[Any, list[Any]]:
    """A transparent figure of panels side by side, in greys that read on light and dark."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    for one in axes:
        one.grid(color="#8888", linewidth=0.5)
        for part in (one.xaxis.label, one.yaxis.label):
            part.set_color(SOFT)
        one.tick_params(which="both", colors=SOFT)
        one.spines[:].set_visible(False)
    return figure, axes


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, transparent=True)
    return buffer.getvalue()
