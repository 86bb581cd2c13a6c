"""What a checkpoint must be: the form of its marker and of its tensors. Whoever reads one reads it here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, with_config
from torch import Tensor
from typing_extensions import TypedDict

from common.errors import UserError, errors_as
from common.files import sha256_file
from common.log_lines import Count
from common.recipe import Recipe, denoiser_config
from common.run_folder import ema_names
from common.sealed import STRICT, read_sealed
from fpdm.weights import tensor_shapes
from pipeline.training.guards import WINDOW
from pipeline.training.identity import changes
from pipeline.training.throughput import QUARTILES
from pipeline.training.zero import MOMENTS

STATE, MARKER = "state.safetensors", "complete.json"
FORMAT = 3  # of what is written; 2 named the recipe's fields before `train` had sections

State = dict[str, Tensor]
Quarters = Field(min_length=QUARTILES, max_length=QUARTILES)


@with_config(STRICT)
class IntervalForm(TypedDict):
    """`pipeline.training.throughput.Interval`."""

    steps: Count
    skipped: Count
    loss: float
    quartile_losses: Annotated[list[float], Quarters]
    quartile_counts: Annotated[list[Annotated[float, Field(ge=0)]], Quarters]


@with_config(STRICT)
class ScalerForm(TypedDict):
    """Of a loss scaler (`pipeline.training.engine.SCALER_STATE`)."""

    cur_scale: Annotated[float, Field(gt=0)]
    cur_iter: Count
    last_overflow_iter: Annotated[int, Field(ge=-1)]
    cur_hysteresis: Count


@with_config(STRICT)
class NoScaler(TypedDict):
    """Where nothing is scaled."""


@with_config(STRICT)
class ProgressForm(TypedDict):
    """The loop's own numbers (`Trainer`)."""

    updates: Count
    skipped: Count
    interval: IntervalForm
    recent_losses: Annotated[list[float], Field(max_length=WINDOW)]
    scaler: ScalerForm | NoScaler


@with_config(STRICT)
class MarkerForm(TypedDict):
    format: Literal[3]
    samples_seen: Count
    identity: dict[str, Any]
    progress: ProgressForm
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class Found:
    """A whole checkpoint."""

    folder: Path
    samples_seen: int
    progress: dict[str, Any]  # of ProgressForm
    state: State


def read(folder: Path, recipe: Recipe, identity: dict[str, Any], samples_seen: int | None = None) -> Found | str:
    """The checkpoint in a folder, or which file in it is not as it was written, and why.

    `samples_seen`: what its place says. Raises UserError where it is another run's.
    """
    try:
        marker = read_sealed(folder / MARKER, MarkerForm, "no checkpoint of this version")
    except UserError as told:
        return str(told)
    if changed := changes(marker["identity"], identity):
        raise UserError(f"{folder}: belongs to a run with another {changed}; set it back, or choose another name")
    if fault := _out_of_range(marker, recipe, samples_seen):
        return f"{folder / MARKER}: {fault}"
    try:
        state = _read_state(folder / STATE, marker["sha256"])
    except UserError as told:
        return str(told)
    if fault := _misfit(state, recipe):
        return f"{folder / STATE}: {fault}"
    return Found(folder, marker["samples_seen"], {**marker["progress"]}, state)


def _out_of_range(marker: MarkerForm, recipe: Recipe, samples_seen: int | None) -> str | None:
    """What cannot be of a run of this recipe."""
    seen, progress, batch_size = marker["samples_seen"], marker["progress"], recipe.train.batch_size
    if samples_seen not in (None, seen):
        return f"samples_seen: {seen} in a folder of that name"
    if seen % batch_size:
        return f"samples_seen: {seen}, which is no multiple of train.batch_size, {batch_size}"
    steps, interval = seen // batch_size, progress["interval"]
    counts = {"updates": progress["updates"], "skipped": progress["skipped"]}
    counts["interval"] = interval["steps"] + interval["skipped"]
    for name, count in counts.items():
        if count > steps:
            return f"progress.{name}: {count} of {steps} steps"
    scaled = marker["identity"].get("train.precision") == "fp16"
    if bool(progress["scaler"]) != scaled:
        return f"progress.scaler: {progress['scaler']}, with train.precision {'' if scaled else 'other than '}fp16"
    return None


def _read_state(path: Path, sha256: str) -> State:
    from safetensors.torch import load_file

    with errors_as(UserError, f"{path}: not readable"):
        if sha256_file(path) != sha256:
            raise UserError(f"{path}: damaged (its checksum differs)")
        return load_file(path)


def _misfit(state: State, recipe: Recipe) -> str | None:
    """Which tensor is not one of a run of this recipe."""
    parts = ("model", *(f"ema-{name}" for name in ema_names(recipe)), *MOMENTS)
    shapes = tensor_shapes(denoiser_config(recipe))
    wanted = {f"{one}.{name}": shape for one in parts for name, shape in shapes.items() if name != "pos_embed"}
    for name in sorted(wanted.keys() ^ state.keys()):
        return f"tensor {name!r} is {'missing' if name in wanted else 'unknown'}"
    for name, tensor in state.items():
        if tuple(tensor.shape) != wanted[name] or tensor.dtype != torch.float32:
            return f"tensor {name!r} is {tensor.dtype} of {tuple(tensor.shape)}, not float32 of {wanted[name]}"
        if name.startswith("exp_avg_sq.") and tensor.numel() and tensor.min() < 0:
            return f"tensor {name!r} is negative, and a mean of squares"
    bad = not_finite(state)
    return f"tensor {bad!r} is not finite" if bad else None


def not_finite(state: State) -> str | None:
    """The first tensor that is not."""
    for name, tensor in state.items():
        if not torch.stack(tensor.aminmax()).isfinite().all():  # a NaN is both; a tenth of the time of isfinite
            return name
    return None


def part(state: State, name: str) -> State:
    """The tensors of one part of a state ("model", "ema-0.9999", a moment) by parameter name."""
    return {key.removeprefix(f"{name}."): tensor for key, tensor in state.items() if key.startswith(f"{name}.")}
