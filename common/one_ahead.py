"""Computing the next item while the caller works on this one."""

from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")


def one_ahead(items: Iterable[Item]) -> Generator[Item, None, None]:
    """Yields `items`; a thread computes each while the caller works on the one before it.

    What computing an item raises is raised where that item would have been yielded. Closing the iterator waits for the
    item that is being computed.
    """
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1, "one ahead") as thread:
        ahead = thread.submit(next, iterator, end)
        while (item := ahead.result()) is not end:
            ahead = thread.submit(next, iterator, end)
            yield item  # type: ignore[misc]  # no `end`
