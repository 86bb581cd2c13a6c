"""The recipe: one frozen dataclass a component; every field has its type, range, default and explanation.

A field that a YAML file does not name has the default written here; an unknown name is an error (`common.loading`).
docs/recipe.md is generated from these classes (`common.recipe.reference`).
"""

from __future__ import annotations

from pathlib import Path

from pydantic.dataclasses import dataclass

from common.recipe.data import VAE, Data, DemoImages, check_data, check_vae
from common.recipe.fields import STRICT, Name, Place, Seed
from common.recipe.launch import Launch, check_launch, launch_of, own_launch
from common.recipe.network import (
    Model,
    Objective,
    check_network,
    denoiser_config,
    describe_network,
    diffusion,
    latent_shape,
    num_classes,
)
from common.recipe.sampling import Evaluate, Sample, Sweep, check_sampling
from common.recipe.training import (
    OF_ITERATIONS,
    Train,
    check_training,
    node_counts,
    timestep_density,
    wanted_samples,
    with_world_size,
)

__all__ = [
    "VAE",
    "Data",
    "DemoImages",
    "Evaluate",
    "Launch",
    "Model",
    "Objective",
    "Recipe",
    "Sample",
    "Sweep",
    "Train",
    "check_together",
    "denoiser_config",
    "describe_network",
    "diffusion",
    "latent_shape",
    "launch_of",
    "node_counts",
    "num_classes",
    "own_launch",
    "timestep_density",
    "wanted_samples",
    "with_world_size",
]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Recipe:
    """An experiment. `name` is its folder below `runs`."""

    name: Name
    """The experiment's name: letters, digits, `.`, `_` and `-`, at most 100."""
    runs: Place = "runs"
    """Folder of all runs."""
    seed: Seed = 0
    """Everything random is a function of it, except the shuffles of KID and the Inception Score, whose seed is
    torch-fidelity's (2020)."""
    demo: DemoImages | None = None
    data: Data = Data()
    vae: VAE = VAE()
    model: Model = Model()
    objective: Objective = Objective()
    train: Train = Train()
    sample: Sample = Sample()
    evaluate: Evaluate = Evaluate()
    sweep: Sweep = Sweep()
    launch: Launch = Launch()

    @property
    def folder(self) -> Path:
        return Path(self.runs) / self.name


def check_together(recipe: Recipe) -> None:
    """Raises ValueError that names a field whose value does not go with the others."""
    check_data(recipe.data)
    check_vae(recipe.vae)
    if recipe.train.batch_size % recipe.data.lanes:
        raise ValueError(f"data.lanes: {recipe.data.lanes} do not divide train.batch_size, {recipe.train.batch_size}")
    check_network(recipe)
    check_training(recipe.train)
    for name in OF_ITERATIONS:
        if recipe.model.kind == "dit" and getattr(recipe.train, name) != getattr(Train, name):
            raise ValueError(f"train.{name}: a DiT has no iterations; set it to {getattr(Train, name):g}")
    check_sampling(recipe)
    check_launch(recipe.launch)
