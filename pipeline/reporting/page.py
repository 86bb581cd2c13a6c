"""What a run's report shows, and writing it: `report.html`, one file that needs no other, and `samples.png`."""

import hashlib
import re
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jinja2

from common.errors import UserError, printable
from common.files import atomic_write, content_key, sha256_file
from common.loading import dump_recipe
from common.log_lines import read_log
from common.provenance import Started
from common.recipe import Recipe, denoiser_config, latent_shape
from common.run_folder import RunFolder, SampleFolder
from common.stage_times import read_times
from fpdm.denoiser import count_parameters
from pipeline.evaluation import evaluate
from pipeline.evaluation.measurements import Evaluation
from pipeline.evaluation.plots import loss_curve, sweep_plot
from pipeline.evaluation.sweep_table import read_table, table
from pipeline.reporting.contact_sheet import class_panels, contact_sheet, png_uri
from pipeline.reporting.cost import receipt
from pipeline.reporting.fixed_point import FixedPoint, fixed_point
from pipeline.reporting.nearest import nearest
from pipeline.sampling import iterates
from pipeline.sampling.plans import blocks_an_image

ROLES = {
    "trained": "this run's samples",
    "untrained": "the same network before training",
    "held_out": "real images that training never saw: the floor",
    "reconstruction": "the same images after the autoencoder alone",
}
TEMPLATE = "report.html.j2"
SEAL = b"\n<!-- sha256 of the page above and samples.png:"


class Report:
    """Of a recipe's run; what it shows is read once."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.folder = recipe, RunFolder(recipe.folder)

    @cached_property
    def evaluation(self) -> Evaluation:
        return Evaluation.of(self.recipe)

    @property
    def fixed_point(self) -> FixedPoint | None:
        """None for a DiT, and for samples of a network before training."""
        drawn = iterates.read(self.evaluation.sampling.sets[0])
        return fixed_point(drawn, self.recipe.sample.num_steps) if drawn else None

    @cached_property
    def inputs(self) -> str:
        """A key of all that the report shows, but when and where it was made and how long stages took.

        Raises UserError where this recipe's samples are not measured, or a file that is shown is missing.
        """
        folder = self.folder
        if not evaluate.finished(self.evaluation):
            if folder.metrics.exists():
                evaluate.read_metrics(folder)  # says what is wrong with a damaged one
            raise UserError(
                f"{folder.metrics}: not there, or of other settings than this recipe's; "
                "run python pipeline/eval_fid.py with this recipe first"
            )
        for path in (folder.log, folder.provenance):
            if not path.exists():
                raise UserError(
                    f"{path}: not there, and the report shows it; run python pipeline/train.py with this recipe"
                )
        drawn = SampleFolder(self.evaluation.sampling.sets[0].folder).iterates
        files = [path for path in (folder.metrics, folder.log, folder.sweep_table, drawn) if path.exists()]
        return content_key([dump_recipe(self.recipe), *(sha256_file(path) for path in files)])


def report(shown: Report) -> None:
    """The stage: draws images and curve, fills the template. Raises UserError where a stage before is missing."""
    folder, recipe, inputs = shown.folder, shown.recipe, shown.inputs
    panels = class_panels(shown.evaluation.sampling, partial(nearest, shown.evaluation))
    # A loss of null was not finite.
    losses = [line for line in read_log(folder.log) if line.get("loss") is not None and "step" in line]
    if not losses:
        raise UserError(f"{folder.log}: no line has a loss; run python pipeline/train.py with this recipe")
    with atomic_write(folder.contact_sheet) as temporary:
        contact_sheet(panels, recipe.data.resolution).save(temporary, format="PNG")
    page = render(
        TEMPLATE,
        **context(recipe),
        panels=panels,
        fixed_point=shown.fixed_point,
        losses=losses,
        loss_curve=loss_curve(losses),
        inputs=inputs,
    )
    with atomic_write(folder.report) as temporary:
        temporary.write_bytes(page.encode() + _seal(page.encode(), folder.contact_sheet))


def finished(shown: Report) -> bool:
    """Whether the report was made from what lies in the run folder now, and is as it was written."""
    folder = shown.folder
    if not folder.report.exists() or not folder.contact_sheet.exists():
        return False
    written = folder.report.read_bytes()
    page = written[: written.rfind(SEAL)]
    made_from = re.search(rb'<meta name="inputs" content="(\w+)">', page)
    if made_from is None or written != page + _seal(page, folder.contact_sheet):
        return False
    try:
        return made_from[1].decode() == shown.inputs
    except UserError:  # a stage before this one is missing
        return False


def _seal(page: bytes, contact_sheet: Path) -> bytes:
    """The page's last line, by which `finished` sees a changed byte of either file."""
    sha256 = hashlib.sha256(page + contact_sheet.read_bytes()).hexdigest()
    return SEAL + f" {sha256} -->\n".encode()


def render(template: str, **values: Any) -> str:
    """A page of `templates/`; every value is escaped, printable in each of its lines, and a missing one is an error."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, finalize=_shown
    )
    environment.filters |= {"png_uri": png_uri, "count": "{:,}".format, "decimal": "{:.1f}".format}
    return environment.get_template(template).render(values)


def _shown(value: Any) -> Any:
    """Escapes lone surrogates and control characters before they reach the HTML."""
    return "\n".join(map(printable, value.split("\n"))) if isinstance(value, str) else value


def context(recipe: Recipe) -> dict[str, Any]:
    """The page's words and numbers."""
    folder = RunFolder(recipe.folder)
    metrics = evaluate.read_metrics(folder)
    started = [line for line in read_log(folder.provenance, Started) if line["stage"] == "train"]
    provenance = [("training", line) for line in started[-1:]]
    device, trained = started[-1].get("device") if started else None, metrics["measurements"][0]
    return {
        "recipe": recipe,
        "recipe_yaml": dump_recipe(recipe),
        "latents": latent_shape(recipe),
        "parameters": count_parameters(denoiser_config(recipe)),
        "blocks": blocks_an_image(recipe),
        "distance": metrics["distance"],
        "measurements": metrics["measurements"],
        "roles": ROLES,
        "sweep": _sweep(folder),
        "receipt": list(receipt(recipe, trained["content"]["samples_seen"], device)),
        "command": started[-1].get("command") if started else None,
        "stages": [{"stage": stage, "seconds": seconds} for stage, seconds in read_times(folder).items()],
        "provenance": [*provenance, ("evaluation", trained["provenance"])],
    }


def _sweep(folder: RunFolder) -> dict[str, Any] | None:
    """The table and the plot of the run's sweep, if there was one."""
    if not folder.sweep_table.exists():
        return None
    swept = read_table(folder)
    rows = [dict(row) for row in swept["rows"]]
    return {"table": table(rows), "plot": sweep_plot(rows), "unsound": swept.get("unsound", [])}
