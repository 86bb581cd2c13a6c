"""Requests to stop: a signal sets a flag; the training loop reads it between two steps, saves and ends.

Nothing is saved inside the handler: a signal reaches one rank, and saving needs all of them.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from common.command import outlived

# Sent by SLURM at a time limit or preemption, by submitit, by launchers, by Ctrl-C, and by a terminal that is closed.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
SAME_REQUEST_SECONDS = 1.0  # a launcher often passes on a signal that the process group has received too


class StopRequest:
    """True once this process was asked to stop. A second request, SAME_REQUEST_SECONDS later, ends it at once."""

    def __init__(self) -> None:
        self.signal: str | None = None  # name of the first signal
        self._when = 0.0

    def __bool__(self) -> bool:
        return self.signal is not None

    def handle(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._when = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self._when > SAME_REQUEST_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Yields a request that stop signals set inside the block; restores the handlers after it.

    A signal that `nohup` has made this process ignore stays ignored.
    """
    request = StopRequest()
    before = {number: signal.signal(number, request.handle) for number in STOP_SIGNALS if not outlived(number)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
