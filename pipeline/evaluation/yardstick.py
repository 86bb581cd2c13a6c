"""What distances are measured with and from: an extractor and a reference, both resolved once."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path

from tqdm import tqdm

from common.errors import UserError
from common.files import content_key, folder_lock, shared_folder_lock
from common.recipe import Recipe
from common.run_folder import RunFolder
from pipeline.evaluation.image_sets import ImageSet
from pipeline.evaluation.references import reference
from pipeline.evaluation.statistics import KEPT_LAYERS, Summary, read_summary, summarise, write_summary
from pipeline.features.extractors import NamedExtractor
from pipeline.sampling.models import Models

COMMAND = "python pipeline/eval_fid.py"


class Yardstick:
    """The same for all recipes that differ in `sample` alone, such as the points of a sweep."""

    def __init__(self, recipe: Recipe, models: Models) -> None:
        self.recipe, self.models = recipe, models

    @property
    def extractor(self) -> NamedExtractor:
        return self.models.extractor

    @cached_property
    def reference(self) -> ImageSet:
        """Raises UserError as `references.reference`."""
        return reference(self.recipe)

    @cached_property
    def reference_summary(self) -> Summary:
        """Feature summary of the reference, cached across runs; precomputed statistics in its file take precedence."""
        summary = Summary({}, {}) if self.reference.open is None else self._reference_of_images
        if self.reference.statistics is None:
            return summary
        return Summary(self.reference.statistics(), summary.rows)

    def prepare_reference(self) -> None:
        """Extracts the features of its images now, before several jobs would do so at the same time."""
        if self.reference.open is not None:
            _ = self._reference_of_images

    @property
    def kept_reference(self) -> Summary | None:
        """Of the images that the reference is; None where no evaluation has kept it: nothing is extracted."""
        path = self._path(self.reference, RunFolder(self.recipe.folder).references)
        return read_summary(path, COMMAND) if path.exists() else None

    @cached_property
    def _reference_of_images(self) -> Summary:
        folder = RunFolder(self.recipe.folder).references
        return self._summary(self.reference, folder, folder, ("pooled",))  # nobody asks for its Inception Score

    def summary(self, images: ImageSet) -> Summary:
        """Feature summary of images other than the reference; computed once for each extractor and content."""
        folder = RunFolder(self.recipe.folder)
        return self._summary(images, folder.statistics, folder.measurements, KEPT_LAYERS)

    def _summary(self, images: ImageSet, folder: Path, held: Path, layers: Sequence[str]) -> Summary:
        """From its file in `folder`, which is written first where it is missing or damaged, by one process alone."""
        path = self._path(images, folder)
        if (kept := _kept(path)) is not None:
            return kept
        _ = self.extractor.network  # what is missing of it is said before images are read
        with shared_folder_lock(held), _waited_for(folder, f".{path.name}.lock", f"features of {images.name}"):
            if (kept := _kept(path)) is not None:
                return kept
            bar = tqdm(images.iterate(), total=images.size, unit="image", desc=f"features of {images.name}")
            write_summary(path, summarise(self.extractor.features(bar), images.size, layers))
        return read_summary(path, COMMAND)

    def _path(self, images: ImageSet, folder: Path) -> Path:
        key = content_key([images.content, self.extractor.weights.sha256, self.extractor.layers])
        return folder / f"{images.name}-{key}.npz"


def _kept(path: Path) -> Summary | None:
    """None where it is missing or, with a warning, damaged."""
    try:
        return read_summary(path, COMMAND) if path.exists() else None
    except UserError as fault:
        print(f"warning: {fault}; now it is made again", file=sys.stderr, flush=True)
        return None


@contextmanager
def _waited_for(folder: Path, name: str, what: str) -> Iterator[None]:
    """Holds the lock `name` in `folder`, and says so where another process is making `what` meanwhile."""
    with ExitStack() as held:
        try:
            held.enter_context(folder_lock(folder, name, place=what))
        except UserError as busy:
            print(f"waiting: {busy}", file=sys.stderr, flush=True)
            held.enter_context(folder_lock(folder, name, wait=True, place=what))
        yield
