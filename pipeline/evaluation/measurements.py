"""What an evaluation compares, and where it keeps what it measured."""

import json
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, TypeAdapter, with_config
from tqdm import tqdm
from typing_extensions import TypedDict

from common.errors import UserError
from common.files import content_key, shared_folder_lock
from common.log_lines import Count
from common.provenance import Provenance, provenance
from common.recipe import Recipe
from common.sealed import STRICT, read_sealed, write_sealed
from pipeline.evaluation import image_sets as picture_sets
from pipeline.evaluation.image_sets import PictureSet, SampleRanges, opened
from pipeline.evaluation.metrics import bootstrap_error
from pipeline.evaluation.references import reference
from pipeline.evaluation.statistics import (
    KEPT_LAYERS,
    Summary,
    measure,
    possible,
    read_summary,
    summarise,
    write_summary,
)
from pipeline.features.extractors import (
    Extractor,
    ExtractorWeights,
    extract,
    find_weights,
    load_extractor,
    wanted_layers,
    wanted_metrics,
)
from pipeline.sampling.plans import PlanForm

COMMAND = "python pipeline/eval_fid.py"
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
    """The numbers of one set, and all that they are made of."""

    name: str
    label: str
    distance: str
    value: float
    numbers: dict[str, NumberForm]
    ranges: Annotated[list[float], Field(min_length=1)]
    count: Count
    notes: list[str]
    content: dict[str, Any]
    plan: PlanForm | None
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
    """The measurements of a recipe: each one JSON file in `eval/`, named by a key of all that it is made of."""

    recipe: Recipe

    @cached_property
    def weights(self) -> ExtractorWeights:
        return find_weights(self.recipe.evaluate)

    @cached_property
    def extractor(self) -> Extractor:
        return load_extractor(self.weights, wanted_layers(self.recipe.evaluate))

    @cached_property
    def reference(self) -> PictureSet:
        return reference(self.recipe)

    @cached_property
    def samples(self) -> list[SampleRanges]:
        sets = [SampleRanges(self.recipe, "trained", self.recipe.sample.weights)]
        if self.recipe.evaluate.untrained_baseline:
            sets.append(SampleRanges(self.recipe, "untrained", 0))
        return sets

    @cached_property
    def compared(self) -> list[SampleRanges | PictureSet]:
        """What is measured against the reference, the recipe's own samples first."""
        others = [picture_sets.held_out, picture_sets.reconstruction] if self.recipe.data.held_out else []
        return [*self.samples, *(make(self.recipe) for make in others)]

    def path_of(self, pictures: SampleRanges | PictureSet) -> Path:
        settings = self.recipe.evaluate
        made_of = [pictures.content, self.reference.content, self.weights.sha256, wanted_metrics(settings)]
        key = content_key([*made_of, settings.bootstrap])
        return self.recipe.folder / "eval" / f"{pictures.name}-{key}.json"

    def measured(self, pictures: SampleRanges | PictureSet) -> Measurement:
        """Raises UserError where it is not measured yet, or the file is not as it was written, or of another set."""
        path = self.path_of(pictures)
        found = read_sealed(path, Measurement, REMEDY)
        stated = (found["name"], found["distance"], found["content"], found["reference"]["content"])
        meant = (pictures.name, self.weights.distance_name, pictures.content, self.reference.content)
        if as_json(stated) != as_json(meant):
            raise UserError(f"{path}: measured of another set; {REMEDY}")
        distance, mean = found["numbers"].get("frechet"), float(np.mean(found["ranges"]))
        if distance is None or distance["value"] != found["value"] or not np.isclose(mean, found["value"]):
            raise UserError(f"{path}: value: {found['value']} is not the distance among its numbers; {REMEDY}")
        return found

    def metrics(self) -> Metrics:
        """What `metrics.json` holds. Raises UserError where something is not measured yet."""
        measurements = [self.measured(pictures) for pictures in self.compared]
        distances = {found["name"]: found["value"] for found in measurements}
        return {"distance": self.weights.distance_name, "distances": distances, "measurements": measurements}

    def measure(self, pictures: SampleRanges | PictureSet) -> None:
        """Writes the numbers of one set, with what it and the reference were made of."""
        against = self.reference_summary
        own = pictures.summaries() if isinstance(pictures, SampleRanges) else iter([self._summary(pictures)])
        ranges, counts = [], []
        for summary in own:
            ranges.append(self._numbers(summary, against))
            counts.append(summary.statistics["pooled"].count)
        numbers = {name: float(np.mean([found[name] for found in ranges])) for name in ranges[0]}
        for name, value in numbers.items():
            if not np.isfinite(value):
                raise UserError(
                    f"{pictures.name}: {name} comes out as {value}; look at the pictures, and the reference"
                )
        found = {
            "name": pictures.name,
            "label": pictures.label,
            "distance": self.weights.distance_name,
            "value": numbers["frechet"],
            "numbers": {
                name: {"name": self.weights.name_of(name), "value": value, "spread": numbers.get(f"{name}_spread")}
                for name, value in numbers.items()
                if not name.endswith("_spread")
            },
            "ranges": [found["frechet"] for found in ranges],
            "count": counts[0],
            "notes": self._notes(counts[0], against),
            "content": pictures.content,
            "plan": pictures.plan if isinstance(pictures, SampleRanges) else None,
            "reference": {
                "label": self.reference.label,
                "count": against.statistics["pooled"].count,
                "content": self.reference.content,
            },
            "extractor": {"name": self.weights.extractor, "weights_sha256": self.weights.sha256},
            "recipe": TypeAdapter(Recipe).dump_python(self.recipe, mode="json"),
            "provenance": provenance(),
        }
        with shared_folder_lock(self.path_of(pictures).parent):
            write_sealed(self.path_of(pictures), found)

    def measure_reference(self) -> None:
        """Once, where many measurements would do it at the same time."""
        if self.reference.open is not None:
            self._summary(self.reference)

    def _numbers(self, own: Summary, against: Summary) -> dict[str, float]:
        """Raises UserError for a metric that the recipe names and that these sets do not give."""
        settings = self.recipe.evaluate
        numbers = measure("frechet", own, against)
        for metric in wanted_metrics(settings):
            reason = possible(metric, own, against)
            if reason is None and metric != "frechet":
                numbers |= measure(metric, own, against)
            if reason is not None and settings.metrics is not None:
                raise UserError(f"evaluate.metrics: {metric} cannot be measured: {reason}; leave it out")
        if settings.bootstrap:
            numbers["frechet_spread"] = bootstrap_error(
                own.rows["pooled"], against.statistics["pooled"], settings.bootstrap, self.recipe.seed
            )
        return numbers

    @staticmethod
    def _notes(count: int | None, against: Summary) -> list[str]:
        """What a reader of the number must know."""
        width = against.statistics["pooled"].mean.size
        sets = {"the set": count, "the reference": against.statistics["pooled"].count}
        return [
            f"{name} has {pictures:,} pictures for {width:,} dimensions: a singular covariance, a biased distance"
            for name, pictures in sets.items()
            if pictures is not None and pictures <= width
        ]

    @cached_property
    def reference_summary(self) -> Summary:
        summary = Summary({}, {}) if self.reference.open is None else self._summary(self.reference)
        if self.reference.statistics is None:
            return summary
        return Summary(self.reference.statistics(), summary.rows)

    def _summary(self, pictures: PictureSet) -> Summary:
        """Computed once for each extractor and content; of references, for all runs below `runs`."""
        key = content_key([pictures.content, self.weights.sha256, wanted_layers(self.recipe.evaluate)])
        is_reference = pictures.name == "reference"
        folder = Path(self.recipe.runs) / ".references" if is_reference else self.recipe.folder / "eval" / "statistics"
        path = folder / f"{pictures.name}-{key}.npz"
        try:
            if path.exists():
                return read_summary(path, COMMAND)
        except UserError as fault:
            print(f"warning: {fault}; now it is made again", file=sys.stderr, flush=True)
        extractor = self.extractor
        bar = tqdm(opened(pictures), total=pictures.size, unit="picture", desc=f"features of {pictures.name}")
        features = extract(extractor, bar, self.recipe.evaluate.batch_size)
        kept = ("pooled",) if is_reference else KEPT_LAYERS  # nobody asks for a reference's Inception Score
        with shared_folder_lock(folder if is_reference else folder.parent):
            write_summary(path, summarise(features, pictures.size, kept))
        return read_summary(path, COMMAND)
