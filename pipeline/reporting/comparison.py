"""Runs side by side: the same noise at equal blocks and equal training computation, and quality against cost."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter
from tqdm import tqdm

from common.errors import UserError
from common.files import atomic_write
from common.log_lines import read_log
from common.ranks import own_device, share_cores
from common.recipe import Recipe, denoiser_config, latent_shape
from common.recipe.sampling import SWEEP_AXES, stated_iterations
from common.run_folder import RunFolder, counted
from common.run_recipe import read_recipe
from common.run_weights import find_weights, load_network
from fpdm.allocation import MEASURED
from fpdm.denoiser import count_parameters
from fpdm.latents import to_uint8
from pipeline.evaluation.evaluate import read_metrics
from pipeline.evaluation.plots import comparison_plot
from pipeline.evaluation.sweep import points
from pipeline.evaluation.sweep_table import read_table
from pipeline.reporting.contact_sheet import grid
from pipeline.reporting.page import render
from pipeline.sampling.generate import draw_images
from pipeline.sampling.models import Models
from pipeline.sampling.plans import blocks_an_image, labels_for, unmeasured
from pipeline.training.operations import mean_flops
from preprocess.from_data import class_names, from_data

NEAR = 0.05  # totals of computation that are called equal
Curve = list[tuple[float, float]]


@dataclass(frozen=True)
class Measured:
    """A distance of a run's newest samples, and what it may be compared with: those of equal `yardstick`."""

    name: str
    value: float
    reference: str
    yardstick: tuple[str, str]


@dataclass(frozen=True)
class Run:
    """One run: what it is, what it cost, and how good it came out."""

    name: str
    recipe: Recipe
    samples_seen: int
    flops_a_sample: float
    losses: Curve  # PFLOP of training, mean loss
    measured: Measured | None
    distances: Curve  # blocks an image, distance

    @property
    def pflop(self) -> float:
        return self.samples_seen * self.flops_a_sample / 1e15

    @property
    def blocks(self) -> int:
        return blocks_an_image(self.recipe)


@dataclass(frozen=True)
class Drawn:
    """Images of one run at equal cost."""

    run: str
    images: NDArray[np.uint8]  # (N, H, W, 3)
    classes: list[str]  # of each
    samples_seen: int
    pflop: float
    blocks: int

    def of_class(self, name: str) -> NDArray[np.uint8] | None:
        """Its images side by side (H, W, 3); None where there is none."""
        images = [image for image, own in zip(self.images, self.classes, strict=True) if own == name]
        return grid(images) if images else None


@dataclass(frozen=True)
class Compared:
    runs: list[Run]
    drawn: list[Drawn]
    pflop: float  # which every run has spent
    blocks: int  # an image, at most

    @property
    def classes(self) -> list[str]:
        """Of all images, in the order in which they come."""
        return list(dict.fromkeys(name for drawn in self.drawn for name in drawn.classes))

    @property
    def rows(self) -> list[dict[str, Any]]:
        return rows(self.runs, self.drawn, self.pflop)

    @property
    def notes(self) -> list[str]:
        dear = [drawn.run for drawn in self.drawn if drawn.pflop > self.pflop * (1 + NEAR)]
        more = "saved no weights of as little computation as the shortest training; its first ones are shown."
        return [*notes(self.runs), *(f"{name} {more}" for name in dear)]


def compare(folders: Sequence[Path], blocks: int | None, count: int) -> Compared:
    """`blocks`: an image; None: the least of the runs' own. Raises UserError naming the run that cannot be compared."""
    runs = [read_run(folder) for folder in folders]
    pflop, most = min(run.pflop for run in runs), blocks or min(run.blocks for run in runs)
    bar = tqdm(runs, desc="draw", unit="run", delay=2)
    return Compared(runs, [draw(run, pflop, most, count) for run in bar], pflop, most)


def page(compared: Compared, path: Path) -> None:
    """Writes it: one file that needs no other."""
    drawn, runs = compared.drawn, compared.runs
    text = render(
        "compare.html.j2",
        rows=compared.rows,
        notes=compared.notes,
        drawn=drawn,
        panels={name: [picture.of_class(name) for picture in drawn] for name in compared.classes},
        plot=comparison_plot(
            {run.name: run.losses for run in runs},
            {run.name: run.distances for run in runs},
            next((run.measured.name for run in runs if run.measured), "distance"),
        ),
        measured=any(run.distances for run in runs),
        count=len(drawn[0].classes),
        pflop=compared.pflop,
        blocks=compared.blocks,
    )
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_run(folder: Path) -> Run:
    """Raises UserError where the folder holds no run with weights."""
    recipe = from_data(sampled_recipe(folder))
    flops, samples_seen = mean_flops(recipe), find_weights(recipe, "latest", recipe.sample.ema)[0]
    lines = [line for line in read_log(RunFolder(folder).log) if line.get("loss") is not None]
    losses = [(line["samples"] * flops / 1e15, line["loss"]) for line in lines]
    measured, distances = _distances(folder, recipe)
    return Run(folder.name, recipe, samples_seen, flops, losses, measured, distances)


def sampled_recipe(folder: Path) -> Recipe:
    """As the run was measured, else as it was trained."""
    trained = read_recipe(folder)
    if not RunFolder(folder).metrics.exists():
        return trained
    recorded = read_metrics(RunFolder(folder))["measurements"][0]["recipe"]
    try:
        recipe = TypeAdapter(Recipe).validate_python(recorded)
    except ValueError:  # of an older version, with other fields
        return trained
    return replace(recipe, name=trained.name, runs=trained.runs)


