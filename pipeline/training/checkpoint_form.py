"""Reading a checkpoint, and the form that its marker and its tensors must have."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

import torch
from pydantic import Field, with_config
from torch import Tensor
from typing_extensions import TypedDict

from common.errors import UserError, errors_as
from common.files import sha256_file
from common.log_lines import Count
from common.recipe import Recipe, denoiser_config
from common.sealed import STRICT, read_sealed
from fpdm.weights import tensor_shapes
from pipeline.training.identity import changes
from pipeline.training.muon import takes
from pipeline.training.state import WINDOW, TrainState
from pipeline.training.throughput import QUARTILES
from pipeline.training.zero import MOMENTS

STATE, MARKER = "state.safetensors", "complete.json"
FORMAT = 3  # the version that is written; version 2 had the flat names of the section `train`

Tensors = dict[str, Tensor]
Quarters = Field(min_length=QUARTILES, max_length=QUARTILES)


@with_config(STRICT)
class IntervalForm(TypedDict):
    """`pipeline.training.throughput.Interval`."""

    steps: Count
    skipped: Count
    loss: float
    quartile_losses: Annotated[list[float], Quarters]
    quartile_counts: Annotated[list[Annotated[float, Field(ge=0)]], Quarters]
    intermediate_loss: NotRequired[float]  # these four are younger than the format
    intermediate_count: NotRequired[Annotated[float, Field(ge=0)]]
    growth: NotRequired[Annotated[float, Field(ge=0)]]
    growth_count: NotRequired[Annotated[float, Field(ge=0)]]


@with_config(STRICT)
class ScalerForm(TypedDict):
    """The fields `pipeline.training.engine.SCALER_STATE` of a loss scaler."""

    cur_scale: Annotated[float, Field(gt=0)]
    cur_iter: Count
    last_overflow_iter: Annotated[int, Field(ge=-1)]
    cur_hysteresis: Count


@with_config(STRICT)
class NoScaler(TypedDict):
    """In other precisions than fp16, where no loss is scaled."""


@with_config(STRICT)
class ProgressForm(TypedDict):
    """`TrainState`, except `samples_seen`."""

    seconds: NotRequired[Annotated[float, Field(ge=0)]]
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
class Checkpoint:
    """A complete checkpoint, as read from `folder`."""

    folder: Path
    state: TrainState
    tensors: Tensors


class Damaged(UserError):
    """A checkpoint that cannot be used; the message names its file and the reason."""


def read(folder: Path, recipe: Recipe, identity: dict[str, Any], samples_seen: int | None = None) -> Checkpoint:
    """The checkpoint in a folder. Raises Damaged, or another UserError where the checkpoint belongs to another run.

    `samples_seen`: the number that the folder is named after, if it is in its own run.
    """
    with _as_damage():
        marker = read_sealed(folder / MARKER, MarkerForm, "no checkpoint of this version")
    if changed := changes(marker["identity"], identity):
        raise UserError(f"{folder}: belongs to a run with another {changed}; set it back, or choose another name")
    if reason := _out_of_range(marker, recipe.train.batch_size, samples_seen):
        raise Damaged(f"{folder / MARKER}: {reason}")
    with _as_damage():
        tensors = _read_tensors(folder / STATE, marker["sha256"])
    if reason := _misfit(tensors, recipe):
        raise Damaged(f"{folder / STATE}: {reason}")
    return Checkpoint(folder, TrainState.from_json(marker["samples_seen"], marker["progress"]), tensors)


@contextmanager
def _as_damage() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise Damaged(str(error)) from None


def _out_of_range(marker: MarkerForm, batch_size: int, samples_seen: int | None) -> str | None:
    """The first number of a marker that no run of this recipe can have, and why; None if all are possible."""
    seen, progress = marker["samples_seen"], marker["progress"]
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


def _read_tensors(path: Path, sha256: str) -> Tensors:
    from safetensors.torch import load_file

    with errors_as(UserError, f"{path}: not readable"):
        if sha256_file(path) != sha256:
            raise UserError(f"{path}: damaged (its checksum differs)")
        return load_file(path)


def _misfit(tensors: Tensors, recipe: Recipe) -> str | None:
    """The first tensor that no run of this recipe can have, and why; None if all are possible."""
    parts = ("model", *(f"ema-{name}" for name in recipe.train.ema.names), *MOMENTS)
    shapes = tensor_shapes(denoiser_config(recipe))
    muon = recipe.train.optimizer.name == "muon"
    wanted = {
        f"{part}.{name}": shape
        for part in parts
        for name, shape in shapes.items()
        if name != "pos_embed" and not (muon and part == "exp_avg_sq" and takes(name, len(shape)))
    }
    for name in sorted(wanted.keys() ^ tensors.keys()):
        return f"tensor {name!r} is {'missing' if name in wanted else 'unknown'}"
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != wanted[name] or tensor.dtype != torch.float32:
            return f"tensor {name!r} is {tensor.dtype} of {tuple(tensor.shape)}, not float32 of {wanted[name]}"
        if name.startswith("exp_avg_sq.") and tensor.numel() and tensor.min() < 0:
            return f"tensor {name!r} is negative, and a mean of squares"
    bad = first_not_finite(tensors)
    return f"tensor {bad!r} is not finite" if bad else None


def first_not_finite(tensors: Tensors) -> str | None:
    """The name of the first tensor with a NaN or an infinity."""
    for name, tensor in tensors.items():
        if not torch.stack(tensor.aminmax()).isfinite().all():  # a NaN is both; a tenth of the time of isfinite
            return name
    return None


def part(tensors: Tensors, name: str) -> Tensors:
    """The tensors of one part of a checkpoint ("model", "ema-0.9999", a moment) by parameter name."""
    return {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
