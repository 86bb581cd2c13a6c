"""Opening a run folder for training."""

from typing import Any

from common.files import disk_errors_as_user_errors, remove_leftovers, write_json
from common.log_lines import append_line
from common.provenance import provenance
from common.ranks import rank_and_world_size
from common.recipe import Recipe
from common.run_folder import RunFolder, counted
from common.run_recipe import write_recipe
from pipeline.training.checkpoint import export_ema_weights
from pipeline.training.checkpoint_form import Tensors
from pipeline.training.log import TrainingLog
from pipeline.training.state import TrainState


def open_run_folder(
    recipe: Recipe, identity: dict[str, Any], config: dict[str, Any], samples_seen: int, weights: Tensors
) -> TrainingLog:
    """Writes what belongs there before the first step, and opens the log. Raises UserError where the disk does not
    take it.

    Removes unfinished files of killed processes. Writes the recipe, DeepSpeed's settings and the provenance and, in a
    new run, the untrained network under every EMA's name: the report compares it with the trained one.

    Args:
        config: DeepSpeed's settings (`deepspeed_config`).
        samples_seen: where training begins.
        weights: of the untrained network, by parameter name, if `samples_seen` is 0.
    """
    folder = RunFolder(recipe.folder)
    with disk_errors_as_user_errors(folder.path):
        for written in (folder.path, folder.checkpoints, folder.grids, *counted(folder.weights)):
            remove_leftovers(written)
        write_recipe(recipe)
        write_json(folder.deepspeed, config)
        started = {"stage": "train", "from_samples": samples_seen, "ranks": rank_and_world_size()[1]}
        append_line(folder.provenance, {**started, **provenance()})
        log = TrainingLog(recipe, samples_seen, identity)
        if samples_seen == 0:
            export_ema_weights(recipe, dict.fromkeys(recipe.train.ema.names, weights), TrainState(), identity)
    return log
