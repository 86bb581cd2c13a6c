"""Runs a stage as an array of independent jobs."""

from common.errors import UserError
from common.ranks import own_cores
from common.recipe import Recipe


def run_parts(recipe: Recipe, cluster: str, name: str, module: str, function: str, parts: int | None = None) -> None:
    """Runs `module.function(recipe, part, parts)` for every part, each a job; without `parts`, one job of
    `module.function(recipe)`. Raises UserError with the message of the first job that failed.
    """
    from common.jobs import Job, failed
    from slurm.cluster import Resources, executor, run_array

    launch = recipe.launch
    resources = Resources(
        cpus_per_process=launch.cpus_per_process,
        gpus_per_process=min(1, launch.gpus_per_process),
        share_of_node=1 / launch.processes,
        timeout_minutes=launch.timeout_minutes,
    )
    try:
        submitter = executor(cluster, recipe.folder / "logs" / name, name, resources)
    except ValueError as error:
        raise UserError(str(error)) from None
    if parts is None:
        calls = [Job.of(module, function, recipe)]
    else:
        calls = [Job.of(module, function, recipe, part=part, parts=parts) for part in range(parts)]
    here = 1 if launch.gpus_per_process else max(1, own_cores() // launch.cpus_per_process)
    outcomes = run_array(submitter, calls, at_once=len(calls) if submitter.cluster == "slurm" else here, failed=failed)
    for outcome in outcomes:
        if failed(outcome):
            raise UserError(outcome["error"])
