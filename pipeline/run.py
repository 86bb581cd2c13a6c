# PYTHON_ARGCOMPLETE_OK
"""Runs a whole recipe, each stage a submitit job: compose (the demo's), autoencoder (where vae.training is set),
encode, train, sample, evaluate, report.

  python pipeline/run.py --config recipes/demo.yaml
  python pipeline/run.py --config recipes/demo.yaml --cluster slurm train.total_samples=100000
  python pipeline/run.py --config recipes/demo.yaml --detach           # submits all to SLURM and returns
  python pipeline/run.py --config recipes/demo.yaml --render kueue     # prints the same chain as YAML: docs/cluster.md

Run it again to go on: finished stages are recognised and skipped.
"""

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from common.command import (
    add_force_option,
    argument_parser,
    ended_by_signals,
    exit_status_of,
    show_recipe,
    unless_forced,
)
from common.errors import Refused, UserError
from common.recipe import Recipe
from common.run_folder import RunFolder

if TYPE_CHECKING:
    from common.stage import Stage


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--cluster",
        metavar="local|debug|slurm|auto",
        help="where jobs run: this machine (local), this process, SLURM, or SLURM where it answers",
    )
    parser.add_argument("--stages", metavar="NAME,NAME", help="only these, such as sample,evaluate,report")
    parser.add_argument(
        "--detach", action="store_true", help="submit all stages to SLURM, each after the one before it, and return"
    )
    parser.add_argument(
        "--snapshot",
        action="store_true",
        help="with --detach: jobs run the code as it is now, copied to the run folder",
    )
    parser.add_argument("--render", metavar="skypilot|kueue", help="print all stages as YAML for that engine")
    parser.add_argument("--step", metavar="NAME[:PART]", help="the work of one job, in this process: what YAML calls")
    add_force_option(parser)
    arguments = parser.parse_intermixed_args()

    from common.loading import load_recipe
    from common.stage_checks import check_stages
    from pipeline.stages import select
    from slurm.cluster import resolve

    recipe = load_recipe(arguments.config, arguments.overrides)
    stages = select(recipe, arguments.stages)
    refuse_options(arguments)
    if arguments.render:
        print(rendered(recipe, stages, arguments), end="")
        return
    if arguments.step:
        run_step(recipe, stages, arguments.step)
        return
    if arguments.detach:
        with unless_forced(arguments):
            check_stages(recipe, stages, "slurm", fetches=not arguments.dry_run)
        detach(recipe, stages, arguments)
        return
    try:
        cluster = resolve(arguments.cluster or "local")
    except ValueError as error:
        raise UserError(str(error)) from None
    if arguments.dry_run:
        show_recipe(recipe, arguments)
        show_plan(recipe, stages, cluster)
        return
    with unless_forced(arguments):
        check_stages(recipe, stages, cluster)
    with ended_by_signals():
        run_all(recipe, stages, cluster)
    say_where(recipe)


def refuse_options(arguments: argparse.Namespace) -> None:
    """Raises UserError for options that do not go together."""
    if arguments.snapshot and not arguments.detach:
        raise UserError("--snapshot: without --detach stages start at once; leave it out, or add --detach")
    if arguments.force and arguments.dry_run:
        raise UserError("--force: with --dry-run no jobs are started; leave it out")
    if arguments.detach and arguments.cluster in ("local", "debug"):
        raise UserError(f"--detach: submits to SLURM, and --cluster is {arguments.cluster}; leave one of the two out")
    for name in ("render", "step"):
        others = ("cluster", "detach", "force", "dry_run", "render" if name == "step" else "step")
        given = [f"--{other.replace('_', '-')}" for other in others if getattr(arguments, other)]
        if getattr(arguments, name) is not None and given:
            raise UserError(f"--{name}: it starts no jobs, and does not go with {', '.join(given)}; leave one out")


def rendered(recipe: Recipe, stages: list["Stage"], arguments: argparse.Namespace) -> str:
    from pipeline.orchestration.other_engines import render
    from slurm.site_file import load_site

    root = Path(__file__).resolve().parents[1]
    config = arguments.config.resolve()
    if not config.is_relative_to(root):
        raise UserError(f"--config: {arguments.config} is outside of the clone, {root}, which jobs see; copy it there")
    words = ("--config", str(config.relative_to(root)), *arguments.overrides)
    try:
        return render(arguments.render, recipe, stages, words, load_site())
    except ValueError as error:
        raise UserError(str(error)) from None


