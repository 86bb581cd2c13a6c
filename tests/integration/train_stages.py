"""Trains the same recipe under several ZeRO stages in one launch: starting processes costs more than the training.

torchrun --nproc-per-node 2 tests/integration/train_stages.py RECIPE.yaml RANKS STAGE...
"""

import sys

from common.loading import load_recipe
from common.recipe import with_world_size
from pipeline.distributed import process_group
from pipeline.trainer import Trainer, open_shards

# The demo's network, on the experiment's smaller latents; one checkpoint, at the end.
DEMO_NETWORK = ("model.hidden_size=256", "model.num_heads=4", "model.patch_size=4", "train.checkpoint_samples=160")

path, ranks, *stages = sys.argv[1:]
with process_group() as (rank, world_size):
    for stage in stages:
        overrides = [f"name=ranks-{ranks}-stage-{stage}", f"train.zero_stage={stage}", *DEMO_NETWORK]
        recipe = with_world_size(load_recipe(path, overrides), world_size)
        Trainer(recipe, open_shards(recipe), rank, world_size).run()
