"""Calls that are slow the first time and remembered: the server of `tests/forks.py` makes them before it forks."""

import tempfile

import deepspeed

from common.loading import load_recipe
from pipeline.training.operations import mean_flops
from tests.integration.conftest import RECIPE

deepspeed.ops.__compatible_ops__  # noqa: B018 (found by running a compiler)
with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
    file.write(RECIPE.format(folder=".", data=".", vae="."))
    file.flush()
    mean_flops(load_recipe(file.name))
