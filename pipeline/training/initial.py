"""What a new run begins with: its own initialisation, or the weights that `train.initial_weights` names."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.recipe import Objective, Recipe, denoiser_config
from fpdm.config import DenoiserConfig, differing_field
from fpdm.denoiser import Denoiser, build_denoiser
from fpdm.weights import load_pretrained, read_config, read_extra, weights_sha256

WEIGHS_ONLY = "loss_weight"  # of the objective: changes no meaning of the output


def initial_network(recipe: Recipe) -> Denoiser:
    """In float32. Raises UserError as `check_initial_weights`, and where the weights are damaged."""
    network, place = denoiser_config(recipe), recipe.train.initial_weights
    if place is None:
        return build_denoiser(network, seed=recipe.seed)
    check_initial_weights(Path(place), network, recipe.objective)
    try:
        return load_pretrained(place).float()
    except ValueError as error:
        raise UserError(f"train.initial_weights: {error}; make them again") from None


def check_initial_weights(folder: Path, network: DenoiserConfig, objective: Objective) -> None:
    """Raises UserError where the weights are another network's than `network`, or predict something else."""
    sha256_of_weights(folder)
    try:
        config, extra = read_config(folder), read_extra(folder)
    except ValueError as error:
        raise UserError(f"train.initial_weights: {error}") from None
    if config.self_conditioned:
        raise UserError(
            f"train.initial_weights: in {folder} each block embeds the timestep by itself, which is sampled here "
            "and not trained; name other weights"
        )
    field = differing_field(network, config)
    if field is not None:
        stated, wanted = getattr(config, field), getattr(network, field)
        raise UserError(f"train.initial_weights: {folder} has {field} {stated}, the recipe makes it {wanted}; set that")
    known: dict[str, Any] = extra.get("objective") or {}
    for name, value in asdict(objective).items():
        if name != WEIGHS_ONLY and known.get(name, value) != value:
            raise UserError(
                f"train.initial_weights: {folder} was trained with objective.{name} {known[name]}, the recipe has "
                f"{value}; set that"
            )


def sha256_of_weights(folder: Path) -> str:
    """That config.json states; `initial_network` compares it with the file."""
    try:
        sha256 = weights_sha256(folder)
    except ValueError as error:
        raise UserError(f"train.initial_weights: {error}; pipeline/convert.py makes such a folder") from None
    if sha256 is None:
        raise UserError(
            f"train.initial_weights: {folder} has no seal, which weights of this project have; pipeline/convert.py "
            "converts a DiT of others, pipeline/import_weights.py takes a network as it is"
        )
    return sha256
