# PYTHON_ARGCOMPLETE_OK
"""Remakes the paper's tables: trains what is missing, samples, measures, and writes docs/results.md.

  python pipeline/reproduce.py --scale small                      # hours on two cores
  python pipeline/reproduce.py --scale small --only T1,T5 --seeds 3
  python pipeline/reproduce.py --scale full --cluster slurm       # recipes/paper/, thousands of V100-hours
  python pipeline/reproduce.py --scale small --smoke              # minutes: everything happens, nothing is learned
  python pipeline/reproduce.py --scale small --at-once 8 --cluster debug launch.processes=1   # one GPU, or 8 cores

Run it again to go on. --dry-run lists the runs and what they cost.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from common.command import Parser, count_argument, ended_by_signals, exit_status_of, path_argument
from common.errors import UserError

if TYPE_CHECKING:
    from pipeline.reproduction.claims import Table

ROOT = Path(__file__).parents[1]
OWN = {  # fields that tell the runs apart
    "name": "each run is named by its recipe and seed; leave it out",
    "seed": "each recipe has a run of every seed from 0 on; say how many with --seeds",
    "runs": "say it with --runs",
}


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--scale", choices=("small", "full"), required=True, help="recipes/small or recipes/paper")
    parser.add_argument("--only", metavar="T1,T5", help="these tables, T1 and T5; another key names them all")
    parser.add_argument("--seeds", type=int, metavar="N", help="runs of each recipe; 3, or 1 with --smoke")
    parser.add_argument("--smoke", action="store_true", help="tiny networks; the page lies in the folder of the runs")
    parser.add_argument(
        "--runs", type=path_argument, metavar="FOLDER", help="of all runs; runs/reproduction/ and the scale otherwise"
    )
    parser.add_argument("--cluster", default="local", metavar="local|debug|slurm|auto", help="where jobs run")
    parser.add_argument("--at-once", type=count_argument, default=1, metavar="N", help="runs at the same time (1)")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and what they cost; touch nothing")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="replace a field of all recipes")
    arguments = parser.parse_intermixed_args()

    from common.files import atomic_write
    from pipeline.reproduction.intervals import MOST_SEEDS
    from pipeline.reproduction.results import page
    from pipeline.reproduction.running import Scale, check_images, make, plan
    from slurm.cluster import resolve

    tables = chosen(arguments.only, arguments.scale)
    if arguments.smoke and arguments.scale == "full":
        raise UserError("--smoke: is of small recipes, which every machine can run; use --scale small")
    seeds = arguments.seeds if arguments.seeds is not None else 1 if arguments.smoke else 3
    if not 1 <= seeds <= MOST_SEEDS:
        raise UserError(f"--seeds: {seeds}; 1 to {MOST_SEEDS}")
    runs = (
        str(arguments.runs)
        if arguments.runs
        else f"runs/reproduction/{'smoke' if arguments.smoke else arguments.scale}"
    )
    for override in arguments.overrides:
        if (own := OWN.get(override.partition("=")[0])) is not None:
            raise UserError(f"{override}: {own}")
    scale = Scale(arguments.scale, runs, seeds, arguments.smoke, tuple(arguments.overrides))
    if arguments.dry_run:
        print("\n".join(plan(tables, scale)))
        return
    try:
        cluster = resolve(arguments.cluster)
    except ValueError as error:
        raise UserError(str(error)) from None
    check_images(tables, scale, cluster)
    with ended_by_signals():
        make(tables, scale, cluster, arguments.at_once)
    results = Path(runs) / "results.md" if arguments.smoke else ROOT / "docs/results.md"
    with atomic_write(results) as temporary:
        temporary.write_text(page(tables, scale), encoding="utf-8")
    print(f"results: {results}")


def chosen(only: str | None, scale: str) -> list["Table"]:
    from pipeline.reproduction.claims import tables_of

    tables = tables_of(scale)
    keys = [table.key for table in tables]
    wanted = keys if only is None else only.split(",")
    for key in wanted:
        if key not in keys:
            raise UserError(f"--only: found {key!r}; allowed, separated by commas: {', '.join(keys)}")
    return [table for table in tables if table.key in wanted]


if __name__ == "__main__":
    sys.exit(exit_status_of(main))
