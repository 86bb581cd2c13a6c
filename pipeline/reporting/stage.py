"""The stage `report`. Importing it takes no time: `--help` needs nothing of torch."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from common.recipe import Recipe
from common.run_folder import RunFolder
from common.stage import Input, Stage

if TYPE_CHECKING:
    from pipeline.reporting.page import Report


def resolve(recipe: Recipe) -> "Report":
    from pipeline.reporting.page import Report
    from preprocess.from_data import from_data

    return Report(from_data(recipe))


def plan(shown: "Report") -> Iterator[str]:
    yield f"report: {shown.folder.report}, " + ("up to date" if finished(shown) else "to be written")
    yield f"images: {shown.folder.contact_sheet}, {shown.recipe.sample.save_images} of each set"


def finished(shown: "Report") -> bool:
    from pipeline.reporting import page

    return page.finished(shown)


def report(shown: "Report") -> None:
    from pipeline.reporting import page

    page.report(shown)


def look_for_measurements(shown: "Report") -> None:
    _ = shown.inputs


STAGE = Stage(
    name="report",
    resolve=resolve,
    plan=plan,
    finished=finished,
    work=report,
    place=lambda recipe: RunFolder(recipe.folder).report,
    inputs=(Input(look_for_measurements, ("compose", "train", "sample", "evaluate")),),
)
