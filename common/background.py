"""Calls that run on a thread while the caller goes on."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType


class Background:
    """Runs calls one after another on a thread. Leaving the `with` block waits for them.

    An error of a call is raised by the next `submit`, `check` or `wait`, or at the end of the block; the calls after it
    do not run.

    limit: calls that run or wait at once; `submit` waits for room. 0: `submit` runs each call itself.
    """

    def __init__(self, limit: int = 1) -> None:
        self.limit = limit
        self._thread = ThreadPoolExecutor(1, "background")
        self._calls: deque[Future[None]] = deque()
        self._failed = False

    def __enter__(self) -> "Background":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._thread.shutdown()
        if kind is None:
            self.wait()

    def submit(self, call: Callable[[], None]) -> None:
        if not self.limit:
            call()
            return
        self.check()
        while len(self._calls) >= self.limit:
            self._calls.popleft().result()
        self._calls.append(self._thread.submit(self._run, call))

    def check(self) -> None:
        """Raises the error of a call that has failed; waits for nothing."""
        while self._calls and self._calls[0].done():
            self._calls.popleft().result()

    def wait(self) -> None:
        """Until all calls have ended."""
        while self._calls:
            self._calls.popleft().result()

    def _run(self, call: Callable[[], None]) -> None:
        if not self._failed:
            self._failed = True  # unless the call returns
            call()
            self._failed = False
