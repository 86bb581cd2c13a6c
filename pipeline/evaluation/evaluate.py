"""Measures what is not measured yet, and writes `metrics.json`."""

import sys
from collections.abc import Iterator

from common.errors import UserError
from common.ranks import rank_and_world_size, share_cores
from common.run_folder import RunFolder
from common.sealed import read_sealed, write_sealed
from pipeline.evaluation.image_sets import ComparedSet
from pipeline.evaluation.measurements import REMEDY, Evaluation, Measurement, Metrics, NumberForm


def evaluate(evaluation: Evaluation) -> None:
    """The stage. Each of several ranks extracts the features of its chunks; the one that ends last does the rest.

    Where there were none to extract, the first rank does.
    """
    rank, world_size = rank_and_world_size()
    share_cores()
    missing = [images for images in evaluation.compared if not is_measured(evaluation, images)]
    asked = [samples for samples in evaluation.samples if samples in missing]
    for samples in asked:
        samples.check()  # what is missing is named now, not after minutes of work on the others
    if world_size > 1:
        nothing_to_extract = all(samples.is_extracted for samples in asked)
        for samples in asked:
            samples.extract(rank, world_size)
        if not all(samples.is_extracted for samples in asked) or (nothing_to_extract and rank > 0):
            return
        share_cores(alone=True)
    for images in missing:
        evaluation.measure(images)
    metrics = evaluation.metrics()
    write_sealed(RunFolder(evaluation.recipe.folder).metrics, metrics)
    for line in summary(metrics["measurements"]):
        print(line)


def extract_part(evaluation: Evaluation, part: int, parts: int) -> None:
    """The features of this part's chunks of samples."""
    for samples in evaluation.samples:
        samples.check()
        samples.extract(part, parts)


def finished(evaluation: Evaluation) -> bool:
    try:
        return read_metrics(RunFolder(evaluation.recipe.folder)) == evaluation.metrics()
    except UserError:  # something is missing or damaged; the stage says what
        return False


def read_metrics(folder: RunFolder) -> Metrics:
    """`metrics.json`. Raises UserError where it is missing or not as it was written."""
    return read_sealed(folder.metrics, Metrics, REMEDY)


def is_measured(evaluation: Evaluation, images: ComparedSet) -> bool:
    """A damaged measurement is a warning, and is measured again."""
    try:
        evaluation.measured(images)
    except UserError as fault:
        if evaluation.path_of(images).exists():
            print(f"warning: {fault}", file=sys.stderr, flush=True)
        return False
    return True


def summary(measurements: list[Measurement]) -> Iterator[str]:
    """The numbers of each set, and what they were measured from."""
    for measurement in measurements:
        spread, ranges = measurement["numbers"]["frechet"]["spread"], measurement["ranges"]
        error = f" ± {spread:.2f} (bootstrap)" if spread is not None else ""
        if len(ranges) > 1:
            error += f" ({min(ranges):.2f} to {max(ranges):.2f} over {len(ranges)} ranges)"
        number = f"{measurement['distance']} = {measurement['value']:.2f}{error}"
        yield f"{number}: {measurement['label']}, from {measurement['reference']['label']}"
        others = [_short(number) for key, number in measurement["numbers"].items() if key != "frechet"]
        if others:
            yield f"  {', '.join(others)}"
        yield from (f"  note: {note}" for note in measurement["notes"])


def _short(number: NumberForm) -> str:
    """Without the extractor, which the line above names."""
    spread = f" ± {number['spread']:.2g}" if number["spread"] is not None else ""
    return f"{number['name'].partition(' (')[0]} {number['value']:.4g}{spread}"
