"""A run whose stages are waited for, one after another."""

from common.errors import UserError
from common.jobs import failed
from common.recipe import Recipe, describe_network
from pipeline.orchestration.stages import Stage, steps
from slurm.cluster import executor, run_array


def plan(recipe: Recipe, stages: list[Stage], cluster: str) -> list[str]:
    """One line a stage, and the exact size of the network."""
    lines = [describe_network(recipe)]
    for stage in stages:
        if stage.finished(recipe):
            lines.append(f"{stage.name}: finished")
            continue
        for step in steps(recipe, stage, cluster):
            jobs = f"{len(step.jobs)} jobs of " if len(step.jobs) > 1 else ""
            asked = f"{step.resources.nodes} x {step.resources.processes} processes"
            lines.append(f"{step.name}: {jobs}{asked}, --cluster {cluster}")
    return [*lines, f"run folder: {recipe.folder}"]


def run_stage(stage: Stage, recipe: Recipe, cluster: str, title: str) -> None:
    """Submits one stage, several jobs where it has parts, and waits for them.

    Raises UserError with the stage's own message.
    """
    if stage.finished(recipe):
        print(f"{title}: finished before, skipped", flush=True)
        return
    print(f"{title} ...", flush=True)
    seconds = 0.0
    for step in steps(recipe, stage, cluster):
        folder = recipe.folder / "logs" / step.name
        try:
            made = executor(cluster, folder, f"{recipe.name}-{step.name}", step.resources)
            outcomes = run_array(made, step.jobs, at_once=len(step.jobs), failed=failed)
        except ValueError as error:
            raise UserError(str(error)) from None
        for outcome in outcomes:
            if "error" in outcome:
                raise UserError(outcome["error"])
        seconds += max(outcome["seconds"] for outcome in outcomes)
    print(f"{title}: done in {seconds:.0f} s", flush=True)
