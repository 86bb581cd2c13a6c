"""What is checked before any job is submitted: what stages ask for, their settings, and what they read."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from subprocess import SubprocessError
from typing import Any

from common.errors import NoDataYet, Refused, UserError
from common.files import not_writable
from common.recipe import Recipe
from common.run_folder import RunFolder
from common.stage import Stage
from common.stage_jobs import steps
from slurm import controller
from slurm.cluster import refuse

# The fields that say where stages write; the others write into the run's folder.
PLACES = {"compose": "data.images", "autoencoder": "vae.path", "encode": "data.shards"}


def check_stages(
    recipe: Recipe, stages: Sequence[Stage], cluster: str, jobs: int | None = None, *, fetches: bool = True
) -> None:
    """Checks every stage that is not finished. What another of them will make is not looked for.

    Downloads what the stages need, since compute nodes often have no internet.

    Args:
        cluster: resolved.
        jobs: into how many a stage is divided, where it is not what the recipe says.
        fetches: False: nothing is downloaded.

    Raises Refused with all faults at once.
    """
    found: list[str] = []
    to_do: set[str] = set()
    for stage in stages:
        with _noting(found):
            _check(recipe, stage, cluster, jobs, fetches, to_do, found)
    if found:
        raise Refused(list(dict.fromkeys(found)))


def _check(
    recipe: Recipe, stage: Stage, cluster: str, jobs: int | None, fetches: bool, to_do: set[str], found: list[str]
) -> None:
    resolved = _resolved(recipe, stage, bool(to_do & {"compose", "encode"}))
    if stage.finished(resolved):
        return
    to_do.add(stage.name)
    place = Path(str(stage.place(recipe)))
    if fault := not_writable(place.parent if stage.name not in PLACES and place.is_file() else place):
        found.append(f"{PLACES.get(stage.name, 'runs')}: {fault}; name another folder")
    for step in steps(recipe, stage, cluster, jobs):
        with _noting(found):
            refuse(cluster, RunFolder(recipe.folder).step_logs(step.name), step.resources)
        with _noting(found):
            _refuse_long_array(step.name, len(step.jobs), cluster)
    with _noting(found):
        stage.check(recipe, cluster)
    if fetches and stage.fetch is not None:
        with _noting(found):
            stage.fetch(recipe)
    for each in stage.inputs:
        if not to_do & set(each.made_by):
            with _noting(found):
                looked = each.look(resolved)
                if isinstance(looked, Iterator):
                    list(looked)


def _resolved(recipe: Recipe, stage: Stage, data_follow: bool) -> Any:
    """As the stage resolves it. What waits for data that a stage before will make has a value that refuses nothing."""
    try:
        return stage.resolve(recipe)
    except NoDataYet:
        if not data_follow:
            raise
        model = recipe.model if recipe.model.num_classes else replace(recipe.model, num_classes=2)
        train = replace(recipe.train, epochs=None, total_samples=1) if recipe.train.epochs else recipe.train
        return stage.resolve(replace(recipe, model=model, train=train))


@contextmanager
def _noting(found: list[str]) -> Iterator[None]:
    try:
        yield
    except (UserError, ValueError) as fault:
        found.append(str(fault))


def _refuse_long_array(step: str, jobs: int, cluster: str) -> None:
    longest = None
    if cluster == "slurm" and jobs > 1:
        with suppress(OSError, SubprocessError):  # a dry run on a machine without SLURM
            longest = controller.longest_array()
    if longest is not None and jobs > longest:
        raise UserError(
            f"launch.jobs: {jobs:,} jobs of {step}, and an array of this cluster has at most {longest:,} "
            f"(MaxArraySize of scontrol show config); set launch.stages.{step}.jobs to {longest} or fewer"
        )
