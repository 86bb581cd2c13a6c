"""Counter-based random numbers: what they promise."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fpdm import rng


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, expected):
    words = rng.philox(tuple(torch.tensor([word]) for word in counter), key)
    assert tuple(int(word) for word in words) == expected


@pytest.mark.parametrize("draw", [rng.uniform, rng.normal])
def test_an_index_draws_the_same_bits_alone_and_in_any_batch(draw):
    index = torch.arange(5000, 5064)
    together = draw(7, "noise", index, (3, 5, 7))
    for i in (0, 13, 63):
        assert torch.equal(draw(7, "noise", index[i : i + 1], (3, 5, 7))[0], together[i])
    assert torch.equal(draw(7, "noise", index.flip(0), (3, 5, 7)).flip(0), together)


def test_a_longer_draw_begins_with_the_shorter_one():
    index = torch.tensor([3])
    assert torch.equal(rng.normal(0, "a", index, (10,))[:, :3], rng.normal(0, "a", index, (3,)))


def test_chunks_do_not_show(monkeypatch):
    whole = rng.normal(0, "a", torch.arange(50), (40,))
    monkeypatch.setattr(rng, "_CHUNK", 30)
    assert torch.equal(rng.normal(0, "a", torch.arange(50), (40,)), whole)


def test_seed_stream_and_index_each_change_the_numbers():
    base = rng.uniform(1, "a", torch.tensor([1]), (8,))
    for seed, stream, index in ((2, "a", 1), (1, "b", 1), (1, "a", 2), (1, "a", 1 + 2**32)):
        assert not torch.equal(rng.uniform(seed, stream, torch.tensor([index]), (8,)), base)


def test_uniforms_fill_the_unit_interval_evenly():
    values = rng.uniform(0, "u", torch.arange(2000), (50,))
    assert values.dtype == torch.float32
    assert 0 <= values.min() < 1e-4
    assert 1 - 1e-4 < values.max() < 1
    counts = torch.histc(values, bins=100, min=0, max=1)
    assert ((counts - 1000).square() / 1000).sum() < 149  # chi-square, 99 degrees of freedom: 0.1 % lie above


def test_normals_have_the_moments_of_a_standard_normal():
    values = rng.normal(0, "n", torch.arange(1000), (4, 100)).double()
    assert abs(values.mean()) < 4 / values.numel() ** 0.5
    assert abs(values.var() - 1) < 4 * (2 / values.numel()) ** 0.5
    assert abs((values**4).mean() - 3) < 4 * (96 / values.numel()) ** 0.5
    neighbours = (values[..., 1:] * values[..., :-1]).mean()
    assert abs(neighbours) < 4 / values.numel() ** 0.5


def test_integers_cover_their_range_evenly():
    counts = rng.integers(3, "i", torch.arange(70_000), 7).bincount(minlength=7)
    assert len(counts) == 7
    assert ((counts - 10_000).square() / 10_000).sum() < 22.5  # chi-square, 6 degrees of freedom: 0.1 % lie above


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**32 - 1))
def test_permute_visits_every_position_exactly_once(size, seed):
    assert rng.permute(seed, "order", torch.arange(size), size).sort().values.equal(torch.arange(size))


def test_permute_needs_no_memory_of_its_size_and_answers_one_position_as_many():
    size = 10**12
    position = torch.tensor([0, 5, size - 1])
    together = rng.permute(1, "order", position, size)
    assert torch.equal(torch.cat([rng.permute(1, "order", p[None], size) for p in position]), together)
    assert (together >= 0).all()
    assert (together < size).all()


def test_permute_answers_many_streams_as_each_alone():
    position = torch.arange(40) % 10
    streams = [f"epoch {number // 3}" for number in range(40)]
    alone = [rng.permute(1, stream, p[None], 10) for stream, p in zip(streams, position, strict=True)]
    assert torch.equal(rng.permute(1, streams, position, 10), torch.cat(alone))


def test_permute_sends_each_position_everywhere_over_the_streams():
    landed = torch.stack([rng.permute(0, f"epoch {e}", torch.arange(10), 10) for e in range(400)])
    counts = torch.stack([column.bincount(minlength=10) for column in landed.T]).double()
    assert ((counts - 40).square() / 40).sum() < 130  # about 81 degrees of freedom: 0.05 % lie above


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda: rng.uniform(-1, "a", torch.tensor([0])), "seed"),
        (lambda: rng.uniform(2**32, "a", torch.tensor([0])), "seed"),
        (lambda: rng.integers(0, "a", torch.tensor([0]), 0), "high"),
        (lambda: rng.permute(0, "a", torch.tensor([0]), 0), "size"),
        (lambda: rng.permute(0, "a", torch.tensor([5]), 5), "position"),
    ],
)
def test_a_value_out_of_range_is_named(call, field):
    with pytest.raises(ValueError, match=f"^{field}: "):
        call()


def test_the_global_generator_is_left_alone():
    before = torch.random.get_rng_state()
    rng.normal(0, "a", torch.arange(3), (3,))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("draw", [rng.uniform, rng.normal])
def test_a_shape_of_no_numbers_draws_none(draw):
    assert draw(0, "none", torch.arange(3), (4, 0)).shape == (3, 4, 0)
