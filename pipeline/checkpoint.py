"""Checkpoints: `checkpoints/<samples seen>/` holds `state.safetensors` and `complete.json`, or does not exist.

The state is whole fp32 tensors by parameter name (parameters, Adam's moments, the averages), gathered from whatever
shards DeepSpeed keeps. So one format resumes at any number of ranks and any ZeRO stage, opens anywhere, and holds no
pickle; the networks of this project are small enough for that (XL/2: 1.4 GB).
"""

import shutil
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from common.errors import UserError
from common.files import atomic_folder, content_key, read_json, sha256_file, write_json
from common.recipe import Recipe, denoiser_config
from fpdm.weights import save_pretrained
from pipeline.run_folder import weights_folder
from pipeline.zero import (
    MOMENTS,
    ExponentialMovingAverage,
    gather,
    moment_shards,
    parameter_shards,
    scatter,
    start_moments,
)

STATE, MARKER = "state.safetensors", "complete.json"


def folder_of(recipe: Recipe) -> Path:
    return recipe.folder / "checkpoints"


def save(
    recipe: Recipe, engine: Any, ema: ExponentialMovingAverage, samples_seen: int, identity: dict[str, Any]
) -> None:
    """Writes the checkpoint and the averaged weights of this moment; all ranks must call it."""
    from safetensors.torch import save_file

    averages = gather(engine, ema.shards)
    state = {f"ema.{name}": tensor for name, tensor in averages.items()}
    state |= {f"model.{name}": tensor for name, tensor in gather(engine, parameter_shards(engine)).items()}
    for moment in MOMENTS:
        state |= {f"{moment}.{name}": tensor for name, tensor in gather(engine, moment_shards(engine, moment)).items()}
    if engine.global_rank == 0:
        _refuse_non_finite(recipe, state, samples_seen)
        export_weights(recipe, averages, samples_seen, identity)
        with atomic_folder(folder_of(recipe) / f"{samples_seen:012d}") as folder:
            save_file(state, folder / STATE)
            marker = {"samples_seen": samples_seen, "sha256": sha256_file(folder / STATE), "identity": identity}
            write_json(folder / MARKER, {"marker": marker, "key": content_key(marker)})
        for old in complete_checkpoints(recipe)[: -recipe.train.keep_checkpoints]:
            shutil.rmtree(old)


def _refuse_non_finite(recipe: Recipe, state: dict[str, Tensor], samples_seen: int) -> None:
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise UserError(
                f"train.learning_rate: {name} is not finite after {samples_seen} samples; nothing is saved of this; "
                f"lower it from {recipe.train.learning_rate}"
            )


def export_weights(
    recipe: Recipe, averages: dict[str, Tensor], samples_seen: int, identity: dict[str, Any] | None = None
) -> None:
    """Writes averaged weights in diffusers' layout: what sampling reads. `identity`: of the run they come from."""
    with atomic_folder(weights_folder(recipe, samples_seen)) as folder:
        # The objective goes with the weights: a v-predicting network sampled as if it predicted noise still draws.
        extra: dict[str, object] = {"objective": asdict(recipe.objective), "run": identity}
        save_pretrained(averages, denoiser_config(recipe), folder, extra)


def complete_checkpoints(recipe: Recipe) -> list[Path]:
    """Oldest first. A folder under a temporary name, or without its marker, is none."""
    return sorted(path.parent for path in folder_of(recipe).glob(f"[0-9]*/{MARKER}"))


def newest_checkpoint(recipe: Recipe, identity: dict[str, Any]) -> tuple[int, dict[str, Tensor]] | None:
    """(samples seen, state) of the newest checkpoint whose checksum holds; None where there is no checkpoint.

    A damaged one is named in a warning and the one before it taken. Raises UserError where every one is damaged, or
    where the recipe no longer describes the run that the checkpoint belongs to.
    """
    from safetensors.torch import load_file

    folders = complete_checkpoints(recipe)
    for folder in reversed(folders):
        marker = _read_marker(folder)
        if marker is None or not (folder / STATE).exists() or sha256_file(folder / STATE) != marker["sha256"]:
            damaged = folder / (MARKER if marker is None else STATE)
            warnings.warn(f"{damaged}: damaged (its checksum differs); taking the checkpoint before it", stacklevel=2)
            continue
        _refuse_changes(folder, marker["identity"], identity)
        return marker["samples_seen"], load_file(folder / STATE)
    if folders:
        raise UserError(
            f"{folder_of(recipe)}: none of its {len(folders)} checkpoints is whole; delete it to start again"
        )
    return None


def _read_marker(folder: Path) -> dict[str, Any] | None:
    """The marker of a checkpoint; None where it is not as it was written."""
    try:
        sealed = read_json(folder / MARKER)
    except UserError:
        return None
    if not isinstance(sealed, dict) or sealed.get("key") != content_key(sealed.get("marker")):
        return None
    return sealed["marker"]


def restore(engine: Any, ema: ExponentialMovingAverage, state: dict[str, Tensor], steps: int) -> None:
    """Puts a saved state back, to the bit; all ranks must call it. The module must hold the same parameters already."""
    start_moments(engine, steps)
    scatter(engine, part(state, "model"), parameter_shards(engine))
    scatter(engine, part(state, "ema"), ema.shards)
    for moment in MOMENTS:
        scatter(engine, part(state, moment), moment_shards(engine, moment))


def part(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors of one part of a state ("model", "ema", a moment) by parameter name."""
    return {key.removeprefix(f"{name}."): tensor for key, tensor in state.items() if key.startswith(f"{name}.")}


def _refuse_changes(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    changed = [
        f"{field} (was {before.get(field)!r}, is {now.get(field)!r})"
        for field in sorted(before | now)
        if before.get(field) != now.get(field)
    ]
    if changed:
        raise UserError(
            f"{folder}: belongs to a run with another {', '.join(changed)}; set it back, or choose another name"
        )
