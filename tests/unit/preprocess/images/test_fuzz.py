"""Whatever is done to an image's file, it is decoded or rejected with a reason, the same one each time."""

import resource
import warnings
from collections.abc import Iterator

import pytest

from preprocess.encoding.decoding import decoded
from preprocess.encoding.image_loader import ImageLoader
from preprocess.images.images import Rejected
from tests.mutations import Mutations, originals

ROOM = 6 * 2**30  # bytes, for all that one image may take
BATCH = 50


@pytest.fixture
def bounded() -> Iterator[None]:
    """No process may take more than ROOM beyond what this one has; the warnings are Pillow's, of damaged headers."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM, hard))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def check(first: int, count: int, again: int) -> None:
    """Every mutation, and every `again`th of them twice. A process that one ends is an error that names it."""
    loader = ImageLoader(Mutations(first, count), "center", 16)
    batches = [range(start, min(start + BATCH, count)) for start in range(0, count, BATCH)]
    accepted, reasons = 0, dict[str, str]()
    with decoded(loader, batches, 2) as loaded:
        for batch in loaded:
            accepted += len(batch.positions)
            reasons |= {rejection.key: rejection.reason for rejection in batch.rejected}
    assert accepted + len(reasons) == count
    assert accepted > count / 20
    assert all(0 < len(reason) <= Rejected.limit and reason.isprintable() for reason in reasons.values())
    assert not any(" at 0x" in reason for reason in reasons.values())
    second = loader[range(0, count, again)]
    assert {rejection.key for rejection in second.rejected} == reasons.keys() & {
        str(first + number) for number in range(0, count, again)
    }
    assert all(reasons[rejection.key] == rejection.reason for rejection in second.rejected)


def test_files_are_valid_before_mutation() -> None:
    source = Mutations(0, len(originals()))
    source.open = lambda entry: originals()[entry.place[0]]
    assert not ImageLoader(source, "center", 16)[range(len(originals()))].rejected


@pytest.mark.usefixtures("bounded")
def test_of_4_000_mutated_files_none_escapes() -> None:
    check(0, 4_000, 5)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.usefixtures("bounded")
def test_of_100_000_mutated_files_none_escapes() -> None:
    check(0, 100_000, 20)
