"""Curves as PNGs: the loss over time, the distance against what sampling costs."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from common.recipe.sampling import SWEEP_AXES

SOFT = "#858585"
Lines = Mapping[str, Sequence[tuple[float, float]]]  # points by name
COLOURS = ("#3b82c4", "#d1793b", "#4f9d69", "#a35fb5", "#b8475a", "#8c8c3e")


def loss_curve(lines: Sequence[dict[str, Any]]) -> bytes:
    """The training loss as a PNG, from lines of `metrics.jsonl`."""
    figure, (axes,) = _panels(1)
    axes.plot([line["samples"] for line in lines], [line["loss"] for line in lines], color=COLOURS[0], linewidth=1.5)
    axes.set(xlabel="training samples", ylabel="loss", xlim=(0, None))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    return _png(figure)


def sweep_plot(rows: Sequence[dict[str, Any]]) -> bytes:
    """The distance against blocks an image, a line a way of sampling (the paper's Table 1); where several numbers of
    steps were tried, also against iterations a step, a line a budget (its Figure 4). From rows of `sweep/table.json`.
    """
    ways = SWEEP_AXES
    iterated = len({round(row["iterations"] or 0) for row in rows}) > 1
    figure, axes = _panels(2 if iterated else 1)
    _draw_lines(axes[0], rows, "blocks", (*ways, "about") if iterated else ways)
    axes[0].set(xlabel="blocks an image", ylabel=rows[0]["distance"], xscale="log")
    if iterated:
        _draw_lines(axes[1], rows, "iterations", ("budget", *ways))
        axes[1].set(xlabel="iterations a step", xscale="log")
    ticks = (sorted({row["blocks"] for row in rows}), sorted({round(row["iterations"] or 0) for row in rows}))
    for one, values in zip(axes, ticks, strict=False):
        one.set_xticks(values, [f"{value:,}" for value in values], minor=False)
        one.set_xticks([], minor=True)
    return _png(figure)


def comparison_plot(losses: Lines, distances: Lines, distance: str) -> bytes:
    """Runs against one another, a colour each: the loss by training computation and, where any is measured, the
    distance by blocks an image.
    """
    figure, panels = _panels(2 if any(distances.values()) else 1)
    for axes, lines in zip(panels, (losses, distances), strict=False):
        for number, (name, points) in enumerate(lines.items()):
            x, y = zip(*points, strict=True) if points else ((), ())
            style = "-" if lines is losses else "o-"
            axes.plot(x, y, style, color=COLOURS[number % len(COLOURS)], linewidth=1.5, markersize=4, label=name)
    panels[0].set(xlabel="PFLOP of training", ylabel="loss", xlim=(0, None))
    panels[-1].set(**({"xlabel": "blocks an image", "ylabel": distance} if len(panels) > 1 else {}))
    panels[0].legend(frameon=False, labelcolor=SOFT, fontsize=8)
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
        said = zip(varying, name, strict=True)
        label = ", ".join(_word(field, value) for field, value in said if value is not None)  # None: fitted
        x, y = zip(*sorted(points), strict=True)
        axes.plot(x, y, "o-", color=COLOURS[number % len(COLOURS)], linewidth=1.5, markersize=4, label=label)
    if varying:
        axes.legend(frameon=False, labelcolor=SOFT, fontsize=8)


def _word(field: str, value: Any) -> str:
    words = {"guidance_scale": "guidance", "spacing_power": "power", "start_extrapolation": "start moved on by"}
    if field == "budget":
        return f"{value} blocks"
    alone = field in ("sampler", "spacing", "allocation", "about")
    return str(value) if alone else f"{words.get(field, field)} {value}"


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
