"""Ways of sampling at given budgets of blocks, and the distance of each: points, table, and what the picture shows."""

import csv
import io
import sys
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, with_config
from typing_extensions import TypedDict

from common.errors import UserError
from common.files import atomic_write
from common.log_lines import Count
from common.recipe import Recipe, check_together, denoiser_config
from common.sealed import STRICT, read_sealed, write_sealed
from pipeline.sampling.plans import blocks_a_picture

if TYPE_CHECKING:
    from pipeline.evaluation.measurements import Measurement

TABLE = "sweep/table.json"
COLUMNS = ("budget", "blocks", "sampler", "num_steps", "iterations", "allocation", "reuse", "guidance_scale")


@with_config(STRICT)
class RowNumber(TypedDict):
    name: str
    value: float
    spread: float | None


@with_config(STRICT)
class RowForm(TypedDict):
    """A measured `Point`."""

    budget: Count
    blocks: Count
    sampler: str
    num_steps: Count
    iterations: Annotated[float, Field(ge=0)] | int | None
    allocation: str
    reuse: str
    guidance_scale: float
    distance: str
    count: Count
    numbers: dict[str, RowNumber]


@with_config(STRICT)
class TableForm(TypedDict):
    rows: Annotated[list[RowForm], Field(min_length=1)]


@dataclass(frozen=True)
class Point:
    """One way of sampling; `iterations` is the mean of a step, None for DiT."""

    budget: int
    blocks: int
    sampler: str
    num_steps: int
    iterations: int | float | None
    allocation: str
    reuse: str
    guidance_scale: float


def points(recipe: Recipe) -> tuple[dict[Point, Recipe], list[str]]:
    """Every point with the recipe that draws it, and why some combinations are none.

    Raises UserError where none is left.
    """
    sweep, found, left_out = recipe.sweep, {}, []
    each_step = sweep.num_steps or sweep.iterations
    ways = product(sweep.sampler, sweep.guidance_scale, sweep.allocation, sweep.reuse, each_step, sweep.budgets)
    for sampler, guidance_scale, allocation, reuse, number, budget in ways:
        try:
            num_steps, iterations = _spend(recipe, budget // (1 if guidance_scale == 1 else 2), number)
            made = replace(
                recipe,
                data=replace(recipe.data, held_out=None),  # its distance does not depend on how samples are drawn
                evaluate=replace(recipe.evaluate, untrained_baseline=False),
                sample=replace(
                    recipe.sample,
                    sampler=sampler,
                    num_steps=num_steps,
                    iterations=iterations or recipe.sample.iterations,
                    allocation=allocation,
                    step_choices=(),  # the sweep compares them itself
                    tolerance=None,  # at budgets that are spent
                    reuse=reuse,
                    guidance_scale=guidance_scale,
                ),
            )
            check_together(made)
        except ValueError as error:
            left_out.append(
                f"{sampler}, {number} {'steps' if sweep.num_steps else 'iterations'}, {budget} blocks: {error}"
            )
            continue
        blocks = blocks_a_picture(made)
        found[Point(budget, blocks, sampler, num_steps, iterations, allocation, reuse, guidance_scale)] = made
    if not found:
        raise UserError(f"sweep: no combination can be drawn; {left_out[0]}")
    return found, left_out


def _spend(recipe: Recipe, budget: int, number: int) -> tuple[int, int | float | None]:
    """(steps, mean iterations of a step) that cost `budget` blocks exactly; of DiT, at most. ValueError if none do."""
    config = denoiser_config(recipe)
    if config.kind == "dit":
        num_steps = budget // config.blocks(0)
        if not num_steps:
            raise ValueError(f"one step costs {config.blocks(0)}")
        return num_steps, None
    outer = config.blocks(0)
    num_steps = number if recipe.sweep.num_steps else max(1, budget // (number + outer))
    total = budget - outer * num_steps
    if total < num_steps:
        raise ValueError(f"{num_steps} steps of one iteration cost {num_steps * (outer + 1)}")
    return num_steps, total // num_steps if total % num_steps == 0 else total / num_steps


def measure_point(recipe: Recipe) -> None:
    """Draws and measures one point; what is there already is kept."""
    from pipeline.evaluation.measurements import Evaluation
    from pipeline.sampling.samples import sample

    sample(recipe)
    if measured(recipe) is None:
        evaluation = Evaluation(recipe)
        evaluation.measure(evaluation.samples[0])


def measured(recipe: Recipe) -> "Measurement | None":
    """The measurement of a point, if it is there; what is damaged is told, and none."""
    from pipeline.evaluation.measurements import Evaluation

    evaluation = Evaluation(recipe)
    try:
        return evaluation.measured(evaluation.samples[0])
    except UserError as fault:
        if evaluation.path_of(evaluation.samples[0]).exists():
            print(f"warning: {fault}", file=sys.stderr, flush=True)
        return None


def write_tables(recipe: Recipe) -> list[dict[str, Any]]:
    """Writes the points that are measured: table.json, table.csv, table.md and distances.png in `sweep/`."""
    from pipeline.evaluation.plots import sweep_picture

    rows = [
        asdict(point) | {"distance": found["distance"], "count": found["count"], "numbers": found["numbers"]}
        for point, made in points(recipe)[0].items()
        if (found := measured(made)) is not None
    ]
    if not rows:
        return rows
    rows.sort(key=lambda row: (row["sampler"], row["guidance_scale"], row["budget"], row["num_steps"]))
    folder = recipe.folder / Path(TABLE).parent
    write_sealed(recipe.folder / TABLE, {"rows": rows})
    _write_text(folder / "table.csv", _csv(rows))
    _write_text(folder / "table.md", _markdown(rows))
    with atomic_write(folder / "distances.png") as temporary:
        temporary.write_bytes(sweep_picture(rows))
    return rows


def read_table(recipe: Recipe) -> list[dict[str, Any]]:
    """The rows of the run's last sweep. Raises UserError where the file is not as it was written."""
    found = read_sealed(recipe.folder / TABLE, TableForm, "delete it, or run python pipeline/sweep.py again")
    return [dict(row) for row in found["rows"]]


def table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Header and lines, as the CSV, the Markdown and the report show them."""
    names = {key: number["name"] for row in rows for key, number in row["numbers"].items()}
    lines = [[*COLUMNS, "pictures", *names.values()]]
    for row in rows:
        numbers = [row["numbers"].get(key) for key in names]
        values = ["" if number is None else f"{number['value']:.6g}" for number in numbers]
        settings = [
            "" if row[name] is None else f"{row[name]:g}" if isinstance(row[name], float) else str(row[name])
            for name in COLUMNS
        ]
        lines.append([*settings, str(row["count"]), *values])
    return lines


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(table(rows))
    return text.getvalue()


def _markdown(rows: list[dict[str, Any]]) -> str:
    header, *lines = table(rows)
    return "".join(f"| {' | '.join(line)} |\n" for line in [header, ["---"] * len(header), *lines])


def _write_text(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
