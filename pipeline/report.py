"""Writes what came out of a run: `samples.png`, and `report.html`, one file that needs nothing else to be read.

python pipeline/report.py --config recipes/demo.yaml
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import with_config
from typing_extensions import TypedDict

from common.command import run_command
from common.errors import UserError, printable
from common.files import atomic_write, content_key, sha256_file
from common.log_lines import read_log
from common.recipe import Recipe
from common.sealed import OPEN

ROLES = {
    "trained": "this run's samples",
    "untrained": "the same network before training",
    "held_out": "real pictures that training never saw: the floor",
    "reconstruction": "the same pictures after the autoencoder alone",
}


@with_config(OPEN)
class Started(TypedDict):
    """A line of `provenance.jsonl`; all of it is shown."""

    stage: str


def report(recipe: Recipe) -> None:
    """The stage: draws the pictures and the curve, fills the template. Raises UserError where a stage is missing."""
    from pipeline.evaluation.plots import loss_curve
    from pipeline.reporting.contact_sheet import class_panels, contact_sheet

    inputs = _inputs(recipe)
    panels, log = class_panels(recipe), recipe.folder / "metrics.jsonl"
    losses = [line for line in read_log(log) if line.get("loss") is not None and "step" in line]  # null: not finite
    if not losses:
        raise UserError(f"{log}: no line has a loss; run python pipeline/train.py with this recipe")
    with atomic_write(recipe.folder / "samples.png") as temporary:
        contact_sheet(panels, recipe.data.resolution).save(temporary, format="PNG")
    page = render(**context(recipe), panels=panels, losses=losses, loss_curve=loss_curve(losses), inputs=inputs)
    with atomic_write(recipe.folder / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")


def finished(recipe: Recipe) -> bool:
    """Whether the report was made from what lies in the run folder now; how long stages took does not count."""
    page = recipe.folder / "report.html"
    if not page.exists() or not (recipe.folder / "samples.png").exists():
        return False
    made_from = re.search(r'<meta name="inputs" content="(\w+)">', page.read_text(encoding="utf-8", errors="replace"))
    try:
        return made_from is not None and made_from[1] == _inputs(recipe)
    except UserError:  # a stage before this one is missing
        return False


def render(**values: Any) -> str:
    """The page; every value is escaped, printable in each of its lines, and a missing one is an error."""
    import jinja2

    from pipeline.reporting.contact_sheet import png_uri

    loader = jinja2.FileSystemLoader(Path(__file__).parent / "reporting" / "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, finalize=_shown
    )
    environment.filters |= {"png_uri": png_uri, "count": "{:,}".format, "decimal": "{:.1f}".format}
    return environment.get_template("report.html.j2").render(values)


def _shown(value: Any) -> Any:
    """A value as the page has it: no encoding has half a character, and no browser is to obey a control character."""
    return "\n".join(map(printable, value.split("\n"))) if isinstance(value, str) else value


def context(recipe: Recipe) -> dict[str, Any]:
    """The page's words and numbers."""
    from common.loading import dump_recipe
    from common.recipe import denoiser_config, latent_shape
    from fpdm.denoiser import count_parameters
    from pipeline.eval_fid import read_metrics
    from pipeline.orchestration.stages import read_times
    from pipeline.sampling.plans import blocks_a_picture

    metrics = read_metrics(recipe)
    started = [line for line in read_log(recipe.folder / "provenance.jsonl", Started) if line["stage"] == "train"]
    provenance = [("training", line) for line in started[-1:]]
    return {
        "recipe": recipe,
        "recipe_yaml": dump_recipe(recipe),
        "latents": latent_shape(recipe),
        "parameters": count_parameters(denoiser_config(recipe)),
        "blocks": blocks_a_picture(recipe),
        "distance": metrics["distance"],
        "measurements": metrics["measurements"],
        "roles": ROLES,
        "sweep": _sweep(recipe),
        "stages": [{"stage": stage, "seconds": seconds} for stage, seconds in read_times(recipe).items()],
        "provenance": [*provenance, ("evaluation", metrics["measurements"][0]["provenance"])],
    }


def _sweep(recipe: Recipe) -> dict[str, Any] | None:
    """The table and the picture of the run's sweep, if there was one."""
    from pipeline.evaluation.plots import sweep_picture
    from pipeline.evaluation.sweep import TABLE, read_table, table

    if not (recipe.folder / TABLE).exists():
        return None
    rows = read_table(recipe)
    return {"table": table(rows), "picture": sweep_picture(rows)}


def _inputs(recipe: Recipe) -> str:
    """A key of all that the report shows. Raises UserError where this recipe's samples are not measured."""
    from common.loading import dump_recipe
    from pipeline import eval_fid
    from pipeline.evaluation.sweep import TABLE

    if not eval_fid.finished(recipe):
        raise UserError(
            f"{recipe.folder / 'metrics.json'}: not there, or of other settings than this recipe's; "
            "run python pipeline/eval_fid.py with this recipe first"
        )
    files = [recipe.folder / name for name in ("metrics.json", "metrics.jsonl", "provenance.jsonl")]
    for path in files:
        if not path.exists():
            raise UserError(
                f"{path}: not there, and the report shows it; run python pipeline/train.py with this recipe"
            )
    files.pop()  # says when and where, which is nothing new to show
    files += [path for path in [recipe.folder / TABLE] if path.exists()]
    return content_key([dump_recipe(recipe), *(sha256_file(path) for path in files)])


def plan(recipe: Recipe) -> Iterator[str]:
    yield f"report: {recipe.folder / 'report.html'}, " + ("up to date" if finished(recipe) else "to be written")
    yield f"pictures: {recipe.folder / 'samples.png'}, {recipe.sample.save_images} of each set"


if __name__ == "__main__":
    sys.exit(run_command(__doc__, plan, report))
