"""A run as SLURM jobs that wait for one another; nobody has to wait for them.

`jobs.json` in the run folder lists what was submitted. A job that is still on its way is never submitted again.
"""

import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import submitit

from common.errors import UserError
from common.files import content_key, folder_lock
from common.job_listing import ListingForm
from common.loading import dump_recipe
from common.recipe import Recipe
from common.run_folder import RunFolder
from common.sealed import read_sealed, write_sealed
from common.stage import Stage
from common.stage_jobs import Step, steps
from slurm import cluster, controller

ENDING_SECONDS = 120  # a cancelled training saves first


@dataclass(frozen=True)
class Submitted:
    """A job, or an array of `parts` jobs, as `jobs.json` lists it and `slurm/status.py` reads it."""

    step: str
    job: str
    parts: int
    after: str | None
    logs: str  # folder
    recipe: str  # key of the recipe it works on
    time: float


def submit_chain(recipe: Recipe, stages: Sequence[Stage], code: Path | None) -> list[Submitted]:
    """Submits the steps that are neither finished nor on their way, each after the one before it, and the first after
    this run's jobs of other stages.

    Returns all jobs that are now on their way. Raises UserError where SLURM refuses one (those before it stay, and the
    same call goes on from there), and where jobs of another recipe are at work in the run folder.
    """
    folder = RunFolder(recipe.folder)
    with folder_lock(folder.logs):
        listed = listed_jobs(folder)
        alive = _alive(listed)
        key = content_key(dump_recipe(recipe))
        _refuse_another_recipe(folder, alive, key)
        on_their_way: list[Submitted] = []
        asked = {step.name for stage in stages for step in steps(recipe, stage, "slurm")}
        others = [one.job for one in listed if one.step not in asked and alive.get(one.step) == one]
        previous = others[-1] if others else None
        for step in _to_do(recipe, stages, alive):
            if step.name not in alive:
                alive[step.name] = _submit(recipe, step, previous, code, key)
                listed.append(alive[step.name])
                write_sealed(folder.jobs, {"jobs": [asdict(one) for one in listed]})
            on_their_way.append(alive[step.name])
            previous = alive[step.name].job
        return on_their_way


def submission_scripts(recipe: Recipe, stages: Sequence[Stage], code: Path | None) -> Iterator[str]:
    """What `submit_chain` would give to sbatch; ids of jobs that are not submitted yet are shown as names."""
    after = None
    for step in _to_do(recipe, stages, {}):
        queue = _executor(recipe, step, after, code, submits=False)
        script = cluster.submission_script(queue, len(step.jobs), step.at_once)
        yield f"# ---- {step.name}: {len(step.jobs)} job(s)\n{script}"
        after = f"<{step.name}>"


def listed_jobs(folder: RunFolder) -> list[Submitted]:
    """All that were ever submitted. Raises UserError where the file is damaged."""
    if not folder.jobs.exists():
        return []
    listing = read_sealed(folder.jobs, ListingForm, "end this run's jobs (squeue --me shows them), and delete it")
    return [Submitted(**entry) for entry in listing["jobs"]]


def describe(folder: RunFolder, jobs: Sequence[Submitted]) -> list[str]:
    """How to watch, stop and continue."""
    if not jobs:
        return [f"{folder.path}: every stage is finished; nothing to submit"]
    lines = [
        f"{one.step:14} job {one.job}{f'_[0-{one.parts - 1}]' if one.parts > 1 else '':8}"
        + (f" after {one.after}" if one.after else "")
        for one in jobs
    ]
    ids = " ".join(one.job for one in jobs)
    return [
        *lines,
        f"logs:     {folder.logs}/<step>/<job>_0_log.out",
        f"watch:    python slurm/status.py {folder.path}",
        f"stop:     scancel {ids}",
        "continue: the same command again; it submits only what is neither finished nor on its way",
    ]


def _to_do(recipe: Recipe, stages: Sequence[Stage], alive: dict[str, Submitted]) -> list[Step]:
    """The steps from the first that is on its way, or else from the first that is not finished."""
    planned = [(step, stage) for stage in stages for step in steps(recipe, stage, "slurm")]
    here = {step.name for step, _ in planned} & alive.keys()
    for number, (step, stage) in enumerate(planned):
        if step.name in here or (not here and not stage.is_finished(recipe)):
            return [step for step, _ in planned[number:]]
    return []


def _alive(listed: Sequence[Submitted]) -> dict[str, Submitted]:
    """Maps step to its queued or running job, excluding jobs whose dependency failed.

    Waits for those that are just ending: only then is it known how. A job that the controller has forgotten ended long
    ago. Raises UserError where some of an array have failed and others are still at work.
    """
    patience = time.monotonic() + ENDING_SECONDS
    while True:
        try:
            states = controller.states(one.job for one in listed)
        except (OSError, subprocess.SubprocessError) as error:
            raise UserError(f"cluster: slurm does not say which jobs are on their way ({error}); try again") from None
        ending = [job_id for job_id, state in states.items() if state == "COMPLETING"]
        if not ending:
            break
        if time.monotonic() > patience:
            raise UserError(f"jobs {', '.join(ending)} have been ending for a while; try again when they have ended")
        time.sleep(2)
    living: set[str] = set()
    lost: set[str] = set()
    for job_id, state in states.items():
        if state != "COMPLETED":
            (lost if state in controller.OVER else living).add(job_id.partition("_")[0])
    for one in listed:  # in the order of their submission
        if one.job in lost & living:
            raise UserError(
                f"{one.step}: some of the jobs of array {one.job} have failed or were cancelled, others are at work; "
                f"try again when they have ended, or end them (scancel {one.job})"
            )
        if one.after in lost:
            lost.add(one.job)
    return {one.step: one for one in listed if one.job in living - lost}


def _refuse_another_recipe(folder: RunFolder, alive: dict[str, Submitted], key: str) -> None:
    others = [one.job for one in alive.values() if one.recipe != key]
    if others:
        raise UserError(
            f"{folder.path}: jobs of another recipe are on their way in it: {', '.join(others)}; wait for them, end "
            f"them (scancel {' '.join(others)}), or choose another name"
        )


def _executor(
    recipe: Recipe, step: Step, after: str | None, code: Path | None, *, submits: bool = True
) -> submitit.AutoExecutor:
    folder, name = RunFolder(recipe.folder).step_logs(step.name), f"{recipe.name}-{step.name}"
    try:
        return cluster.executor("slurm", folder, name, step.resources, after=after, code=code, submits=submits)
    except ValueError as error:
        raise UserError(str(error)) from None


def _submit(recipe: Recipe, step: Step, after: str | None, code: Path | None, key: str) -> Submitted:
    queue = _executor(recipe, step, after, code)
    try:
        jobs = cluster.submit(queue, step.jobs, at_once=step.at_once)
    except ValueError as error:
        raise UserError(f"{step.name}: {error}") from None
    job = jobs[0].job_id.partition("_")[0]
    return Submitted(step.name, job, len(jobs), after, str(queue.folder), key, round(time.time(), 1))
