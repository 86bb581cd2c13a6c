"""Sets of samples as a whole: ranks, batches and kills change none; forms of output hold the same images."""

import io
import itertools
import json
import multiprocessing
import shutil
import signal
import tarfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from common.errors import UserError
from common.recipe import Model, Recipe, Sample
from common.run_folder import weights_folder
from common.sealed import write_sealed
from fpdm.latents import to_uint8
from fpdm.weights import load_pretrained, read_config, read_extra, save_pretrained
from pipeline.features import extractors as features
from pipeline.sampling import generate, plans
from pipeline.sampling.chunks import chunk_spans, find_chunks, read_chunk
from pipeline.sampling.sample_set import Sampling, sample_set
from pipeline.sampling.stage import STAGE as SAMPLE
from preprocess import shards as latent_shards
from tests.conftest import generated, load_samples, run_stage
from tests.unit.pipeline.sampling.test_samples import changed, fresh


@pytest.fixture
def recipe(tiny_recipe: Recipe) -> Recipe:
    return changed(tiny_recipe, num_samples=24, chunk_samples=4, batch_size=16)


@pytest.fixture(scope="module")
def processes() -> Any:
    """Starts processes that have imported everything and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipeline.sampling.generate", "diffusers.models.autoencoders.autoencoder_kl"])
    return context


def extracted(images: np.ndarray, recipe: Recipe) -> np.ndarray:
    extractor = features.load_extractor(features.find_extractor_weights(recipe.evaluate))
    return np.concatenate([batch["pooled"] for batch in features.extract(extractor, images, 8)])


def test_ranks_batches_and_ten_kills_change_no_sample(recipe: Recipe, tmp_path: Path, processes: Any) -> None:
    images, labels = load_samples(generated(recipe, "latest"), 24)
    other = fresh(recipe, tmp_path, num_steps=3)
    folder = sample_set(other, "latest").folder
    kills, plan = 0, itertools.cycle(itertools.product((1, 2, 4), (1, 3, 64)))
    while kills < 10:
        world_size, batch_size = next(plan)
        attempt = changed(other, batch_size=batch_size)
        for rank in range(world_size):
            before = set(folder.glob("*")) if folder.exists() else set()
            process = processes.Process(target=generated, args=(attempt, "latest", rank, world_size))
            process.start()
            while process.is_alive() and (not folder.exists() or set(folder.glob("chunk-*")) <= before):
                time.sleep(0.001)
            process.kill()
            process.join()
            kills += process.exitcode == -signal.SIGKILL  # one that had ended by itself was not killed
            if len(find_chunks(folder)) == 6:  # all are there: start again, to be killed again
                max(folder.glob("chunk-*")).unlink()
    generated(other, "latest")
    found_images, found_labels = load_samples(folder, 24)
    assert sorted(find_chunks(folder)) == chunk_spans(24, 4)  # none is missing, none is there twice
    assert len(found_images) == 24
    assert (found_labels == labels).all()
    assert np.abs(found_images.astype(int) - images).max() <= 1
    # What one grey level in every pixel does to the features is the most that rounding may do: other batches round
    # alike where the products do, and elsewhere a few pixels differ.
    levels = np.random.default_rng(0).integers(-1, 2, images.shape)
    every_pixel = np.clip(images + levels, 0, 255).astype(np.uint8)
    one, two, three = (extracted(each, recipe) for each in (images, found_images, every_pixel))
    assert np.abs(one - two).max() <= np.abs(one - three).max()


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_every_batch_starts_from_the_same_noise(recipe: Recipe, batch_size: int) -> None:
    model = load_pretrained(weights_folder(recipe, 64))
    whole = plans.bind_sampler(recipe, model, "sample", torch.arange(24)).args[2]
    parts = [plans.bind_sampler(recipe, model, "sample", index).args[2] for index in torch.arange(24).split(batch_size)]
    assert torch.equal(whole, torch.cat(parts))


@given(
    classes=st.integers(1, 12),
    each=st.integers(1, 9),
    batch=st.integers(1, 64),
    chunk=st.integers(1, 40),
    ranks=st.integers(1, 5),
)
def test_balanced_labels_are_exactly_as_many_of_each_class(
    classes: int, each: int, batch: int, chunk: int, ranks: int
) -> None:
    recipe = Recipe(name="a", model=Model(num_classes=classes), sample=Sample(num_samples=classes * each))
    spans = chunk_spans(classes * each, chunk)
    drawn = [
        plans.labels_for(recipe, torch.arange(start, min(start + batch, end)))
        for rank in range(ranks)
        for first, end in spans[rank::ranks]
        for start in range(first, end, batch)
    ]
    assert torch.bincount(torch.cat(drawn), minlength=classes).tolist() == [each] * classes


def test_uniform_labels_are_a_function_of_seed_and_index_and_cover_the_classes(recipe: Recipe) -> None:
    recipe = changed(recipe, labels="uniform")
    labels = plans.labels_for(recipe, torch.arange(3000))
    assert torch.equal(labels[1000:1010], plans.labels_for(recipe, torch.arange(1000, 1010)))
    counts = torch.bincount(labels, minlength=3)
    assert ((counts - 1000).abs() < 120).all()
    assert (counts != 1000).any()
    assert not torch.equal(labels, plans.labels_for(replace(recipe, seed=1), torch.arange(3000)))


def test_truncating_is_half_a_level_darker(recipe: Recipe) -> None:
    pixels = torch.linspace(-1, 1, 10001)
    difference = to_uint8(pixels).int() - to_uint8(pixels, "truncate").int()
    assert set(difference.tolist()) == {0, 1}
    assert difference.float().mean().item() == pytest.approx(0.5, abs=0.01)
    here = load_samples(generated(recipe, "latest"), 24)[0].astype(int)
    there = load_samples(generated(changed(recipe, rounding="truncate"), "latest"), 24)[0].astype(int)
    assert set(np.unique(here - there)) == {0, 1}


@pytest.mark.parametrize(
    "fields",
    [
        {"allocation": "more_at_noise"},
        {"allocation": "more_at_data"},
        {"allocation": "list", "iterations": (1, 2, 3)},
        {"allocation": "adaptive"},
        {"allocation": "list", "iterations": (4, 0, 2)},
        {"allocation": "calibrated", "sampler": "ddim"},
    ],
)
def test_defects_c2_c3_every_allocation_can_be_drawn_and_spends_its_budget_exactly(
    recipe: Recipe, fields: dict[str, Any]
) -> None:
    chosen = changed(recipe, num_samples=4, calibration_samples=2, **fields)
    folder = generated(chosen, "latest")
    planned = json.loads((folder / "plan.json").read_text())
    assert sum(planned["iterations"]) + 2 * planned["num_steps"] == 12 == plans.blocks_an_image(chosen)
    assert planned["num_steps"] == len(planned["iterations"])
    assert len(load_samples(folder, 4)[0]) == 4


def test_a_plan_is_measured_once_for_a_set(recipe: Recipe) -> None:
    chosen = changed(recipe, num_samples=8, calibration_samples=2, allocation="calibrated", sampler="ddim")
    folder = generated(changed(chosen, num_samples=4), "latest")
    made = asdict(replace(plans.unmeasured(chosen), num_steps=2, iterations=(3, 5)))
    write_sealed(folder / "plan.json", made)
    generated(chosen, "latest")
    assert json.loads((folder / "plan.json").read_text())["iterations"] == [3, 5]


def test_a_webdataset_holds_the_same_images(recipe: Recipe) -> None:
    images, labels = load_samples(generated(recipe, "latest"), 24)
    for path in sample_set(recipe, "latest").folder.glob("chunk-*"):
        path.unlink()
    folder = generated(changed(recipe, output="webdataset"), "latest")
    tars = sorted(map(str, folder.glob("chunk-*.tar")))
    found = list(webdataset.WebDataset(tars, shardshuffle=False).decode("rgb8").to_tuple("png", "cls"))
    assert (np.stack([image for image, _ in found]) == images).all()
    assert [label for _, label in found] == labels.tolist()
    assert (load_samples(folder, 24)[0] == images).all()


def test_damage_to_a_tar_is_named_and_never_returned(recipe: Recipe) -> None:
    folder = generated(changed(recipe, output="webdataset"), "latest")
    chunk = min(folder.glob("chunk-*.tar"))
    whole, expected = chunk.read_bytes(), read_chunk(chunk)
    messages = []
    for bit in range(0, 8 * len(whole), 997):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        chunk.write_bytes(damaged)
        try:
            found = read_chunk(chunk)
        except UserError as error:
            messages.append(str(error))
        else:  # padding, or a date
            assert all((expected[name] == found[name]).all() for name in expected)
    assert all(str(chunk) in message for message in messages)
    assert len(messages) > 20


def test_defect_c11_the_npz_is_what_adms_evaluator_reads(recipe: Recipe) -> None:
    recipe = changed(recipe, output="npz")
    assert not SAMPLE.is_finished(recipe)
    run_stage(SAMPLE, recipe)
    folder = sample_set(recipe, "latest").folder
    assert SAMPLE.is_finished(recipe)
    images, labels = load_samples(folder, 24)
    with np.load(folder / "samples-24.npz", allow_pickle=False) as arrays:
        assert (arrays["arr_0"] == images).all()
        assert (arrays["arr_1"] == labels).all()


def test_what_was_made_of_fewer_samples_is_not_taken_for_the_whole(recipe: Recipe) -> None:
    few, more = (changed(recipe, output="npz", num_samples=count) for count in (8, 24))
    run_stage(SAMPLE, few)
    assert SAMPLE.is_finished(few)
    assert not SAMPLE.is_finished(more)
    run_stage(SAMPLE, more)
    with np.load(sample_set(more, "latest").folder / "samples-24.npz", allow_pickle=False) as arrays:
        assert len(arrays["arr_0"]) == 24


def test_the_folder_holds_one_png_a_sample(recipe: Recipe) -> None:
    recipe = changed(recipe, output="folder")
    run_stage(SAMPLE, recipe)
    folder = sample_set(recipe, "latest").folder
    files = sorted((folder / "images-24").iterdir())
    assert [path.name for path in files] == [f"{index:08d}.png" for index in range(24)]
    found = np.stack([np.asarray(Image.open(path)) for path in files])
    assert (found == load_samples(folder, 24)[0]).all()


def test_parts_of_an_array_share_the_set_and_the_last_one_finishes_it(recipe: Recipe) -> None:
    expected = load_samples(generated(recipe, "latest"), 24)
    recipe = changed(recipe, output="npz", num_samples=24, chunk_samples=5)
    for path in sample_set(recipe, "latest").folder.glob("chunk-*"):
        path.unlink()
    for part in (2, 0, 1):
        assert not SAMPLE.is_finished(recipe)
        generate.sample(Sampling.of(recipe), part, 3)
    assert SAMPLE.is_finished(recipe)
    found = load_samples(sample_set(recipe, "latest").folder, 24)
    assert all((one == two).all() for one, two in zip(expected, found, strict=True))


def test_a_chunk_of_another_autoencoder_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    folder = generated(recipe, "latest")
    other = replace(recipe, vae=replace(recipe.vae, precision="bf16"))
    stranger = min(generated(other, "latest").glob("chunk-*"))
    (folder / stranger.name).write_bytes(stranger.read_bytes())
    with pytest.raises(UserError, match=rf"{stranger.name}: made with other settings .* another autoencoder"):
        load_samples(folder, 24)


def test_an_autoencoder_that_scales_otherwise_than_the_latents_were_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    moments = np.ones((8, 2, 2), np.float16)
    settings: Any = {"flips": False, "vae": {"scaling_factor": 0.18215, "shift_factor": 0.0}}
    sample = latent_shards.Sample(0, "0.png", 0, 8, 8, moments, None)
    record = latent_shards.write_shard(shards, 0, [sample], settings)
    latent_shards.write_index(shards, [record], (8, 2, 2), ["a"])
    mixed = replace(recipe, data=replace(recipe.data, shards=str(shards)))
    with pytest.raises(UserError, match=r"vae\.path: .* has scaling_factor 1\.0, the latents in .* with 0\.18215"):
        generated(mixed, "latest")


def test_tars_of_equal_samples_are_equal_bytes(recipe: Recipe) -> None:
    recipe = changed(recipe, output="webdataset", num_samples=4)
    path = min(generated(recipe, "latest").glob("chunk-*"))
    before = path.read_bytes()
    path.unlink()
    generated(recipe, "latest")
    assert path.read_bytes() == before
    with tarfile.open(fileobj=io.BytesIO(before)) as tar:
        assert [member.name for member in tar][:3] == ["00000000.png", "00000000.cls", "00000000.json"]


def test_the_average_of_the_weights_is_chosen_by_name(recipe: Recipe) -> None:
    own = weights_folder(recipe, 64)
    other = own.parent / "power-0.05"
    shutil.copytree(own, other)
    save_pretrained(
        {name: 1.1 * values for name, values in load_pretrained(own).named_parameters()},
        read_config(own),
        other,
        read_extra(own),
    )
    chosen = changed(recipe, num_samples=4, ema="power-0.05")
    here = load_samples(generated(changed(recipe, num_samples=4), "latest"), 4)[0]
    there = load_samples(generated(chosen, "latest"), 4)[0]
    assert sample_set(chosen, "latest").weights == other
    assert (here != there).any()
    with pytest.raises(UserError, match=r"sample\.ema: no average power-0\.1 in .*; there are 0\.9999, power-0\.05 "):
        generated(changed(recipe, ema="power-0.1"), "latest")
