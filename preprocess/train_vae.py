# PYTHON_ARGCOMPLETE_OK
"""Trains an autoencoder on the recipe's images and writes it as a diffusers folder to `vae.path`.

    python preprocess/train_vae.py --config recipe.yaml vae.training.images=16000 vae.path=data/mine/vae

Its PSNR is measured on images that it never sees: `data.held_out`, or else a twentieth of the images. It is printed,
and kept beside the weights. A recipe with a section `vae.training` has this as a stage of pipeline/run.py.
"""

import sys

from common.command import run_stage_command
from preprocess.autoencoder.stage import STAGE

if __name__ == "__main__":
    sys.exit(run_stage_command(__doc__, STAGE))
