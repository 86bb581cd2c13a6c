"""Features of samples, a chunk beside each chunk of pictures: what a distance is computed of, whoever computed them."""

from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError
from common.files import content_key, shared_folder_lock
from common.recipe import Recipe
from common.run_folder import Weights
from pipeline.features.extractors import Extractor, extract, find_weights, load_extractor, wanted_layers
from pipeline.sampling.chunks import Chunk, Span, chunk_path, chunk_spans, cover_gap, iterate, write_chunk
from pipeline.sampling.sample_set import sample_set, total_samples


def features_folder(recipe: Recipe, folder: Path) -> Path:
    """Of the set of samples in `folder`, for the recipe's extractor and metrics."""
    key = content_key([folder.name, find_weights(recipe.evaluate).sha256, wanted_layers(recipe.evaluate)])
    return folder / f"features-{key}"


class FeatureWriter:
    """Writes the features of chunks of one set."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe, self.folder = recipe, features_folder(recipe, folder)

    @cached_property
    def extractor(self) -> Extractor:
        return load_extractor(find_weights(self.recipe.evaluate), wanted_layers(self.recipe.evaluate))

    def __call__(self, span: Span, images: NDArray[np.uint8]) -> None:
        """Of samples first to end - 1. Raises UserError for constant pictures, with their count."""
        constant = int((images.reshape(len(images), -1).min(1) == images.reshape(len(images), -1).max(1)).sum())
        if constant:
            raise UserError(f"samples {span[0]} to {span[1] - 1}: {constant} of {len(images)} pictures are constant")
        batches = list(extract(self.extractor, images, self.recipe.evaluate.batch_size))
        rows = {layer: np.concatenate([batch[layer] for batch in batches]) for layer in self.extractor.layers}
        write_chunk(chunk_path(self.folder, span), rows)


def extract_missing(recipe: Recipe, weights: Weights, part: int = 0, parts: int = 1) -> None:
    """Features of the chunks of this part that have none: chunk k belongs to part k % parts."""
    folder = sample_set(recipe, weights).folder
    write = FeatureWriter(recipe, folder)
    spans = chunk_spans(total_samples(recipe), recipe.sample.chunk_samples)[part::parts]
    spans = [span for span in spans if cover_gap(write.folder, span)]
    if spans:
        with shared_folder_lock(folder):
            for span in spans:
                write(span, np.concatenate([rows["images"] for rows in iterate(folder, span)]))


def read_features(recipe: Recipe, weights: Weights, span: Span) -> Chunk:
    """(D,) a layer and sample, of samples first to end - 1. Raises UserError naming what is missing or damaged."""
    folder = features_folder(recipe, sample_set(recipe, weights).folder)
    parts = list(iterate(folder, span))
    return {layer: np.concatenate([rows[layer] for rows in parts]) for layer in parts[0]}
