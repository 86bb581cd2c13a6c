"""A stage as submitit jobs: what each calls and asks for, and waiting for them."""

import importlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from common.errors import UserError
from common.jobs import Job, failed
from common.loading import dump_recipe
from common.provenance import COMMAND_VARIABLE, typed_command
from common.ranks import own_cores
from common.recipe import Launch, Recipe, launch_of, node_counts, own_launch
from common.recipe.launch import LIGHT
from common.run_folder import RunFolder
from common.stage import Stage
from common.stage_times import write_time
from slurm.cluster import Resources, executor, run_array
from slurm.waiting import Show

LIGHT_MINUTES = 60  # time limit of a light job


@dataclass(frozen=True)
class Step:
    """Jobs that can run at the same time, and what each asks for. The jobs of the next step come after all of them."""

    name: str
    jobs: Sequence[Job]
    resources: Resources
    at_once: int = 1  # how many of the jobs may run at the same time on SLURM


def steps(recipe: Recipe, stage: Stage, cluster: str, jobs: int | None = None, *, timed: bool = True) -> list[Step]:
    """One job of the work; or several jobs of one process each, if the stage has parts, with `first` and `merge`.

    Args:
        cluster: resolved.
        jobs: how many; without it as many as the recipe says on SLURM, and one on one machine, where several would
            wait for the same cores and GPUs.
        timed: the jobs write the stage's time, as a run's do.
    """
    launch = launch_of(recipe.launch, stage.name)
    parts = jobs or (launch.jobs if cluster == "slurm" else 1)
    for_work = replace(recipe, launch=replace(recipe.launch, cpus_per_process=launch.cpus_per_process))
    job = partial(_job, dump_recipe(for_work), stage)
    asked = partial(_resources, recipe.launch)
    own = own_launch(recipe.launch, stage.name)
    if stage.part is None or parts == 1:
        several = stage.all_processes or own.nodes or own.processes
        if stage.name == "train" and launch.elastic and cluster == "slurm":
            return [_elastic(recipe, job(stage.work, timed=timed), asked(stage.name, _all_processes))]
        share = _light if stage.name in LIGHT else _all_processes if several else _all_cores
        return [Step(stage.name, [job(stage.work, timed=timed)], asked(stage.name, share))]
    array = [job(stage.part, timed=timed and part == 0, part=part, parts=parts) for part in range(parts)]
    planned = [Step(stage.name, array, asked(stage.name, _one_process), min(parts, own.at_once or parts))]
    if stage.first:
        planned.insert(0, Step(f"{stage.name}-first", [job(stage.first)], asked(stage.name, _one_process)))
    if stage.merge:
        heavy = stage.merge_needs_all_cores(recipe)
        needed = asked(stage.name, _all_cores) if heavy else asked("merge", _light)
        planned.append(Step(f"{stage.name}-merge", [job(stage.merge)], needed))
    return planned


def plain_steps(recipe: Recipe, stage: Stage, cluster: str = "slurm") -> list[Step]:
    """As `steps`, with a task for each rank even of an elastic training: for other engines, and for looking around."""
    return steps(replace(recipe, launch=replace(recipe.launch, elastic=False)), stage, cluster)


def run_in_jobs(
    recipe: Recipe,
    stage: Stage,
    cluster: str,
    jobs: int | None = None,
    *,
    timed: bool = True,
    show: Show | None = None,
) -> float:
    """Submits the jobs of a stage and waits for them. Returns the seconds that they took. Arguments: as of `steps`.

    `show`: takes the lines of their output, which else are copied to this terminal.

    Raises UserError with the message of the first job that failed.
    """
    return sum(_run_step(recipe, step, cluster, show) for step in steps(recipe, stage, cluster, jobs, timed=timed))


