"""Being asked to stop: a signal sets a flag, and the training loop, which reads it between two steps, saves and leaves.

Nothing is saved inside a handler: a signal reaches one rank, and saving needs all of them.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from common.command import outlived

# SLURM's end of time and of preemption, submitit's, a launcher's, a person's Ctrl-C, and a terminal that is closed.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
SAME_REQUEST_SECONDS = 1.0  # one request often comes twice: from the launcher, and to the whole group


class StopRequest:
    """Whether this process was asked to stop. A second request, later than the first one's echo, leaves at once."""

    def __init__(self) -> None:
        self.signal: str | None = None  # the first one's name
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
    """Inside, stop signals set the request that it yields; afterwards the handlers are those of before.

    What `nohup` had this process ignore stays ignored.
    """
    request = StopRequest()
    before = {number: signal.signal(number, request.handle) for number in STOP_SIGNALS if not outlived(number)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
