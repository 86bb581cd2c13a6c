"""Dry-run plan of all stages."""

from collections.abc import Sequence

from common.recipe import Recipe, describe_network
from common.stage import Stage
from common.stage_jobs import Step, steps


def plan(recipe: Recipe, stages: Sequence[Stage], cluster: str) -> list[str]:
    """A line for each step, and the exact size of the network."""
    lines = [describe_network(recipe)]
    for stage in stages:
        if stage.is_finished(recipe):
            lines.append(f"{stage.name}: finished")
        else:
            lines += [f"{_described(step)}, --cluster {cluster}" for step in steps(recipe, stage, cluster)]
    return [*lines, f"run folder: {recipe.folder}"]


def _described(step: Step) -> str:
    asked, count = step.resources, len(step.jobs)
    jobs = f"{count} jobs of " if count > 1 else ""
    gpus = f", {asked.gpus_per_process} GPUs each" if asked.gpus_per_process else ""
    return f"{step.name}: {jobs}{asked.nodes} x {asked.processes} processes{gpus}"
