# PYTHON_ARGCOMPLETE_OK
"""Compares ways of sampling at equal cost: the distance against blocks an image, as a table and a plot.

  python pipeline/sweep.py --config recipes/demo.yaml sweep.budgets='[70,140,280]' sweep.iterations='[2,5]'
  python pipeline/sweep.py --config recipes/paper/imagenet_fpdm.yaml --cluster slurm --jobs 6

Every combination of the recipe's `sweep` section is drawn and measured. Run it again to go on: finished points are
kept, and so are those of an earlier sweep. The report shows the table and the plot.
"""

import sys

from common.command import run_stage_command
from pipeline.evaluation.sweep_stage import STAGE

if __name__ == "__main__":
    sys.exit(run_stage_command(__doc__, STAGE))
