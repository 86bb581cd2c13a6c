"""`pipeline/sweep.py` as a stage: no part of a run, but shared among jobs as those are."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from common.errors import UserError
from common.recipe import Recipe
from common.stage import Input, Stage
from pipeline.evaluation.stage import fetch

if TYPE_CHECKING:
    from pipeline.evaluation.sweep import Sweep


def resolve(recipe: Recipe) -> "Sweep":
    from pipeline.evaluation.sweep import Sweep
    from preprocess.from_data import from_data

    return Sweep(from_data(recipe))


def plan(sweep: "Sweep") -> Iterator[str]:
    """The points, which of them are measured, and which combinations are left out."""
    for point in sweep.recipes:
        measurement = sweep.measured(point)
        state = sweep.unsound(point) or "to be measured"
        if measurement:
            state = f"{measurement['distance']} = {measurement['value']:.2f}"
        yield f"{sweep.in_words(point)}: {state}"
    yield from (f"left out: {reason}" for reason in sweep.left_out)


def finished(sweep: "Sweep") -> bool:
    return sweep.finished


def measure_part(sweep: "Sweep", part: int = 0, parts: int = 1) -> None:
    """Measures this part's points. The table is written after each, so that it holds all that is measured so far."""
    for point in list(sweep.recipes)[part::parts]:
        sweep.measure(point)
        sweep.write_tables()


def measure(sweep: "Sweep") -> None:
    """All points, and the table on the terminal. Raises UserError where there are several ranks."""
    from common.ranks import rank_and_world_size

    if rank_and_world_size()[1] > 1:
        raise UserError(
            "sweep.py is one process, not several ranks; --cluster with --jobs shares its points among jobs"
        )
    prepare(sweep)
    measure_part(sweep)
    show(sweep)


def prepare(sweep: "Sweep") -> None:
    sweep.prepare()


def show(sweep: "Sweep") -> None:
    """Writes the table once more, with what other jobs have measured, and prints it."""
    if not sweep.write_tables():
        print("\n".join([*sweep.diverged, "nothing to tabulate"]))
        return
    folder = sweep.folder
    print(folder.sweep_markdown.read_text(encoding="utf-8"), end="")
    print(f"\ntable: {folder.sweep_csv}\nplot:  {folder.sweep_plot}")
    print("report:  python pipeline/report.py with the recipe shows both")


STAGE = Stage(
    name="sweep",
    resolve=resolve,
    plan=plan,
    finished=finished,
    work=measure,
    part=measure_part,
    first=prepare,
    merge=show,
    fetch=fetch,
    inputs=(Input(plan),),
)
