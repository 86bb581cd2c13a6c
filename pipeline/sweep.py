"""Compares ways of sampling at equal cost: the distance against blocks a picture, as a table and a picture.

  python pipeline/sweep.py --config recipes/demo.yaml sweep.budgets='[70,140,280]' sweep.iterations='[2,5]'
  python pipeline/sweep.py --config recipes/imagenet256_paper.yaml sweep.sampler='[ddpm,ddim]' --cluster slurm --jobs 6

Every combination of the recipe's `sweep` section is drawn and measured. Run it again to go on: finished points are
kept, and so are those of an earlier sweep. The report shows the table and the picture.
"""

import sys
from collections.abc import Iterator

from common.command import run_command
from common.errors import UserError
from common.parts import run_parts
from common.recipe import Recipe


def plan(recipe: Recipe) -> Iterator[str]:
    """The points, which of them are measured, and what is no point."""
    from pipeline.evaluation.sweep import measured, points

    found, left_out = points(recipe)
    for point, made in found.items():
        there = measured(made)
        state = f"{there['distance']} = {there['value']:.2f}" if there else "to be measured"
        iterations = f" x {point.iterations:g} iterations ({point.allocation}, reuse {point.reuse})"
        how = f"{point.sampler}, {point.num_steps} steps{iterations if point.iterations else ''}"
        yield f"{point.blocks} blocks: {how}, guidance {point.guidance_scale:g}: {state}"
    yield from (f"left out: {reason}" for reason in left_out)


def sweep(recipe: Recipe, part: int = 0, parts: int = 1) -> None:
    """Measures this part's points; the table holds what is measured so far."""
    from pipeline.evaluation.sweep import measure_point, points, write_tables

    for made in list(points(recipe)[0].values())[part::parts]:
        measure_point(made)
        write_tables(recipe)


def measure_reference(recipe: Recipe) -> None:
    """Once, before many jobs would do it at the same time."""
    from pipeline.evaluation.measurements import Evaluation
    from pipeline.evaluation.sweep import points

    Evaluation(next(iter(points(recipe)[0].values()))).measure_reference()


def work(recipe: Recipe) -> None:
    from common.ranks import rank_and_world_size

    if rank_and_world_size()[1] > 1:
        raise UserError(
            "sweep.py is one process, not several ranks; --cluster with --jobs shares its points among jobs"
        )
    sweep(recipe)
    _say(recipe)


def in_jobs(recipe: Recipe, cluster: str, jobs: int) -> None:
    """An array of jobs over the points; then the table."""
    run_parts(recipe, cluster, "reference", "pipeline.sweep", "measure_reference")
    run_parts(recipe, cluster, "sweep", "pipeline.sweep", "sweep", jobs)
    _say(recipe)


def _say(recipe: Recipe) -> None:
    from pipeline.evaluation.sweep import write_tables

    write_tables(recipe)
    folder = recipe.folder / "sweep"
    print((folder / "table.md").read_text(encoding="utf-8"), end="")
    print(f"\ntable:   {folder / 'table.csv'}\npicture: {folder / 'distances.png'}")
    print("report:  python pipeline/report.py with the recipe shows both")


if __name__ == "__main__":
    sys.exit(run_command(__doc__, plan, work, in_jobs=in_jobs))