def _distances(folder: Path, recipe: Recipe) -> tuple[Measured | None, Curve]:
    """Of the run's own samples, and of its sweep where that was measured in the same way."""
    place = RunFolder(folder)
    if not place.metrics.exists():
        return None, []
    own = read_metrics(place)["measurements"][0]
    reference = own["reference"]
    yardstick = (own["distance"], str(reference["content"]))
    measured = Measured(own["distance"], own["value"], reference["label"], yardstick)
    curve = [(float(blocks_an_image(recipe)), own["value"])]
    if place.sweep_table.exists():
        rows = [row for row in read_table(place)["rows"] if row["distance"] == own["distance"]]
        curve += [(float(row["blocks"]), row["numbers"]["frechet"]["value"]) for row in rows]
    return measured, sorted(set(curve))


def loss_at(run: Run, pflop: float) -> float | None:
    """The logged loss when so much was computed; None where the log does not reach it."""
    passed = [loss for spent, loss in run.losses if spent <= pflop * (1 + NEAR)]
    return passed[-1] if passed else None


def draw(run: Run, pflop: float, blocks: int, count: int) -> Drawn:
    """Samples 0 to count - 1 of its seed, from the last weights of at most `pflop`, in at most `blocks` an image; from
    its first trained weights where these took more.

    Raises UserError where no way of sampling costs so little.
    """
    share_cores()
    recipe = at_blocks(run.recipe, blocks)
    trained = [int(folder.name) for folder in counted(RunFolder(recipe.folder).weights) if int(folder.name)]
    affordable = [seen for seen in trained if seen * run.flops_a_sample / 1e15 <= pflop * (1 + NEAR)]
    chosen = max(affordable, default=min(trained, default=run.samples_seen))
    samples_seen, folder = find_weights(recipe, chosen, recipe.sample.ema)
    device = own_device()
    model, vae = load_network(folder).to(device), Models(recipe.vae, recipe.evaluate).load_vae(device)
    index = torch.arange(count, device=device)
    recipe = replace(recipe, sample=replace(recipe.sample, eta=0.0))  # other numbers of steps have other noise in them
    way, parts = unmeasured(recipe), index.split(recipe.sample.batch_size)
    pixels = torch.cat([draw_images(recipe, way, model, vae, part) for part in parts])
    images = to_uint8(pixels, recipe.sample.rounding).permute(0, 2, 3, 1).cpu().numpy()
    labels, names = labels_for(recipe, index).tolist(), class_names(recipe)
    classes = [names[label] if names else f"class {label}" for label in labels]
    spent = samples_seen * run.flops_a_sample / 1e15
    return Drawn(run.name, images, classes, samples_seen, spent, blocks_an_image(recipe))


def at_blocks(recipe: Recipe, blocks: int) -> Recipe:
    """The recipe's way of sampling with so many blocks an image, on as many steps as they pay for."""
    own = recipe.sample
    if blocks_an_image(recipe) == blocks and own.allocation not in MEASURED:
        return recipe
    axes: dict[str, Any] = {name: (getattr(own, name),) for name in SWEEP_AXES}
    if own.allocation in (*MEASURED, "list"):
        axes["allocation"] = ("constant",)
    mean = round(sum(stated_iterations(own)) / own.num_steps) if recipe.model.kind == "fpdm" else 1
    sweep = replace(recipe.sweep, **axes, budgets=(blocks,), iterations=(max(1, mean),), num_steps=None)
    try:
        (found,) = points(replace(recipe, sweep=sweep))[0].values()
    except UserError as error:
        raise UserError(f"--blocks: {blocks}: {recipe.folder}: {error}") from None
    return found


def notes(runs: Sequence[Run]) -> list[str]:
    """What of these runs does not compare, in sentences."""
    first, found = runs[0], []
    if len({run.recipe.seed for run in runs}) > 1 or len({latent_shape(run.recipe) for run in runs}) > 1:
        found.append("Their seeds or latents differ, so that the same place in the pictures is not the same noise.")
    if len({run.recipe.objective for run in runs}) > 1:
        found.append("Their objectives differ, so that their losses do not compare.")
    yardsticks = {run.measured.yardstick for run in runs if run.measured}
    if len(yardsticks) > 1:
        found.append("Their distances have other extractors or references and do not compare.")
    if len({run.recipe.data.shards for run in runs}) > 1:
        found.append(f"They learned other latents: {', '.join(run.recipe.data.shards for run in runs)}.")
    unmeasured_runs = [run.name for run in runs if run.measured is None]
    if unmeasured_runs:
        found.append(f"Not evaluated: {', '.join(unmeasured_runs)}; python pipeline/eval_fid.py does it.")
    if any(abs(run.pflop - first.pflop) > NEAR * first.pflop for run in runs):
        found.append("Their trainings differ in computation; pictures and losses are compared at the least of them.")
    return found


def rows(runs: Sequence[Run], drawn: Sequence[Drawn], pflop: float) -> list[dict[str, Any]]:
    """The table, JSON-able: a row a run."""
    return [
        {
            "run": run.name,
            "kind": run.recipe.model.kind,
            "parameters": count_parameters(denoiser_config(run.recipe)),
            "samples_seen": run.samples_seen,
            "pflop": run.pflop,
            "loss_at_equal_pflop": loss_at(run, pflop),
            "blocks": run.blocks,
            "distance": run.measured.value if run.measured else None,
            "distance_name": run.measured.name if run.measured else None,
            "reference": run.measured.reference if run.measured else None,
            "distances_by_blocks": run.distances,
            "drawn": {
                "samples_seen": picture.samples_seen,
                "pflop": picture.pflop,
                "blocks": picture.blocks,
                "classes": picture.classes,
            },
        }
        for run, picture in zip(runs, drawn, strict=True)
    ]
