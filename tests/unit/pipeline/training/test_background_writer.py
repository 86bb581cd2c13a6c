"""Jobs in the background: their errors are raised by the next call, and leaving waits for them."""

import threading
import time

import pytest

from common.errors import UserError
from pipeline.training.background_writer import BackgroundWriter


def test_an_error_of_the_background_writer_is_raised_by_the_next_call_once() -> None:
    go = threading.Event()

    def fail() -> None:
        go.wait(10)
        raise UserError("disk: full")

    writer = BackgroundWriter()
    writer.start(fail)
    writer.check()  # the job has not failed yet
    go.set()
    with pytest.raises(UserError, match="disk: full"):
        writer.wait()
    writer.check()


def test_leaving_the_background_writer_waits_for_its_job() -> None:
    done = []

    def write() -> None:
        time.sleep(0.1)
        done.append("written")

    def interrupted() -> None:
        with BackgroundWriter() as writer:
            writer.start(write)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert done == ["written"]
