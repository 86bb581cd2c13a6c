"""Whether a run is trained to its end, by its last weights."""

import sys
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.recipe import Recipe
from common.run_folder import ema_names, weights_folder
from common.run_weights import describe
from pipeline.training.checkpoint import MARKER, folder_of
from pipeline.training.data import open_shards
from pipeline.training.identity import identity, total_samples


def finished(recipe: Recipe) -> bool:
    """Whether this recipe's averaged weights after its last sample are there."""
    try:
        wanted = identity(recipe, open_shards(recipe))
    except UserError:  # no shards any more; the stage before this one says so
        return False
    try:
        return all(
            folder.exists() and _is_run(recipe, describe(folder).extra["run"], wanted) for folder in _last(recipe)
        )
    except UserError:  # damaged; training says so and writes them again
        return False


def _last(recipe: Recipe) -> list[Path]:
    """Where the run's last weights lie."""
    return [weights_folder(recipe, total_samples(recipe), name) for name in ema_names(recipe)]


def tell_damage(recipe: Recipe, rank: int) -> None:
    """Says that damaged last weights are written again, from the last checkpoint. Raises UserError where that is gone:
    to train all of it again is nothing to begin without a word."""
    for folder in _last(recipe):
        try:
            if folder.exists():
                describe(folder)
        except UserError as fault:
            if not (folder_of(recipe) / f"{total_samples(recipe):012d}" / MARKER).exists():
                raise
            if rank == 0:
                print(f"warning: {fault}; now they are written again", file=sys.stderr, flush=True)


def _is_run(recipe: Recipe, found: dict[str, Any] | None, wanted: dict[str, Any]) -> bool:
    """Whatever "auto" was on the machine that trained: a cluster's login node has no GPU."""
    free = {"train.precision": None} if recipe.train.precision == "auto" else {}
    return found is not None and found | free == wanted | free
