"""Writing beside the training: one thread, one job at a time."""

import threading
from collections.abc import Callable
from types import TracebackType


class BackgroundWriter:
    """Runs jobs one after another on a thread that the process waits for. Leaving the block waits too.

    What a job raises comes out of the next `check`, `start` or `wait`.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._join()
        if kind is None:
            self.check()

    def start(self, job: Callable[[], None]) -> None:
        """Begins a job, after the one before it has ended."""
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(job,), name="checkpoint writer", daemon=False)
        self._thread.start()

    def wait(self) -> None:
        self._join()
        self.check()

    def check(self) -> None:
        """Raises what the last job raised, if it has ended and did."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except Exception as error:  # noqa: BLE001 - a thread has nobody to raise to: the main one does, in `check`
            self._error = error
