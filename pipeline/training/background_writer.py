"""Writing while training goes on: one thread, one job at a time."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType


class BackgroundWriter:
    """Runs jobs one after another on a thread. Leaving the `with` block waits for the current job.

    An error of a job is raised by the next `check`, `start` or `wait`.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "checkpoint writer")
        self._job: Future[None] | None = None

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._thread.shutdown()
        if kind is None:
            self.wait()

    def start(self, job: Callable[[], None]) -> None:
        """Waits for the job before it, and begins this one."""
        self.wait()
        self._job = self._thread.submit(job)

    def wait(self) -> None:
        job, self._job = self._job, None
        if job is not None:
            job.result()

    def check(self) -> None:
        """Raises the error of a job that has failed; waits for nothing."""
        if self._job is not None and self._job.done():
            self.wait()
