"""Trains and measures what is missing. Every run and every point is a file, so a killed reproduction goes on."""

import math
import multiprocessing
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from statistics import fmean

from common.command import ended_by_signals, exit_status_of
from common.errors import INTERRUPTED, Interrupted, UserError
from common.loading import load_recipe
from common.log_lines import read_log
from common.recipe import Recipe, denoiser_config
from common.run_folder import RunFolder
from common.sealed import read_sealed, write_sealed
from common.stage import Stage
from common.stage_checks import check_stages
from common.stage_jobs import run_in_jobs
from fpdm.denoiser import count_parameters
from pipeline.evaluation.stage import fetch
from pipeline.evaluation.sweep import Sweep
from pipeline.evaluation.sweep_stage import STAGE as SWEEP
from pipeline.reproduction.claims import RECIPES, SECOND_JUDGE, Arm, Row, Table
from pipeline.stages import select
from pipeline.training.checkpoint import MARKER
from pipeline.training.checkpoint_form import MarkerForm
from pipeline.training.guards import through_samples
from pipeline.training.identity import total_samples
from pipeline.training.operations import training_flops, with_end

ENDING_SECONDS = 30.0  # for a run to end what it has started
ROOT = Path(__file__).parents[2]
MADE = ("compose", "autoencoder", "encode", "train")  # the stages before sampling
# What --smoke makes of every recipe: everything happens, and nothing is learned.
SMOKE = (
    *("model.hidden_size=32", "model.num_heads=2", "model.depth=2"),
    *("train.max_pflops=null", "train.total_samples=16", "train.batch_size=8", "train.log.every_samples=8"),
    *("train.optimizer.warmup_samples=0", "train.log.tensorboard=false", "train.zero_stage=0"),
    *("sample.num_samples=4", "sample.batch_size=4", "evaluate.reference_samples=8", "evaluate.metrics=[frechet]"),
    *("launch.processes=1", "sweep.budgets=[140]", "sweep.sampler=[ddim]", "data.shard_samples=8"),
)
SMOKE_DEMO = ("demo.per_class=4", "demo.held_out_per_class=2")


@dataclass(frozen=True)
class Scale:
    """What is reproduced: `name` is small or full, `runs` the folder of its runs."""

    name: str
    runs: str
    seeds: int
    smoke: bool
    overrides: tuple[str, ...] = ()  # of all its recipes

    def judges(self, table: Table) -> tuple[str | None, ...]:
        """The extractors that a table's distances are taken with; None: each recipe's own."""
        again = self.name == "small" and table.judged_again
        return (None, SECOND_JUDGE) if again else (None,)

    def recipes(self, arm: Arm, judge: str | None = None) -> list[Recipe]:
        """The arm's run of each seed, and its sweep."""
        path = ROOT / RECIPES[self.name] / f"{arm.stem(self.name)}.yaml"
        own = load_recipe(path)
        overrides = [*arm.overrides, *([f"evaluate.feature_extractor={judge}"] if judge else [])]
        return [load_recipe(path, [*overrides, *self._overrides(own, seed)]) for seed in range(self.seeds)]

    def _overrides(self, own: Recipe, seed: int) -> Iterator[str]:
        yield from (f"name={own.name}-{seed}", f"seed={seed}", f"runs={self.runs}")
        if self.smoke:
            yield from SMOKE
            yield f"data.shards={self.runs}/{own.data.shards}"
            if own.demo:
                yield from SMOKE_DEMO
                yield from (
                    f"data.images={self.runs}/{own.data.images}",
                    f"data.held_out={self.runs}/{own.data.held_out}",
                )
            if own.vae.training:
                yield from (f"vae.path={self.runs}/{own.vae.path}", "vae.training.images=16")
        yield from self.overrides


@dataclass(frozen=True)
class Outcome:
    """One run of an arm, trained and measured."""

    recipe: Recipe
    distances: dict[Row, float]  # inf: its training or its samples diverged
    distance: str  # its name; empty where all diverged
    parameters: int
    samples: int
    pflop: float  # of training
    seconds: float | None  # of training, if its last checkpoint is still there
    residual: float | None  # see `_residual`; None of DiT
    diverged: bool = False  # in training, which then ended early


