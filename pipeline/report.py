"""Writes what came out of a run: `samples.png`, and `report.html`, one file that needs nothing else to be read.

python pipeline/report.py --config recipes/demo.yaml
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.command import run_command
from common.errors import UserError, printable
from common.files import atomic_write, content_key, sha256_file
from common.recipe import Recipe
from common.sealed import parse_json, read_bytes, read_json

ROLES = {
    "trained": "this run's samples",
    "untrained": "the same network before training",
    "held_out": "real pictures that training never saw: the floor",
    "reconstruction": "the same pictures after the autoencoder alone",
}


def report(recipe: Recipe) -> None:
    """The stage: draws the pictures and the curve, fills the template. Raises UserError where a stage is missing."""
    from pipeline.figures import class_panels, contact_sheet, loss_curve

    inputs = _inputs(recipe)
    panels, log = class_panels(recipe), recipe.folder / "metrics.jsonl"
    losses = [line for line in _json_lines(log) if line.get("loss") is not None]  # null: it was not finite
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

    from pipeline.figures import png_uri

    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
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
    from pipeline.plans import blocks_a_picture

    metrics = read_json(recipe.folder / "metrics.json")
    stages = recipe.folder / "stages.json"
    trainings = [line for line in _json_lines(recipe.folder / "provenance.jsonl") if line["stage"] == "train"]
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
        "stages": read_json(stages) if stages.exists() else [],
        "provenance": [("training", trainings[-1]), ("evaluation", metrics["measurements"][0]["provenance"])],
    }


def _sweep(recipe: Recipe) -> dict[str, Any] | None:
    """The table and the picture of the run's sweep, if there was one."""
    from pipeline.sweeping import TABLE, table

    path = recipe.folder / TABLE
    if not path.exists():
        return None
    return {"table": table(read_json(path)), "picture": (path.parent / "distances.png").read_bytes()}


def _inputs(recipe: Recipe) -> str:
    """A key of all that the report shows. Raises UserError where this recipe's samples are not measured."""
    from common.loading import dump_recipe
    from pipeline import eval_fid
    from pipeline.sweeping import TABLE

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


def _json_lines(path: Path) -> list[dict[str, Any]]:
    *whole, _ = read_bytes(path).split(b"\n")  # the last line may still be written
    return [parse_json(line, path, "take out the line that is damaged") for line in whole]


def plan(recipe: Recipe) -> Iterator[str]:
    yield f"report: {recipe.folder / 'report.html'}, " + ("up to date" if finished(recipe) else "to be written")
    yield f"pictures: {recipe.folder / 'samples.png'}, {recipe.sample.save_images} of each set"


if __name__ == "__main__":
    sys.exit(run_command(__doc__, plan, report))
