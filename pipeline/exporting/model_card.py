"""The page of an exported pipeline on a hub: README.md and the images it shows."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from common.errors import UserError, printable
from common.log_lines import read_log
from common.provenance import Started
from common.recipe import Recipe, denoiser_config, latent_shape
from common.run_folder import RunFolder
from fpdm.denoiser import count_parameters
from pipeline.evaluation import evaluate
from pipeline.evaluation.measurements import Evaluation
from pipeline.reporting.contact_sheet import grid
from pipeline.sampling.chunks import cover_gap, iterate
from pipeline.sampling.plans import blocks_an_image
from pipeline.sampling.sample_set import SampleSet

GRID_IMAGES = 16
SHOWN_CLASSES = 20
LEAST_SIDE = 128  # pixels of an image on the page; smaller ones are enlarged, pixels kept


@dataclass(frozen=True)
class Licences:
    """What whoever exports says of the weights, in the hub's words such as "apache-2.0", and of the data."""

    weights: str = "unknown"
    data: str = ""


UNSTATED = Licences()


def drawn_images(num_samples: int, samples: SampleSet) -> list[NDArray[np.uint8]] | None:
    """The first samples of the set (H, W, 3); None where they are not drawn, or kept as features alone."""
    count = min(GRID_IMAGES, num_samples)
    if cover_gap(samples.folder, (0, count)):
        return None
    return [image for rows in iterate(samples.folder, (0, count)) for image in rows["images"]]


def write_card(
    folder: Path,
    recipe: Recipe,
    samples: SampleSet,
    images: Sequence[NDArray[np.uint8]],
    *,
    names: Sequence[str] | None,
    sampling: Mapping[str, Any],
    place: str,
    licences: Licences,
) -> None:
    """Writes README.md and samples.png. `place`: what the lines of use load."""
    scale = max(1, LEAST_SIDE // recipe.data.resolution)
    sheet = Image.fromarray(grid(images))
    sheet = sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST)
    sheet.save(folder / "samples.png")
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        finalize=lambda value: printable(value) if isinstance(value, str) else value,
    )
    page = environment.get_template("model_card.md.j2").render(
        **_context(recipe, samples, names, sampling),
        last_image=len(images) - 1,
        place=place,
        licence=licences.weights,
        data_licence=licences.data,
    )
    (folder / "README.md").write_text(page, encoding="utf-8")


def _context(
    recipe: Recipe, samples: SampleSet, names: Sequence[str] | None, sampling: Mapping[str, Any]
) -> dict[str, Any]:
    network, objective = denoiser_config(recipe), recipe.objective
    measurements, reason = _measurements(recipe)
    return {
        "recipe": recipe,
        "kind": "Fixed Point Diffusion Model" if network.kind == "fpdm" else "Diffusion Transformer (DiT)",
        "classes": _classes(names, network.num_classes),
        "example": ", ".join(
            json.dumps(name, ensure_ascii=False) if "," not in name else str(i)
            for i, name in enumerate((names or ())[:2])
        )
        or "0",
        "sampling": sampling,
        "variance": ", without the variance that this network learned" if network.learned_variance else "",
        "measurements": measurements,
        "notes": sorted({note for one in measurements for note in one["notes"]}),
        "unmeasured": reason,
        "parameters": count_parameters(network),
        "latents": latent_shape(recipe),
        "blocks": f"{blocks_an_image(recipe):,}",
        "samples_seen": samples.samples_seen,
        "training": _training(RunFolder(recipe.folder)),
        "objective": f"prediction {objective.prediction}, schedule {objective.schedule}",
    }


def _classes(names: Sequence[str] | None, count: int) -> str:
    said = "one class" if count == 1 else f"{count:,} classes"
    if not names:
        return said
    more = ", ..." if len(names) > SHOWN_CLASSES else ""
    return f"{said} ({'; '.join(names[:SHOWN_CLASSES])}{more})"


def _measurements(recipe: Recipe) -> tuple[list[Any], str | None]:
    """Those of this recipe's samples; or none, and why."""
    folder = RunFolder(recipe.folder)
    try:
        if evaluate.finished(Evaluation.of(recipe)):
            return list(evaluate.read_metrics(folder)["measurements"]), None
    except UserError as error:
        return [], str(error)
    return [], "its numbers are of other settings" if folder.metrics.exists() else None


def _training(folder: RunFolder) -> str:
    """How long and on what, where the run's log says so."""
    lines = [line for line in read_log(folder.log) if line.get("samples_per_second")]
    seconds = sum(
        (line["samples"] - before["samples"]) / line["samples_per_second"]
        for before, line in pairwise([{"samples": 0}, *lines])
    )
    started = [line for line in read_log(folder.provenance, Started) if line["stage"] == "train"]
    place = f" on {started[-1].get('device') or started[-1].get('machine')}" if started else ""
    if not seconds:
        return place
    return f" in {seconds / 3600:.1f} hours{place}" if seconds > 2 * 3600 else f" in {seconds / 60:.0f} minutes{place}"
