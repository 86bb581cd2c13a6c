"""The stages of a run, in order, what each asks for, and the jobs that it is."""

import importlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import Field, with_config
from typing_extensions import TypedDict

from common.errors import UserError
from common.files import disk_faults_told
from common.jobs import Job
from common.recipe import Recipe
from common.sealed import STRICT, read_sealed, write_sealed
from slurm.cluster import Resources

TIMES = "stages.json"


@dataclass(frozen=True)
class Stage:
    """One stage: the module of its `function(recipe)` and `finished(recipe)`, and whether ranks share its work.

    `part`: the `module.function(recipe, part, parts)` that does one of `parts` independent parts of it, in any order,
    any number of times. `merge`: the `module.function(recipe)` that makes one whole of them.
    """

    name: str
    module: str
    function: str
    parallel: bool = False
    wanted: Callable[[Recipe], bool] = lambda _: True
    part: str | None = None
    merge: str | None = None
    merge_is_work: bool = False  # for the cores of all processes

    def finished(self, recipe: Recipe) -> bool:
        return importlib.import_module(self.module).finished(recipe)

    def resources(self, recipe: Recipe) -> Resources:
        """Parallel stages get all processes; the others one, with the cores of all."""
        if self.parallel:
            return _resources(recipe, recipe.launch.nodes, recipe.launch.processes)
        alone = _resources(recipe, 1, 1)
        return replace(alone, cpus_per_process=recipe.launch.processes * alone.cpus_per_process, share_of_node=1.0)


def _resources(recipe: Recipe, nodes: int, processes: int) -> Resources:
    launch = recipe.launch
    return Resources(
        nodes=nodes,
        processes=processes,
        cpus_per_process=launch.cpus_per_process,
        gpus_per_process=launch.gpus_per_process,
        share_of_node=processes / launch.processes,
        timeout_minutes=launch.timeout_minutes,
        signal_seconds=launch.signal_seconds,
    )


STAGES = (
    Stage("compose", "preprocess.demo_pictures", "compose", wanted=lambda recipe: recipe.demo is not None),
    Stage(
        "encode",
        "preprocess.encode_latents",
        "encode",
        part="preprocess.encoding.encoding.encode_part",
        merge="preprocess.encode_latents.merge",
    ),
    Stage("train", "pipeline.training.stage", "train", parallel=True),
    Stage("sample", "pipeline.sampling.samples", "sample", parallel=True, part="pipeline.sampling.samples.sample"),
    Stage(
        "evaluate",
        "pipeline.eval_fid",
        "evaluate",
        part="pipeline.eval_fid.extract_part",
        merge="pipeline.eval_fid.evaluate",
        merge_is_work=True,
    ),
    Stage("report", "pipeline.report", "report"),
)


def select(recipe: Recipe, names: str | None) -> list[Stage]:
    """The stages that the recipe wants: all, or those of a comma-separated list. UserError names an unknown one."""
    wanted = [stage for stage in STAGES if stage.wanted(recipe)]
    if names is None:
        return wanted
    known = [stage.name for stage in wanted]
    for name in names.split(","):
        if name not in known:
            raise UserError(f"--stages: found {name!r}; allowed, separated by commas: {', '.join(known)}")
    return [stage for stage in wanted if stage.name in names.split(",")]


@dataclass(frozen=True)
class Step:
    """Jobs that may run at the same time, and what each asks for; those of the next step come after all of them."""

    name: str
    stage: Stage
    jobs: Sequence[Job]
    resources: Resources


def steps(recipe: Recipe, stage: Stage, cluster: str = "slurm") -> list[Step]:
    """One job, or on SLURM `launch.jobs` of one process each where the stage has parts, and what merges these.

    Elsewhere parts would wait for the same cores and GPUs.
    """
    parts = recipe.launch.jobs if cluster == "slurm" else 1
    if stage.part is None or parts == 1:
        job = _job(recipe, stage, f"{stage.module}.{stage.function}")
        return [Step(stage.name, stage, [job], stage.resources(recipe))]
    alone = _resources(recipe, 1, 1)
    jobs = [_job(recipe, stage, stage.part, part=part, parts=parts) for part in range(parts)]
    made = [Step(stage.name, stage, jobs, alone)]
    if stage.merge:
        job = _job(recipe, stage, stage.merge, timed=False)
        made.append(
            Step(f"{stage.name}-merge", stage, [job], stage.resources(recipe) if stage.merge_is_work else alone)
        )
    return made


def _job(recipe: Recipe, stage: Stage, function: str, **arguments: Any) -> Job:
    return Job.of(__name__, "work", recipe, stage=stage.name, call=function, **arguments)


def work(recipe: Recipe, *, stage: str, call: str, timed: bool = True, **arguments: int) -> None:
    """A job's work: `call(recipe, **arguments)`. The first that is `timed` notes how long it took, for the report."""
    module, _, name = call.rpartition(".")
    started = time.monotonic()
    getattr(importlib.import_module(module), name)(recipe, **arguments)
    first = os.environ.get("RANK", "0") == "0" and arguments.get("part", 0) == 0
    if first and timed:
        keep_time(recipe, stage, round(time.monotonic() - started, 1))


@with_config(STRICT)
class TimesForm(TypedDict):
    """`stages.json`: seconds by stage, of its last run."""

    seconds: dict[str, Annotated[float, Field(ge=0)]]


def keep_time(recipe: Recipe, stage: str, seconds: float) -> None:
    """Notes how long a stage took. Where it cannot be noted that is told, and fails no stage: it is finished."""
    times = read_times(recipe) | {stage: seconds}
    try:
        with disk_faults_told(recipe.folder / TIMES):
            write_sealed(recipe.folder / TIMES, {"seconds": times})
    except UserError as fault:
        print(f"warning: {fault}", file=sys.stderr, flush=True)


def read_times(recipe: Recipe) -> dict[str, float]:
    """Seconds by stage, in the order of the stages; none, with a warning, where the file is damaged."""
    path = recipe.folder / TIMES
    if not path.exists():
        return {}
    try:
        seconds = read_sealed(path, TimesForm, "the times of stages before are lost")["seconds"]
    except UserError as fault:
        print(f"warning: {fault}", file=sys.stderr, flush=True)
        return {}
    return {one.name: seconds[one.name] for one in STAGES if one.name in seconds}
