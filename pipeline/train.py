# PYTHON_ARGCOMPLETE_OK
"""Trains the denoiser on latent shards with DeepSpeed. Run it again to resume.

python pipeline/train.py --config recipes/demo.yaml
torchrun --nproc-per-node 8 pipeline/train.py --config recipes/imagenet256.yaml train.batch_size=1024
"""

import sys

from common.command import run_stage_command
from pipeline.training.stage import STAGE

if __name__ == "__main__":
    sys.exit(run_stage_command(__doc__, STAGE))
