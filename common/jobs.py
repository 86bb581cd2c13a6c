"""A call as submitit pickles it: names and plain values, so that a queue holds no objects of ours."""

import importlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import submitit

from common.errors import UserError
from common.loading import dump_recipe, parse_recipe
from common.recipe import Recipe


@dataclass(frozen=True)
class Job(submitit.helpers.Checkpointable):
    """`module.function(recipe, **arguments)`; the recipe is YAML.

    `Checkpointable`: on a time limit or a preemption the same job is queued again; every stage finds what is done.
    """

    module: str
    function: str
    recipe: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, module: str, function: str, recipe: Recipe, **arguments: Any) -> "Job":
        return cls(module, function, dump_recipe(recipe), arguments)

    def __call__(self) -> dict[str, Any]:
        """{"seconds": ...}, or {"error": line} for a user's mistake: that needs no traceback."""
        os.environ.setdefault("TQDM_MININTERVAL", "1")  # a bar in a log file: a line a second is enough
        _forget_result()
        started = time.monotonic()
        try:
            getattr(importlib.import_module(self.module), self.function)(parse_recipe(self.recipe), **self.arguments)
        except UserError as error:
            return {"error": str(error)}
        return {"seconds": round(time.monotonic() - started, 1)}


def failed(outcome: dict[str, Any]) -> bool:
    """Whether a job's result tells of a user's mistake; `slurm.cluster` asks."""
    return "error" in outcome


def _forget_result() -> None:
    """A job that is queued again keeps its number, and so does the file of what it raised before."""
    if os.environ.get("SUBMITIT_EXECUTOR") in ("local", "slurm"):
        submitit.JobEnvironment().paths.result_pickle.unlink(missing_ok=True)