def make(tables: Sequence[Table], scale: Scale, cluster: str, at_once: int = 1) -> None:
    """Trains every run that is not trained, and measures every point that is not measured; so many runs at once."""
    arms = [scale.recipes(arm, judge) for table in tables for judge in scale.judges(table) for arm in table.arms]
    every = dict.fromkeys(recipe for of_a_seed in zip(*arms, strict=True) for recipe in of_a_seed)
    runs: dict[Path, list[Recipe]] = {}
    for recipe in every:
        runs.setdefault(recipe.folder, []).append(recipe)
    for first in _data_sets(every):
        fetch(first)  # compute nodes often have no internet
        for stage in _before_sampling(first)[:-1]:
            _make(first, stage, cluster)
    if at_once == 1:
        for run in runs.values():
            _make_run(run, cluster)
        return
    _make_together(list(runs.values()), cluster, at_once)


def _make_together(runs: list[list[Recipe]], cluster: str, at_once: int) -> None:
    """Each run in a process of its own: networks of this size leave most of a GPU, or of many cores, idle.

    Raises UserError or Interrupted where one does not finish; this and a signal end those that are running.
    """
    spawned, running = multiprocessing.get_context("spawn"), dict[SpawnProcess, Path]()
    try:
        while runs or running:
            while runs and len(running) < at_once:
                run = runs.pop(0)
                process = spawned.Process(target=_make_alone, args=(run, cluster))
                process.start()
                running[process] = run[0].folder
            wait([process.sentinel for process in running])
            for process in [process for process in running if process.exitcode is not None]:
                folder, status = running.pop(process), process.exitcode
                again = "the same command again goes on"
                if status == INTERRUPTED:
                    raise Interrupted(f"{folder}; {again}")
                if status:
                    raise UserError(f"{folder}: ended with status {status}; what it said is above, and {again}")
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.join(ENDING_SECONDS)
            process.kill()


def _make_alone(run: Sequence[Recipe], cluster: str) -> None:
    """A process of `_make_together`."""
    os.environ.pop("MASTER_PORT", None)  # each finds a free one
    with ended_by_signals():
        sys.exit(exit_status_of(partial(_make_run, run, cluster)))


def check_images(tables: Sequence[Table], scale: Scale, cluster: str) -> None:
    """Raises UserError where a table's images are not there, before hours of other tables."""
    faults: dict[str, UserError] = {}
    for table in tables:
        (recipe,) = _data_sets(recipe for arm in table.arms for recipe in scale.recipes(arm))
        try:
            check_stages(_for(recipe, first := _before_sampling(recipe)[0]), [first], cluster, fetches=False)
        except UserError as fault:
            faults[table.key] = fault
    if faults:
        key, words = next(iter(faults.items()))
        others = ",".join(table.key for table in tables if table.key not in faults)
        raise UserError(f"{key}: {words}{f'; or make the others, --only {others}' if others else ''}")


def _data_sets(recipes: Iterable[Recipe]) -> Iterable[Recipe]:
    """The first recipe of each data set."""
    by_shards: dict[str, Recipe] = {}
    for recipe in recipes:
        by_shards.setdefault(recipe.data.shards, recipe)
    return by_shards.values()


def _make_run(arms: Sequence[Recipe], cluster: str) -> None:
    """Trains a run, and measures it in the way of each of its arms. A training that diverges is a result too."""
    diverged = RunFolder(arms[0].folder).diverged
    for stage in _before_sampling(arms[0]):
        if diverged.exists():
            return
        try:
            _make(arms[0], stage, cluster)
        except UserError:
            if stage.name != "train" or not _ended_not_finite(arms[0]):
                raise
            write_sealed(diverged, {"reason": "the gradient or loss was not finite, through no single sample"})
            print(f"{arms[0].name}: its training diverged, as the page will say; delete {diverged} to train it again")
            return
    for recipe in arms:
        _make(recipe, SWEEP, cluster)


