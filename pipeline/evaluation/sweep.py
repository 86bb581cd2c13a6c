"""Ways of sampling at given budgets of blocks, and the distance of each: points, and what is measured of them."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import with_config
from typing_extensions import TypedDict

from common.errors import UserError
from common.files import atomic_write
from common.recipe import Recipe, check_together, denoiser_config, diffusion
from common.recipe import Sweep as SweepSettings
from common.recipe.sampling import SWEEP_AXES
from common.run_folder import RunFolder, SampleFolder
from common.sealed import STRICT, read_sealed, write_sealed
from fpdm.calibration import LIMIT_ITERATIONS, MOVED_ON, limit_way
from pipeline.evaluation.measurements import Evaluation, Measurement
from pipeline.evaluation.metrics import frechet_distance
from pipeline.evaluation.plots import sweep_plot
from pipeline.evaluation.sweep_table import csv_text, markdown, varied_axes
from pipeline.evaluation.yardstick import Yardstick
from pipeline.sampling.generate import sample
from pipeline.sampling.models import Models
from pipeline.sampling.plans import UnsoundSamples, blocks_an_image
from pipeline.sampling.sample_set import Sampling


@with_config(STRICT)
class UnsoundForm(TypedDict):
    reason: str


@dataclass(frozen=True)
class Point:
    """One way of sampling; `iterations` is the mean of a step, None for DiT."""

    budget: int
    blocks: int
    sampler: str
    num_steps: int
    iterations: int | float | None
    order: int
    spacing: str
    spacing_power: float
    allocation: str
    reuse: str
    start_extrapolation: float
    guidance_scale: float
    iterate_guidance: float
    ema: str | None


class Sweep:
    """The points of a recipe, which share one reference, one extractor and one autoencoder."""

    def __init__(self, recipe: Recipe) -> None:
        """Raises UserError where no combination can be drawn."""
        alone = replace(
            recipe,
            data=replace(recipe.data, held_out=None),  # its distance does not depend on how samples are drawn
            evaluate=replace(recipe.evaluate, untrained_baseline=False),
        )
        self.folder = RunFolder(recipe.folder)
        self.recipes, self.left_out = points(alone)
        self.yardstick = Yardstick(alone, Models(alone.vae, alone.evaluate))
        self.to_limit = recipe.sweep.distance_to_limit
        self._measurements: dict[Point, Measurement] = {}
        self._to_limit: dict[Point, list[float]] = {}  # of each seed range

    @cached_property
    def evaluations(self) -> dict[Point, Evaluation]:
        return {
            point: Evaluation(Sampling(recipe, self.yardstick.models, shown=False), self.yardstick)
            for point, recipe in self.recipes.items()
        }

    @cached_property
    def limits(self) -> dict[Recipe, Evaluation]:
        """The samples that points are compared with, if the recipe asks for that."""
        recipes = {_limit(recipe): None for recipe in self.recipes.values()} if self.to_limit else {}
        return {
            recipe: Evaluation(Sampling(recipe, self.yardstick.models, shown=False), self.yardstick)
            for recipe in recipes
        }

    def prepare(self) -> None:
        """What all points need and several jobs would otherwise do at the same time."""
        self.yardstick.prepare_reference()
        for limit in self.limits.values():
            try:
                sample(limit.sampling)
            except UnsoundSamples as fault:
                raise UserError(f"sweep.distance_to_limit: at the limit {fault}; set it to false") from None
            limit.samples[0].extract()

    def measured(self, point: Point) -> Measurement | None:
        """The measurement of a point where there is one; of a damaged one there is a warning."""
        if point in self._measurements:
            return self._measurements[point]
        evaluation = self.evaluations[point]
        try:
            self._measurements[point] = evaluation.measured(evaluation.samples[0])
        except UserError as fault:
            if evaluation.path_of(evaluation.samples[0]).exists():
                print(f"warning: {fault}", file=sys.stderr, flush=True)
        return self._measurements.get(point)

    def unsound(self, point: Point) -> str | None:
        """Why the samples of a point are non-finite or constant, where they are: it then has no numbers."""
        path = self._unsound_path(point)
        if not path.exists() or self.measured(point):
            return None
        return f"{read_sealed(path, UnsoundForm, 'delete it')['reason']} (delete {path} to draw it again)"

    def _unsound_path(self, point: Point) -> Path:
        return SampleFolder(self.evaluations[point].samples[0].samples.folder).unsound

    @property
    def diverged(self) -> list[str]:
        """A line for each point whose samples are unsound."""
        reasons = ((point, self.unsound(point)) for point in self.recipes)
        return [f"no numbers: {self.in_words(point)}: {reason}" for point, reason in reasons if reason]

    def in_words(self, point: Point) -> str:
        """What it costs, and how it is drawn."""
        how = f"{point.sampler}, {point.num_steps} steps"
        if point.iterations:  # of FPDM; DiT has none
            how += f" x {point.iterations:g} iterations ({point.allocation}, reuse {point.reuse})"
        others = "".join(f", {axis} {getattr(point, axis)}" for axis in varied_axes(map(asdict, self.recipes)))
        noise = self.recipes[point].sample.eta
        how += f", eta {noise:g}" if noise else ""
        return f"{point.blocks} blocks: {how}, guidance {point.guidance_scale:g}{others}"

    def measure(self, point: Point) -> None:
        """Draws and measures a point, where that is not done yet, or notes that its samples are `unsound`."""
        evaluation = self.evaluations[point]
        if self.unsound(point):
            return
        try:
            sample(evaluation.sampling)
        except UnsoundSamples as fault:
            write_sealed(self._unsound_path(point), {"reason": str(fault)})
            return
        if self.measured(point) is None:
            evaluation.measure(evaluation.samples[0])

    @property
    def finished(self) -> bool:
        drawn = all(limit.samples[0].is_extracted for limit in self.limits.values())
        return drawn and all(self.measured(point) or self.unsound(point) for point in self.recipes)

    def _row(self, point: Point, measurement: Measurement) -> dict[str, Any]:
        """A measured point, and its distance to the limit if the recipe asks for that."""
        row = _row(point, measurement)
        if not self.to_limit:
            return row
        if point not in self._to_limit:
            sets = self.evaluations[point], self.limits[_limit(self.recipes[point])]
            ranges = zip(*(each.samples[0].summaries(self.yardstick) for each in sets), strict=True)
            self._to_limit[point] = [
                frechet_distance(*(each.statistics["pooled"] for each in summaries)) for summaries in ranges
            ]
        name, values = f"{measurement['distance']} to the limit", self._to_limit[point]
        number = {"name": name, "value": float(np.mean(values)), "spread": _spread(values)}
        return row | {"numbers": row["numbers"] | {"limit": number}}

    def write_tables(self) -> bool:
        """Writes the points that are measured, as JSON, CSV, Markdown and a plot; False where none is."""
        measured = ((point, self.measured(point)) for point in self.recipes)
        rows = [self._row(point, measurement) for point, measurement in measured if measurement is not None]
        if not rows:
            for path in (self.folder.sweep_table, self.folder.sweep_csv, self.folder.sweep_markdown):
                path.unlink(missing_ok=True)  # of an earlier sweep
            self.folder.sweep_plot.unlink(missing_ok=True)
            return False
        rows.sort(key=lambda row: (row["sampler"], row["guidance_scale"], row["budget"], row["num_steps"]))
        write_sealed(self.folder.sweep_table, {"rows": rows, "unsound": self.diverged})
        _write_text(self.folder.sweep_csv, csv_text(rows))
        _write_text(self.folder.sweep_markdown, markdown(rows) + "".join(f"\n{line}\n" for line in self.diverged))
        with atomic_write(self.folder.sweep_plot) as temporary:
            temporary.write_bytes(sweep_plot(rows))
        return True


def _limit(recipe: Recipe) -> Recipe:
    """The same weights, guidance_scale and noise, at the limit of many steps and iterations."""
    way = limit_way(diffusion(recipe))
    own = {name: value for name, value in asdict(way.sampler_settings).items() if name != "coefficients"}
    limit = replace(
        recipe.sample,
        sampler="multistep",
        **own,
        num_steps=way.num_steps,
        allocation="constant",
        iterations=LIMIT_ITERATIONS,
        reuse="always",
        start_extrapolation=MOVED_ON,
        solver="picard",
        iterate_guidance=0.0,
    )
    return replace(recipe, sample=limit)


def points(recipe: Recipe) -> tuple[dict[Point, Recipe], list[str]]:
    """Every point with the recipe that draws it, and why other combinations cannot be drawn.

    Raises UserError where none can.
    """
    recipes, left_out = {}, []
    for changes, budget, number in _combinations(recipe.sweep):
        try:
            share = budget // (1 if changes["guidance_scale"] == 1 else 2)
            num_steps, iterations = _spend(recipe, share, number, guided=changes["iterate_guidance"] > 0)
            settings = changes | {
                "num_steps": num_steps,
                "iterations": iterations or recipe.sample.iterations,
                "tolerance": None,  # at budgets that are spent
                "guidance_rescale": 0.0 if changes["guidance_scale"] == 1 else recipe.sample.guidance_rescale,
            }
            point_recipe = replace(recipe, sample=replace(recipe.sample, **settings))
            check_together(point_recipe)
            if changes["iterate_guidance"] and (cost := blocks_an_image(point_recipe)) != budget:
                raise ValueError(f"guided by iterates, {num_steps} steps cost {cost}")
        except ValueError as error:
            counted = "steps" if recipe.sweep.num_steps else "iterations"
            left_out.append(f"{changes['sampler']}, {number} {counted}, {budget} blocks: {error}")
            continue
        blocks = blocks_an_image(point_recipe)
        recipes[Point(budget, blocks, num_steps=num_steps, iterations=iterations, **changes)] = point_recipe
    if not recipes:
        raise UserError(f"sweep: no combination can be drawn; {left_out[0]}")
    return recipes, left_out


def _combinations(sweep: SweepSettings) -> Iterator[tuple[dict[str, Any], int, int]]:
    """Settings of sampling, a budget, and a number of steps or of iterations."""
    axes = (getattr(sweep, name) for name in SWEEP_AXES)
    for *values, number, budget in product(*axes, sweep.num_steps or sweep.iterations, sweep.budgets):
        yield dict(zip(SWEEP_AXES, values, strict=True)), budget, number


def _spend(recipe: Recipe, budget: int, number: int, *, guided: bool) -> tuple[int, int | float | None]:
    """(steps, mean iterations of a step) that cost `budget` blocks exactly; of DiT, at most. ValueError if none do.

    guided: by iterates, which costs the post-layers of each step once more, if it has an iteration more.
    """
    config = denoiser_config(recipe)
    if config.kind == "dit":
        num_steps = budget // config.blocks(0)
        if not num_steps:
            raise ValueError(f"one step costs {config.blocks(0)}")
        return num_steps, None
    outer = config.blocks(0) + config.post_depth * guided
    num_steps = number if recipe.sweep.num_steps else max(1, budget // (number + outer))
    total = budget - outer * num_steps
    if total < 1:
        raise ValueError(f"{num_steps} steps with one iteration cost {num_steps * outer + 1}")
    return num_steps, total // num_steps if total % num_steps == 0 else total / num_steps


def _row(point: Point, measurement: Measurement) -> dict[str, Any]:
    """A measured point; in place of its own settings are calibration's, None where it fitted a sampler."""
    row = asdict(point) | {name: dict(measurement)[name] for name in ("distance", "count", "numbers")}
    if len(measurement["ranges"]) > 1:
        distance = dict(measurement["numbers"]["frechet"]) | {"spread": _spread(measurement["ranges"])}
        row["numbers"] = row["numbers"] | {"frechet": distance}
    way = measurement["plan"]
    if point.allocation == "calibrated" and way is not None and way["iterations"] is not None:
        row |= {"sampler": way["sampler"], "num_steps": way["num_steps"]}
        row |= {"iterations": sum(way["iterations"]) / way["num_steps"], "reuse": "always" if way["reuse"] else "none"}
        if way["sampler"] == "fitted":
            row |= dict.fromkeys(("order", "spacing", "spacing_power", "start_extrapolation"))
    return row


def _spread(values: Sequence[float]) -> float | None:
    """The standard error of their mean; None of a single one."""
    return float(np.std(values, ddof=1)) / len(values) ** 0.5 if len(values) > 1 else None


def _write_text(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
