"""Which images a recipe draws: its sets of samples, the settings that decide each, and its folder.

A set of samples is a folder `samples/<samples seen>-<key>/`; the key covers everything that changes an image. It holds
`settings.json`, what the key is of, `plan.json`, the iterations of each step, and chunks (`pipeline.sampling.chunks`).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from common.errors import UserError, one_line
from common.files import content_key
from common.recipe import Data, Recipe, denoiser_config
from common.run_folder import RunFolder
from common.run_weights import Description, Weights, describe, find_weights
from pipeline.sampling.chunks import Span, chunk_spans
from pipeline.sampling.features import SampleFeatures
from pipeline.sampling.models import Models
from preprocess.encoding.encoder import Identity
from preprocess.from_data import from_data
from preprocess.shards import INDEX
from preprocess.shards.forms import read_local_index

# Fields of `sample` that change no image.
CHANGES_NO_IMAGE = ("num_samples", "batch_size", "chunk_samples", "weights", "ema", "save_images", "output")


@dataclass(frozen=True)
class SampleSet:
    """Which images a recipe draws from some weights, and where they lie."""

    folder: Path
    weights: Path
    samples_seen: int
    settings: dict[str, Any]  # all that changes an image, JSON-able


@dataclass(frozen=True)
class Sampling:
    """A recipe's sets of samples, each resolved when it is first needed, and then once."""

    recipe: Recipe
    models: Models
    shown: bool = True  # in a report, with its iterates; not a sweep's

    @classmethod
    def of(cls, recipe: Recipe) -> "Sampling":
        return cls(recipe, Models(recipe.vae, recipe.evaluate))

    @cached_property
    def sets(self) -> list[SampleSet]:
        """Sets of the weights that `sample.weights` names, and of the untrained network if that is measured.

        Raises UserError as `sample_set`.
        """
        own = self.recipe.sample.weights
        wanted: list[Weights] = [own, 0] if self.recipe.evaluate.untrained_baseline and own != 0 else [own]
        return [sample_set(self.recipe, weights, self.models.vae) for weights in wanted]

    @property
    def total(self) -> int:
        """Samples of each set: as many as each of the seed ranges has."""
        return self.recipe.sample.num_samples * self.recipe.evaluate.seed_ranges

    @property
    def spans(self) -> list[Span]:
        """A chunk each."""
        return chunk_spans(self.total, self.recipe.sample.chunk_samples)

    def features(self, samples: SampleSet) -> SampleFeatures:
        return SampleFeatures(samples.folder, self.models.extractor)


def sample_set(recipe: Recipe, weights: Weights, vae: Identity | None = None) -> SampleSet:
    """Resolves `weights`, "latest" or a number of samples seen. `vae`: the autoencoder's identity, where it is known.

    Raises UserError where there are none, where they are another network's than the recipe's, and where the autoencoder
    scales latents otherwise than the one that encoded the training images.
    """
    recipe = from_data(recipe)  # some commands come with a recipe as it is written
    samples_seen, folder = find_weights(recipe, weights, recipe.sample.ema)
    described = describe(folder)
    identity = asdict(vae or Models(recipe.vae, recipe.evaluate).vae)
    _check_scaling(identity, recipe.vae.path, recipe.data)
    settings = {
        "weights_sha256": described.sha256,
        "network": _network_settings(recipe, folder, described),
        "seed": recipe.seed,
        "sample": {name: value for name, value in asdict(recipe.sample).items() if name not in CHANGES_NO_IMAGE},
        "objective": asdict(recipe.objective),
        "vae": identity | {"precision": recipe.vae.precision},
        "resolution": recipe.data.resolution,
    }
    target = RunFolder(recipe.folder).sample_set(samples_seen, content_key(settings))
    return SampleSet(target, folder, samples_seen, settings)


def _check_scaling(identity: Mapping[str, Any], path: str | None, data: Data) -> None:
    """Decoders of one encoder may differ, as sd-vae-ft-mse and -ema do; the scaling of its latents may not."""
    shards = Path(data.shards)
    trained: Mapping[str, Any] = (
        (read_local_index(shards)["settings"].get("vae") or {}) if (shards / INDEX).exists() else {}
    )
    for name in ("scaling_factor", "shift_factor"):
        if name in trained and trained[name] != identity[name]:
            raise UserError(
                f"vae.path: {path} has {name} {identity[name]}, the latents in {shards} were made "
                f"with {trained[name]}; name the autoencoder that they were made with"
            )


def _network_settings(recipe: Recipe, folder: Path, weights: Description) -> dict[str, Any]:
    """The network that the weights belong to. Raises UserError where the recipe means another network or objective."""
    network, extra = asdict(weights.config), weights.extra
    del network["self_conditioned"]  # its tensors have other names, so that their hash covers it
    for stated, wanted in ((network, denoiser_config(recipe)), (extra["objective"], recipe.objective)):
        for name, value in asdict(wanted).items():
            if name != "self_conditioned" and stated.get(name) != value:
                raise UserError(
                    f"{folder}: weights with {name} {one_line(str(stated.get(name)), 100)}, the recipe has {value}; "
                    "set that"
                )
    scale = recipe.sample.guidance_scale
    if scale != 1 and extra["label_dropout"] == 0:
        raise UserError(
            f"sample.guidance_scale: {scale:g}, but {folder} was trained with label_dropout 0 and never saw the null "
            "label that guidance needs; set it to 1, or take other weights"
        )
    return network