def _ended_not_finite(recipe: Recipe) -> bool:
    """Whether the last event of a training was a step that no single sample made infinite."""
    events = list(read_log(RunFolder(recipe.folder).events))
    last = events[-1] if events else {}
    return last.get("event") == "not finite" and not through_samples(last, recipe.train.batch_size)


def _make(recipe: Recipe, stage: Stage, cluster: str) -> None:
    stated = _for(recipe, stage)
    if stage.is_finished(stated):
        return
    print(f"{recipe.name}: {stage.name} ...", flush=True)
    if stage is not SWEEP:
        check_stages(stated, [stage], cluster)
    run_in_jobs(stated, stage, cluster)


def _for(recipe: Recipe, stage: Stage) -> Recipe:
    """Images, autoencoder and latents are those of seed 0, which all runs share."""
    return recipe if stage.name == "train" or stage is SWEEP else replace(recipe, seed=0)


def plan(tables: Sequence[Table], scale: Scale) -> Iterator[str]:
    """One line a run: what it costs, and whether it is trained."""
    jobs = {recipe.name: recipe for table in tables for arm in table.arms for recipe in scale.recipes(arm)}
    for recipe in jobs.values():
        samples = total_samples(with_end(recipe).train)
        yield f"{recipe.folder}: {training_flops(recipe) / 1e15:,.4g} PFLOP for {samples:,} samples, {_state(recipe)}"


def _state(recipe: Recipe) -> str:
    if RunFolder(recipe.folder).diverged.exists():
        return "diverged"
    trained = all(stage.is_finished(_for(recipe, stage)) for stage in _before_sampling(recipe))
    return "trained" if trained else "to be trained"


def outcomes(table: Table, scale: Scale, judge: str | None) -> dict[str, list[Outcome]]:
    """By arm, of each seed. Raises UserError where something is not measured."""
    return {arm.name: [_outcome(recipe, table.rows) for recipe in scale.recipes(arm, judge)] for arm in table.arms}


def _outcome(recipe: Recipe, rows: Sequence[str]) -> Outcome:
    sweep, distances, name = Sweep(recipe), {}, ""
    diverged = RunFolder(recipe.folder).diverged.exists()
    for point in sweep.recipes:
        row = tuple(_row(getattr(point, field)) for field in rows)
        measurement = None if diverged else sweep.measured(point)
        if measurement is not None:
            distances[row], name = measurement["value"], measurement["distance"]
        elif diverged or sweep.unsound(point):
            distances[row] = math.inf
        else:
            raise UserError(f"{recipe.folder}: a point is not measured; run python pipeline/reproduce.py again")
    return Outcome(
        recipe=recipe,
        distances=distances,
        distance=name,
        parameters=count_parameters(denoiser_config(recipe)),
        samples=total_samples(with_end(recipe).train),
        pflop=training_flops(recipe) / 1e15,
        seconds=_seconds(recipe),
        residual=_residual(RunFolder(recipe.folder)),
        diverged=diverged,
    )


def _row(value: object) -> object:
    """Iterations of the exact budget, 7.83, stand in the row of those asked for, 8."""
    return round(value) if isinstance(value, float) else value


def _seconds(recipe: Recipe) -> float | None:
    marker = RunFolder(recipe.folder).checkpoint(total_samples(with_end(recipe).train)) / MARKER
    if not marker.exists():
        return None
    progress = read_sealed(marker, MarkerForm, "delete the checkpoint, and its time is left out")["progress"]
    return progress.get("seconds")


def _residual(folder: RunFolder) -> float | None:
    """Relative, of the last iteration: the mean of those steps that drew most iterations, in the log's last half."""
    lines = [line for line in read_log(folder.log) if line.get("residual") is not None]
    by_count: dict[int, list[float]] = {}
    for line in lines[len(lines) // 2 :]:
        by_count.setdefault(line["no_grad_iterations"] + line["grad_iterations"], []).append(line["residual"])
    return fmean(by_count[max(by_count)]) if by_count else None


def _before_sampling(recipe: Recipe) -> list[Stage]:
    return [stage for stage in select(recipe, None) if stage.name in MADE]
