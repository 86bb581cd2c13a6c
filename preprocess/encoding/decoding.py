"""Decoding in processes of its own, so that the VAE never waits for images.

Process w of n prepares the batches w, w + n, w + 2n, ... and writes their pixels into memory that it shares with its
parent: mapped before its birth and without a name, this takes no room in /dev/shm, which containers make small. The
processes have nothing in common, no lock above all: whatever ends one closes its pipe, and so is noticed.
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

AHEAD = 4  # batches that each process may be ahead
MAX_SECONDS = 600  # of a processor's time for one image; the slowest of MAX_PIXELS take minutes
CRASHES = ("SIGSEGV", "SIGABRT", "SIGFPE", "SIGILL", "SIGPROF")  # a decoder's own
BETWEEN = -1  # the position in hand between two images
PR_SET_PDEATHSIG = 1  # of Linux's prctl
ENDING_SECONDS = 30  # a process that has closed its pipe is about to end


@contextmanager
def decoded(loader: ImageLoader, batches: Sequence[Sequence[int]], processes: int) -> Iterator[Iterator[LoadedBatch]]:
    """The batches, in their order, prepared by so many processes.

    The iterator raises UserError naming the image in hand where a process has died, or was ended after MAX_SECONDS.
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
    """One process, as its parent sees it."""

    def __init__(self, loader: ImageLoader, batches: Sequence[Sequence[int]]) -> None:
        shape = (AHEAD, max(map(len, batches)), 3, loader.resolution, loader.resolution)
        memory = mmap.mmap(-1, 8 + int(np.prod(shape)))  # shared with children, zero, and real only where written to
        self.in_hand = np.frombuffer(memory, np.int64, 1)  # position of the image that is read
        self.places = np.frombuffer(memory, np.uint8, offset=8).reshape(shape)
        self.loader, self.given = loader, 0
        self.connection, theirs = get_context("fork").Pipe()
        arguments = (loader, batches, self.in_hand, self.places, theirs, os.getpid())
        self.process = get_context("fork").Process(target=_decode, args=arguments, daemon=True)
        self.process.start()
        theirs.close()

    def next(self) -> LoadedBatch:
        """Its next batch. Raises UserError where there will be none."""
        try:
            loaded: LoadedBatch = self.connection.recv()
        except (EOFError, ConnectionError):
            raise self._death() from None
        places = torch.from_numpy(self.places[self.given % AHEAD])
        self.given += 1
        loaded = loaded.with_images(places)
        if loaded.images is not None:
            loaded = loaded.with_images(loaded.images.clone())
        with suppress(ConnectionError):  # it may have nothing left to do
            self.connection.send_bytes(b"free")
        return loaded

    def _death(self) -> UserError:
        self.process.join(ENDING_SECONDS)
        status, position = self.process.exitcode, int(self.in_hand[0])
        by = signal.Signals(-status).name if status is not None and status < 0 else f"status {status}"
        where, remedy = "a decoding process", "look for the reason above"
        if position != BETWEEN:
            where = f"{self.loader.source.entries[position].key}: its decoding process"
        what = f"ended with {by}"
        if by == "SIGPROF":
            what = f"took more than {MAX_SECONDS} seconds of computing"
        if by in ("SIGKILL", "SIGBUS"):
            what += ", as for lack of memory"
            remedy = "allow more memory or set a smaller launch.cpus_per_process"
        elif by in CRASHES and position != BETWEEN:
            remedy = "repair or remove this image"
        return UserError(f"{where} {what}; {remedy}, and run this again: what is finished is kept")


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
    in_hand: np.ndarray,
    places: np.ndarray,
    connection: Connection,
    parent: int,
) -> None:
    """What a process does. Pixels go into `places`, the rest of each batch through its pipe."""
    _end_with(parent)
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(each, signal.SIG_IGN)  # they go to all of a group or step: its parent knows what to do
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    for number, batch in enumerate(batches):
        if number >= AHEAD:
            connection.recv_bytes()  # a place is free again
        connection.send(loader.fill(places[number % AHEAD], _watched(batch, in_hand)))


def _watched(batch: Sequence[int], in_hand: np.ndarray) -> Iterator[int]:
    """Notes which image is in hand, and has the system end this process where it takes too long."""
    for position in batch:
        in_hand[0] = position
        signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
        yield position
    signal.setitimer(signal.ITIMER_PROF, 0)
    in_hand[0] = BETWEEN


def _end_with(parent: int) -> None:
    """Ends this process with its parent, even one that was killed before this began."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
