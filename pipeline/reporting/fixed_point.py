"""The fixed point as the report shows it: the same images after more and fewer iterations, beside its residuals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.reporting.contact_sheet import grid
from pipeline.sampling.iterates import Iterates

CURVES = 6  # timesteps whose residuals are drawn
WIDTH, HEIGHT = 440, 260  # of the chart, in its own units
LEFT, BOTTOM, TOP, RIGHT = 52, 34, 10, 10


@dataclass(frozen=True)
class Frame:
    """One choice of a dial: what it says, its images (H, W, 3), and where its line lies in the chart."""

    name: str
    grid: NDArray[np.uint8]
    x: float | None = None


@dataclass(frozen=True)
class Curve:
    """Residuals of one timestep: points of an SVG polyline."""

    timestep: int
    points: str


@dataclass(frozen=True)
class Chart:
    """Relative residual, on a logarithmic scale, by iteration; in an SVG of WIDTH x HEIGHT."""

    curves: list[Curve]
    powers: list[tuple[float, int]]  # y of each power of ten, and its exponent
    iterations: list[tuple[float, int]]  # x of each number of iterations that the dial offers
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    bottom: int = HEIGHT - BOTTOM


@dataclass(frozen=True)
class FixedPoint:
    by_iterations: list[Frame]
    by_steps: list[Frame]
    chart: Chart
    steps: int
    shown: int  # the frame of by_steps that is the recipe's own


def fixed_point(iterates: Iterates, own_steps: int) -> FixedPoint:
    """own_steps: the recipe's number of steps."""
    chart = residual_chart(iterates)
    steps = [int(count) for count in iterates.steps]
    return FixedPoint(
        by_iterations=[
            Frame(str(count), grid(list(images)), x)
            for (x, count), images in zip(chart.iterations, iterates.by_iterations, strict=True)
        ],
        by_steps=[
            Frame(f"{blocks:,}", grid(list(images)))
            for blocks, images in zip(iterates.blocks.tolist(), iterates.by_steps, strict=True)
        ],
        chart=chart,
        steps=own_steps,
        shown=steps.index(own_steps),
    )


def residual_chart(iterates: Iterates) -> Chart:
    count = iterates.residuals.shape[1]
    rows = sorted(set(np.linspace(0, len(iterates.timesteps) - 1, CURVES).round().astype(int).tolist()))
    finite = iterates.residuals[rows][np.isfinite(iterates.residuals[rows]) & (iterates.residuals[rows] > 0)]
    exponents = np.log10(finite) if finite.size else np.zeros(1)
    low, high = math.floor(exponents.min()), max(math.ceil(exponents.max()), math.floor(exponents.min()) + 1)

    def x(iteration: int) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * (iteration - 1) / max(1, count - 1), 1)

    def y(exponent: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * (exponent - low) / (high - low), 1)

    def points(residuals: Sequence[float]) -> str:
        known = [(k, value) for k, value in enumerate(residuals, 1) if math.isfinite(value) and value > 0]
        return " ".join(f"{x(k)},{y(math.log10(value))}" for k, value in known)

    return Chart(
        curves=[Curve(round(float(iterates.timesteps[row])), points(iterates.residuals[row].tolist())) for row in rows],
        powers=[(y(power), power) for power in range(low, high + 1)],
        iterations=[(x(int(k)), int(k)) for k in iterates.iterations],
    )
