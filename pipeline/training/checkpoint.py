"""Checkpoints: `checkpoints/<samples seen>/` holds `state.safetensors` and `complete.json`, or does not exist.

The state is whole fp32 tensors by parameter name (parameters, Adam's moments, the averages), gathered from whatever
shards DeepSpeed keeps. So one format resumes at any number of ranks and any ZeRO stage, opens anywhere, and holds no
pickle; the networks of this project are small enough for that (XL/2: 1.4 GB).
"""

import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import atomic_folder, disk_errors_as_user_errors, remove_folder, sha256_file
from common.recipe import Recipe, denoiser_config
from common.run_folder import counted, ema_names, weights_folder
from common.sealed import write_sealed
from fpdm.denoiser import DenoiserConfig
from fpdm.weights import save_pretrained
from pipeline.training.checkpoint_form import FORMAT, MARKER, STATE, Found, State, not_finite, part, read
from pipeline.training.ema import Averages
from pipeline.training.identity import total_samples
from pipeline.training.zero import MOMENTS, gather, moment_shards, parameter_shards, scatter, start_moments


def folder_of(recipe: Recipe) -> Path:
    return recipe.folder / "checkpoints"


def collect(engine: Any, averages: Averages) -> State:
    """The state of this moment, on rank 0; copies, which training does not change. All ranks must call it."""
    parts = {f"ema-{name}": shards for name, shards in averages.shards.items()}
    parts |= {"model": parameter_shards(engine)} | {moment: moment_shards(engine, moment) for moment in MOMENTS}
    return {
        f"{part}.{name}": tensor for part, shards in parts.items() for name, tensor in gather(engine, shards).items()
    }


def write(
    recipe: Recipe,
    state: State,
    samples_seen: int,
    identity: dict[str, Any],
    progress: dict[str, Any],
    *,
    with_weights: bool,
) -> None:
    """Writes what `collect` gave as a checkpoint and, `with_weights`, the averages to sample with.

    Weights come first, so that every checkpoint passed has its own; the run's last ones come last, because they say
    that it is finished. Raises UserError where the state is not finite, or the disk does not take it: then the
    checkpoint before it stands.
    """
    _refuse_non_finite(recipe, state, samples_seen)
    folder, last = folder_of(recipe) / f"{samples_seen:012d}", samples_seen == total_samples(recipe)
    averages = {name: part(state, f"ema-{name}") for name in ema_names(recipe)} if with_weights else {}
    with disk_errors_as_user_errors(folder):
        if not last:
            export_averages(recipe, averages, samples_seen, identity)
        _write_folder(folder, state, {"samples_seen": samples_seen, "identity": identity, "progress": progress})
        if last:
            export_averages(recipe, averages, samples_seen, identity)
        prune(recipe)


def _write_folder(folder: Path, state: State, marker: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    with atomic_folder(folder) as temporary:
        save_file(state, temporary / STATE)
        write_sealed(temporary / MARKER, {"format": FORMAT, **marker, "sha256": sha256_file(temporary / STATE)})


def prune(recipe: Recipe) -> None:
    """Deletes all checkpoints but the last ones, and those that `train.checkpoint.keep_every_samples` keeps for good.

    One that a person has put elsewhere and linked is that person's to delete.
    """
    keep, every = recipe.train.checkpoint.keep, recipe.train.checkpoint.keep_every_samples
    for folder in [one for one in complete_checkpoints(recipe) if not one.is_symlink()][:-keep]:
        if (
            not every or int(folder.name) % every >= recipe.train.batch_size
        ):  # the first step at or after a multiple stays
            remove_folder(folder)


def _refuse_non_finite(recipe: Recipe, state: State, samples_seen: int) -> None:
    if name := not_finite(state):
        raise UserError(
            f"train.optimizer.learning_rate: {name} is not finite after {samples_seen} samples; nothing is saved of "
            f"this; lower it from {recipe.train.optimizer.learning_rate}"
        )


def export_averages(
    recipe: Recipe, averages: dict[str, State], samples_seen: int, identity: dict[str, Any] | None
) -> None:
    """`export_weights` of each of the run's averages, by name."""
    for name, state in averages.items():
        export_weights(recipe, state, samples_seen, identity, name)


def export_weights(
    recipe: Recipe,
    weights: State,
    samples_seen: int,
    identity: dict[str, Any] | None = None,
    ema: str | None = None,
    config: DenoiserConfig | None = None,
    **notes: Any,
) -> None:
    """Writes averaged weights in diffusers' layout: what sampling reads.

    `identity`: of the run they come from; `config`: of their network, if it is none that a recipe describes.
    """
    with atomic_folder(weights_folder(recipe, samples_seen, ema)) as folder:
        # The objective goes with the weights: a v-predicting network sampled as if it predicted noise still draws.
        # So does how often it saw the null label: never, and there is no guidance.
        dropout = (identity or {}).get("train.label_dropout", recipe.train.label_dropout)
        known = {"objective": asdict(recipe.objective), "label_dropout": dropout}
        extra: dict[str, object] = {**known, "run": identity, **notes}
        save_pretrained(weights, config or denoiser_config(recipe), folder, extra)


def complete_checkpoints(recipe: Recipe) -> list[Path]:
    """Oldest first. A folder under another name than `write` gives it, or without its marker, is none."""
    return [path for path in counted(folder_of(recipe)) if (path / MARKER).is_file()]


def newest_checkpoint(recipe: Recipe, identity: dict[str, Any]) -> Found | None:
    """The newest checkpoint whose checksum holds; the one of `train.resume_from` where the run has none; or None.

    A damaged one is named in a warning and the one before it taken. Raises UserError where every one is damaged, or
    where the recipe no longer describes the run that the checkpoint belongs to.
    """
    folders = complete_checkpoints(recipe)
    for folder in reversed(folders):
        found = read(folder, recipe, identity, samples_seen=int(folder.name))
        if isinstance(found, Found):
            return found
        print(f"warning: {found}; taking the checkpoint before it", file=sys.stderr, flush=True)
    if folders:
        raise UserError(
            f"{folder_of(recipe)}: none of its {len(folders)} checkpoints is whole and of this version; delete it to "
            "start again"
        )
    if recipe.train.resume_from is None:
        return None
    found = read(Path(recipe.train.resume_from), recipe, identity)
    if isinstance(found, str):
        raise UserError(f"train.resume_from: {found}; give a folder below a run's checkpoints/")
    return found


def whole_checkpoint(folder: Path, recipe: Recipe, identity: dict[str, Any]) -> Found:
    """The checkpoint in a folder. Raises UserError where it is damaged, or another run's."""
    found = read(folder, recipe, identity)
    if isinstance(found, str):
        raise UserError(f"{found}, though rank 0 could read it; look at the disks of {platform.node()}, and run again")
    return found


def restore(engine: Any, averages: Averages, state: State, updates: int) -> None:
    """Puts a saved state back, to the bit; all ranks must call it. The module must hold the same parameters already.

    `updates`: how many updates Adam had made.
    """
    start_moments(engine, updates)
    scatter(engine, part(state, "model"), parameter_shards(engine))
    for name, shards in averages.shards.items():
        scatter(engine, part(state, f"ema-{name}"), shards)
    for moment in MOMENTS:
        scatter(engine, part(state, moment), moment_shards(engine, moment))
