"""A rank's micro-batches, read one step ahead."""

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from common.recipe import Recipe
from pipeline.training.data import Batch, Stream


class Feed:
    """The micro-batches of each step that belong to one rank: an equal, contiguous part of the step's positions.

    A thread reads the next step's while this one is computed. `micro_batch_size` must be resolved.
    """

    def __init__(self, recipe: Recipe, stream: Stream, rank: int, world_size: int, total: int) -> None:
        self.batch_size, self.total, self.stream = recipe.train.batch_size, total, stream
        assert recipe.train.micro_batch_size is not None
        self.micro_batch_size = recipe.train.micro_batch_size
        self.share = self.batch_size // world_size
        self.offset = rank * self.share
        self._reader = ThreadPoolExecutor(1, "batches")
        self._ahead: tuple[int, Future[list[Batch]]] | None = None

    def __enter__(self) -> "Feed":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._reader.shutdown(cancel_futures=True)

    def batches(self, samples_seen: int) -> list[Batch]:
        """Of the step that starts there. Raises UserError naming a damaged sample."""
        if self._ahead is None or self._ahead[0] != samples_seen:
            self._ahead = (samples_seen, self._reader.submit(self._read, samples_seen))
        found = self._ahead[1].result()
        following = samples_seen + self.batch_size
        self._ahead = (following, self._reader.submit(self._read, following)) if following < self.total else None
        return found

    def sample_ids(self, samples_seen: int) -> list[int]:
        """The data set's samples in this rank's part of the step, in the batches' order."""
        import torch

        first = samples_seen + self.offset
        return self.stream.order.indices(torch.arange(first, first + self.share)).tolist()

    def _read(self, samples_seen: int) -> list[Batch]:
        first = samples_seen + self.offset
        starts = range(first, first + self.share, self.micro_batch_size)
        return [self.stream.batch(start, self.micro_batch_size) for start in starts]
