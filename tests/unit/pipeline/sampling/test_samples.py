"""Sample i depends on (seed, i) alone; chunks are whole, counted once, and damage is named."""

import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import UserError
from common.loading import dump_recipe, load_recipe
from common.recipe import Recipe
from common.run_folder import weights_folder
from fpdm.diffusers_folders import WEIGHTS_NAME
from fpdm.weights import load_pretrained
from pipeline.sampling.chunks import read_chunk
from pipeline.sampling.iterates import even
from pipeline.sampling.outputs import Pngs
from pipeline.sampling.plans import blocks_an_image
from pipeline.sampling.sample_set import sample_set
from pipeline.sampling.stage import STAGE as SAMPLE
from pipeline.training.checkpoint import export_weights
from tests.conftest import generated, load_samples, run_stage

ROOT = Path(__file__).parents[4]


@pytest.fixture
def recipe(tiny_recipe: Recipe) -> Recipe:
    return tiny_recipe


def changed(recipe: Recipe, **fields: Any) -> Recipe:
    return replace(recipe, sample=replace(recipe.sample, **fields))


def fresh(recipe: Recipe, tmp_path: Path, **fields: Any) -> Recipe:
    """The same run in an empty folder, with other settings of sampling."""
    other = replace(changed(recipe, **fields), runs=str(tmp_path / "other"))
    shutil.copytree(recipe.folder / "weights", other.folder / "weights")
    return other


def drawn(recipe: Recipe) -> tuple[np.ndarray, np.ndarray]:
    return load_samples(generated(recipe, "latest"), recipe.sample.num_samples)


@pytest.mark.parametrize("fields", [{"batch_size": 1}, {"batch_size": 3}, {"chunk_samples": 3}, {"chunk_samples": 100}])
def test_batch_and_chunk_size_change_no_image(recipe: Recipe, tmp_path: Path, fields: dict[str, int]) -> None:
    images, labels = drawn(recipe)
    other_images, other_labels = drawn(fresh(recipe, tmp_path, **fields))
    assert (labels == other_labels).all()
    # The network's sums round by the batch: a pixel at the edge between two grey levels may fall on either side.
    assert np.abs(images.astype(int) - other_images).max() <= 1
    assert images.std() > 1
    assert (images[0] != images[3]).any()  # of the same label


def test_defect_c6_the_number_of_ranks_changes_no_image(recipe: Recipe, tmp_path: Path) -> None:
    expected = drawn(recipe)
    other = fresh(recipe, tmp_path)
    for rank in (2, 0, 1):
        folder = generated(other, "latest", rank, 3)
    found = load_samples(folder, 10)
    assert all((one == two).all() for one, two in zip(expected, found, strict=True))


def test_labels_are_balanced(recipe: Recipe) -> None:
    _, labels = drawn(changed(recipe, num_samples=12))
    assert np.bincount(labels).tolist() == [4, 4, 4]


def test_whole_chunks_are_kept_and_the_rest_is_drawn(recipe: Recipe) -> None:
    folder = generated(recipe, "latest")
    expected = load_samples(folder, 10)
    kept, lost, _ = sorted(folder.glob("chunk-*.npz"))
    before = kept.stat().st_mtime_ns
    lost.unlink()
    (folder / f".{lost.name}.77.tmp").write_bytes(b"what a kill leaves")
    assert not SAMPLE.is_finished(recipe)
    with pytest.raises(UserError, match=r"samples 4 to 7 of 10 are missing; run python pipeline/sample\.py"):
        load_samples(folder, 10)
    run_stage(SAMPLE, recipe)
    found = load_samples(folder, 10)
    assert SAMPLE.is_finished(recipe)
    assert kept.stat().st_mtime_ns == before
    assert all((one == two).all() for one, two in zip(expected, found, strict=True))


