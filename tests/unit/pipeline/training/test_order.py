"""Each sample comes exactly once an epoch, in either order, from any start; block order reads few shards at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.training.order import BlockOrder, RandomOrder

LAION = 5_000_000_000


@st.composite
def block_orders(draw: st.DrawFn) -> BlockOrder:
    lanes = draw(st.integers(1, 5))
    ranges = {"size": (1, 90), "block": (4, 30), "mixed": (1, 4)}
    numbers = {name: draw(st.integers(*allowed)) for name, allowed in ranges.items()}
    return BlockOrder(seed=draw(st.integers(0, 9)), batch_size=lanes * draw(st.integers(1, 9)), lanes=lanes, **numbers)


@settings(max_examples=25, deadline=None)
@given(block_orders())
def test_in_block_order_every_sample_comes_exactly_once_an_epoch(order: BlockOrder) -> None:
    indices = order.indices(torch.arange(2 * order.size)).reshape(2, order.size)
    assert all(sorted(epoch.tolist()) == list(range(order.size)) for epoch in indices)


@settings(max_examples=10, deadline=None)
@given(block_orders(), st.randoms())
def test_a_positions_sample_does_not_depend_on_the_other_positions_asked_for(order: BlockOrder, random) -> None:
    positions = torch.tensor(random.sample(range(2 * order.size), min(6, order.size)))
    expected = order.indices(torch.arange(2 * order.size))[positions]
    assert order.indices(positions).tolist() == expected.tolist()
    assert [int(order.indices(position[None])) for position in positions] == expected.tolist()


def test_the_epochs_of_block_order_differ_and_so_do_seeds() -> None:
    epochs = BlockOrder(0, 300, 8, 20, 3).indices(torch.arange(600)).reshape(2, 300)
    assert epochs[0].tolist() != epochs[1].tolist()
    assert BlockOrder(1, 300, 8, 20, 3).indices(torch.arange(300)).tolist() != epochs[0].tolist()


@pytest.mark.parametrize("size", [4096, 4096 - 17])  # the last block is short
def test_a_node_of_block_order_holds_few_shards_and_shares_hardly_any(size: int) -> None:
    batch, lanes, block, mixed = 64, 4, 64, 3
    order = BlockOrder(0, size, batch, block, mixed, lanes)
    # (steps, nodes, positions of a node): shards that each node needs in each step of the first epoch
    positions = torch.arange(size // batch * batch).reshape(-1, lanes, batch // lanes)
    shards = order.indices(positions.flatten()).reshape(positions.shape) // block
    for node in range(lanes):
        # A window lasts mixed * block / 16 = 12 steps; inside it the node stays with its blocks, two of them cut.
        for step in range(0, len(shards) - 12, 12):
            assert len(shards[step : step + 12, node].unique()) <= mixed + 2
    readers = [len({node for node in range(lanes) if (shards[:, node] == shard).any()}) for shard in range(64)]
    assert sum(readers) <= 64 + 2 * (lanes - 1) + 2
    assert len(shards[0, 0].unique()) > 1  # and samples of several are mixed


def test_five_thousand_million_positions_are_ordered_without_holding_them() -> None:
    """Around the ends of lanes, windows and epochs, too, positions map one to one to samples in range."""
    order = BlockOrder(0, LAION, 65_536, 65_536, 4, 512)
    edges = [0, LAION // 2, LAION - 4096, 2 * LAION - 4096]
    for first in edges:
        indices = order.indices(torch.arange(first, first + 8192))
        assert 0 <= int(indices.min()) <= int(indices.max()) < LAION
        epochs = torch.arange(first, first + 8192) // LAION
        for epoch in epochs.unique():
            assert len(indices[epochs == epoch].unique()) == int((epochs == epoch).sum())


def test_random_order_is_a_permutation_an_epoch() -> None:
    indices = RandomOrder(0, 101).indices(torch.arange(202)).reshape(2, 101)
    assert all(sorted(epoch.tolist()) == list(range(101)) for epoch in indices)
    assert indices[0].tolist() != indices[1].tolist()
