"""What an evaluation compares, and the files of its measurements."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, TypeAdapter, with_config
from typing_extensions import TypedDict

from common.errors import UserError
from common.files import content_key, shared_folder_lock
from common.log_lines import Count
from common.provenance import Provenance, provenance
from common.recipe import Recipe
from common.run_folder import RunFolder
from common.sealed import STRICT, read_sealed, write_sealed
from pipeline.evaluation.image_sets import ComparedSet, SampleRanges, held_out, reconstruction
from pipeline.evaluation.metrics import bootstrap_error
from pipeline.evaluation.statistics import Summary, measure, reason_unavailable
from pipeline.evaluation.yardstick import COMMAND, Yardstick
from pipeline.features.extractors import ExtractorWeights
from pipeline.sampling.plans import WayForm
from pipeline.sampling.sample_set import Sampling

REMEDY = f"{COMMAND} measures it again"


@with_config(STRICT)
class NumberForm(TypedDict):
    name: str  # as it is printed
    value: float
    spread: Annotated[float, Field(ge=0)] | None


@with_config(STRICT)
class ReferenceForm(TypedDict):
    label: str
    count: Count | None
    content: dict[str, Any]


@with_config(STRICT)
class ExtractorForm(TypedDict):
    name: str
    weights_sha256: str


@with_config(STRICT)
class Measurement(TypedDict):
    """The numbers of one set, with all that they depend on."""

    name: str
    label: str
    distance: str
    value: float
    numbers: dict[str, NumberForm]
    ranges: Annotated[list[float], Field(min_length=1)]
    count: Count
    notes: list[str]
    content: dict[str, Any]
    plan: WayForm | None
    reference: ReferenceForm
    extractor: ExtractorForm
    recipe: dict[str, Any]
    provenance: Provenance


@with_config(STRICT)
class Metrics(TypedDict):
    """`metrics.json`."""

    distance: str
    distances: dict[str, float]
    measurements: Annotated[list[Measurement], Field(min_length=1)]


def as_json(value: Any) -> Any:
    """A value as it comes back from a file."""
    return json.loads(json.dumps(value))


@dataclass(frozen=True)
class Evaluation:
    """The measurements of a recipe: each one JSON file in `eval/`, named by a key of all that it depends on."""

    sampling: Sampling
    yardstick: Yardstick

    @classmethod
    def of(cls, recipe: Recipe) -> "Evaluation":
        sampling = Sampling.of(recipe)
        return cls(sampling, Yardstick(recipe, sampling.models))

    @property
    def recipe(self) -> Recipe:
        return self.sampling.recipe

    @property
    def extractor_weights(self) -> ExtractorWeights:
        return self.yardstick.extractor.weights

    @cached_property
    def samples(self) -> list[SampleRanges]:
        """The recipe's own first."""
        sets = self.sampling.sets
        ranges = [SampleRanges("trained", self.sampling, sets[0])]
        if self.recipe.evaluate.untrained_baseline:
            ranges.append(SampleRanges("untrained", self.sampling, sets[-1]))
        return ranges

    @cached_property
    def compared(self) -> list[ComparedSet]:
        """What is measured against the reference, the recipe's own samples first."""
        if self.recipe.data.held_out is None:
            return [*self.samples]
        originals = held_out(self.recipe)
        if self.recipe.vae.path is None:  # which would return them as they are
            return [*self.samples, originals]
        return [*self.samples, originals, reconstruction(originals, self.recipe.vae, self.sampling.models)]

    def path_of(self, images: ComparedSet) -> Path:
        measured_with = [
            self.yardstick.reference.content,
            self.extractor_weights.sha256,
            self.yardstick.extractor.metrics,
        ]
        key = content_key([images.content, *measured_with, self.recipe.evaluate.bootstrap])
        return RunFolder(self.recipe.folder).measurements / f"{images.name}-{key}.json"

    def measured(self, images: ComparedSet) -> Measurement:
        """Raises UserError where it is not measured yet, or the file is not as it was written, or of another set."""
        path, reference = self.path_of(images), self.yardstick.reference
        measurement = read_sealed(path, Measurement, REMEDY)
        stated = (
            measurement["name"],
            measurement["distance"],
            measurement["content"],
            measurement["reference"]["content"],
        )
        meant = (images.name, self.extractor_weights.distance_name, images.content, reference.content)
        if as_json(stated) != as_json(meant):
            raise UserError(f"{path}: measured of another set; {REMEDY}")
        distance, mean = measurement["numbers"].get("frechet"), float(np.mean(measurement["ranges"]))
        value = measurement["value"]
        if distance is None or distance["value"] != value or not np.isclose(mean, value):
            raise UserError(f"{path}: value: {value} is not the distance among its numbers; {REMEDY}")
        return measurement

    def metrics(self) -> Metrics:
        """What `metrics.json` holds. Raises UserError where something is not measured yet."""
        measurements = [self.measured(images) for images in self.compared]
        distances = {measurement["name"]: measurement["value"] for measurement in measurements}
        return {"distance": self.extractor_weights.distance_name, "distances": distances, "measurements": measurements}

    def measure(self, images: ComparedSet) -> None:
        """Writes the numbers of one set, with what it and the reference were made of.

        Raises UserError for numbers that are not finite, and for a metric that cannot be measured.
        """
        against, reference = self.yardstick.reference_summary, self.yardstick.reference
        ranges, counts = [], []
        for summary in images.summaries(self.yardstick):
            ranges.append(self._numbers(summary, against))
            counts.append(summary.statistics["pooled"].count)
        numbers = {name: float(np.mean([each[name] for each in ranges])) for name in ranges[0]}
        for name, value in numbers.items():
            if not np.isfinite(value):
                raise UserError(f"{images.name}: {name} comes out as {value}; look at the images, and the reference")
        measurement = {
            "name": images.name,
            "label": images.label,
            "distance": self.extractor_weights.distance_name,
            "value": numbers["frechet"],
            "numbers": {
                name: {
                    "name": self.extractor_weights.name_of(name),
                    "value": value,
                    "spread": numbers.get(f"{name}_spread"),
                }
                for name, value in numbers.items()
                if not name.endswith("_spread")
            },
            "ranges": [each["frechet"] for each in ranges],
            "count": counts[0],
            "notes": _notes(counts[0], against),
            "content": images.content,
            "plan": images.plan,
            "reference": {
                "label": reference.label,
                "count": against.statistics["pooled"].count,
                "content": reference.content,
            },
            "extractor": {"name": self.extractor_weights.extractor, "weights_sha256": self.extractor_weights.sha256},
            "recipe": TypeAdapter(Recipe).dump_python(self.recipe, mode="json"),
            "provenance": provenance(),
        }
        with shared_folder_lock(self.path_of(images).parent):
            write_sealed(self.path_of(images), measurement)

    def _numbers(self, own: Summary, against: Summary) -> dict[str, float]:
        """Raises UserError for a metric that the recipe names and that these sets do not give."""
        settings = self.recipe.evaluate
        numbers = measure("frechet", own, against)
        for metric in self.yardstick.extractor.metrics:
            reason = reason_unavailable(metric, own, against)
            if reason is None and metric != "frechet":
                numbers |= measure(metric, own, against)
            if reason is not None and settings.metrics is not None:
                raise UserError(f"evaluate.metrics: {metric} cannot be measured: {reason}; leave it out")
        if settings.bootstrap:
            numbers["frechet_spread"] = bootstrap_error(
                own.rows["pooled"], against.statistics["pooled"], settings.bootstrap, self.recipe.seed
            )
        return numbers


def _notes(count: int | None, against: Summary) -> list[str]:
    """What a reader of the number must know."""
    width = against.statistics["pooled"].mean.size
    sets = {"the set": count, "the reference": against.statistics["pooled"].count}
    return [
        f"{name} has {images:,} images for {width:,} dimensions: a singular covariance, a biased distance"
        for name, images in sets.items()
        if images is not None and images <= width
    ]
