"""The training image nearest to each sample, by the features that the distance is measured with."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from common.errors import UserError
from common.recipe import Data
from pipeline.evaluation.image_sets import evenly_spaced, read_images
from pipeline.evaluation.measurements import Evaluation
from pipeline.evaluation.statistics import kept_rows
from preprocess.from_data import open_latents
from preprocess.sources import open_source


def nearest(evaluation: Evaluation, indices: Sequence[int]) -> list[NDArray[np.uint8]]:
    """For each of these samples of the recipe's own set, an image (H, W, 3) of those that the distance was measured
    from. None at all where that is not images of the data, or where features do not say of which image they are.

    It reads features that evaluation kept, at most 50,000, and decodes one image a sample.
    """
    recipe = evaluation.recipe
    kept = evaluation.yardstick.kept_reference if recipe.evaluate.reference is None else None
    if kept is None or not indices:
        return []
    rows = kept.rows["pooled"]
    source = open_source(recipe.data)
    positions = evenly_spaced(len(source.entries), recipe.evaluate.reference_samples).tolist()
    rejected = _rejected(recipe.data)
    accepted = np.array([place for place in positions if source.entries[place].key not in rejected])
    positions_of_rows = accepted[kept_rows(np.arange(len(accepted)), len(positions))]
    if len(positions_of_rows) != len(rows):
        return []
    samples = evaluation.sampling.features(evaluation.sampling.sets[0]).read((0, max(indices) + 1))["pooled"]
    distances = torch.cdist(torch.from_numpy(samples[list(indices)]), torch.from_numpy(rows))
    found = positions_of_rows[distances.argmin(dim=1).numpy()]
    wanted = sorted(set(found.tolist()))
    images = dict(zip(wanted, read_images(recipe.data, source, wanted), strict=True))
    return [images[place] for place in found.tolist()]


def _rejected(data: Data) -> set[str]:
    """The keys of images that encoding rejected, and so the evaluation too."""
    try:
        return {one["key"] for one in open_latents(data).index["rejected"]}
    except UserError:  # the shards are not there any more; a count that differs says that some were rejected
        return set()
