# PYTHON_ARGCOMPLETE_OK
"""Writes what came out of a run: `samples.png`, and `report.html`, one file that needs nothing else to be read.

python pipeline/report.py --config recipes/demo.yaml
"""

import sys

from common.command import run_stage_command
from pipeline.reporting.stage import STAGE

if __name__ == "__main__":
    sys.exit(run_stage_command(__doc__, STAGE))
