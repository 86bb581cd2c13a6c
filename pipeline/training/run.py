"""Training a run: whether it is finished, and all that surrounds the loop."""

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import folder_lock
from common.ranks import rank_and_world_size
from common.recipe import Recipe, with_world_size
from common.run_folder import RunFolder, counted, weights_folder
from common.run_weights import describe
from pipeline.training.checkpoint import MARKER
from pipeline.training.data import open_shards, stage_in
from pipeline.training.distributed import process_group, raise_on_all_ranks
from pipeline.training.identity import changes, identity, total_samples
from pipeline.training.operations import with_end
from pipeline.training.schedule import has_ended
from pipeline.training.signals import stop_requests
from pipeline.training.trainer import Trainer
from pipeline.training.warnings import warnings


def train(recipe: Recipe) -> None:
    """Trains to the end (`train.total_samples`, `max_pflops`, `max_hours`), from the newest checkpoint if there is one.

    Finished runs return at once.

    Raises Interrupted, after all ranks have saved, if any of them is sent a stop signal.
    """
    if finished(recipe):
        return
    recipe = with_end(recipe)
    rank, world_size = rank_and_world_size()
    _check_last_weights(recipe, rank)
    try:
        recipe = with_world_size(recipe, world_size)
    except ValueError as error:
        raise UserError(str(error)) from None
    with stop_requests() as stop, process_group() as ranks, ExitStack() as lock:
        with raise_on_all_ranks(ranks):
            if rank == 0:
                lock.enter_context(folder_lock(recipe.folder))
            shards = open_shards(recipe)
            stage_in(recipe.data, shards)
            shards.prove_places(rank, world_size)
            if rank == 0:
                for line in warnings(recipe, len(shards)):
                    print(line, file=sys.stderr, flush=True)
        Trainer(recipe, shards, ranks, stop).run()


def finished(recipe: Recipe) -> bool:
    """Whether the run has its EMA weights after the last sample, trained by this recipe."""
    recipe = with_end(recipe)
    try:
        wanted = identity(recipe, open_shards(recipe))
    except UserError:  # no shards any more; the stage before this one says so
        return False
    try:
        return all(
            folder.exists() and _is_same_run(describe(folder).extra["run"], wanted, recipe.train.precision)
            for folder in _last_weights(recipe)
        )
    except UserError:  # damaged; training says so and writes them again
        return False


def _last_weights(recipe: Recipe) -> list[Path]:
    return [weights_folder(recipe, _last_sample(recipe), name) for name in recipe.train.ema.names]


def _last_sample(recipe: Recipe) -> int:
    """Where training ends: by `train.max_hours` at the newest weights, if they were trained as long."""
    train, newest = recipe.train, counted(RunFolder(recipe.folder).weights)
    if train.max_hours is not None and newest:
        samples_seen = int(newest[-1].name)
        try:
            seconds = describe(weights_folder(recipe, samples_seen)).extra.get("seconds", 0.0)
        except UserError:  # whoever reads them next says so
            return samples_seen
        if has_ended(train, samples_seen, seconds):
            return samples_seen
    return total_samples(train)


def _is_same_run(run: dict[str, Any] | None, wanted: dict[str, Any], precision: str) -> bool:
    """Compares identities. "auto" precision matches any: a cluster's login node has no GPU to resolve it as training
    did."""
    free = {"train.precision": None} if precision == "auto" else {}
    return run is not None and not changes(run | free, wanted | free)


def _check_last_weights(recipe: Recipe, rank: int) -> None:
    """Warns of damaged last weights, which the last checkpoint restores. Raises UserError where that is missing:
    training must not begin again from the start unasked."""
    for folder in _last_weights(recipe):
        try:
            if folder.exists():
                describe(folder)
        except UserError as error:
            if not (RunFolder(recipe.folder).checkpoint(_last_sample(recipe)) / MARKER).exists():
                raise
            if rank == 0:
                print(f"warning: {error}; now they are written again", file=sys.stderr, flush=True)
