"""Trains the demo's network several times in one launch: starting processes costs more than the training.

torchrun --nproc-per-node 2 tests/integration/train_stages.py RECIPE.yaml NAME=OVERRIDE,OVERRIDE... NAME=...

Each run stops half-way and goes on from its checkpoint in a new engine, as a run that was interrupted does.
"""

import sys

from common.loading import load_recipe
from common.recipe import with_world_size
from pipeline.distributed import process_group
from pipeline.trainer import Trainer, open_shards

# On the experiment's smaller latents; nothing learned of the variance, as in the demo.
DEMO_NETWORK = (
    *("model.hidden_size=256", "model.num_heads=4", "model.patch_size=4", "objective.learned_variance=false"),
    "train.checkpoint_samples=160",
)

path, *runs = sys.argv[1:]
with process_group() as (rank, world_size):
    for run in runs:
        name, _, overrides = run.partition("=")
        for total_samples in (80, 160):
            given = [f"name={name}", *DEMO_NETWORK, f"train.total_samples={total_samples}", *overrides.split(",")]
            recipe = with_world_size(load_recipe(path, given), world_size)
            Trainer(recipe, open_shards(recipe), rank, world_size).run()
