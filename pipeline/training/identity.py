"""The identity of a run: the fields of its recipe that must not change while it trains."""

import json
import math
from operator import attrgetter
from pathlib import Path
from typing import Any

from common.recipe import Recipe, Train, wanted_samples
from common.recipe.training import OF_ITERATIONS
from pipeline.training.initial import sha256_of_weights
from preprocess.shards import LatentShards

IDENTITY = {
    "model": None,
    "objective": None,
    "data": ["flips", "order", "mixed_blocks", "lanes"],
    "train": [
        *("batch_size", "latents", "label_dropout", "gradient", "max_no_grad_iterations", "max_grad_iterations"),
        *OF_ITERATIONS,
    ],
    "train.optimizer": [
        *("name", "learning_rate", "learning_rate_decay", "warmup_samples", "weight_decay", "betas"),
        "gradient_clipping",
    ],
    "train.timesteps": None,
    "train.ema": None,
}


def identity(recipe: Recipe, shards: LatentShards) -> dict[str, Any]:
    """Field names and values, JSON-able."""
    fields: dict[str, Any] = {
        "seed": recipe.seed,
        "data.shards": shards.content_key,
        "train.precision": precision(recipe.train),
    }
    train = recipe.train
    if train.optimizer.learning_rate_decay != "constant" or train.iterations_rise or train.dense_end:
        # every rate and count of the schedule depends on its end
        fields["train.total_samples"] = wanted_samples(train)
        if train.max_hours is not None:
            fields["train.max_hours"] = train.max_hours
    if train.initial_weights is not None:
        fields["train.initial_weights"] = sha256_of_weights(Path(train.initial_weights))
    return json.loads(json.dumps(fields | _of_recipe(recipe)))  # with JSON's types, as it is compared


def _of_recipe(recipe: Recipe) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for section, names in IDENTITY.items():
        values = vars(attrgetter(section)(recipe))
        fields |= {f"{section}.{name}": values[name] for name in names or values}
    return fields


def changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The fields in which two identities differ, with both values; empty if they are equal.

    A field that is younger than the run had its default.
    """
    defaults = json.loads(json.dumps(_of_recipe(Recipe(name="default"))))
    before = {field: defaults[field] for field in defaults.keys() & now.keys()} | before
    return ", ".join(
        f"{field} (was {before.get(field)!r}, is {now.get(field)!r})"
        for field in sorted(before | now)
        if before.get(field) != now.get(field)
    )


def precision(train: Train, on_gpu: bool | None = None) -> str:
    """`train.precision`, with "auto" resolved. `on_gpu`: whether training sees GPUs; None: as this process."""
    import torch

    if train.precision == "auto":
        return "bf16" if (torch.cuda.is_available() if on_gpu is None else on_gpu) else "fp32"
    return train.precision


def total_samples(train: Train) -> int:
    """`train.total_samples`, rounded up to a multiple of the batch size."""
    return math.ceil(wanted_samples(train) / train.batch_size) * train.batch_size


def crosses(before: int, after: int, interval: int) -> bool:
    """Whether a multiple of `interval` samples lies in (before, after]; false for an interval of 0."""
    return bool(interval) and after // interval > before // interval
