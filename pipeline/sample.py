"""Draws the pictures that the recipe measures: from the trained weights, and from the network before its first step.

  python pipeline/sample.py --config recipes/demo.yaml
  python pipeline/sample.py --config recipes/demo.yaml --cluster slurm --jobs 16
  torchrun --nproc-per-node 8 pipeline/sample.py --config recipes/demo.yaml sample.weights=64000

Run it again to go on: whole chunks are kept, whatever the number of processes that drew them.
"""

import sys
from collections.abc import Iterator

from common.command import run_command
from common.parts import run_parts
from common.recipe import Recipe


def plan(recipe: Recipe) -> Iterator[str]:
    """What sampling costs, which weights it takes, and what is there already."""
    from pipeline.sampling.chunks import chunk_spans
    from pipeline.sampling.plans import blocks_a_picture
    from pipeline.sampling.sample_set import sample_set, total_samples, wanted_weights
    from pipeline.sampling.samples import missing_chunks

    settings = recipe.sample
    iterations = ""
    if recipe.model.kind == "fpdm":
        iterations = f" x {settings.iterations} iterations ({settings.allocation}, reuse {settings.reuse})"
    steps = " or ".join(map(str, (settings.num_steps, *settings.step_choices)))
    yield (
        f"sampler: {settings.sampler}, {steps} steps{iterations}, guidance {settings.guidance_scale:g}: "
        f"{'at most ' if settings.tolerance else ''}{blocks_a_picture(recipe):,} blocks a picture"
    )
    chunks = len(chunk_spans(total_samples(recipe), settings.chunk_samples))
    for weights in wanted_weights(recipe):
        found, missing = sample_set(recipe, weights), len(missing_chunks(recipe, weights))
        yield f"weights: {found.weights}, sha256 {found.settings['weights_sha256'][:16]}..."
        there = f"{chunks - missing} chunks there, {missing} missing"
        yield f"samples: {total_samples(recipe):,} in {found.folder} ({settings.output}): {there}"


def work(recipe: Recipe) -> None:
    from pipeline.sampling.samples import sample

    sample(recipe)


def in_jobs(recipe: Recipe, cluster: str, jobs: int) -> None:
    """An array of jobs, each drawing every `jobs`-th chunk; then what is made of all chunks."""
    run_parts(recipe, cluster, "sample", "pipeline.sampling.samples", "sample", jobs)
    work(recipe)


if __name__ == "__main__":
    sys.exit(run_command(__doc__, plan, work, in_jobs=in_jobs, shared=True))
