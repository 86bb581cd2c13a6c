"""The stream of training samples: everything about position p is a function of (seed, p).

Position p of the stream belongs to the step p // batch_size, whatever the number of ranks; a rank takes an equal,
contiguous part of each step's positions. Epoch e is a permutation of the data set keyed by (seed, e), so that every
picture comes exactly once an epoch and a step may span two epochs.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.recipe import Recipe
from fpdm import rng
from fpdm.diffusion import Diffusion
from preprocess.encoder import draw_latents
from preprocess.shards import LatentShards


@dataclass(frozen=True)
class Batch:
    """What one forward pass needs: `latents` and `noise` (B, C, h, w), `timesteps` and `labels` (B,)."""

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(**{name: tensor.to(device, non_blocking=True) for name, tensor in vars(self).items()})


@dataclass(frozen=True)
class Stream:
    """The endless, seekable stream of a recipe's training samples."""

    recipe: Recipe
    shards: LatentShards
    diffusion: Diffusion

    def indices(self, positions: Tensor) -> Tensor:
        """(B,) stream positions -> (B,) sample indices of the data set."""
        size, seed = len(self.shards), self.recipe.seed
        epochs, places = positions // size, positions % size
        indices = torch.empty_like(positions)
        for epoch in epochs.unique().tolist():
            of_epoch = epochs == epoch
            indices[of_epoch] = rng.permute(seed, f"train/order/{epoch}", places[of_epoch], size)
        return indices

    def batch(self, first: int, count: int) -> Batch:
        """The samples at positions `first` to `first + count`. Raises UserError naming a damaged sample."""
        recipe, seed = self.recipe, self.recipe.seed
        positions = torch.arange(first, first + count)
        indices = self.indices(positions).numpy()
        moments = torch.from_numpy(self.shards.gather(indices, self._flips(positions))).float()  # (B, 2C, h, w)
        shape = (moments.shape[1] // 2, *moments.shape[2:])
        vae = self.shards.index["settings"]["vae"]
        normals = rng.normal(seed, "train/posterior", positions, shape)
        latents = draw_latents(moments, normals, vae["scaling_factor"], vae["shift_factor"])
        labels = torch.from_numpy(self.shards.labels_at(indices))
        dropped = rng.uniform(seed, "train/label_dropout", positions) < recipe.train.label_dropout
        return Batch(
            latents=latents,
            noise=rng.normal(seed, "train/noise", positions, shape),
            timesteps=self.diffusion.timesteps(rng.uniform(seed, "train/timestep", positions)),
            labels=torch.where(dropped, recipe.model.num_classes, labels),  # num_classes is the null label
        )

    def _flips(self, positions: Tensor) -> np.ndarray | None:
        if not self.recipe.data.flips:
            return None
        return rng.integers(self.recipe.seed, "train/flip", positions, 2).bool().numpy()
