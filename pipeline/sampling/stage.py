"""The stage `sample`. Importing it takes no time: `--help` needs nothing of torch."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from common.recipe import Recipe
from common.run_folder import RunFolder
from common.stage import Input, Stage
from preprocess.encoding.stage import fetch

if TYPE_CHECKING:
    from pipeline.sampling.sample_set import Sampling


def resolve(recipe: Recipe) -> "Sampling":
    from pipeline.sampling.sample_set import Sampling
    from preprocess.from_data import from_data

    return Sampling.of(from_data(recipe))


def plan(sampling: "Sampling") -> Iterator[str]:
    """What sampling costs, which weights it takes, and which chunks are missing."""
    from pipeline.sampling.generate import missing_chunks
    from pipeline.sampling.iterates import are_missing
    from pipeline.sampling.plans import blocks_an_image

    recipe, settings = sampling.recipe, sampling.recipe.sample
    iterations = ""
    if recipe.model.kind == "fpdm":
        iterations = f" x {settings.iterations} iterations ({settings.allocation}, reuse {settings.reuse})"
    yield (
        f"sampler: {settings.sampler}, {settings.num_steps} steps{iterations}, guidance {settings.guidance_scale:g}: "
        f"{'at most ' if settings.tolerance else ''}{blocks_an_image(recipe):,} blocks an image"
    )
    for samples in sampling.sets:
        chunks, missing = len(sampling.spans), len(missing_chunks(sampling, samples))
        yield f"weights: {samples.weights}, sha256 {samples.settings['weights_sha256'][:16]}..."
        state = f"{chunks - missing} of {chunks} chunks finished"
        if are_missing(sampling, samples):
            yield f"iterates, for the report: to be drawn in {samples.folder}"
        yield f"samples: {sampling.total:,} in {samples.folder} ({settings.output}): {state}"


def finished(sampling: "Sampling") -> bool:
    from pipeline.sampling import generate

    return generate.finished(sampling)


def sample(sampling: "Sampling", part: int = 0, parts: int = 1) -> None:
    from pipeline.sampling import generate

    generate.sample(sampling, part, parts)


def look_for_vae(sampling: "Sampling") -> None:
    from preprocess.encoding.encoder import find_vae

    find_vae(sampling.recipe.vae)  # one that is still to be downloaded is no fault: `fetch` does


STAGE = Stage(
    name="sample",
    resolve=resolve,
    plan=plan,
    finished=finished,
    work=sample,
    ranks_share=True,
    all_processes=True,
    part=sample,
    fetch=fetch,
    place=lambda recipe: RunFolder(recipe.folder).samples,
    inputs=(Input(look_for_vae, ("autoencoder",)), Input(plan, ("train",))),
)
