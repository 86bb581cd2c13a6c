"""Writes a run's weights as a diffusers pipeline, which loads without a recipe and without this project's other rooms.

  python pipeline/export.py --config recipes/demo.yaml
  python -c "from fpdm.pipeline_hf import FPDMPipeline; FPDMPipeline.from_pretrained('runs/demo/pipeline')([0])"

Into `pipeline/` of the run folder: model_index.json, transformer/, vae/.
"""

import sys
from collections.abc import Iterator

from common.command import run_command
from common.errors import UserError
from common.recipe import Recipe
from common.run_folder import RunFolder


def plan(recipe: Recipe) -> Iterator[str]:
    from pipeline.sampling.sample_set import sample_set

    yield f"weights: {sample_set(recipe, recipe.sample.weights).weights}"
    yield f"pipeline: {RunFolder(recipe.folder).pipeline}"


def export(recipe: Recipe) -> None:
    """Replaces what was exported before. Raises UserError where the weights are damaged."""
    from common.files import atomic_folder
    from common.run_weights import REMEDY
    from fpdm.pipeline_hf import FPDMPipeline, FPDMTransformer2DModel
    from pipeline.sampling.sample_set import sample_set
    from preprocess.encoding.encoder import fetch_vae, load_vae

    try:
        transformer = FPDMTransformer2DModel.from_pretrained(sample_set(recipe, recipe.sample.weights).weights)
    except ValueError as error:
        raise UserError(f"{error}; {REMEDY}") from None
    target = RunFolder(recipe.folder).pipeline
    with atomic_folder(target) as folder:
        FPDMPipeline(transformer, load_vae(fetch_vae(recipe.vae))).save_pretrained(folder)
    print(f"pipeline: {target}")


if __name__ == "__main__":
    sys.exit(run_command(__doc__, plan, export))
