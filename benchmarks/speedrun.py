"""The gain of each ingredient of the demo's training: added alone to the paper's, and left out of the demo's.

    python benchmarks/speedrun.py [--variants paper all with-X without-X ...] [--seeds 3] [--samples N]
        [--target FD] [--images 256] [--every N] [--at-once N] [--set FIELD=VALUE ...] [--runs FOLDER] [--json FILE]
        [--markdown FILE]

Each variant is a run of `pipeline/train.py` with the demo's recipe, on one process with one thread, that measures its
distance on the way; the seed sets weights, noise and order alike. Runs that are finished are read, interrupted ones go
on. Seconds are those of training without the measurements, and of runs that wait for one another where several run at
once; FLOPs are the network's, of every step as it was drawn. The interval of a mean over seeds is Student's, 95 %.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, astuple, dataclass
from itertools import product
from pathlib import Path
from statistics import mean, stdev

from scipy.stats import t as student

from benchmarks.machine import show_machine
from common.command import Parser, count_argument, exit_status_of
from common.loading import load_recipe
from common.log_lines import read_log
from common.recipe import Recipe, denoiser_config
from common.run_folder import RunFolder
from common.run_recipe import read_recipe
from pipeline.training.schedule import step_iterations
from pipeline.training.stage import STAGE as TRAINING
from pipeline.training.throughput import step_flops

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "recipes/demo.yaml"
# By name: the fields that it sets, and what they are without it.
INGREDIENTS: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "prediction": (
        {"objective.prediction": "clean", "objective.loss_weight": "velocity"},
        {"objective.prediction": "v", "objective.loss_weight": "none"},
    ),
    "latents": ({"train.latents": "mean"}, {"train.latents": "drawn"}),
    "conditioning": (
        {"model.pre_post_timestep_conditioning": "true"},
        {"model.pre_post_timestep_conditioning": "false"},
    ),
    "attention": (
        {"model.qk_norm": "true", "model.rope": "true", "model.value_residual": "true"},
        {"model.qk_norm": "false", "model.rope": "false", "model.value_residual": "false"},
    ),
    "injection": ({"model.injection": "decay"}, {"model.injection": "concat"}),
    "iterations": (
        {"train.max_no_grad_iterations": "2", "train.max_grad_iterations": "2"},
        {"train.max_no_grad_iterations": "3", "train.max_grad_iterations": "3"},
    ),
    "contraction": ({"train.contraction": "8"}, {"train.contraction": "0"}),
    "timesteps": (
        {"train.timesteps.kind": "logit_normal", "train.timesteps.stratified": "true"},
        {"train.timesteps.kind": "uniform", "train.timesteps.stratified": "false"},
    ),
    "rate": (
        {"train.optimizer.learning_rate": "5.6e-3", "train.optimizer.betas": "[0.9, 0.99]"},
        {"train.optimizer.learning_rate": "2e-3", "train.optimizer.betas": "[0.9, 0.999]"},
    ),
}


VARIANTS = ["paper", *(f"with{out}-{name}" for out in ("", "out") for name in INGREDIENTS), "all"]


@dataclass(frozen=True)
class Measured:
    """A run's distance after so many samples, seconds and floating-point operations."""

    samples: int
    seconds: float
    flops: float
    distance: float


@dataclass(frozen=True)
class Row:
    """One variant: means over its seeds; None where a seed did not reach the target."""

    variant: str
    seeds: int
    distance: float
    interval: float
    samples: float | None
    seconds: float | None
    tflops: float | None

    def cells(self) -> list[str]:
        reached = [self.samples, self.seconds, self.tflops]
        digits = (0, 0, 1)
        numbers = ["-" if value is None else f"{value:,.{n}f}" for value, n in zip(reached, digits, strict=True)]
        interval = f" ± {self.interval:.1f}" if self.seeds > 1 else ""
        return [self.variant, str(self.seeds), f"{self.distance:.1f}{interval}", *numbers]


def overrides(variant: str) -> list[str]:
    """The fields of a variant: `paper` has no ingredient, `all` every one, with-X that one, without-X all but it."""
    fields: dict[str, str] = {}
    for ingredient, (present, absent) in INGREDIENTS.items():
        without = variant.startswith("without-") and variant != f"without-{ingredient}"
        fields |= present if variant in ("all", f"with-{ingredient}") or without else absent
    return [f"{field}={value}" for field, value in fields.items()]


