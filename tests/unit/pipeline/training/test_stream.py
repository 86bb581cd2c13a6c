"""The training stream: position p's sample, noise, timestep and label are functions of (seed, p) alone."""

from pathlib import Path

import numpy as np
import pytest
import torch

from common.loading import parse_recipe
from common.recipe import Recipe, diffusion
from fpdm import rng
from pipeline.training.data import Stream, rank_positions, step_batches
from preprocess.shards import LatentShards, Sample, write_index, write_shard

COUNT, CLASSES = 23, 3


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Stream:
    folder = tmp_path_factory.mktemp("shards")
    settings = {"flips": True, "vae": {"scaling_factor": 0.5, "shift_factor": 0.25}}
    samples = [
        Sample(i, f"{i}.png", i % CLASSES, 8, 8, np.full((4, 2, 2), i, np.float16), np.full((4, 2, 2), -i, np.float16))
        for i in range(COUNT)
    ]
    records = [write_shard(folder, number, samples[12 * number : 12 * number + 12], settings) for number in range(2)]
    write_index(folder, records, (4, 2, 2), ["a", "b", "c"])
    return Stream(recipe(folder), LatentShards(folder), diffusion(recipe(folder)))


def span(first: int, count: int) -> torch.Tensor:
    return torch.arange(first, first + count)


def recipe(folder: Path, *overrides: str) -> Recipe:
    return parse_recipe(f"name: a\ndata: {{shards: {folder}}}\nmodel: {{num_classes: {CLASSES}}}", overrides)


def test_every_sample_comes_once_an_epoch_and_the_epochs_differ(stream: Stream) -> None:
    order = stream.order.indices(torch.arange(3 * COUNT)).reshape(3, COUNT)
    assert all(sorted(epoch.tolist()) == list(range(COUNT)) for epoch in order)
    assert len({tuple(epoch.tolist()) for epoch in order}) == 3


@pytest.mark.parametrize("parts", [(40,), (20, 20), (1, 2, 7, 30), (10, 10, 10, 10)])
def test_dividing_a_step_into_micro_batches_changes_nothing(stream: Stream, parts: tuple[int, ...]) -> None:
    batch = stream.batch(span(5, 40))  # spans two epochs
    first, pieces = 5, []
    for part in parts:
        pieces.append(stream.batch(span(first, part)))
        first += part
    for name, tensor in vars(batch).items():
        assert torch.equal(torch.cat([vars(piece)[name] for piece in pieces]), tensor), name


def test_latents_are_drawn_from_their_posterior_and_scaled(stream: Stream) -> None:
    batch, indices = stream.batch(span(0, COUNT)), stream.order.indices(torch.arange(COUNT))
    mirrored = rng.integers(0, "train/flip", torch.arange(COUNT), 2)
    assert 0 < mirrored.sum() < COUNT
    assert torch.allclose(batch.latents, drawn(torch.where(mirrored == 1, -indices, indices)))


def test_latents_are_their_posteriors_mean_where_the_recipe_says_so(stream: Stream) -> None:
    of_means = Stream(recipe(stream.shards.address, "train.latents=mean"), stream.shards, stream.diffusion)
    batch, indices = of_means.batch(span(0, COUNT)), stream.order.indices(torch.arange(COUNT))
    mirrored = rng.integers(0, "train/flip", torch.arange(COUNT), 2)  # their means are those of the others, negative
    means = torch.where(mirrored == 1, -indices, indices).float()
    expected = 0.5 * (means - 0.25)[:, None, None, None].expand(-1, 2, 2, 2)
    assert torch.allclose(batch.latents, expected)
    assert torch.equal(batch.noise, stream.batch(span(0, COUNT)).noise)


def test_the_tokens_of_sparse_iterations_are_a_random_order_of_all_by_position_alone(stream: Stream) -> None:
    assert stream.batch(span(0, 3)).tokens.shape == (3, 0)
    settings = ("train.sparse_tokens=0.25", "data.resolution=64", "vae.downsampling=8")
    sparse = Stream(recipe(stream.shards.address, *settings), stream.shards, stream.diffusion)  # 4 x 4 tokens
    tokens = sparse.batch(span(3, 200)).tokens
    assert (tokens.sort(dim=1).values == torch.arange(16)).all()
    assert torch.equal(torch.cat([sparse.batch(span(3, 50)).tokens, sparse.batch(span(53, 150)).tokens]), tokens)
    counts = torch.bincount(tokens[:, :4].flatten(), minlength=16)  # 50 expected of each
    assert counts.min() > 20
    assert counts.max() < 80


