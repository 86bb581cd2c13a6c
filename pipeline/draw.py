# PYTHON_ARGCOMPLETE_OK
"""Draws images of a run's network into one picture, to look at.

  python pipeline/draw.py runs/demo
  python pipeline/draw.py runs/demo --class cat --guidance 2 --count 25 --seed 3 --out cats.png

A class is a name or a number; without one they take turns. All else is as the run was sampled. Image i is a function of
the seed and i, so that another guidance or class changes the same images. Where the run's way of sampling is measured
on its weights (sample.allocation), another guidance or seed measures it anew: with `calibrated` that takes minutes.
"""

import sys
from pathlib import Path

from common.command import Parser, count_argument, exit_status_of, output_argument, path_argument


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("run", type=path_argument, metavar="RUN", help="a run's folder, such as runs/demo")
    parser.add_argument("--class", dest="name", metavar="CLASS", help="name or number")
    parser.add_argument("--guidance", type=float, metavar="SCALE", help="1 is none; the run's if left out")
    parser.add_argument("--count", type=count_argument, default=16, metavar="N", help="of images (16)")
    parser.add_argument("--seed", type=int, metavar="S", help="of the noise; the run's if left out")
    parser.add_argument("--out", type=output_argument, default=Path("drawn.png"), metavar="FILE", help="drawn.png")
    arguments = parser.parse_args()

    from pipeline.reporting.drawing import draw

    print(draw(arguments.run, arguments.name, arguments.guidance, arguments.count, arguments.seed, arguments.out))


if __name__ == "__main__":
    sys.exit(exit_status_of(main))
