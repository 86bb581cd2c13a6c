"""A stage as submitit jobs: what each calls and asks for, and waiting for them."""

import importlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from common.errors import UserError
from common.jobs import Job, failed
from common.ranks import own_cores
from common.recipe import Launch, Recipe
from common.run_folder import RunFolder
from common.stage import Stage
from common.stage_times import write_time
from slurm.cluster import Resources, executor, run_array


@dataclass(frozen=True)
class Step:
    """Jobs that can run at the same time, and what each asks for. The jobs of the next step come after all of them."""

    name: str
    jobs: Sequence[Job]
    resources: Resources


def steps(recipe: Recipe, stage: Stage, parts: int, *, timed: bool = True) -> list[Step]:
    """One job of the work; or `parts` jobs of one process each, if the stage has parts, with `first` and `merge`.

    `timed`: the jobs write the stage's time, as a run's do.
    """
    launch = recipe.launch
    one, all_cores = _resources(launch, 1, 1), _all_cores(launch)
    if stage.part is None or parts == 1:
        asked = _resources(launch, launch.nodes, launch.processes) if stage.all_processes else all_cores
        return [Step(stage.name, [_job(recipe, stage, stage.work, timed=timed)], asked)]
    array = [
        _job(recipe, stage, stage.part, timed=timed and part == 0, part=part, parts=parts) for part in range(parts)
    ]
    planned = [Step(stage.name, array, one)]
    if stage.first:
        planned.insert(0, Step(f"{stage.name}-first", [_job(recipe, stage, stage.first)], one))
    if stage.merge:
        asked = all_cores if stage.merge_needs_all_cores else one
        planned.append(Step(f"{stage.name}-merge", [_job(recipe, stage, stage.merge)], asked))
    return planned


def run_in_jobs(recipe: Recipe, stage: Stage, cluster: str, parts: int, *, timed: bool = True) -> float:
    """Submits the jobs of a stage and waits for them. Returns the seconds that they took; `timed`: see `steps`.

    What the stage downloads is fetched here, because compute nodes often have no internet.

    Raises UserError with the message of the first job that failed.
    """
    planned = steps(recipe, stage, parts, timed=timed)
    if stage.fetch is not None:
        stage.fetch(recipe)
    return sum(_run_step(recipe, step, cluster) for step in planned)


def run_job(
    recipe: Recipe, *, resolve: str, call: str, stage: str, timed: bool = False, part: int = 0, parts: int = 1
) -> None:
    """The work of a job: `call(resolve(recipe))`, or `call(resolve(recipe), part, parts)` of several parts.

    Where it is `timed`, rank 0 writes down how long it took.
    """
    started = time.monotonic()
    resolved = _imported(resolve)(recipe)
    _imported(call)(resolved, *((part, parts) if parts > 1 else ()))
    if timed and os.environ.get("RANK", "0") == "0":
        write_time(RunFolder(recipe.folder), stage, round(time.monotonic() - started, 1))


def _job(recipe: Recipe, stage: Stage, function: Callable[..., Any], **arguments: Any) -> Job:
    names = {"resolve": _name(stage.resolve), "call": _name(function), "stage": stage.name}
    return Job.of(__name__, run_job.__name__, recipe, **names, **arguments)


def _name(function: Callable[..., Any]) -> str:
    return f"{function.__module__}:{function.__qualname__}"


def _imported(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def _run_step(recipe: Recipe, step: Step, cluster: str) -> float:
    launch = recipe.launch
    try:
        logs = RunFolder(recipe.folder).step_logs(step.name)
        queue = executor(cluster, logs, f"{recipe.name}-{step.name}", step.resources)
        here = 1 if launch.gpus_per_process else max(1, own_cores() // launch.cpus_per_process)
        at_once = len(step.jobs) if queue.cluster == "slurm" else here
        outcomes = run_array(queue, step.jobs, at_once=at_once, failed=failed)
    except ValueError as error:
        raise UserError(str(error)) from None
    for outcome in outcomes:
        if failed(outcome):
            raise UserError(outcome["error"])
    return max(outcome["seconds"] for outcome in outcomes)


def _all_cores(launch: Launch) -> Resources:
    """One process with the cores that all processes of a node have together."""
    one = _resources(launch, 1, 1)
    return replace(one, cpus_per_process=launch.processes * one.cpus_per_process, share_of_node=1.0)


def _resources(launch: Launch, nodes: int, processes: int) -> Resources:
    return Resources(
        nodes=nodes,
        processes=processes,
        cpus_per_process=launch.cpus_per_process,
        gpus_per_process=launch.gpus_per_process,
        share_of_node=processes / launch.processes,
        timeout_minutes=launch.timeout_minutes,
        signal_seconds=launch.signal_seconds,
    )