def test_killed_sampling_resumes_to_the_same_set(recipe: Recipe, tmp_path: Path) -> None:
    recipe = changed(recipe, num_samples=120, chunk_samples=4, batch_size=2, num_steps=10)
    config = tmp_path / "tiny.yaml"
    config.write_text(dump_recipe(recipe))
    folder = sample_set(recipe, "latest").folder
    command = [sys.executable, "pipeline/sample.py", "--config", str(config)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        while not (early := sorted(folder.glob("chunk-*.npz"))):
            assert process.poll() is None
            time.sleep(0.005)
        process.kill()
    assert len(sorted(folder.glob("chunk-*.npz"))) < 30, "the kill came too late to prove anything"
    before = early[0].stat().st_mtime_ns
    images, labels = load_samples(generated(recipe, "latest"), 120)
    assert early[0].stat().st_mtime_ns == before
    assert len(images) == 120
    assert (labels == np.arange(120) % 3).all()
    assert len(np.unique(images.reshape(120, -1), axis=0)) == 120


def test_of_the_ranks_that_see_a_whole_set_one_completes_it(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, collect, collected = changed(recipe, output="folder"), Pngs.collect, list[Path]()

    def slowly(self: Pngs, path: Path) -> None:
        collected.append(path)
        time.sleep(0.3)  # for the other to come
        collect(self, path)

    generated(folder)
    monkeypatch.setattr(Pngs, "collect", slowly)
    with ThreadPoolExecutor(2) as ranks:
        for done in [ranks.submit(run_stage, SAMPLE, folder) for _ in range(2)]:
            done.result()
    assert len(collected) == 1
    assert len(list(collected[0].glob("*.png"))) == folder.sample.num_samples


def test_overlapping_chunks_count_no_sample_twice(recipe: Recipe) -> None:
    folder = generated(recipe, "latest")
    expected, _ = load_samples(folder, 10)
    assert generated(changed(recipe, chunk_samples=3, num_samples=8), "latest") == folder
    (folder / "chunk-00000004-00000008.npz").unlink()  # what is left: 0 to 4, 3 to 6 and 6 to 8, 8 to 10
    found, labels = load_samples(folder, 8)
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert np.abs(found.astype(int) - expected[:8]).max() <= 1


@pytest.mark.parametrize(
    "fields",
    [
        {"sampler": "ddim"},
        {"num_steps": 4},
        {"guidance_scale": 2.0},
        {"reuse": "none"},
        {"allocation": "more_at_data"},
        {"solver": "anderson"},
        {"tolerance": 0.9},
    ],
)
def test_defect_c11_samples_of_other_settings_are_never_counted(recipe: Recipe, fields: dict[str, Any]) -> None:
    here, there = generated(recipe, "latest"), generated(changed(recipe, **fields), "latest")
    assert here != there
    assert (load_samples(here, 10)[0] != load_samples(there, 10)[0]).any()


def test_samples_of_other_weights_are_never_counted(recipe: Recipe) -> None:
    here = sample_set(recipe, "latest").folder
    state = {
        name: parameter * 1.1 for name, parameter in load_pretrained(weights_folder(recipe, 64)).named_parameters()
    }
    export_weights(recipe, state, 64)
    assert sample_set(recipe, "latest").folder != here


def test_a_flipped_bit_is_named_and_never_returned(recipe: Recipe) -> None:
    folder = generated(recipe, "latest")
    chunk = sorted(folder.glob("chunk-*.npz"))[1]
    whole, expected = chunk.read_bytes(), read_chunk(chunk)
    bits = range(0, 8 * len(whole), 101)
    messages = []
    for bit in bits:
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        chunk.write_bytes(damaged)
        try:
            found = read_chunk(chunk)
        except UserError as error:
            messages.append(str(error))
        else:  # the bit was one that carries nothing, such as a date in the archive's directory
            assert all((expected[name] == found[name]).all() for name in expected)
    assert all(str(chunk) in message and "\n" not in message for message in messages)
    assert len(messages) > 0.9 * len(bits)


def test_a_chunk_under_another_name_is_refused(recipe: Recipe) -> None:
    folder = generated(recipe, "latest")
    first, second, _ = sorted(folder.glob("chunk-*.npz"))
    second.write_bytes(first.read_bytes())
    with pytest.raises(UserError, match=rf"{second.name}: holds .* from 0, not the samples of its name"):
        load_samples(folder, 10)


def test_unsound_samples_are_refused_with_their_count(recipe: Recipe) -> None:
    model = load_pretrained(weights_folder(recipe, 64))
    state = {name: parameter * float("nan") for name, parameter in model.named_parameters()}
    export_weights(recipe, state, 64)
    with pytest.raises(UserError, match="samples 0 to 3: samples: 4 of 4 are non-finite"):
        generated(recipe, "latest")
    assert not list(sample_set(recipe, "latest").folder.glob("chunk-*"))


def test_without_the_weights_the_message_says_which_there_are(recipe: Recipe) -> None:
    with pytest.raises(UserError, match=r"no weights after 5 samples in .*; there are 0, 64"):
        generated(recipe, "5")


def test_defect_c7_weights_of_another_network_are_refused(recipe: Recipe) -> None:
    other = replace(recipe, model=replace(recipe.model, hidden_size=32))
    with pytest.raises(UserError, match="weights with hidden_size 16, the recipe has 32; set that"):
        generated(other, "latest")


def test_guidance_of_weights_that_never_saw_the_null_label_is_refused(recipe: Recipe) -> None:
    """Whatever the recipe says now of how they were trained."""
    weights = load_pretrained(weights_folder(recipe, 64)).state_dict()
    weights.pop("pos_embed")
    blind = replace(recipe, name="blind", train=replace(recipe.train, label_dropout=0.0))
    export_weights(blind, weights, 64)
    asked = changed(replace(recipe, name="blind"), guidance_scale=4.0)
    with pytest.raises(UserError, match=r"sample\.guidance_scale: 4, but .* was trained with label_dropout 0"):
        sample_set(asked, "latest")
    assert sample_set(changed(asked, guidance_scale=1.0), "latest").samples_seen == 64
    assert sample_set(changed(recipe, guidance_scale=4.0), "latest").samples_seen == 64
    # An average that is made later, by a recipe that no longer says it.
    run = {"train.label_dropout": 0.0}
    export_weights(replace(recipe, name="later"), weights, 64, run)
    with pytest.raises(UserError, match="was trained with label_dropout 0"):
        sample_set(changed(replace(recipe, name="later"), guidance_scale=4.0), "latest")


def test_cut_weights_are_named(recipe: Recipe) -> None:
    path = weights_folder(recipe, 64) / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{path}: changed after it was written; move the folder aside, and run"):
        generated(recipe, "latest")


def test_blocks_an_image_counts_every_block_evaluation(recipe: Recipe) -> None:
    assert blocks_an_image(recipe) == 3 * (1 + 2 + 1)
    assert blocks_an_image(changed(recipe, num_steps=4, iterations=0.5)) == 4 * (1 + 1) + 2
    assert blocks_an_image(changed(recipe, guidance_scale=1.5)) == 2 * 3 * (1 + 2 + 1)
    uneven = changed(recipe, allocation="list", iterations=(3, 2, 1))
    assert blocks_an_image(changed(uneven, guidance_scale=1.5, guidance_interval=(0.3, 0.7))) == 5 + 2 * 4 + 3


def test_what_is_shown_beside_other_numbers_of_steps_is_drawn_without_noise() -> None:
    noisy = load_recipe("recipes/demo.yaml")
    assert noisy.sample.eta == 1
    assert even(noisy, 8, 2, reuse=True).sample.eta == 0
