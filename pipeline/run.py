"""Runs a whole recipe, each stage a submitit job: compose (demo only), encode, train, sample, evaluate, report.

  python pipeline/run.py --config recipes/demo.yaml
  python pipeline/run.py --config recipes/demo.yaml --cluster slurm train.total_samples=100000

Run it again to go on: finished stages are recognised and skipped.
"""

import os
import shlex
import signal
import sys
from typing import TYPE_CHECKING

from common.command import argument_parser, guarded
from common.errors import UserError
from common.recipe import Recipe

if TYPE_CHECKING:
    from pipeline.stages import Stage


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--cluster",
        default="local",
        metavar="local|debug|slurm|auto",
        help="where jobs run: this machine, this process, SLURM, or SLURM where it answers",
    )
    arguments = parser.parse_intermixed_args()

    from common.loading import dump_recipe, load_recipe
    from pipeline.stages import STAGES

    recipe = load_recipe(arguments.config, arguments.overrides)
    stages = [stage for stage in STAGES if stage.wanted(recipe)]
    if arguments.dry_run:
        print(dump_recipe(recipe))
        print("\n".join(f"plan: {line}" for line in plan(recipe, stages, arguments.cluster)))
        return
    # Ending this process must end the job it waits for, which lives in processes of its own.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    for number, stage in enumerate(stages, 1):
        run_stage(stage, recipe, arguments.cluster, f"[{number}/{len(stages)}] {stage.name}")
    say_where(recipe)


def plan(recipe: Recipe, stages: list["Stage"], cluster: str) -> list[str]:
    """One line a stage, and the exact size of the network."""
    from common.recipe import describe_network

    lines = [describe_network(recipe)]
    for stage in stages:
        asked = stage.resources(recipe)
        state = (
            "finished"
            if stage.finished(recipe)
            else f"{asked.nodes} x {asked.processes} processes, --cluster {cluster}"
        )
        lines.append(f"{stage.name}: {state}")
    return [*lines, f"run folder: {recipe.folder}"]


def run_stage(stage: "Stage", recipe: Recipe, cluster: str, title: str) -> None:
    """Submits one stage and waits for it. Raises UserError with the stage's own message."""
    from common.jobs import Job, failed
    from pipeline.stages import keep_time
    from slurm import cluster as slurm

    if stage.finished(recipe):
        print(f"{title}: finished before, skipped", flush=True)
        return
    print(f"{title} ...", flush=True)
    try:
        executor = slurm.executor(cluster, recipe.folder / "logs" / stage.name, stage.name, stage.resources(recipe))
    except ValueError as error:
        raise UserError(str(error)) from None
    outcomes = slurm.run(executor, Job.of(stage.module, stage.function, recipe), failed=failed)
    for outcome in outcomes:
        if "error" in outcome:
            raise UserError(outcome["error"])
    seconds = max(outcome["seconds"] for outcome in outcomes)
    keep_time(recipe, stage, seconds)
    print(f"{title}: done in {seconds:.0f} s", flush=True)


def say_where(recipe: Recipe) -> None:
    """The last lines of a run: where the results lie, and what to do next."""
    folder = recipe.folder
    print(
        f"\nreport:   {folder / 'report.html'}\npictures: {folder / 'samples.png'}\nnumbers:  {folder / 'metrics.json'}"
    )
    longer = (f"name={recipe.name}-longer", f"train.total_samples={4 * recipe.train.total_samples}")
    command = shlex.join([os.path.relpath(sys.executable), *sys.argv, *longer])
    print(f"\nnext: train four times as long, beside this run:\n  {command}")


if __name__ == "__main__":
    sys.exit(guarded(main))
