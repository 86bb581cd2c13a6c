"""Checkpoints: `checkpoints/<samples seen>/` holds `state.safetensors` and `complete.json`, or does not exist.

The tensors are complete fp32 ones by parameter name (parameters, Adam's moments, EMAs), gathered from the shards that
DeepSpeed keeps. So one format resumes at any number of ranks and any ZeRO stage, opens anywhere, and holds no pickle;
the networks of this project are small enough for that (XL/2: 1.4 GB). The numbers beside them are those of state.py;
checkpoint_form.py says what is read back.
"""

import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed
from torch import Tensor

from common.errors import UserError
from common.files import atomic_folder, disk_errors_as_user_errors, remove_folder, sha256_file
from common.recipe import Recipe, denoiser_config, wanted_samples
from common.run_folder import RunFolder, counted, weights_folder
from common.sealed import write_sealed
from fpdm.config import DenoiserConfig
from fpdm.weights import save_pretrained
from pipeline.training.checkpoint_form import (
    FORMAT,
    MARKER,
    STATE,
    Checkpoint,
    Damaged,
    Tensors,
    first_not_finite,
    part,
    read,
)
from pipeline.training.distributed import Ranks, raise_on_all_ranks
from pipeline.training.ema import EMAWeights
from pipeline.training.engine import restore_scaler
from pipeline.training.identity import total_samples
from pipeline.training.schedule import has_ended
from pipeline.training.state import TrainState
from pipeline.training.zero import MOMENTS, gather, moment_shards, parameter_shards, scatter, start_moments


def collect(engine: Any, ema: EMAWeights) -> Tensors:
    """Copies of all tensors that training resumes from, on rank 0. A collective: every rank must call it."""
    parts: dict[str, Sequence[Tensor | None]] = {f"ema-{name}": shards for name, shards in ema.shards.items()}
    parts |= {"model": parameter_shards(engine)} | {moment: moment_shards(engine, moment) for moment in MOMENTS}
    return {
        f"{part}.{name}": tensor for part, shards in parts.items() for name, tensor in gather(engine, shards).items()
    }


def write(recipe: Recipe, state: TrainState, tensors: Tensors, identity: dict[str, Any], *, with_weights: bool) -> None:
    """Writes a checkpoint and, `with_weights`, the EMA weights that sampling reads.

    The weights are written first, so that every checkpoint that is due has its weights; the run's last weights after
    their checkpoint, because they mark the run as finished. Raises UserError where a tensor is not finite or the
    disk does not take it; the checkpoint before it stays.
    """
    samples_seen, last = state.samples_seen, has_ended(recipe.train, state.samples_seen, state.seconds)
    _require_finite(tensors, samples_seen, recipe.train.optimizer.learning_rate)
    folder = RunFolder(recipe.folder).checkpoint(samples_seen)
    ema_weights = {name: part(tensors, f"ema-{name}") for name in recipe.train.ema.names} if with_weights else {}
    with disk_errors_as_user_errors(folder):
        if not last:
            export_ema_weights(recipe, ema_weights, state, identity)
        marker = {"samples_seen": samples_seen, "identity": identity, "progress": state.to_json()}
        _write_folder(folder, tensors, marker)
        if last:
            export_ema_weights(recipe, ema_weights, state, identity)
        prune(recipe, state.samples_seen)


