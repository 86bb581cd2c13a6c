"""Dry-run plan and pre-flight checks of all stages."""

from collections.abc import Sequence

from common.errors import UserError
from common.recipe import Launch, Recipe, describe_network
from common.run_folder import RunFolder
from common.stage import Stage
from common.stage_jobs import steps
from slurm.cluster import refuse


def parts_on(launch: Launch, cluster: str) -> int:
    """Into how many jobs a stage is split. On one machine they would wait for the same cores and GPUs."""
    return launch.jobs if cluster == "slurm" else 1


def check_stages(recipe: Recipe, stages: Sequence[Stage], cluster: str) -> None:
    """Raises UserError for the first fault of the stages that are not finished; `cluster` is resolved."""
    for stage in stages:
        if stage.is_finished(recipe):
            continue
        try:
            for step in steps(recipe, stage, parts_on(recipe.launch, cluster)):
                refuse(cluster, RunFolder(recipe.folder).step_logs(step.name), step.resources)
        except ValueError as error:
            raise UserError(str(error)) from None
        stage.check(recipe, cluster)


def plan(recipe: Recipe, stages: Sequence[Stage], cluster: str) -> list[str]:
    """One line a stage, and the exact size of the network."""
    lines = [describe_network(recipe)]
    for stage in stages:
        if stage.is_finished(recipe):
            lines.append(f"{stage.name}: finished")
            continue
        for step in steps(recipe, stage, parts_on(recipe.launch, cluster)):
            jobs = f"{len(step.jobs)} jobs of " if len(step.jobs) > 1 else ""
            asked = f"{step.resources.nodes} x {step.resources.processes} processes"
            lines.append(f"{step.name}: {jobs}{asked}, --cluster {cluster}")
    return [*lines, f"run folder: {recipe.folder}"]
