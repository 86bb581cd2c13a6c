"""Which pictures a recipe draws: the sets, what each is made of, and where it lies.

A set of samples is a folder `samples/<samples seen>-<key>/`; the key covers everything that changes a picture. It holds
`settings.json`, what the key is of, `plan.json`, the iterations of each step, and chunks (`pipeline.sampling.chunks`).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError, one_line
from common.files import content_key
from common.recipe import Recipe, denoiser_config
from common.run_folder import Weights, find_weights
from common.run_weights import Description, describe
from preprocess.encoding.encoder import find_vae, identify
from preprocess.shards import INDEX
from preprocess.shards.forms import read_local_index

# Fields of `sample` that change no picture.
NOT_OF_THE_PICTURE = ("num_samples", "batch_size", "chunk_samples", "weights", "ema", "save_images", "output")


def wanted_weights(recipe: Recipe) -> list[Weights]:
    """The weights that the recipe measures: its own, then 0, the network before its first step."""
    own = recipe.sample.weights
    return [own, 0] if recipe.evaluate.untrained_baseline and own != 0 else [own]


def total_samples(recipe: Recipe) -> int:
    """Drawn of each set: as many as each of the seed ranges has."""
    return recipe.sample.num_samples * recipe.evaluate.seed_ranges


@dataclass(frozen=True)
class SampleSet:
    """Which pictures a recipe draws from some weights, and where they lie."""

    folder: Path
    weights: Path
    samples_seen: int
    settings: dict[str, Any]  # all that changes a picture, JSON-able


def sample_set(recipe: Recipe, weights: Weights) -> SampleSet:
    """Resolves `weights`, "latest" or a number of samples seen.

    Raises UserError where there are none, or where they are another network's than the recipe's.
    """
    samples_seen, folder = find_weights(recipe, weights, recipe.sample.ema)
    described = describe(folder)
    settings = {
        "weights_sha256": described.sha256,
        "network": _network_settings(recipe, folder, described),
        "seed": recipe.seed,
        "sample": {name: value for name, value in asdict(recipe.sample).items() if name not in NOT_OF_THE_PICTURE},
        "objective": asdict(recipe.objective),
        "vae": vae_settings(recipe),
        "resolution": recipe.data.resolution,
    }
    name = f"{samples_seen:012d}-{content_key(settings)}"
    return SampleSet(recipe.folder / "samples" / name, folder, samples_seen, settings)


def vae_settings(recipe: Recipe) -> dict[str, Any]:
    """What of the autoencoder changes a picture.

    Raises UserError where it scales latents otherwise than the one that encoded the training pictures.
    """
    folder = find_vae(recipe.vae)
    if folder is None:
        raise UserError(f"vae.path: {recipe.vae.path} is not here; python preprocess/encode_latents.py downloads it")
    identity = asdict(identify(folder, recipe.vae))
    shards = Path(recipe.data.shards)
    trained: Mapping[str, Any] = (
        (read_local_index(shards)["settings"].get("vae") or {}) if (shards / INDEX).exists() else {}
    )
    for name in ("scaling_factor", "shift_factor"):  # decoders of one encoder may differ, as sd-vae-ft-mse and -ema do
        if name in trained and trained[name] != identity[name]:
            raise UserError(
                f"vae.path: {recipe.vae.path} has {name} {identity[name]}, the latents in {shards} were made "
                f"with {trained[name]}; name the autoencoder that they were made with"
            )
    return identity | {"precision": recipe.vae.precision}


def _network_settings(recipe: Recipe, folder: Path, weights: Description) -> dict[str, Any]:
    """The network that the weights belong to. Raises UserError where the recipe means another network or objective."""
    found, extra = asdict(weights.config), weights.extra
    del found["self_conditioned"]  # its tensors have other names, so that their hash tells it
    for there, wanted in ((found, denoiser_config(recipe)), (extra["objective"], recipe.objective)):
        for name, value in asdict(wanted).items():
            if name != "self_conditioned" and there.get(name) != value:
                raise UserError(
                    f"{folder}: weights with {name} {one_line(str(there.get(name)), 100)}, the recipe has {value}; "
                    "set that"
                )
    scale = recipe.sample.guidance_scale
    if scale != 1 and extra["label_dropout"] == 0:
        raise UserError(
            f"sample.guidance_scale: {scale:g}, but {folder} was trained with label_dropout 0 and never saw the null "
            "label that guidance needs; set it to 1, or take other weights"
        )
    return found
