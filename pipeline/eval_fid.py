"""Measures how far the samples lie from the training pictures: FID, or the Fréchet distance of another extractor.

  python pipeline/eval_fid.py --config recipes/demo.yaml
  python pipeline/eval_fid.py --config recipes/demo.yaml evaluate.feature_extractor=inception-v3-compat
  python pipeline/eval_fid.py --config recipes/demo.yaml --cluster slurm --jobs 16
  torchrun --nproc-per-node 8 pipeline/eval_fid.py --config recipes/demo.yaml

Also measured against the same reference: the network before its first step, held-out pictures (the floor), and their
reconstructions (what the autoencoder alone costs). What is measured already is kept.
"""

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from common.command import run_command
from common.errors import UserError
from common.parts import run_parts
from common.recipe import Recipe
from common.sealed import read_sealed, write_sealed

if TYPE_CHECKING:
    from pipeline.evaluation.image_sets import PictureSet, SampleRanges
    from pipeline.evaluation.measurements import Evaluation, Measurement, Metrics, NumberForm


def evaluate(recipe: Recipe) -> None:
    """The stage: measures what is not measured yet, then writes `metrics.json`.

    Of several ranks each extracts the features of its chunks of samples, and the one that ends last does the rest.
    """
    from common.ranks import rank_and_world_size, share_cores
    from pipeline.evaluation.measurements import Evaluation

    rank, world_size = rank_and_world_size()
    share_cores()
    evaluation = Evaluation(recipe)
    missing = [pictures for pictures in evaluation.compared if not _measured(evaluation, pictures)]
    asked = [samples for samples in evaluation.samples if samples in missing]
    for samples in asked:
        samples.check()  # what is not there is named now, not after minutes of work on the others
    if world_size > 1:
        for samples in asked:
            samples.extract(rank, world_size)
        if not all(samples.extracted for samples in asked):
            return
    for pictures in missing:
        evaluation.measure(pictures)
    metrics = evaluation.metrics()
    write_sealed(recipe.folder / "metrics.json", metrics)
    for line in summary(metrics["measurements"]):
        print(line)


def _measured(evaluation: "Evaluation", pictures: "SampleRanges | PictureSet") -> bool:
    """Whether it is there; what is damaged is told, and no measurement."""
    try:
        evaluation.measured(pictures)
    except UserError as fault:
        if evaluation.path_of(pictures).exists():
            print(f"warning: {fault}", file=sys.stderr, flush=True)
        return False
    return True


def summary(measurements: list["Measurement"]) -> Iterator[str]:
    """The numbers of each set, and what they were measured from."""
    for found in measurements:
        spread = found["numbers"]["frechet"]["spread"]
        error = f" ± {spread:.2f} (bootstrap)" if spread is not None else ""
        if len(found["ranges"]) > 1:
            error += f" ({min(found['ranges']):.2f} to {max(found['ranges']):.2f} over {len(found['ranges'])} ranges)"
        yield f"{found['distance']} = {found['value']:.2f}{error}: {found['label']}, from {found['reference']['label']}"
        others = [_short(number) for key, number in found["numbers"].items() if key != "frechet"]
        if others:
            yield f"  {', '.join(others)}"
        yield from (f"  note: {note}" for note in found["notes"])


def _short(number: "NumberForm") -> str:
    """Without the extractor, which the line above names."""
    spread = f" ± {number['spread']:.2g}" if number["spread"] is not None else ""
    return f"{number['name'].partition(' (')[0]} {number['value']:.4g}{spread}"


def finished(recipe: Recipe) -> bool:
    from pipeline.evaluation.measurements import Evaluation

    try:
        return read_metrics(recipe) == Evaluation(recipe).metrics()
    except UserError:  # something is missing or damaged; the stage says what
        return False


def read_metrics(recipe: Recipe) -> "Metrics":
    """`metrics.json`. Raises UserError where it is missing or not as it was written."""
    from pipeline.evaluation.measurements import REMEDY, Metrics

    return read_sealed(recipe.folder / "metrics.json", Metrics, REMEDY)


def plan(recipe: Recipe) -> Iterator[str]:
    """What is compared with what, and which distances are there already."""
    from pipeline.evaluation.measurements import Evaluation

    evaluation = Evaluation(recipe)
    weights = evaluation.weights
    yield f"distance: {weights.distance_name}, {weights.extractor} with weights of sha256 {weights.sha256[:16]}..."
    yield f"reference: {evaluation.reference.label}"
    for pictures in evaluation.compared:
        path = evaluation.path_of(pictures)
        there = _measured(evaluation, pictures)
        yield f"{pictures.name}: {pictures.label}; " + (f"measured in {path}" if there else "to be measured")


def in_jobs(recipe: Recipe, cluster: str, jobs: int) -> None:
    """An array of jobs that extract the features of samples; then one that reduces them to numbers."""
    run_parts(recipe, cluster, "features", "pipeline.eval_fid", "extract_part", jobs)
    run_parts(recipe, cluster, "evaluate", "pipeline.eval_fid", "evaluate")


def extract_part(recipe: Recipe, part: int = 0, parts: int = 1) -> None:
    """The features of this part's chunks of samples."""
    from pipeline.evaluation.measurements import Evaluation

    for samples in Evaluation(recipe).samples:
        samples.check()
        samples.extract(part, parts)


if __name__ == "__main__":
    sys.exit(run_command(__doc__, plan, evaluate, in_jobs=in_jobs, shared=True))
