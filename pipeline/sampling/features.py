"""Features of samples, in a chunk beside each chunk of images: all that a distance needs of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError
from common.files import content_key, shared_folder_lock
from common.run_folder import SampleFolder
from pipeline.features.extractors import NamedExtractor
from pipeline.sampling.chunks import Chunk, Span, chunk_path, cover_gap, iterate, write_chunk


@dataclass(frozen=True)
class SampleFeatures:
    """Features of the set in the folder `samples`, by one extractor."""

    samples: Path
    extractor: NamedExtractor

    @property
    def folder(self) -> Path:
        key = content_key([self.samples.name, self.extractor.weights.sha256, self.extractor.layers])
        return SampleFolder(self.samples).features(key)

    def write(self, span: Span, images: NDArray[np.uint8]) -> None:
        """Writes features of samples first to end - 1. Raises UserError for constant images, with their count."""
        constant = int((images.reshape(len(images), -1).min(1) == images.reshape(len(images), -1).max(1)).sum())
        if constant:
            raise UserError(f"samples {span[0]} to {span[1] - 1}: {constant} of {len(images)} images are constant")
        batches = list(self.extractor.features(images))
        rows = {layer: np.concatenate([batch[layer] for batch in batches]) for layer in batches[0]}
        write_chunk(chunk_path(self.folder, span), rows)

    def extract(self, spans: Sequence[Span]) -> None:
        """Extracts features for the given chunks that lack them. Raises UserError naming missing or damaged samples."""
        missing = [span for span in spans if cover_gap(self.folder, span)]
        if missing:
            with shared_folder_lock(self.samples):
                for span in missing:
                    self.write(span, np.concatenate([rows["images"] for rows in iterate(self.samples, span)]))

    def read(self, span: Span) -> Chunk:
        """(D,) a layer and sample, of samples first to end - 1. Raises UserError naming what is missing or damaged."""
        parts = list(iterate(self.folder, span))
        return {layer: np.concatenate([rows[layer] for rows in parts]) for layer in parts[0]}
