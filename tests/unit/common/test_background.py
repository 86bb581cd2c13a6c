"""Calls in the background: their errors are raised by the next call, and leaving waits for them."""

import threading
import time
from functools import partial

import pytest

from common.background import Background
from common.errors import UserError


def fail(go: threading.Event) -> None:
    go.wait(10)
    raise UserError("disk: full")


def test_an_error_in_the_background_is_raised_by_the_next_call_once() -> None:
    go, background = threading.Event(), Background()
    background.submit(partial(fail, go))
    background.check()  # the call has not failed yet
    go.set()
    with pytest.raises(UserError, match="disk: full"):
        background.wait()
    background.check()


def test_nothing_runs_in_the_background_after_a_call_that_failed() -> None:
    go, written = threading.Event(), []

    def submitted() -> None:
        with Background(limit=3) as background:
            background.submit(partial(fail, go))
            background.submit(partial(written.append, "a chunk that lacks a batch"))
            go.set()

    with pytest.raises(UserError, match="disk: full"):
        submitted()
    assert not written


def test_leaving_the_background_waits_for_its_call() -> None:
    done = []

    def write() -> None:
        time.sleep(0.1)
        done.append("written")

    def interrupted() -> None:
        with Background() as background:
            background.submit(write)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert done == ["written"]


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_no_more_calls_than_the_limit_wait(limit: int) -> None:
    ended: list[int] = []
    with Background(limit) as background:
        for number in range(6):
            background.submit(partial(ended.append, number))
            assert len(ended) >= number + 1 - limit
    assert ended == list(range(6))