def run_job(
    recipe: Recipe,
    *,
    resolve: str,
    call: str,
    stage: str,
    command: str = "",
    timed: bool = False,
    part: int = 0,
    parts: int = 1,
) -> None:
    """The work of a job: `call(resolve(recipe))`, or `call(resolve(recipe), part, parts)` of several parts.

    `command`: as typed, for provenance. Where it is `timed`, rank 0 writes down how long it took.
    """
    if command:
        os.environ[COMMAND_VARIABLE] = command
    started = time.monotonic()
    resolved = _imported(resolve)(recipe)
    _imported(call)(resolved, *((part, parts) if parts > 1 else ()))
    if timed and os.environ.get("RANK", "0") == "0":
        write_time(RunFolder(recipe.folder), stage, round(time.monotonic() - started, 1))


def _job(recipe: str, stage: Stage, function: Callable[..., Any], **arguments: Any) -> Job:
    names = {"resolve": _name(stage.resolve), "call": _name(function), "stage": stage.name, "command": typed_command()}
    return Job(__name__, run_job.__name__, recipe, names | arguments)


def _elastic(recipe: Recipe, job: Job, asked: Resources) -> Step:
    """One task a node, which starts the ranks there itself."""
    call = {"module": job.module, "function": job.function, "arguments": dict(job.arguments)}
    arguments = {"call": call, "processes": asked.processes, "node_counts": node_counts(recipe)}
    resources = replace(
        asked,
        processes=1,
        cpus_per_process=asked.processes * asked.cpus_per_process,
        gpus_per_process=asked.processes * asked.gpus_per_process,
        outlives_nodes=True,
    )
    return Step("train", [Job("common.elastic", "supervise", job.recipe, arguments)], resources)


def _name(function: Callable[..., Any]) -> str:
    return f"{function.__module__}:{function.__qualname__}"


def _imported(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def _run_step(recipe: Recipe, step: Step, cluster: str, show: Show | None) -> float:
    asked = step.resources
    try:
        logs = RunFolder(recipe.folder).step_logs(step.name)
        queue = executor(cluster, logs, f"{recipe.name}-{step.name}", asked)
        here = 1 if asked.gpus_per_process else max(1, own_cores() // asked.cpus_per_process)
        at_once = step.at_once if queue.cluster == "slurm" else here
        outcomes = run_array(queue, step.jobs, at_once=at_once, failed=failed, show=show)
    except ValueError as error:
        raise UserError(str(error)) from None
    for outcome in outcomes:
        if failed(outcome):
            raise UserError(outcome["error"])
    return max(outcome["seconds"] for outcome in outcomes)


def _all_processes(launch: Launch) -> Launch:
    return launch


def _one_process(launch: Launch) -> Launch:
    return replace(launch, nodes=1, processes=1)


def _all_cores(launch: Launch) -> Launch:
    """One process with the cores that all processes of a node have together."""
    return replace(launch, nodes=1, processes=1, cpus_per_process=launch.processes * launch.cpus_per_process)


def _light(launch: Launch) -> Launch:
    minutes = min(LIGHT_MINUTES, launch.timeout_minutes)
    return replace(_one_process(launch), cpus_per_process=1, gpus_per_process=0, timeout_minutes=minutes)


def _resources(launch: Launch, stage: str, share: Callable[[Launch], Launch]) -> Resources:
    """`share` of what the recipe says of all stages, with what it says of this one alone in place of that."""
    own, asked = own_launch(launch, stage), launch_of(share(launch), stage)
    light = share is _light
    cores_of_node, cores = launch.processes * launch.cpus_per_process, asked.processes * asked.cpus_per_process
    return Resources(
        nodes=asked.nodes,
        processes=asked.processes,
        cpus_per_process=asked.cpus_per_process,
        gpus_per_process=asked.gpus_per_process,
        gpu_type=own.gpu_type,
        without_gpus=light and not asked.gpus_per_process,
        partition=own.partition,
        memory_gb=own.memory_gb,
        share_of_node=min(1.0, cores / cores_of_node),
        timeout_minutes=asked.timeout_minutes,
        signal_seconds=min(asked.signal_seconds, 30 * asked.timeout_minutes) if light else asked.signal_seconds,
    )
