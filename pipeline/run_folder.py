"""Where things lie in a run folder, `runs/<name>/`. The one home of these names.

recipe.yaml, provenance.jsonl, metrics.jsonl, tensorboard/, logs/, checkpoints/<samples seen>/,
weights/<samples seen>/ema/, samples/<samples seen>-<settings key>/, eval/, metrics.json, samples.png, report.html
"""

from pathlib import Path
from typing import Literal

from common.errors import UserError
from common.recipe import Recipe

Weights = Literal["latest"] | int  # which weights: the newest, or those after a number of training samples


def weights_folder(recipe: Recipe, samples_seen: int) -> Path:
    """Holds the averaged weights after `samples_seen` training samples, in diffusers' layout."""
    return recipe.folder / "weights" / f"{samples_seen:012d}" / "ema"


def find_weights(recipe: Recipe, which: Weights) -> tuple[int, Path]:
    """(samples seen, folder) of the exported weights that `which` names: "latest" or a number of samples seen.

    Raises UserError naming what there is.
    """
    # A folder appears by renaming, so that one which exists is whole.
    found = sorted(int(path.parent.name) for path in (recipe.folder / "weights").glob("[0-9]*/ema"))
    if not found:
        raise UserError(f"{recipe.folder / 'weights'}: no weights; run python pipeline/train.py with this recipe first")
    samples_seen = found[-1] if which == "latest" else which
    if samples_seen not in found:
        there = ", ".join(map(str, found))
        raise UserError(
            f"sample.weights: no weights after {samples_seen} samples in {recipe.folder}; there are {there}"
        )
    return samples_seen, weights_folder(recipe, samples_seen)
