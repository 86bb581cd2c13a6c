# PYTHON_ARGCOMPLETE_OK
"""Composes the demo's images: portraits of robots, monsters, robot heads and cats, from robohash's image parts.

    python preprocess/demo_images.py --config recipes/demo.yaml

Writes `<data.images>/<class>/<index>.png` and `<data.held_out>/<class>/<index>.png`. Real artwork, combinatorially
composed: no combination of parts appears twice, but held-out portraits share single parts with the training ones.
"""

import sys

from common.command import run_stage_command
from preprocess.demo.stage import STAGE

if __name__ == "__main__":
    sys.exit(run_stage_command(__doc__, STAGE))
