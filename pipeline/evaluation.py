"""What an evaluation compares, and where it keeps what it measured."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from tqdm import tqdm

from common.files import content_key, read_json, write_json
from common.provenance import provenance
from common.recipe import Recipe
from pipeline import picture_sets
from pipeline.arrays import read_arrays, write_arrays
from pipeline.features import ExtractorWeights, extract, find_weights, load_extractor
from pipeline.metrics import Statistics, frechet_distance, statistics
from pipeline.picture_sets import PictureSet


@dataclass(frozen=True)
class Evaluation:
    """The distances of a recipe: each one JSON file in `eval/`, named by a key of all that it is made of."""

    recipe: Recipe

    @cached_property
    def weights(self) -> ExtractorWeights:
        return find_weights(self.recipe.evaluate)

    @cached_property
    def extractor(self) -> FeatureExtractorBase:
        return load_extractor(self.weights)

    @cached_property
    def reference(self) -> PictureSet:
        return picture_sets.reference(self.recipe)

    @cached_property
    def compared(self) -> list[PictureSet]:
        """What is measured against the reference, the recipe's own samples first."""
        sets = [picture_sets.samples(self.recipe, "trained", self.recipe.sample.weights)]
        if self.recipe.evaluate.untrained_baseline:
            sets.append(picture_sets.samples(self.recipe, "untrained", 0))
        if self.recipe.data.held_out is not None:
            sets += [picture_sets.held_out(self.recipe), picture_sets.reconstruction(self.recipe)]
        return sets

    def path_of(self, pictures: PictureSet) -> Path:
        key = content_key([pictures.content, self.reference.content, self.weights.sha256])
        return self.recipe.folder / "eval" / f"{pictures.name}-{key}.json"

    def metrics(self) -> dict[str, Any]:
        """What `metrics.json` holds. Raises UserError where something is not measured yet."""
        measurements = [read_json(self.path_of(pictures)) for pictures in self.compared]
        distances = {found["name"]: found["value"] for found in measurements}
        return {"distance": self.weights.distance_name, "distances": distances, "measurements": measurements}

    def measure(self, pictures: PictureSet) -> None:
        """Writes the distance of one set from the reference, with what both were made of."""
        own, reference = self._statistics(pictures), self._statistics(self.reference)
        found = {
            "name": pictures.name,
            "label": pictures.label,
            "distance": self.weights.distance_name,
            "value": frechet_distance(own, reference),
            "count": own.count,
            "content": pictures.content,
            "reference": {"label": self.reference.label, "count": reference.count, "content": self.reference.content},
            "extractor": {"name": self.weights.extractor, "weights_sha256": self.weights.sha256},
            "provenance": provenance(),
        }
        write_json(self.path_of(pictures), found)

    def _statistics(self, pictures: PictureSet) -> Statistics:
        """Mean and covariance of a set's features; computed once for each extractor and content."""
        key = content_key([pictures.content, self.weights.sha256])
        path = self.recipe.folder / "eval" / "statistics" / f"{pictures.name}-{key}.npz"
        if not path.exists():
            extractor = self.extractor
            bar = tqdm(pictures.open(), total=pictures.size, unit="picture", desc=f"features of {pictures.name}")
            found = statistics(extract(extractor, bar, self.recipe.evaluate.batch_size))
            write_arrays(path, mean=found.mean, covariance=found.covariance, count=found.count)
        arrays = read_arrays(path, "python pipeline/eval_fid.py")
        return Statistics(arrays["mean"], arrays["covariance"], int(arrays["count"]))