def recipe_of(variant: str, seed: int, options: argparse.Namespace) -> tuple[Recipe, list[str]]:
    """The recipe of a run, and the fields in which it differs from the demo's."""
    given = [
        *overrides(variant),
        *(f"name={variant}-{seed}", f"seed={seed}", f"runs={options.runs}", f"train.total_samples={options.samples}"),
        *(f"train.previews.distance_every_samples={options.every}", f"train.previews.distance_images={options.images}"),
        *("sample.num_steps=10", "launch.processes=1", *options.set),
    ]
    return load_recipe(DEMO, given), given


def train(variant: str, seed: int, options: argparse.Namespace) -> None:
    """Trains a variant as far as it is not trained yet, in a process of its own."""
    recipe, given = recipe_of(variant, seed, options)
    if TRAINING.is_finished(recipe):
        if read_recipe(recipe.folder).sample != recipe.sample:
            sys.exit(f"--runs: {recipe.folder} was measured with another section `sample`; choose another folder")
        return
    command = [sys.executable, ROOT / "pipeline/train.py", "--config", DEMO, *given]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    subprocess.run([*map(str, command)], check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)


def curve(recipe: Recipe) -> list[Measured]:
    """The distances in the run's log, with the samples, seconds and FLOPs before each."""
    settings, config = recipe.train, denoiser_config(recipe)
    seconds, flops, before, points = 0.0, 0.0, 0, []
    for line in read_log(RunFolder(recipe.folder).log):
        starts = range(before, line["samples"], settings.batch_size)
        counts = [step_iterations(settings, recipe.seed, start) for start in starts]
        flops += settings.batch_size * sum(step_flops(config, each) for each in counts)
        seconds += len(starts) * (line["step_seconds"] - line.get("previews_seconds", 0.0))
        before = line["samples"]
        if line.get("distance") is not None:
            points.append(Measured(before, seconds, flops, line["distance"]))
    return points


def reached(points: Sequence[Measured], target: float) -> Measured | None:
    """Where the curve first falls to the target, between two measurements on a straight line."""
    for last, point in zip([None, *points], points, strict=False):
        if point.distance <= target:
            if last is None:
                return point
            part = (last.distance - target) / (last.distance - point.distance)
            blend = [a + part * (b - a) for a, b in zip(astuple(last), astuple(point), strict=True)]
            return Measured(round(blend[0]), *blend[1:])
    return None


def row(variant: str, curves: list[list[Measured]], target: float) -> Row:
    finals, hits = [points[-1].distance for points in curves], [reached(points, target) for points in curves]
    found = [hit for hit in hits if hit is not None]
    all_reached = len(found) == len(hits)
    count = len(finals)
    width = student.ppf(0.975, count - 1) * stdev(finals) / math.sqrt(count) if count > 1 else math.nan
    return Row(
        variant=variant,
        seeds=len(finals),
        distance=mean(finals),
        interval=width,
        samples=mean(hit.samples for hit in found) if all_reached else None,
        seconds=mean(hit.seconds for hit in found) if all_reached else None,
        tflops=mean(hit.flops for hit in found) / 1e12 if all_reached else None,
    )


def table(rows: list[Row], target: float) -> str:
    head = [
        "variant",
        "seeds",
        "distance at the end",
        *(f"{what} to {target:g}" for what in ("samples", "seconds", "TFLOP")),
    ]
    lines = [head, ["---"] * len(head), *(each.cells() for each in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS, metavar="VARIANT")
    parser.add_argument("--seeds", type=count_argument, default=3)
    parser.add_argument("--samples", type=count_argument, default=32_768)
    parser.add_argument("--every", type=count_argument, default=8_192, help="samples between two measurements")
    parser.add_argument("--images", type=count_argument, default=256, help="images of a measurement")
    parser.add_argument("--target", type=float, default=150.0)
    parser.add_argument("--at-once", type=count_argument, default=1, help="runs at the same time")
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="fields of every run")
    parser.add_argument("--runs", default="runs/speedrun")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    machine, rows = show_machine(), []
    runs = list(product(range(options.seeds), options.variants))
    with ThreadPoolExecutor(options.at_once) as pool:
        for _ in pool.map(lambda run: train(run[1], run[0], options), runs):
            pass  # raises where a training failed
    for variant in options.variants:
        curves = [curve(recipe_of(variant, seed, options)[0]) for seed in range(options.seeds)]
        rows.append(row(variant, curves, options.target))
        print(" ".join(rows[-1].cells()), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "rows": [asdict(each) for each in rows]}, indent=1))
    if options.markdown:
        options.markdown.write_text(table(rows, options.target) + "\n")


if __name__ == "__main__":
    sys.exit(exit_status_of(main))
