# PYTHON_ARGCOMPLETE_OK
"""Draws the images that the recipe measures: from the trained weights, and from the network before its first step.

  python pipeline/sample.py --config recipes/demo.yaml
  python pipeline/sample.py --config recipes/demo.yaml --cluster slurm --jobs 16
  torchrun --nproc-per-node 8 pipeline/sample.py --config recipes/demo.yaml sample.weights=65536

Run it again to go on: finished chunks are kept, whatever the number of processes that drew them.
"""

import sys

from common.command import run_stage_command
from pipeline.sampling.stage import STAGE

if __name__ == "__main__":
    sys.exit(run_stage_command(__doc__, STAGE))
