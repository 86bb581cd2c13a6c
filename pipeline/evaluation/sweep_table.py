"""A sweep's table: its file, and as CSV and Markdown."""

import csv
import io
from collections.abc import Iterable
from typing import Annotated, Any, NotRequired

from pydantic import Field, with_config
from typing_extensions import TypedDict

from common.log_lines import Count
from common.recipe.sampling import SWEEP_AXES
from common.run_folder import RunFolder
from common.sealed import STRICT, read_sealed

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
    order: Count | None  # these three and start_extrapolation: None where a sampler is fitted
    spacing: str | None
    spacing_power: float | None
    allocation: str
    reuse: str
    start_extrapolation: float | None
    guidance_scale: float
    iterate_guidance: float
    ema: str | None
    distance: str
    count: Count
    numbers: dict[str, RowNumber]


@with_config(STRICT)
class TableForm(TypedDict):
    rows: Annotated[list[RowForm], Field(min_length=1)]
    unsound: NotRequired[list[str]]  # as `Sweep.diverged`


def read_table(folder: RunFolder) -> TableForm:
    """The run's last sweep. Raises UserError where the file is not as it was written."""
    return read_sealed(folder.sweep_table, TableForm, "delete it, or run python pipeline/sweep.py again")


def varied_axes(rows: Iterable[dict[str, Any]]) -> list[str]:
    """The axes beside `COLUMNS` that have several values."""
    rows = list(rows)
    return [axis for axis in SWEEP_AXES if axis not in COLUMNS and len({row[axis] for row in rows}) > 1]


def table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Header and lines, as the CSV, the Markdown and the report show them: of other axes those with several values."""
    names = {key: number["name"] for row in rows for key, number in row["numbers"].items()}
    columns = [*COLUMNS, *varied_axes(rows)]
    lines = [[*columns, "images", *names.values()]]
    for row in rows:
        numbers = [row["numbers"].get(key) for key in names]
        values = ["" if number is None else f"{number['value']:.6g}" for number in numbers]
        settings = [
            "" if row[name] is None else f"{row[name]:g}" if isinstance(row[name], float) else str(row[name])
            for name in columns
        ]
        lines.append([*settings, str(row["count"]), *values])
    return lines


def csv_text(rows: list[dict[str, Any]]) -> str:
    """Of `table`."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(table(rows))
    return text.getvalue()


def markdown(rows: list[dict[str, Any]]) -> str:
    """Of `table`."""
    header, *lines = table(rows)
    return "".join(f"| {' | '.join(line)} |\n" for line in [header, ["---"] * len(header), *lines])
