"""One item is computed in advance, and its error is raised in its place."""

import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from common.one_ahead import one_ahead


def test_the_next_item_is_computed_while_the_caller_works_and_none_after_it() -> None:
    computed = [threading.Event() for _ in range(4)]

    def numbers() -> Iterator[int]:
        for number, event in enumerate(computed):
            event.set()
            yield number

    with closing(one_ahead(numbers())) as items:
        assert next(items) == 0
        assert computed[1].wait(10)
        assert not computed[2].is_set()
        assert list(items) == [1, 2, 3]


def test_an_error_is_raised_in_place_of_the_item_it_belongs_to() -> None:
    def numbers() -> Iterator[int]:
        yield 0
        raise ValueError("item 1")

    items = one_ahead(numbers())
    assert next(items) == 0
    with pytest.raises(ValueError, match="item 1"):
        next(items)


def test_closing_waits_for_the_item_being_computed() -> None:
    going, finished = threading.Event(), []

    def numbers() -> Iterator[int]:
        yield 0
        going.wait(10)
        finished.append(1)
        yield 1

    items = one_ahead(numbers())
    next(items)
    going.set()
    items.close()
    assert finished == [1]
