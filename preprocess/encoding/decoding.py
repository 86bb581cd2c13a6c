"""Decoding in worker processes, so that the VAE never waits for images.

Process w of n prepares the batches w, w + n, w + 2n, ... and writes their pixels into memory shared with its parent. It
is an anonymous mapping made before the fork, so it takes no room in /dev/shm, which is small in containers. The
processes share no locks: if one ends, its pipe closes and the parent notices.
"""

import ctypes
import mmap
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection

import numpy as np
import torch

from common.errors import UserError
from preprocess.encoding.image_loader import ImageLoader, LoadedBatch

AHEAD = 4  # batches that each process prepares in advance
MAX_SECONDS = 600  # of CPU time per image; the slowest images of MAX_PIXELS take minutes
CRASHES = ("SIGSEGV", "SIGABRT", "SIGFPE", "SIGILL", "SIGPROF")  # caused by a decoder itself
BETWEEN = -1  # the current position between two images
PR_SET_PDEATHSIG = 1  # of Linux's prctl
ENDING_SECONDS = 30  # a process ends soon after its pipe has closed


@contextmanager
def decoded(loader: ImageLoader, batches: Sequence[Sequence[int]], processes: int) -> Iterator[Iterator[LoadedBatch]]:
    """The batches in order, prepared by several processes.

    The iterator raises UserError naming the current image if a process dies or an image takes MAX_SECONDS.
    """
    decoders: list[_Decoder] = []
    try:
        for number in range(min(processes, len(batches))):
            decoders.append(_started(loader, batches[number::processes], processes))
        yield (decoders[number % len(decoders)].next() for number in range(len(batches)))
    finally:
        for decoder in decoders:
            decoder.process.kill()
            decoder.process.join()


class _Decoder:
    """A worker process, seen from its parent."""

    def __init__(self, loader: ImageLoader, batches: Sequence[Sequence[int]]) -> None:
        shape = (AHEAD, max(map(len, batches)), 3, loader.resolution, loader.resolution)
        memory = mmap.mmap(-1, 8 + int(np.prod(shape)))  # shared with the child; pages are allocated when written
        self.current = np.frombuffer(memory, np.int64, 1)  # position of the current image
        self.places = np.frombuffer(memory, np.uint8, offset=8).reshape(shape)
        self.loader, self.given = loader, 0
        self.connection, theirs = get_context("fork").Pipe()
        arguments = (loader, batches, self.current, self.places, theirs, os.getpid())
        self.process = get_context("fork").Process(target=_decode, args=arguments, daemon=True)
        self.process.start()
        theirs.close()

    def next(self) -> LoadedBatch:
        """Its next batch. Raises UserError if the process has died."""
        try:
            loaded: LoadedBatch = self.connection.recv()
        except (EOFError, ConnectionError):
            raise self._death() from None
        places = torch.from_numpy(self.places[self.given % AHEAD])
        self.given += 1
        loaded = loaded.with_images(places)
        if loaded.images is not None:
            loaded = loaded.with_images(loaded.images.clone())
        with suppress(ConnectionError):  # it may have finished
            self.connection.send_bytes(b"free")
        return loaded

    def _death(self) -> UserError:
        self.process.join(ENDING_SECONDS)
        status, position = self.process.exitcode, int(self.current[0])
        by = signal.Signals(-status).name if status is not None and status < 0 else f"status {status}"
        where, remedy = "a decoding process", "look for the reason above"
        if position != BETWEEN:
            where = f"{self.loader.source.entries[position].key}: its decoding process"
        what = f"ended with {by}"
        if by == "SIGPROF":
            what = f"took more than {MAX_SECONDS} seconds of CPU time"
        if by in ("SIGKILL", "SIGBUS"):
            what += ", probably for lack of memory"
            remedy = "allow more memory or set a smaller launch.cpus_per_process"
        elif by in CRASHES and position != BETWEEN:
            remedy = "repair or remove this image"
        return UserError(f"{where} {what}; {remedy}, and run this again: finished shards are kept")


def _started(loader: ImageLoader, batches: Sequence[Sequence[int]], processes: int) -> _Decoder:
    try:
        return _Decoder(loader, batches)
    except OSError as error:
        raise UserError(
            f"launch.cpus_per_process: no room for {processes} decoding processes ({error.strerror}); set fewer"
        ) from None


def _decode(
    loader: ImageLoader,
    batches: Sequence[Sequence[int]],
    current: np.ndarray,
    places: np.ndarray,
    connection: Connection,
    parent: int,
) -> None:
    """The worker's main function: writes pixels to `places` and sends the rest of each batch through the pipe."""
    _end_with(parent)
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(each, signal.SIG_IGN)  # sent to the process group or step: the parent handles them
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    for number, batch in enumerate(batches):
        if number >= AHEAD:
            connection.recv_bytes()  # a place is free again
        connection.send(loader.fill(places[number % AHEAD], _watched(batch, current)))


def _watched(batch: Sequence[int], current: np.ndarray) -> Iterator[int]:
    """Records the current image, and sets a timer that ends this process if it takes too long."""
    for position in batch:
        current[0] = position
        signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
        yield position
    signal.setitimer(signal.ITIMER_PROF, 0)
    current[0] = BETWEEN


def _end_with(parent: int) -> None:
    """Makes this process end with its parent, even with one that was killed before this call."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
