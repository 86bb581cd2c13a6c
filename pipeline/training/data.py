"""The stream of training samples: everything about position p is a function of (seed, p).

Position p of the stream belongs to the step p // batch_size, whatever the number of ranks; a rank takes an equal,
contiguous part of each step's positions. `pipeline/training/order.py` decides which sample comes at p: each comes
exactly once an epoch, and a step may span two epochs.
"""

from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.one_ahead import one_ahead
from common.recipe import Data, Recipe, latent_shape, num_classes, timestep_density
from fpdm import rng
from fpdm.diffusion import Diffusion
from fpdm.latents import draw_latents
from pipeline.training.order import BlockOrder, RandomOrder
from preprocess.from_data import open_latents
from preprocess.shards import LatentShards
from preprocess.shards.storage import CachedFolder

DRAWN_TOGETHER = 256  # samples of a rank, or a few more: whole steps


def open_shards(recipe: Recipe) -> LatentShards:
    """As `open_latents`; raises UserError where latent shape or classes are not the recipe's."""
    shards = open_latents(recipe.data)
    channels, height, width = latent_shape(recipe)
    if shards.shape != (2 * channels, height, width):
        raise UserError(
            f"data.shards: {recipe.data.shards} holds moments of shape {shards.shape}, data.resolution and vae make "
            f"{(2 * channels, height, width)}; encode again or correct the recipe"
        )
    if shards.num_classes != recipe.model.num_classes:
        raise UserError(
            f"model.num_classes: found {recipe.model.num_classes}, {recipe.data.shards} has {shards.num_classes}; set "
            "it to that, or leave it out"
        )
    return shards


def stage_in(data: Data, shards: LatentShards) -> None:
    """Copies all shards to this machine's cache, if data.stage_in is set."""
    if data.stage_in and isinstance(shards.storage, CachedFolder):
        shards.storage.stage(shards.index["shardlist"])


@dataclass(frozen=True)
class Batch:
    """One forward pass: `latents` and `noise` (B, C, h, w); `timesteps`, `labels` and weights of the losses (B,).

    tokens (B, T): numbers of the network's tokens in a random order, of which sparse iterations see the first; (B, 0)
    where `train.sparse_tokens` asks for none.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    labels: Tensor
    weights: Tensor
    tokens: Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(**{name: tensor.to(device, non_blocking=True) for name, tensor in vars(self).items()})

    def split(self, size: int) -> "list[Batch]":
        """Parts of `size` samples each, in order."""
        parts = zip(*(tensor.split(size) for tensor in vars(self).values()), strict=True)
        return [Batch(*part) for part in parts]


@dataclass(frozen=True)
class Stream:
    """The endless, seekable stream of a recipe's training samples."""

    recipe: Recipe
    shards: LatentShards
    diffusion: Diffusion

    @cached_property
    def order(self) -> RandomOrder | BlockOrder:
        data, size = self.recipe.data, len(self.shards)
        if data.order == "random":
            return RandomOrder(self.recipe.seed, size)
        block = self.shards.index["settings"].get("shard_samples", 1)
        return BlockOrder(self.recipe.seed, size, self.recipe.train.batch_size, block, data.mixed_blocks, data.lanes)

    def batch(self, positions: Tensor) -> Batch:
        """The samples at these positions (B,). Raises UserError naming a damaged sample."""
        recipe, seed, count = self.recipe, self.recipe.seed, len(positions)
        indices = self.order.indices(positions).numpy()
        moments = torch.from_numpy(self.shards.gather(indices, self._flips(positions))).float()  # (B, 2C, h, w)
        shape = (moments.shape[1] // 2, *moments.shape[2:])
        drawn = recipe.train.latents == "drawn"
        normals = rng.normal(seed, "train/posterior", positions, shape) if drawn else torch.zeros(count, *shape)
        latents = draw_latents(moments, normals, *self.shards.scaling)
        labels = torch.from_numpy(self.shards.labels_at(indices))
        dropped = rng.uniform(seed, "train/label_dropout", positions) < recipe.train.label_dropout
        density, u = timestep_density(recipe.train.timesteps), self._timestep_quantiles(positions)
        return Batch(
            latents=latents,
            noise=rng.normal(seed, "train/noise", positions, shape),
            timesteps=self.diffusion.timesteps(density.fractions(u)),
            labels=torch.where(dropped, num_classes(recipe.model), labels),  # num_classes is the null label
            weights=density.weights(u) if recipe.train.timesteps.corrected else torch.ones(count),
            tokens=self._shuffled_tokens(positions),
        )

    def _shuffled_tokens(self, positions: Tensor) -> Tensor:
        """(B, T), or (B, 0) where no step has sparse iterations."""
        patches = latent_shape(self.recipe)[1] // self.recipe.model.patch_size
        count = patches**2 if self.recipe.train.sparse_tokens < 1 else 0
        return rng.uniform(self.recipe.seed, "train/tokens", positions, (count,)).argsort(dim=1, stable=True)

    def _timestep_quantiles(self, positions: Tensor) -> Tensor:
        """(B,) in [0, 1): uniform, or one in each of the step's equal parts, which are dealt out at random."""
        seed, batch_size = self.recipe.seed, self.recipe.train.batch_size
        u = rng.uniform(seed, "train/timestep", positions)
        if not self.recipe.train.timesteps.stratified:
            return u
        streams = [f"train/timestep/{step}" for step in (positions // batch_size).tolist()]
        places = rng.permute(seed, streams, positions % batch_size, batch_size)
        return (places + u.double()) / batch_size

    def _flips(self, positions: Tensor) -> np.ndarray | None:
        if not self.recipe.data.flips:
            return None
        return rng.integers(self.recipe.seed, "train/flip", positions, 2).bool().numpy()

    def sample_ids(self, positions: range) -> list[int]:
        """The data set's samples at these positions."""
        return self.order.indices(torch.arange(positions.start, positions.stop)).tolist()


def rank_positions(batch_size: int, samples_seen: int, rank: int, world_size: int) -> range:
    """A rank's stream positions in the step that starts at `samples_seen`."""
    share = batch_size // world_size
    return range(samples_seen + rank * share, samples_seen + (rank + 1) * share)


def step_batches(
    stream: Stream, samples_seen: int, total: int, rank: int, world_size: int
) -> Generator[list[Batch], None, None]:
    """A rank's micro-batches of each step from `samples_seen` to `total`. Raises UserError naming a damaged sample.

    While some steps' are used, a thread draws those of the next, so a damaged sample ends training a few steps early.
    `train.micro_batch_size` must be resolved.
    """
    with closing(one_ahead(_drawn_together(stream, samples_seen, total, rank, world_size))) as ahead:
        for steps in ahead:
            yield from steps


def _drawn_together(
    stream: Stream, samples_seen: int, total: int, rank: int, world_size: int
) -> Iterator[list[list[Batch]]]:
    """`step_batches` of several steps at once, since the calls of torch cost more than few samples' numbers.

    The first comes alone: training begins.
    """
    batch_size, micro_batch_size = stream.recipe.train.batch_size, stream.recipe.train.micro_batch_size
    assert micro_batch_size is not None
    share = batch_size // world_size
    starts = range(samples_seen, total, batch_size)
    together = -(-DRAWN_TOGETHER // share)
    edges = [0, *range(1, len(starts), together), len(starts)] if starts else []
    for first, last in pairwise(edges):
        parts = [rank_positions(batch_size, start, rank, world_size) for start in starts[first:last]]
        batch = stream.batch(torch.tensor([position for part in parts for position in part]))
        yield [step.split(micro_batch_size) for step in batch.split(share)]
