"""Checkpoints: `checkpoints/<samples seen>/` holds `state.safetensors` and `complete.json`, or does not exist.

The state is whole fp32 tensors by parameter name (parameters, Adam's moments, the averages), gathered from whatever
shards DeepSpeed keeps. So one format resumes at any number of ranks and any ZeRO stage, opens anywhere, and holds no
pickle; the networks of this project are small enough for that (XL/2: 1.4 GB).
"""

import platform
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from common.files import atomic_folder, content_key, disk_faults_told, remove_folder, sha256_file, write_json
from common.recipe import Recipe, denoiser_config
from common.sealed import read_json
from fpdm.denoiser import DenoiserConfig
from fpdm.weights import save_pretrained
from pipeline.averages import Averages
from pipeline.run_folder import ema_names, weights_folder
from pipeline.run_identity import changes, total_samples
from pipeline.zero import MOMENTS, gather, moment_shards, parameter_shards, scatter, start_moments

STATE, MARKER = "state.safetensors", "complete.json"

State = dict[str, Tensor]


@dataclass(frozen=True)
class Found:
    """A whole checkpoint. `progress`: the loop's own numbers (`Trainer`), `state` the tensors."""

    folder: Path
    samples_seen: int
    progress: dict[str, Any]
    state: State


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
    with disk_faults_told(folder):
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
        marker = {**marker, "sha256": sha256_file(temporary / STATE)}
        write_json(temporary / MARKER, {"marker": marker, "key": content_key(marker)})


def prune(recipe: Recipe) -> None:
    """Deletes all checkpoints but the last ones, and those that `train.keep_checkpoint_samples` keeps for good."""
    settings = recipe.train
    for folder in complete_checkpoints(recipe)[: -settings.keep_checkpoints]:
        every = settings.keep_checkpoint_samples
        if not every or int(folder.name) % every >= settings.batch_size:  # the first step at or after a multiple stays
            remove_folder(folder)


def _refuse_non_finite(recipe: Recipe, state: State, samples_seen: int) -> None:
    for name, tensor in state.items():
        if not torch.stack(tensor.aminmax()).isfinite().all():  # a NaN is both; a tenth of the time of isfinite
            raise UserError(
                f"train.learning_rate: {name} is not finite after {samples_seen} samples; nothing is saved of this; "
                f"lower it from {recipe.train.learning_rate}"
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
    """Oldest first. A folder under a temporary name, or without its marker, is none."""
    return sorted(path.parent for path in folder_of(recipe).glob(f"[0-9]*/{MARKER}"))


def newest_checkpoint(recipe: Recipe, identity: dict[str, Any]) -> Found | None:
    """The newest checkpoint whose checksum holds; the one of `train.resume_from` where the run has none; or None.

    A damaged one is named in a warning and the one before it taken. Raises UserError where every one is damaged, or
    where the recipe no longer describes the run that the checkpoint belongs to.
    """
    folders = complete_checkpoints(recipe)
    for folder in reversed(folders):
        found = _read(folder, identity)
        if isinstance(found, Found):
            return found
        print(f"warning: {found}; taking the checkpoint before it", file=sys.stderr, flush=True)
    if folders:
        raise UserError(
            f"{folder_of(recipe)}: none of its {len(folders)} checkpoints is whole; delete it to start again"
        )
    if recipe.train.resume_from is None:
        return None
    found = _read(Path(recipe.train.resume_from), identity)
    if isinstance(found, str):
        raise UserError(f"train.resume_from: {found}; give a folder below a run's checkpoints/")
    return found


def whole_checkpoint(folder: Path, identity: dict[str, Any]) -> Found:
    """The checkpoint in a folder. Raises UserError where it is damaged, or another run's."""
    found = _read(folder, identity)
    if isinstance(found, str):
        raise UserError(f"{found}, though rank 0 could read it; look at the disks of {platform.node()}, and run again")
    return found


def _read(folder: Path, identity: dict[str, Any]) -> Found | str:
    """The checkpoint in a folder, or which file in it is not as it was written, and why."""
    from safetensors.torch import load_file

    marker = _read_marker(folder)
    if marker is None:
        return f"{folder / MARKER}: {'damaged' if (folder / MARKER).exists() else 'missing'}"
    try:
        if sha256_file(folder / STATE) != marker["sha256"]:
            return f"{folder / STATE}: damaged (its checksum differs)"
    except OSError as error:
        return f"{folder / STATE}: not readable ({error.strerror})"
    changed = changes(marker["identity"], identity)
    if changed:
        raise UserError(f"{folder}: belongs to a run with another {changed}; set it back, or choose another name")
    return Found(folder, marker["samples_seen"], marker["progress"], load_file(folder / STATE))


def _read_marker(folder: Path) -> dict[str, Any] | None:
    """The marker of a checkpoint; None where it is not as it was written."""
    try:
        sealed = read_json(folder / MARKER)
    except (UserError, OSError):
        return None
    if not isinstance(sealed, dict) or sealed.get("key") != content_key(sealed.get("marker")):
        return None
    return sealed["marker"]


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


def part(state: State, name: str) -> State:
    """The tensors of one part of a state ("model", "ema-0.9999", a moment) by parameter name."""
    return {key.removeprefix(f"{name}."): tensor for key, tensor in state.items() if key.startswith(f"{name}.")}
