"""Measures how far the samples lie from the training pictures: FID, or the Fréchet distance of another extractor.

  python pipeline/eval_fid.py --config recipes/demo.yaml
  python pipeline/eval_fid.py --config recipes/demo.yaml evaluate.feature_extractor=inception-v3-compat

Also measured against the same reference: the network before its first step, held-out pictures (the floor), and their
reconstructions (what the autoencoder alone costs). What is measured already is kept.
"""

import sys
from collections.abc import Iterator

from common.command import run_command
from common.errors import UserError
from common.files import read_json, write_json
from common.recipe import Recipe


def evaluate(recipe: Recipe) -> None:
    """The stage: measures what is not measured yet, then writes `metrics.json`."""
    from pipeline.evaluation import Evaluation

    evaluation = Evaluation(recipe)
    missing = [pictures for pictures in evaluation.compared if not evaluation.path_of(pictures).exists()]
    for pictures in missing:
        pictures.open()  # samples that are not there are named now, not after minutes of work on the others
    for pictures in missing:
        evaluation.measure(pictures)
    metrics = evaluation.metrics()
    write_json(recipe.folder / "metrics.json", metrics)
    for found in metrics["measurements"]:
        print(f"{found['distance']} = {found['value']:.2f}: {found['label']}")


def finished(recipe: Recipe) -> bool:
    from pipeline.evaluation import Evaluation

    try:
        return read_json(recipe.folder / "metrics.json") == Evaluation(recipe).metrics()
    except UserError:  # something is missing; the stage says what
        return False


def plan(recipe: Recipe) -> Iterator[str]:
    """What is compared with what, and which distances are there already."""
    from pipeline.evaluation import Evaluation

    evaluation = Evaluation(recipe)
    weights = evaluation.weights
    yield f"distance: {weights.distance_name}, {weights.extractor} with weights of sha256 {weights.sha256[:16]}..."
    yield f"reference: {evaluation.reference.label}"
    for pictures in evaluation.compared:
        path = evaluation.path_of(pictures)
        yield f"{pictures.name}: {pictures.label}; " + (f"measured in {path}" if path.exists() else "to be measured")


if __name__ == "__main__":
    sys.exit(run_command(__doc__, plan, evaluate))
