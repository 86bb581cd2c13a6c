# PYTHON_ARGCOMPLETE_OK
"""Measures how far the samples lie from the training images: FID, or the Fréchet distance of another extractor.

  python pipeline/eval_fid.py --config recipes/demo.yaml
  python pipeline/eval_fid.py --config recipes/demo.yaml evaluate.feature_extractor=inception-v3-compat
  python pipeline/eval_fid.py --config recipes/demo.yaml --cluster slurm --jobs 16
  torchrun --nproc-per-node 8 pipeline/eval_fid.py --config recipes/demo.yaml

Also measured against the same reference: the network before its first step, held-out images (the floor), and their
reconstructions (what the autoencoder alone costs). What is measured already is kept.
"""

import sys

from common.command import run_stage_command
from pipeline.evaluation.stage import STAGE

if __name__ == "__main__":
    sys.exit(run_stage_command(__doc__, STAGE))
