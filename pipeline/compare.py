# PYTHON_ARGCOMPLETE_OK
"""Puts runs side by side: pictures of the same noise at equal cost, and quality against cost.

  python pipeline/compare.py runs/demo runs/demo-longer
  python pipeline/compare.py runs/fpdm runs/dit --blocks 140 --count 24 --out fpdm-dit.html
  python pipeline/compare.py runs/a runs/b runs/c --json > compared.json

The pictures are drawn anew, from weights that took as much training computation as the shortest run, and with as many
blocks an image as the cheapest run's own samples. Distances and losses are those that the runs have measured.
"""

import json
import sys
from pathlib import Path

from common.command import Parser, count_argument, exit_status_of, output_argument, path_argument
from common.errors import UserError


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("runs", type=path_argument, nargs="+", metavar="RUN", help="folders of runs, such as runs/demo")
    parser.add_argument("--blocks", type=count_argument, metavar="N", help="an image (the least of the runs' own)")
    parser.add_argument("--count", type=count_argument, default=16, metavar="N", help="pictures of each run (16)")
    parser.add_argument(
        "--out", type=output_argument, default=Path("compare.html"), metavar="FILE", help="compare.html"
    )
    parser.add_argument("--json", action="store_true", help="print the table as JSON; no page is written")
    arguments = parser.parse_args()
    if len(arguments.runs) < 2:
        raise UserError("RUN: one run, and comparing takes two or more")

    from pipeline.reporting.comparison import compare, page

    compared = compare(arguments.runs, arguments.blocks, arguments.count)
    if arguments.json:
        print(json.dumps({"notes": compared.notes, "runs": compared.rows}, indent=1))
        return
    page(compared, arguments.out)
    for row in compared.rows:
        distance = "not measured" if row["distance"] is None else f"{row['distance_name']} {row['distance']:.2f}"
        print(f"{row['run']}: {row['pflop']:.3g} PFLOP, {row['blocks']:,} blocks an image, {distance}")
    for note in compared.notes:
        print(f"note: {note}")
    print(f"page: {arguments.out}")


if __name__ == "__main__":
    sys.exit(exit_status_of(main))