def run_step(recipe: Recipe, stages: list["Stage"], asked: str) -> None:
    """The work of one job of a step, such as `encode:3` of an array, in this process or its ranks."""
    from common.stage_jobs import plain_steps

    name, _, part = asked.partition(":")
    jobs = {step.name: step.jobs for stage in stages for step in plain_steps(recipe, stage)}
    allowed = [f"{step}:0 to {len(of) - 1}" if len(of) > 1 else step for step, of in jobs.items()]
    number = int(part) if part.isdecimal() else 0
    if name not in jobs or number >= len(jobs[name]) or bool(part) != (len(jobs[name]) > 1):
        raise UserError(f"--step: found {asked!r}; allowed: {', '.join(allowed)}")
    jobs[name][number].work()


def show_plan(recipe: Recipe, stages: list["Stage"], cluster: str) -> None:
    """What the run will do and take. Raises Refused with all that jobs would refuse, after the rest is said."""
    from common.stage_checks import check_stages
    from pipeline.planning.page import plan_page

    refusal = None
    try:
        check_stages(recipe, stages, cluster, fetches=False)
    except Refused as faults:
        refusal = faults
    for line in plan_page(recipe, stages, cluster, measure=refusal is None):
        print(f"plan: {line}", flush=True)
    if refusal:
        raise refusal


def run_all(recipe: Recipe, stages: list["Stage"], cluster: str) -> None:
    """Runs the stages in turn. Of each a line stays; their jobs' own output is in the run's logs."""
    from common.stage_jobs import run_in_jobs
    from pipeline.planning.progress import TimeLeft, status_line

    left: TimeLeft | None = None
    for number, stage in enumerate(stages, 1):
        title = f"[{number}/{len(stages)}] {stage.name}"
        if stage.is_finished(recipe):
            print(f"{title}: finished before, skipped", flush=True)
            continue
        left = left or TimeLeft(recipe, stages[number - 1 :], cluster)
        left.begin(stage.name)
        with status_line(title, left) as show:
            seconds = run_in_jobs(recipe, stage, cluster, show=show)
        print(f"{title}: done in {seconds:.0f} s, {stage.place(recipe)}{left.after()}", flush=True)


def detach(recipe: Recipe, stages: list["Stage"], arguments: argparse.Namespace) -> None:
    from pipeline.orchestration.code_snapshot import take_snapshot
    from pipeline.orchestration.slurm_chain import describe, submission_scripts, submit_chain

    if arguments.dry_run:
        code = Path("<snapshot>") if arguments.snapshot else None
        scripts = list(submission_scripts(recipe, stages, code))
        print("\n".join(scripts or describe(RunFolder(recipe.folder), [])))
        return
    folder = RunFolder(recipe.folder)
    code = take_snapshot(folder.code) if arguments.snapshot else None
    print("\n".join(describe(folder, submit_chain(recipe, stages, code))), flush=True)


def say_where(recipe: Recipe) -> None:
    """The last lines of a run: where the results lie, and what to do next."""
    from common.recipe.training import PAPER_SAMPLES
    from pipeline.evaluation.evaluate import read_metrics

    folder = RunFolder(recipe.folder)
    print(f"\nreport:  {folder.report}\nimages:  {folder.contact_sheet}\nnumbers: {folder.metrics}")
    if folder.metrics.exists():
        first = read_metrics(folder)["measurements"][0]
        print(f"         {first['distance']} = {first['value']:.2f}: {first['label']}")
    settings = {name: getattr(recipe.train, name) for name in ("total_samples", "epochs", "max_pflops", "max_hours")}
    if not (settings["total_samples"] or settings["epochs"]):
        settings["total_samples"] = PAPER_SAMPLES
    ends = (f"train.{name}={4 * value}" for name, value in settings.items() if value is not None)
    longer = (f"name={recipe.name}-longer", *ends)
    command = shlex.join([os.path.relpath(sys.executable), *sys.argv, *longer])
    print(f"\nnext: train four times as long, beside this run:\n  {command}")


if __name__ == "__main__":
    sys.exit(exit_status_of(main))
