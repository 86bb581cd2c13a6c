"""Trains the same recipe under several ZeRO stages in one launch: starting processes costs more than the training.

torchrun --nproc-per-node 2 tests/integration/train_stages.py RECIPE.yaml RANKS STAGE...
"""

import sys

from common.loading import load_recipe
from common.recipe import with_world_size
from pipeline.distributed import process_group
from pipeline.trainer import Trainer, open_shards

path, ranks, *stages = sys.argv[1:]
with process_group() as (rank, world_size):
    for stage in stages:
        recipe = load_recipe(path, [f"name=ranks-{ranks}-stage-{stage}", f"train.zero_stage={stage}"])
        recipe = with_world_size(recipe, world_size)
        Trainer(recipe, open_shards(recipe), rank, world_size).run()
