"""The order in which training sees the samples: stream position -> sample index, at any position, in O(1) memory.

Epoch e is the positions from e * size to (e + 1) * size, and in each every sample comes exactly once. Both orders are
functions of the seed and the position, never of the number of ranks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fpdm import rng


@dataclass(frozen=True)
class RandomOrder:
    """Epoch e is one permutation of the data set, keyed by (seed, e)."""

    seed: int
    size: int  # samples of the data set

    def indices(self, positions: Tensor) -> Tensor:
        """(B,) int64 stream positions -> (B,) sample indices."""
        streams = [f"train/order/{epoch}" for epoch in (positions // self.size).tolist()]
        return rng.permute(self.seed, streams, positions % self.size, self.size)


@dataclass(frozen=True)
class BlockOrder:
    """Blocks of neighbouring samples in random order, read nearly in sequence: for slow or remote storage.

    Each step's positions are cut into `lanes` equal parts, and each lane walks through its own blocks. Within a lane
    the samples of `mixed` blocks at a time are shuffled together. So a node whose ranks share a lane holds `mixed`
    shards (twice as many where blocks straddle shards), and lanes share shards only where one ends and another begins.
    """

    seed: int
    size: int
    batch_size: int  # a multiple of lanes
    block: int  # samples of one, as many as a shard has
    mixed: int = 16
    lanes: int = 1

    @property
    def window(self) -> int:
        """How many samples are shuffled together."""
        return self.block * self.mixed

    def indices(self, positions: Tensor) -> Tensor:
        """(B,) int64 stream positions -> (B,) sample indices."""
        epochs = positions // self.size
        indices = torch.empty_like(positions)
        for epoch in epochs.unique().tolist():
            here = epochs == epoch
            indices[here] = self._of_epoch(epoch, positions[here])
        return indices

    def _of_epoch(self, epoch: int, positions: Tensor) -> Tensor:
        first, last = (torch.full_like(positions, edge * self.size) for edge in (epoch, epoch + 1))
        lanes = positions % self.batch_size // (self.batch_size // self.lanes)
        before = self._in_lane(first, lanes)
        places, counts = self._in_lane(positions, lanes) - before, self._in_lane(last, lanes) - before
        windows = places // self.window
        starts = windows * self.window
        sizes = (counts - starts).clamp(max=self.window)
        shuffled = torch.empty_like(positions)
        for lane, window in torch.stack([lanes, windows], dim=1).unique(dim=0).tolist():
            here = (lanes == lane) & (windows == window)
            stream = f"train/order/{epoch}/{lane}/{window}"
            shuffled[here] = rng.permute(self.seed, stream, (places - starts)[here], int(sizes[here][0]))
        return self._in_blocks(epoch, self._below(last, lanes) - self._below(first, lanes) + starts + shuffled)

    def _in_lane(self, positions: Tensor, lanes: Tensor) -> Tensor:
        """The number of positions below `positions` that belong to `lanes`."""
        run = self.batch_size // self.lanes
        inside = (positions % self.batch_size - lanes * run).clamp(0, run)
        return positions // self.batch_size * run + inside

    def _below(self, positions: Tensor, lanes: Tensor) -> Tensor:
        """The number of positions below `positions` that belong to lanes before `lanes`."""
        width = lanes * (self.batch_size // self.lanes)
        return positions // self.batch_size * width + torch.minimum(positions % self.batch_size, width)

    def _in_blocks(self, epoch: int, places: Tensor) -> Tensor:
        """Places in the epoch's sequence of blocks -> sample indices. The short last block can come anywhere in it."""
        full, rest = divmod(self.size, self.block)
        place_of_rest = rng.integers(
            self.seed, f"train/order/{epoch}/rest", torch.zeros(1, dtype=torch.int64), full + 1
        )
        rest_start = int(place_of_rest) * self.block
        after = places >= rest_start + rest
        indices = full * self.block + places - rest_start  # correct in the short block
        elsewhere = after | (places < rest_start)
        moved = (places - after * rest)[elsewhere]
        if full:
            numbers = rng.permute(self.seed, f"train/order/{epoch}/blocks", moved // self.block, full)
            indices[elsewhere] = numbers * self.block + moved % self.block
        return indices
