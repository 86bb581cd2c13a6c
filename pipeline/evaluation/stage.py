"""The stage `evaluate`. Importing it takes no time: `--help` needs nothing of torch."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from common.errors import UserError
from common.recipe import Recipe
from common.run_folder import RunFolder
from common.stage import Input, Stage

if TYPE_CHECKING:
    from pipeline.evaluation.measurements import Evaluation


def resolve(recipe: Recipe) -> "Evaluation":
    from pipeline.evaluation.measurements import Evaluation
    from preprocess.from_data import from_data

    return Evaluation.of(from_data(recipe))


def plan(evaluation: "Evaluation") -> Iterator[str]:
    """What is compared with what, and which distances are measured already."""
    from pipeline.evaluation.evaluate import is_measured

    weights = evaluation.extractor_weights
    yield f"distance: {weights.distance_name}, {weights.extractor} with weights of sha256 {weights.sha256[:16]}..."
    yield f"reference: {evaluation.yardstick.reference.label}"
    for images in evaluation.compared:
        state = f"measured in {evaluation.path_of(images)}" if is_measured(evaluation, images) else "to be measured"
        yield f"{images.name}: {images.label}; {state}"


def finished(evaluation: "Evaluation") -> bool:
    from pipeline.evaluation import evaluate

    return evaluate.finished(evaluation)


def evaluate(evaluation: "Evaluation") -> None:
    from pipeline.evaluation import evaluate

    evaluate.evaluate(evaluation)


def extract_part(evaluation: "Evaluation", part: int, parts: int) -> None:
    from pipeline.evaluation import evaluate

    evaluate.extract_part(evaluation, part, parts)


def check(recipe: Recipe, _cluster: str) -> None:
    """Raises UserError for a metric that the extractor does not give, or that needs more images."""
    from pipeline.evaluation.metrics import DENSITY_NEIGHBOURHOOD, ISC_SPLITS, NEIGHBOURHOOD
    from pipeline.features.extractors import wanted_metrics

    wanted_metrics(recipe.evaluate)
    needed = {"inception_score": ISC_SPLITS, "kid": NEIGHBOURHOOD + 1, "precision_recall": NEIGHBOURHOOD + 1}
    of_reference = {**needed, "inception_score": 2, "density_coverage": DENSITY_NEIGHBOURHOOD + 1}
    for metric in ("frechet", *(recipe.evaluate.metrics or ())):
        for field, count, fewest in (
            ("sample.num_samples", recipe.sample.num_samples, needed.get(metric, 2)),
            ("evaluate.reference_samples", recipe.evaluate.reference_samples, of_reference.get(metric, 2)),
        ):
            if count is not None and count < fewest:
                raise UserError(f"{field}: {count}, and the metric {metric} needs {fewest} at least; ask for more")


def fetch(recipe: Recipe) -> None:
    """Downloads Inception's published weights, so that no two jobs do."""
    from pipeline.features.extractors import fetch_extractor_weights

    fetch_extractor_weights(recipe.evaluate)


def look_for_weights(evaluation: "Evaluation") -> None:
    _ = evaluation.extractor_weights


def look_for_images(evaluation: "Evaluation") -> None:
    """Those that no stage reads before this one: held-out images, and a reference that the recipe names."""
    from pipeline.evaluation.image_sets import held_out

    if evaluation.recipe.evaluate.reference is not None:
        _ = evaluation.yardstick.reference
    if evaluation.recipe.data.held_out is not None:
        held_out(evaluation.recipe)


def look_for_samples(evaluation: "Evaluation") -> None:
    """Those that are not measured yet."""
    from pipeline.evaluation.evaluate import is_measured

    for samples in evaluation.samples:
        if not is_measured(evaluation, samples):
            samples.check()


STAGE = Stage(
    name="evaluate",
    resolve=resolve,
    plan=plan,
    finished=finished,
    work=evaluate,
    ranks_share=True,
    part=extract_part,
    merge=evaluate,
    merge_needs_all_cores=lambda _recipe: True,
    fetch=fetch,
    place=lambda recipe: RunFolder(recipe.folder).metrics,
    check=check,
    inputs=(
        Input(look_for_weights),
        Input(look_for_images, ("compose",)),
        Input(plan, ("compose", "train", "sample")),
        Input(look_for_samples, ("compose", "train", "sample")),
    ),
)
