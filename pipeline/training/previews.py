"""Previews of a run while it trains: grids of samples, and the Fréchet distance of some. Rank 0 draws, others wait."""

import torch
from torch import Tensor

from common.errors import UserError
from common.files import disk_errors_as_user_errors
from common.recipe import Recipe
from pipeline.training.grids import GridPainter
from pipeline.training.log import TrainingLog
from preprocess.encoding.encoder import Encoder

Weights = dict[str, Tensor]  # complete tensors by parameter name


class Previewer:
    """Loads the models that the recipe's previews need; raises UserError at once if one is missing.

    A network that has learned nothing may draw nothing: then the log says so, and training goes on.
    """

    def __init__(self, recipe: Recipe, log: TrainingLog, device: torch.device) -> None:
        self.folder, self.log = recipe.folder, log
        vae = Encoder(recipe.vae, device)
        self.painter = GridPainter(recipe, vae, device) if recipe.train.previews.grid_every_samples else None
        self.distance = None
        if recipe.train.previews.distance_every_samples:
            from pipeline.training.preview_fid import PreviewDistance  # seconds to import

            self.distance = PreviewDistance(recipe, vae)

    def paint(self, weights: Weights, samples_seen: int) -> None:
        """A grid, as a file and in the log. Raises UserError where it cannot be written."""
        assert self.painter is not None
        try:
            with disk_errors_as_user_errors(self.folder):
                self.log.image(self.painter.paint(weights, samples_seen), samples_seen)
        except UserError as error:
            self.log.event({"samples": samples_seen, "event": "no grid", "reason": str(error)})

    def measure(self, weights: Weights, samples_seen: int) -> tuple[float, str] | None:
        """The distance and its name; None where it cannot be measured."""
        assert self.distance is not None
        try:
            return self.distance.measure(weights), self.distance.name
        except UserError as error:
            self.log.event({"samples": samples_seen, "event": "no distance", "reason": str(error)})
            return None
