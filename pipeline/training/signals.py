"""Requests to stop: a signal sets a flag; the training loop reads it between two steps, saves and ends.

Nothing is saved inside the handler: a signal reaches one rank, and saving needs all of them.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from common.command import STOP_SIGNALS, outlived

SAME_REQUEST_SECONDS = 1.0  # a launcher often passes on a signal that the process group has received too


class StopRequest:
    """True once this process was asked to stop."""

    def __init__(self) -> None:
        self.signal: str | None = None  # name of the first signal

    def __bool__(self) -> bool:
        return self.signal is not None

    def handle(self, number: int, _frame: FrameType | None) -> None:
        self.signal = self.signal or signal.Signals(number).name


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Yields a request that stop signals set inside the block, or that were blocked before it; restores the handlers.

    A second request, SAME_REQUEST_SECONDS after the first, ends the process at once, with status 128 + its number. A
    signal that `nohup` has made this process ignore stays ignored.
    """
    request = StopRequest()
    before = {number: signal.signal(number, request.handle) for number in STOP_SIGNALS if not outlived(number)}
    heard, told = socket.socketpair()
    told.setblocking(False)
    told_before = signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_end_at_second_request, args=(heard, frozenset(before)), daemon=True).start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # `common.elastic` blocks them until here
    try:
        yield request
    finally:
        signal.set_wakeup_fd(told_before)
        told.close()  # ends the thread
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_at_second_request(heard: socket.socket, numbers: frozenset[int]) -> None:
    """In a thread: a main thread that waits for another rank in a collective runs no handler, for hours if need be."""
    first = None
    with heard:
        while received := heard.recv(64):
            for number in numbers.intersection(received):
                if first is None:
                    first = time.monotonic()
                elif time.monotonic() - first > SAME_REQUEST_SECONDS:
                    os._exit(128 + number)