def _write_folder(folder: Path, tensors: Tensors, marker: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    with atomic_folder(folder) as temporary:
        save_file(tensors, temporary / STATE)
        write_sealed(temporary / MARKER, {"format": FORMAT, **marker, "sha256": sha256_file(temporary / STATE)})


def prune(recipe: Recipe, samples_seen: int) -> None:
    """Deletes all checkpoints but the newest and those that `train.checkpoint.keep_every_samples` keeps for good.

    Those after `samples_seen`, where the newest was just written, are neither counted nor deleted: they are damaged,
    and the run passed over them. Nor are symbolic links: a person made them.
    """
    keep, every = recipe.train.checkpoint.keep, recipe.train.checkpoint.keep_every_samples
    folders = [
        folder
        for folder in complete_checkpoints(recipe.folder)
        if not folder.is_symlink() and int(folder.name) <= samples_seen
    ]
    # The first one after a multiple is never deleted, so the first that exists is the first that was written.
    first_after = {int(folder.name) // every: folder for folder in reversed(folders)} if every else {}
    first_after.pop(0, None)
    for folder in folders[:-keep]:
        if folder not in first_after.values():
            remove_folder(folder)


def _require_finite(tensors: Tensors, samples_seen: int, learning_rate: float) -> None:
    if name := first_not_finite(tensors):
        raise UserError(
            f"train.optimizer.learning_rate: {name} is not finite after {samples_seen} samples; nothing is saved of "
            f"this; lower it from {learning_rate}"
        )


def export_ema_weights(
    recipe: Recipe, ema_weights: dict[str, Tensors], state: TrainState, identity: dict[str, Any]
) -> None:
    """`export_weights` for each of the run's EMAs, by name; with the seconds trained if they can end training."""
    timed: dict[str, Any] = {} if recipe.train.max_hours is None else {"seconds": state.seconds}
    for name, weights in ema_weights.items():
        export_weights(recipe, weights, state.samples_seen, identity, name, **timed)


def export_weights(
    recipe: Recipe,
    weights: Tensors,
    samples_seen: int,
    identity: dict[str, Any] | None = None,
    ema: str | None = None,
    config: DenoiserConfig | None = None,
    **notes: Any,
) -> None:
    """Writes weights in diffusers' layout, in the run folder, for sampling.

    Args:
        identity: of the run that trained them (`pipeline.training.identity`).
        ema: the name of the EMA that they are; None: the run's first.
        config: of their network, if it is none that a recipe describes.
        notes: further fields of their `config.json`.
    """
    with atomic_folder(weights_folder(recipe, samples_seen, ema)) as folder:
        # Sampling checks both: a v-predicting network sampled as if it predicted noise still draws images, and a
        # network that never saw the null label cannot be guided.
        dropout = (identity or {}).get("train.label_dropout", recipe.train.label_dropout)
        known = {"objective": asdict(recipe.objective), "label_dropout": dropout}
        extra: dict[str, object] = {**known, "run": identity, **notes}
        save_pretrained(weights, config or denoiser_config(recipe), folder, extra)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Those in a run's folder, oldest first, but none without a marker or under a name that `write` does not give."""
    return [path for path in counted(RunFolder(folder).checkpoints) if (path / MARKER).is_file()]


def find_checkpoint(recipe: Recipe, identity: dict[str, Any], ranks: Ranks) -> Checkpoint | None:
    """The checkpoint that all ranks resume from, or None: rank 0's choice (`newest_checkpoint`).

    Over a network file system another rank may still see an older listing. If any rank raises UserError, all ranks
    raise it.
    """
    checkpoint = None
    with raise_on_all_ranks(ranks):
        if ranks.rank == 0:
            checkpoint = newest_checkpoint(recipe, identity)
    choice = [checkpoint.folder if checkpoint else None]
    torch.distributed.broadcast_object_list(choice, src=0, group=ranks.control)
    with raise_on_all_ranks(ranks):
        if choice[0] is not None and checkpoint is None:
            checkpoint = _read_choice(choice[0], recipe, identity)
    if checkpoint and checkpoint.state.samples_seen > total_samples(recipe.train):
        end, paid = wanted_samples(recipe.train), recipe.train.max_pflops
        limit = f"total_samples: {end}" if paid is None else f"max_pflops: {paid:g}, with total_samples, allows {end}"
        raise UserError(
            f"train.{limit}, but "
            f"{recipe.folder} has trained on {checkpoint.state.samples_seen}; ask for more, or choose another name"
        )
    return checkpoint


def newest_checkpoint(recipe: Recipe, identity: dict[str, Any]) -> Checkpoint | None:
    """The run's newest checkpoint that is not damaged; in a run without any, that of `train.resume_from`; or None.

    Prints a warning for each damaged one. Raises UserError where all are damaged, or where the recipe no longer
    describes the run that the checkpoint belongs to.
    """
    folders = complete_checkpoints(recipe.folder)
    for folder in reversed(folders):
        try:
            return read(folder, recipe, identity, samples_seen=int(folder.name))
        except Damaged as error:
            print(f"warning: {error}; taking the checkpoint before it", file=sys.stderr, flush=True)
    if folders:
        raise UserError(
            f"{folders[0].parent}: all of its {len(folders)} checkpoints are damaged or of another version; delete it "
            "to start again"
        )
    if recipe.train.resume_from is None:
        return None
    try:
        return read(Path(recipe.train.resume_from), recipe, identity)
    except Damaged as error:
        raise UserError(f"train.resume_from: {error}; give a folder below a run's checkpoints/") from None


def _read_choice(folder: Path, recipe: Recipe, identity: dict[str, Any]) -> Checkpoint:
    """The checkpoint in a folder that rank 0 could read. Raises UserError where this rank cannot."""
    try:
        return read(folder, recipe, identity)
    except Damaged as error:
        raise UserError(
            f"{error}, though rank 0 could read it; look at the disks of {platform.node()}, and run again"
        ) from None


def restore(engine: Any, ema: EMAWeights, checkpoint: Checkpoint) -> None:
    """Puts a checkpoint into the engine and the EMAs, to the bit. A collective: every rank must call it.

    The engine's module must have been built from the same weights.
    """
    tensors = checkpoint.tensors
    start_moments(engine, checkpoint.state.updates)
    scatter(engine, part(tensors, "model"), parameter_shards(engine))
    for name, shards in ema.shards.items():
        scatter(engine, part(tensors, f"ema-{name}"), shards)
    for moment in MOMENTS:
        scatter(engine, part(tensors, moment), moment_shards(engine, moment))
    restore_scaler(engine, checkpoint.state.scaler)
