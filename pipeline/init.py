# PYTHON_ARGCOMPLETE_OK
"""Looks at a folder of your own images, measures this machine, and writes a recipe that suits both.

  python pipeline/init.py path/to/images               # a folder of class folders, or of images; zip, tars
  python pipeline/init.py path/to/images --time 30m --out mine.yaml
  python pipeline/init.py path/to/images data.follow_links=true data.resolution=32  # your own choices

It names every file that is unusable, says how long the run will take and what it needs on disk, and writes nothing but
the recipe. Then `python pipeline/run.py --config recipe.yaml` makes everything to the report.
"""

import argparse
import re
import sys
from pathlib import Path

from common.command import Parser, exit_status_of, output_argument
from common.errors import UserError

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("images", metavar="IMAGES", help="the folder, zip, tars or parquet files")
    parser.add_argument("--out", type=output_argument, default=Path("recipe.yaml"), metavar="FILE", help="recipe.yaml")
    parser.add_argument("--time", default="2h", type=_seconds, help="for the whole run: 90s, 30m, 2h, 1d (2h)")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="fields that you choose yourself")
    arguments = parser.parse_intermixed_args()
    if arguments.out.exists():
        raise UserError(f"--out: {arguments.out} is there already; name another file, or move it away")

    for override in arguments.overrides:
        if override.startswith("data.images="):
            raise UserError(f"{override}: the images are {arguments.images}; name them once, as IMAGES")

    from pipeline.proposal.propose import propose

    propose(arguments.images, arguments.out, arguments.time, arguments.overrides)


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if match is None or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; write 90s, 30m, 2h or 1d")
    return float(match[1]) * UNITS[match[2]]


if __name__ == "__main__":
    sys.exit(exit_status_of(main))
