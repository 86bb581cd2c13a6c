# PYTHON_ARGCOMPLETE_OK
"""Encodes images to verified latent shards.

    python preprocess/encode_latents.py --config recipes/demo.yaml
    torchrun --nproc-per-node 8 preprocess/encode_latents.py --config recipes/imagenet256.yaml
    python preprocess/encode_latents.py --config recipes/imagenet256.yaml --cluster slurm --jobs 64

Reads `data.images`, writes WebDataset tars with an index to `data.shards` (the format: preprocess/shards). Run it again
after a kill or damage: it makes what is missing and keeps the rest, with any number of jobs.
"""

import sys

from common.command import run_stage_command
from preprocess.encoding.stage import STAGE

if __name__ == "__main__":
    sys.exit(run_stage_command(__doc__, STAGE))
