"""Draws the pictures that the recipe measures: from the trained weights, and from the network before its first step.

  python pipeline/sample.py --config recipes/demo.yaml
  torchrun --nproc-per-node 8 pipeline/sample.py --config recipes/demo.yaml sample.weights=64000

Run it again to go on: whole chunks are kept, whatever the number of processes that drew them.
"""

import sys
from collections.abc import Iterator

from common.command import run_command
from common.recipe import Recipe


def plan(recipe: Recipe) -> Iterator[str]:
    """What sampling costs, which weights it takes, and what is there already."""
    from pipeline.samples import blocks_a_picture, chunk_spans, missing_chunks, sample_set, wanted_weights

    settings = recipe.sample
    iterations = f" x {settings.iterations} iterations ({settings.allocation})" if recipe.model.kind == "fpdm" else ""
    yield (
        f"sampler: {settings.sampler}, {settings.num_steps} steps{iterations}, guidance {settings.guidance_scale:g}: "
        f"{blocks_a_picture(recipe):,} blocks a picture"
    )
    chunks = len(chunk_spans(recipe))
    for weights in wanted_weights(recipe):
        found, missing = sample_set(recipe, weights), len(missing_chunks(recipe, weights))
        yield f"weights: {found.weights}, sha256 {found.settings['weights_sha256'][:16]}..."
        yield f"samples: {settings.num_samples:,} in {found.folder}: {chunks - missing} chunks there, {missing} missing"


def work(recipe: Recipe) -> None:
    from pipeline.samples import sample

    sample(recipe)


if __name__ == "__main__":
    sys.exit(run_command(__doc__, plan, work))