def test_without_flips_no_sample_is_mirrored(stream: Stream) -> None:
    plain = Stream(recipe(stream.shards.address, "data.flips=false"), stream.shards, stream.diffusion)
    assert torch.allclose(plain.batch(span(0, COUNT)).latents, drawn(stream.order.indices(torch.arange(COUNT))))


def drawn(moments: torch.Tensor) -> torch.Tensor:
    """The latents of the fixture's moments: mean and deviation are both i, or both -i where mirrored."""
    normals = rng.normal(0, "train/posterior", torch.arange(COUNT), (2, 2, 2))
    return ((1 + normals) * moments[:, None, None, None] - 0.25) * 0.5


def test_labels_belong_to_their_samples_or_are_the_null_label(stream: Stream) -> None:
    positions = torch.arange(40 * COUNT)
    labels = stream.batch(positions).labels
    dropped = labels == CLASSES
    assert torch.equal(labels[~dropped], stream.order.indices(positions)[~dropped] % CLASSES)
    assert 0.05 < dropped.float().mean() < 0.15  # train.label_dropout is 0.1


def test_another_seed_gives_another_stream(stream: Stream) -> None:
    other = Stream(recipe(stream.shards.address, "seed=1"), stream.shards, stream.diffusion)
    assert not torch.equal(other.batch(span(0, 8)).noise, stream.batch(span(0, 8)).noise)
    assert other.order.indices(torch.arange(COUNT)).tolist() != stream.order.indices(torch.arange(COUNT)).tolist()


def test_stratified_timesteps_have_one_in_each_part_of_a_step(stream: Stream) -> None:
    settings = ("train.batch_size=20", "train.timesteps.stratified=true")
    stratified = Stream(recipe(stream.shards.address, *settings), stream.shards, stream.diffusion)
    for first in (0, 20):
        assert sorted((stratified.batch(span(first, 20)).timesteps // 50).tolist()) == list(range(20))
    halves = [stratified.batch(span(first, 10)).timesteps for first in (0, 10)]
    assert torch.equal(torch.cat(halves), stratified.batch(span(0, 20)).timesteps)
    assert not torch.equal(
        stratified.batch(span(0, 20)).timesteps // 50, stratified.batch(span(20, 20)).timesteps // 50
    )


def test_corrected_losses_have_the_weights_of_their_timesteps(stream: Stream) -> None:
    settings = ("train.timesteps.kind=logit_normal", "train.timesteps.corrected=true")
    corrected = Stream(recipe(stream.shards.address, *settings), stream.shards, stream.diffusion).batch(span(0, 512))
    assert (stream.batch(span(0, 512)).weights == 1).all()
    middle = (corrected.timesteps > 300) & (corrected.timesteps < 700)
    assert float(corrected.weights[middle].max()) < 1 < float(corrected.weights[~middle].max())
    assert middle.float().mean() > 0.55  # 0.4 of uniform ones


@pytest.mark.parametrize(("samples_seen", "world_size"), [(0, 1), (40, 2), (1000, 4)])
def test_steps_that_are_drawn_together_are_as_drawn_alone(stream: Stream, samples_seen: int, world_size: int) -> None:
    settings = ("train.batch_size=20", "train.micro_batch_size=5", "train.timesteps.stratified=true")
    drawing = Stream(recipe(stream.shards.address, *settings), stream.shards, stream.diffusion)
    for rank in range(world_size):
        steps = list(step_batches(drawing, samples_seen, 1500, rank, world_size))
        assert len(steps) == (1500 - samples_seen) // 20
        for number, step in enumerate(steps):
            positions = rank_positions(20, samples_seen + 20 * number, rank, world_size)
            assert len(step) == 4 // world_size
            for first, batch in zip(positions[::5], step, strict=True):
                for name, tensor in vars(drawing.batch(span(first, 5))).items():
                    assert torch.equal(vars(batch)[name], tensor), name
